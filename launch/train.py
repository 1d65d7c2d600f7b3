"""python -m launch.train --config=experiments/FILE.py --workdir=DIR [--config.model.d_state=64 ...]

Trains, or resumes: the same command goes on after the newest checkpoint of DIR, whether the run was killed or stopped.
A field that does not exist, a number out of its range (mamba3_jax/config.py), an error that the config file raises and
a run that cannot fit into memory are one line and exit status 2, before anything is written. A file that cannot be
written later on (a full disk) is too: the line names the last good checkpoint, and the same command resumes. SIGTERM
and SIGINT save first; the exit status is then 128 + the signal's number: 143, 130. Exit status 3 means that the loss,
the gradient or the update was not finite in max_bad_steps steps in a row. Several processes, on one host or many, are
one run: see launch/hosts.py.
"""

import sys

from launch import common
from mamba3_jax.train.fit import Failed
from mamba3_jax.train.loop import Diverged, Stopped, Trainer

DIVERGED = 3
CONFIG = common.define_config()
WORKDIR = common.define_path("workdir", None, "Directory of the run: checkpoints, metrics, curve.", required=True)


def main(_):
    config = common.experiment(CONFIG)
    with common.user_errors():
        trainer = Trainer(config, WORKDIR.value)
    try:
        with trainer:
            trainer.run()
    except Diverged as error:
        common.fail(error, DIVERGED)
    except Failed as error:
        common.fail(error)
    except Stopped as stopped:
        print(stopped, flush=True)
        sys.exit(128 + stopped.number)


if __name__ == "__main__":
    common.run(main, saves=True)
