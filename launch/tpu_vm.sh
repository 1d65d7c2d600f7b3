#!/usr/bin/env bash
#
#     ZONE=us-east5-b launch/tpu_vm.sh TPU_NAME --config=experiments/text.py --workdir=/mnt/shared/runs/text
#
# Copies the last commit to every host of a TPU VM slice, installs it there and trains; the workdir is on a file system
# that all hosts share. The same command goes on after a stop. Google's TPU VM API is frozen and has no Ironwood
# (TPU7x): on GKE, launch/jobset.yaml runs on every TPU.
set -euo pipefail

name=${1:?the name of the TPU VM is missing} flags=$(printf ' %q' "${@:2}")
to=(--zone="${ZONE:?the variable ZONE is not set}" --worker=all)
archive=$(mktemp -d)/mamba3_jax.tar.gz
git -C "$(dirname "$0")/.." archive --prefix=mamba3_jax/ --output="$archive" HEAD

gcloud compute tpus tpu-vm scp "$archive" "$name": "${to[@]}"
gcloud compute tpus tpu-vm ssh "$name" "${to[@]}" --command="
    tar xzf mamba3_jax.tar.gz && cd mamba3_jax && python3 -m pip install --quiet --user uv &&
    python3 -m uv venv --quiet --allow-existing --python=3.12 && python3 -m uv pip install --quiet --editable '.[tpu]' &&
    exec .venv/bin/python -m launch.train$flags"
