#!/usr/bin/env bash
#SBATCH --job-name=mamba3
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --open-mode=append
#
#     sbatch --nodes=4 launch/slurm.sh --config=experiments/text.py --workdir=/shared/runs/text
#
# A process a GPU, as jax takes it under Slurm; the workdir is on a file system that all nodes share. Five minutes before
# the time is up it saves and stops, and the same command goes on. Run it from the checkout, in its environment.
set -euo pipefail

exec srun --kill-on-bad-exit=1 "${PYTHON:-python}" -m launch.train "$@"
