"""Record where, when and by what command a figure was taken, for every result file."""

import datetime
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import jax

REPOSITORY = Path(__file__).parents[1]


def device_name() -> str:
    """Return the accelerator's own name; for a CPU, the processor's and how many cores this process may use."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    match = None
    if Path("/proc/cpuinfo").exists():
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"CPU, {cores} cores ({match.group(1) if match else platform.processor() or platform.machine()})"


def git_commit() -> str:
    """Return the short commit, with `-dirty` if code differs from it, new files included; `unknown` outside of git."""
    git = ["git", "-C", str(REPOSITORY)]
    code = ["--", ".", ":(exclude,glob)**/results/**", ":(exclude,glob)**/*.md"]  # which measuring itself rewrites
    try:
        head = subprocess.run([*git, "rev-parse", "--short=9", "HEAD"], capture_output=True, text=True, check=True)
        status = [*git, "status", "--porcelain", "--untracked-files=all", *code]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("-dirty" if changed else "")


def load() -> float:
    """Return the machine's load over the last minute, since a busy machine explains a slow figure."""
    return round(os.getloadavg()[0], 2)


def provenance(commit: str = "") -> dict:
    """Return where and when a figure was taken; `commit` is given where the code runs outside of its checkout."""
    return {
        "commit": commit or git_commit(),
        "date": datetime.date.today().isoformat(),
        "device": device_name(),
        "platform": jax.default_backend(),
        "load_before": load(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "command": command_line(),
    }


def command_line() -> str:
    """Return the command that called this program, as one would type it in the repository's root."""
    program = Path(sys.argv[0]).resolve()
    if not program.is_relative_to(REPOSITORY):
        return " ".join(["python", program.name, *sys.argv[1:]])
    module = ".".join(program.relative_to(REPOSITORY).with_suffix("").parts)
    return " ".join(["python -m", module, *sys.argv[1:]])
