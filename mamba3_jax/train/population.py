"""Many runs in one compiled step: members of one config that differ in seed and learning rate, and in nothing else.

Every member is a run of the ordinary trainer: `step.train_step` with a leading axis M on state and metrics. Members
share the program and nothing else, so that one whose updates are skipped changes no other. Letters: M members, S seeds.
"""

import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mamba3_jax.checkpoint import all_steps, checkpoint_dir
from mamba3_jax.config import SEED, Config, ModelConfig, listed
from mamba3_jax.data import Batch, loader
from mamba3_jax.model import mixer_names
from mamba3_jax.train import metrics
from mamba3_jax.train.loop import Trainer, say
from mamba3_jax.train.step import TrainState, batch_shapes, eval_step, init_state, train_step

AXIS = "member"  # of the mesh


class Member(NamedTuple):
    """What tells one run of a population from the others."""

    seed: int  # added to config.seed and data.seed: its parameters and its rows are those of this seed
    learning_rate: float

    @property
    def name(self) -> str:
        return f"seed_{self.seed}_lr_{self.learning_rate:g}"


def members(seeds: int, learning_rates: tuple[float, ...]) -> list[Member]:
    """List every seed at every learning rate; the seeds of a rate stand together."""
    return [Member(seed, rate) for rate in learning_rates for seed in range(seeds)]


def member_config(config: Config, member: Member) -> Config:
    """Return the config with which the ordinary trainer makes the same run as this member."""
    return dataclasses.replace(
        config,
        seed=config.seed + member.seed,
        data=dataclasses.replace(config.data, seed=config.data.seed + member.seed),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=member.learning_rate),
    )


def member_mesh(count: int, devices=None) -> Mesh:
    """Return a mesh over the largest number of devices that divides the number of members."""
    devices = jax.devices() if devices is None else devices
    used = max(n for n in range(1, len(devices) + 1) if count % n == 0)
    return Mesh(np.array(devices[:used]), (AXIS,))


def together(model: ModelConfig) -> bool:
    """Tell whether a device computes its members side by side (`jax.vmap`), or one after another (`jax.lax.map`).

    Side by side they fill an accelerator. A CPU is busy with one, whose arrays fit into its caches: 8 members of one
    layer took 163 ms a step side by side and 111 one after another (2 cores, experiments.benchmarks.population). Nor
    does cuDNN's attention run under `vmap`: jax 0.10.2 fails to fold the members into the rows of a mask that all heads
    share.
    """
    named = "attention" in mixer_names(model.pattern) and model.attn_implementation != "plain"
    return jax.default_backend() != "cpu" and not (named and model.compute_dtype == "bfloat16")


def curve(lines: list[dict], points: int = 30) -> dict[str, list]:
    """Return the logged steps, losses and accuracies of a run, at most `points` of each, the last ones included."""
    logged = [line for line in lines if "loss" in line]
    kept = logged[:: -max(1, -(-len(logged) // points))][::-1]
    return {name: [line[name] for line in kept] for name in ("step", "loss", "accuracy")}


def check_members(config: Config, members: list[Member]) -> None:
    """Raise ValueError, naming value and wish, for members that no population of this config has."""
    if not members or len(set(members)) < len(members):
        raise ValueError(f"members {[member.name for member in members]} are none, or two are the same")
    if config.train.mesh != Config().train.mesh:
        raise ValueError(f"train.mesh={config.train.mesh!r}: the devices of a population are its members'")
    if (last := max(config.seed, config.data.seed) + max(member.seed for member in members)) > SEED:
        raise ValueError(f"seed {last} of the last member is over {SEED}")
    if jax.process_count() > 1:
        raise ValueError(f"a population is trained by one process, and there are {jax.process_count()}")


class SeedsLoader:
    """Gives batches with a leading axis S: for each seed those that `loader` gives a run of that seed."""

    def __init__(self, config: Config, seeds: list[int], **host):
        self._loaders = [loader(member_config(config, Member(seed, math.nan)).data, "train", **host) for seed in seeds]

    def __next__(self) -> Batch:
        return jax.tree.map(lambda *arrays: np.stack(arrays), *map(next, self._loaders))

    def get_state(self) -> dict:
        """Return the positions of all seeds' loaders, as JSON."""
        return {"seeds": [source.get_state() for source in self._loaders]}

    def set_state(self, state: dict) -> None:
        """Go on as `Loader.set_state` does; ValueError where the data is not the same."""
        saved = state.get("seeds", [])
        if len(saved) != len(self._loaders):
            raise ValueError(f"cannot resume: the data had {len(saved)} seeds, this run has {len(self._loaders)}")
        for source, position in zip(self._loaders, saved, strict=True):
            source.set_state(position)

    def close(self) -> None:
        """End the worker processes, if any."""
        for source in self._loaders:
            source.close()


class Population(Trainer):
    """Train every member in one step; use it as a context manager, as `Trainer`.

    Checkpoints in `workdir` hold all members, so that the same call resumes; no model can be loaded from them. Each
    member's metrics are in workdir/members/NAME. All are validated on the rows of the config's own seed. Members are
    spread over the devices and their rows are not, so `train.mesh` has to be its default.

    Raises:
        ValueError: see `Trainer`; also for a mesh, for no members, for two equal ones, for a seed that is too large,
            and where there are several processes.
        Diverged: raised by `run` after `train.max_bad_steps` updates in a row that were not finite in every member.
    """

    def __init__(self, config: Config, members: list[Member], workdir, report=say):
        check_members(config, members)
        self.members = members
        self.seeds = sorted({member.seed for member in members})
        train = dataclasses.replace(config.train, keep_best=False)  # which of the members' losses would be the best?
        super().__init__(dataclasses.replace(config, train=train), workdir, report)

    def _check_resume(self) -> None:
        """Check what `Trainer` checks, and that the checkpoint is of these members."""
        super()._check_resume()
        if steps := all_steps(self.workdir):
            found = sorted(path.name for path in (self.workdir / "members").glob("*"))
            if found != sorted(member.name for member in self.members):
                raise ValueError(
                    f"{checkpoint_dir(self.workdir) / str(steps[-1])} has other members: {listed(found) or 'none'}; "
                    "use another workdir"
                )

    def _mesh(self, config: Config) -> Mesh:
        return member_mesh(len(self.members))

    def _shapes(self) -> tuple[TrainState, Batch]:
        by_member, whole = (NamedSharding(self.mesh, PartitionSpec(*axes)) for axes in ((AXIS,), ()))
        state = jax.eval_shape(self._initial())
        one, seeds = batch_shapes(self.config.data, self.mesh), len(self.seeds)
        return (
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_member), state),
            jax.tree.map(lambda x: jax.ShapeDtypeStruct((seeds, *x.shape), x.dtype, sharding=whole), one),
        )

    def _runs(self) -> dict[Path, Config]:
        folder = self.workdir / "members"
        return {folder / member.name: member_config(self.config, member) for member in self.members}

    def _training_data(self, host: dict):
        return SeedsLoader(self.config, self.seeds, **host)

    def _initial(self):
        seed_M = np.array([self.config.seed + member.seed for member in self.members], np.uint32)
        return lambda: jax.vmap(lambda seed: init_state(dataclasses.replace(self.config, seed=seed)))(seed_M)

    def _update(self, config: Config):
        rate_M = np.array([member.learning_rate for member in self.members], np.float32)
        seed_M = np.array([self.seeds.index(member.seed) for member in self.members])

        def one(state, rate, seed, batch_SBL):
            optimizer = dataclasses.replace(config.optimizer, learning_rate=rate)
            batch = jax.tree.map(lambda array_SBL: array_SBL[seed], batch_SBL)
            return train_step(dataclasses.replace(config, optimizer=optimizer), state, batch)

        step = self._over_members(one, 3)
        return lambda state, batch_SBL: step(state, rate_M, seed_M, batch_SBL)

    def _scores(self):
        return self._over_members(lambda params, batch: eval_step(self.config, params, batch), 1)

    def _over_members(self, function, count: int):
        """Map over members: the first `count` arguments have their axis, split over devices; the last is whole."""

        def mapped(*arguments):
            if together(self.config.model):
                return jax.vmap(function, in_axes=(0,) * count + (None,))(*arguments)
            *own, whole = arguments
            return jax.lax.map(lambda of_one: function(*of_one, whole), tuple(own))

        specs = (PartitionSpec(AXIS),) * count + (PartitionSpec(),)
        # check_vma: kernels do not say over which axes their outputs differ.
        return jax.shard_map(mapped, mesh=self.mesh, in_specs=specs, out_specs=PartitionSpec(AXIS), check_vma=False)

    def _put(self, batch: Batch) -> Batch:
        return jax.device_put(batch, NamedSharding(self.mesh, PartitionSpec()))

    def _each(self, values: dict) -> list[dict]:
        lists = {name: np.asarray(value).tolist() for name, value in jax.device_get(values).items()}
        return [{name: value[m] for name, value in lists.items()} for m in range(len(self.members))]

    def _progress(self, step: int, each: list[dict], seconds_a_step: float) -> str:
        return metrics.progress_of_many(step, self.config.train.steps, each, seconds_a_step)

    def _validation(self, each: list[dict]) -> str:
        return ", ".join(f"{name} {metrics.spread([values[name] for values in each])}" for name in each[0])

    def _finish(self) -> list[dict]:
        return self.summaries()

    def summaries(self) -> list[dict]:
        """Return every member's summary: what a run's table has, whether it diverged, and its curve."""
        lines = [metrics.read(folder / metrics.FILE, self.report) for folder in self._runs()]
        diverged_M = np.asarray(self.state.bad) >= self.config.train.max_bad_steps
        return [
            metrics.summary(own, self.config) | {"diverged": diverged, "curve": curve(own)}
            for own, diverged in zip(lines, diverged_M.tolist(), strict=True)
        ]

    def params(self) -> dict:
        """Return the parameters on the host; their leading axis is the members."""
        return jax.device_get(self.state.params)
