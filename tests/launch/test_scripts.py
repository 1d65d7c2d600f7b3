"""What starts a run on a cluster, as far as a machine without one can tell."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.helpers import devices
from tests.launch.test_hosts import FLAGS, STEPS, free_port, lines_of

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
# The fields of jobset.x-k8s.io/v1alpha2, and of the batch/v1 and v1 below it that ours uses.
SCHEMA = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "metadata": {"name", "namespace", "labels", "annotations"},
    "spec": {
        *("coordinator", "failurePolicy", "managedBy", "network", "replicatedJobs", "startupPolicy", "successPolicy"),
        *("suspend", "ttlSecondsAfterFinished", "volumeClaimPolicies"),
    },
    "spec.failurePolicy": {"maxRestarts", "restartStrategy", "rules"},
    "spec.failurePolicy.rules": {
        *("name", "action", "onJobFailureReasons", "onJobFailureMessagePatterns", "targetReplicatedJobs"),
    },
    "spec.replicatedJobs": {"name", "groupName", "replicas", "template", "dependsOn"},
    "spec.replicatedJobs.template": {"metadata", "spec"},
    "spec.replicatedJobs.template.spec": {
        *("activeDeadlineSeconds", "backoffLimit", "completionMode", "completions", "parallelism", "podFailurePolicy"),
        *("suspend", "template", "ttlSecondsAfterFinished"),
    },
}
POD = {
    *("containers", "dnsPolicy", "hostNetwork", "nodeSelector", "restartPolicy", "serviceAccountName", "tolerations"),
    *("terminationGracePeriodSeconds", "volumes"),
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script):
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    subprocess.run(["bash", "-n", script], check=True)
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, script], check=True)


def program(folder: Path, name: str, text: str) -> None:
    """Put a command into a folder of PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / name).chmod(0o755)


# What srun does, on one node: a process a task, told by variables which it is.
SRUN = """
while [[ $1 == --* ]]; do shift; done
for task in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=1 "$@" & pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit ${status:-0}
"""


@pytest.mark.full
def test_slurm_runs_two_processes(tmp_path, compiled):
    program(tmp_path / "bin", "srun", SRUN)
    environment = (
        devices(4)
        | compiled
        | {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "SLURM_JOB_ID": "7",
            "SLURM_NTASKS": "2",
            "JAX_COORDINATOR_PORT": str(free_port()),
        }
    )
    command = ["bash", LAUNCH / "slurm.sh", *FLAGS, f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "8 x cpu, mesh {'data': 8}" in done.stdout
    assert lines_of(tmp_path / "run")[-1]["step"] == STEPS


def test_tpu_vm_copies_the_commit_and_trains_on_all_workers(tmp_path):
    program(
        tmp_path / "bin", "gcloud", f'printf "%s\\n" "$@" >> {tmp_path}/said; cp "$5" {tmp_path} 2> /dev/null || true'
    )
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "ZONE": "here-1"}
    command = [LAUNCH / "tpu_vm.sh", "slice", "--workdir=/mnt/a run", "--config=x.py"]
    subprocess.run(command, env=environment, check=True, timeout=60)
    said = (tmp_path / "said").read_text()
    assert said.count("--worker=all") == said.count("--zone=here-1") == 2
    assert said.rstrip().endswith(r"-m launch.train --workdir=/mnt/a\ run --config=x.py")
    listed = subprocess.run(["tar", "tzf", tmp_path / "mamba3_jax.tar.gz"], capture_output=True, text=True, check=True)
    assert "mamba3_jax/launch/train.py" in listed.stdout.splitlines()
    del environment["ZONE"]
    missing = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert missing.returncode
    assert "the variable ZONE is not set" in missing.stderr


def test_the_jobset_has_the_fields_of_its_schema():
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    for path, fields in SCHEMA.items():
        for part in at(jobset, path):
            assert part.keys() <= fields, path
    (rule,) = at(jobset, "spec.failurePolicy.rules")
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    (job,) = at(jobset, "spec.replicatedJobs")
    of_job, pod = job["template"]["spec"], job["template"]["spec"]["template"]["spec"]
    assert pod.keys() <= POD
    (train,) = pod["containers"]
    (stops,) = of_job["podFailurePolicy"]["rules"]
    assert stops["onExitCodes"] == {"containerName": train["name"], "operator": "In", "values": [2, 3]}
    assert (of_job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    assert [mount["name"] for mount in train["volumeMounts"]] == [volume["name"] for volume in pod["volumes"]]
    # All hosts of the slice, of so many chips each.
    sizes = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = next(sizes) * next(sizes)
    assert of_job["parallelism"] == of_job["completions"] == chips // train["resources"]["limits"]["google.com/tpu"]
    assert [*train["command"], train["args"][0]] == ["python", "-m", "launch.train", "--config=experiments/text.py"]


def at(tree, path: str) -> list:
    """What stands at a path, in every item of a list on the way."""
    parts = [tree]
    for name in filter(None, path.split(".")):
        parts = [part[name] for part in parts]
        parts = [item for part in parts for item in (part if isinstance(part, list) else [part])]
    return parts


def test_the_image_has_what_the_package_has():
    lines = re.findall(r"^([A-Z]+) (.*)$", (LAUNCH / "Dockerfile").read_text(), re.MULTILINE)
    assert {word for word, _ in lines} == {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "CMD"}
    copied = [path for word, rest in lines if word == "COPY" for path in rest.split()[:-1]]
    assert all((ROOT / path).exists() for path in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages | {"pyproject.toml", project["project"]["readme"], "LICENSE"} == set(copied)
    extra = next(rest for word, rest in lines if word == "ARG").split("=")[1]
    assert extra in project["project"]["optional-dependencies"]
