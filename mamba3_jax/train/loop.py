"""The training loop: data in, metrics and checkpoints out. A run resumes after the newest checkpoint of its workdir."""

import collections
import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from mamba3_jax import memory
from mamba3_jax.checkpoint import Checkpoints, all_steps, checkpoint_dir, load_config, parameters_alone, write_config
from mamba3_jax.config import Config, check
from mamba3_jax.data import Batch, loader, tokenizer_copy
from mamba3_jax.finite import check_finite
from mamba3_jax.ops.cross_entropy import Sums
from mamba3_jax.sharding import loading, make_mesh, using
from mamba3_jax.train import flops, metrics, resume
from mamba3_jax.train.fit import Failed, fitting, validate
from mamba3_jax.train.loss import bits_per_byte, means
from mamba3_jax.train.step import TrainState, batch_shapes, eval_step, init_state, put, state_shapes, train_step

say = functools.partial(print, flush=True)  # a progress line that waits in a buffer is no progress line
AHEAD = 2  # steps that the device may have to do before the loop waits for the metrics of an earlier one


class Diverged(Exception):
    """Too many updates in a row would not have been finite. The message is for the user."""


class Stopped(Exception):
    """The run saved and stopped on signal `number`. The message is for the user."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number


class Trainer:
    """One run in one workdir; use it as a context manager.

    The constructor raises ValueError or OSError for whatever the user can mend, before anything is compiled: an
    impossible config, data or a workdir that cannot be used, a checkpoint that cannot be read or is of another run.
    """

    def __init__(self, config: Config, workdir, report=say):
        self.spent = metrics.Spent()
        given, config = config, resume.with_own_tokenizer(config, workdir)
        check(config)
        self.mesh = self._mesh(config)
        validate(config, self.mesh)
        self.config, self.workdir = config, checkpoint_dir(workdir).parent
        self.chief = jax.process_index() == 0
        self.report = report if self.chief else lambda *_: None
        if config is not given:
            self.report(f"tokenizer: {config.data.tokenizer}, the run's own copy of {given.data.tokenizer}")
        self.shapes, self.batch = self._shapes()
        memory.fit_device(memory.training(config, self.shapes, self.batch))
        place = loading(self.mesh)
        memory.fit(memory.validation(config, place[1]), "this host", memory.free_on_host())
        self.workdir.mkdir(parents=True, exist_ok=True)
        self._check_resume()

        host = {"host": place, "vocab_size": config.model.vocab_size}
        batches = config.train.eval_batches if config.train.eval_every else 0
        self.valid = list(itertools.islice(loader(config.data, "valid", **host), batches)) if batches else []
        self.pending = collections.deque()  # (step, metrics still on the device)
        self.means = [metrics.Mean() for _ in self._runs()]
        self.flops = flops.flops_per_token(config.model, config.data.length)
        self.peak = flops.peak_flops(config.train.peak_tflops)
        self._open = self._opened(host)
        self.spent.count("starting")

    def _opened(self, host: dict) -> contextlib.ExitStack:
        """Lock the workdir, open data, checkpoints and logs, and restore the state; return what closes them again."""
        with contextlib.ExitStack() as stack:
            if self.chief:
                stack.enter_context(resume.alone(self.workdir))
            resume.check_shared(self.workdir)
            self.data = stack.enter_context(contextlib.closing(self._training_data(host)))
            self.checkpoints = stack.enter_context(Checkpoints(self.workdir, self.config))
            self.best = self.checkpoints.best_loss()
            self.start_params = None
            self.state, self.step = self._restore()
            self.logs = []
            if self.chief:
                for folder, of_run in self._runs().items():
                    write_config(folder, of_run)
                    log = metrics.Log(folder, self.step, self.report)
                    self.logs.append(stack.enter_context(contextlib.closing(log)))
                tokenizer_copy.keep(self.workdir, self.config.data.tokenizer)
            return stack.pop_all()

    def _mesh(self, config: Config) -> Mesh:
        return make_mesh(config.train.mesh)

    def _shapes(self) -> tuple[TrainState, Batch]:
        """Return the shapes, dtypes and shardings of the state and of a batch."""
        return state_shapes(self.config, self.mesh), batch_shapes(self.config.data, self.mesh)

    def _runs(self) -> dict[Path, Config]:
        """Return the config of each run by the folder that its metrics are in."""
        return {self.workdir: self.config}

    def _training_data(self, host: dict):
        return loader(self.config.data, "train", **host)

    def _initial(self) -> Callable[[], TrainState]:
        return functools.partial(init_state, self.config)

    def _update(self, config: Config) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
        return functools.partial(train_step, config)

    def _scores(self) -> Callable[[Any, Batch], Sums]:
        return functools.partial(eval_step, self.config)

    def _put(self, batch: Batch) -> Batch:
        return put(batch, self.mesh)

    def _each(self, values: dict) -> list[dict]:
        """Split metrics of the device into those of each run, as Python numbers."""
        return [{name: value.item() for name, value in jax.device_get(values).items()}]

    def _progress(self, step: int, each: list[dict], seconds_a_step: float) -> str:
        (values,) = each
        return metrics.progress(step, self.config.train.steps, values, seconds_a_step)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if jax.process_count() > 1 and not isinstance(exception[1], Stopped | Diverged | None):
            return  # closing waits for the other processes, which may never come to it
        try:
            self._open.close()
        except OSError as error:
            if exception == (None, None, None):  # else the exception that ended the run is the one to show
                raise self._failure(error) from error

    def run(self) -> dict:
        """Train to the last step, draw the curve, report a table and return its numbers.

        Raises:
            Diverged: max_bad_steps updates in a row were not finite, and so were skipped. The newest checkpoint is a
                good one.
            Stopped: SIGTERM or SIGINT came, and the state is saved.
            Failed: the first parameters are not finite, no step fits into memory, or a file could not be read or
                written, on a full disk for example. Earlier checkpoints are whole.
        """
        try:
            self._train()
            return self._finish()
        except OSError as error:
            raise self._failure(error) from error

    def _train(self) -> None:
        first = self.step
        with using(self.mesh), resume.Signals() as signals:
            with self.spent.on("compiling"):
                self.compile()
            while self.step < self.config.train.steps:
                self._advance()
                stop = signals.stop(self.checkpoints, self.step)
                self._evaluate_and_save(stop)
                if stop:
                    self._wait()
                    path = self.checkpoints.directory / str(self.step)
                    raise Stopped(stop, f"stopped by signal; saved {path}: the same command resumes")
            if self.step > first:  # else the run was done before, and there is nothing to write
                self._wait()

    def _wait(self) -> None:
        """Wait until the last save is done, and log how long that took."""
        with self.spent.on("saving"):
            self.checkpoints.wait()
        self._write_spent()

    def _write_spent(self) -> None:
        self._write(self.step, [self.spent.take()] * len(self.means))

    def _failure(self, error: OSError) -> Failed:
        if jax.process_count() == 1:
            with contextlib.suppress(OSError):
                self.checkpoints.wait()  # a save that is under way may succeed, and then is the last good checkpoint
        return Failed(f"{error}; {self._last_good()}: once that is mended, the same command goes on")

    def _last_good(self) -> str:
        latest = self.checkpoints.latest()
        if latest is None:
            return f"no checkpoint was saved in {self.checkpoints.directory}"
        return f"the last good checkpoint is of step {latest} in {self.checkpoints.directory}"

    def _check_resume(self) -> None:
        """Check that the newest checkpoint is of this run, or holds parameters to start from; note the changes."""
        self.changes = {}
        if steps := all_steps(self.workdir):
            path, only = checkpoint_dir(self.workdir) / str(steps[-1]), parameters_alone(self.workdir)
            if only and steps[-1]:
                raise ValueError(
                    f"{path} holds parameters alone: training starts from such a checkpoint at step 0 only"
                )
            self.changes = resume.check(load_config(self.workdir), self.config, path, model_only=only)

    def _restore(self) -> tuple[TrainState | None, int]:
        """Return the state and step of the newest checkpoint, and go on in the data from there.

        The state is None where it is still to be made: nothing was saved, or parameters alone, to start from.
        """
        step = self.checkpoints.latest()
        if step is None:
            return None, 0
        rest = self.shapes._asdict()
        params, rest, position = self.checkpoints.restore(step, rest.pop("params"), rest)
        check_finite(f"{self.checkpoints.directory / str(step)}", {"params": params, "state": rest})
        if rest is None:
            self.start_params = params
            return None, 0
        self.data.set_state(position)
        return TrainState(params=params, **rest), step

    def compile(self) -> None:
        """Make the first state unless one was restored, and compile the step."""
        config, begin = self.config, time.perf_counter()
        shardings = jax.tree.map(lambda shape: shape.sharding, self.shapes)
        runs = len(self.means)
        parameters = sum(math.prod(shape.shape) for shape in jax.tree.leaves(self.shapes.params)) // runs
        what = f"{runs} runs of {parameters:,} parameters" if runs > 1 else f"{parameters:,} parameters"
        self.report(
            f"{config.name}: {what}, {jax.device_count()} x {jax.devices()[0].device_kind}, "
            f"mesh {dict(self.mesh.shape)}, {self.workdir}"
        )
        if self.state is not None:
            self.report(f"resuming after step {self.step}")
            for field, (old, new) in self.changes.items():
                self.report(f"  config.{field} was {old!r}, is {new!r}")
        else:
            start, self.start_params = self.start_params, None
            # Parameters to start from are not made a second time beside them.
            initial = self._initial() if start is None else lambda: self._initial()()._replace(params=None)
            placed = shardings if start is None else shardings._replace(params=None)
            self.state = jax.jit(initial, out_shardings=placed)()
            if start is not None:
                self.state = self.state._replace(params=start)
            try:
                check_finite("the initial state", self.state._asdict())
            except ValueError as error:
                raise Failed(error) from error
        self.update, remat = self._fitting()
        self.evaluate = jax.jit(self._scores())
        held = memory.readable(memory.of_program(self.update))
        self.report(f"compiled in {time.perf_counter() - begin:.1f} s, remat={remat!r}, {held} a device")
        self.begin = time.perf_counter()
        self.since = (self.begin, self.step)

    def _fitting(self):
        return fitting(self._update, self.config, self.shapes, self.batch, memory.of_device())

    def _advance(self) -> None:
        """Hand one step to the device, and wait for the metrics of earlier ones until `AHEAD` are pending."""
        with self.spent.on("data"):
            batch = next(self.data)
        self.state, got = self.update(self.state, self._put(batch))
        self.step += 1
        self.pending.append((self.step, got))
        while len(self.pending) > AHEAD:
            self._receive()

    def _receive(self) -> None:
        """Wait for the oldest pending metrics, log them if due, and end a run that skips too many updates in a row."""
        step, got = self.pending.popleft()
        each = self._each(got)
        bads = [values.pop("bad") for values in each]
        for mean, values in zip(self.means, each, strict=True):
            mean.add(values)
        if step % self.config.train.log_every == 0 or step == self.config.train.steps:
            now, (before, first) = time.perf_counter(), self.since
            self.since = (now, step)
            seconds = (now - before) / (step - first)
            each = [mean.take(values) | self._rates(seconds) for mean, values in zip(self.means, each, strict=True)]
            self._write(step, each)
            self.report(self._progress(step, each, seconds))
        if min(bads) >= self.config.train.max_bad_steps:
            self.checkpoints.wait()
            raise Diverged(
                f"loss, gradient or update was not finite in {min(bads)} steps in a row, the last one step {step}; "
                f"{self._last_good()}"
            )

    def _rates(self, seconds_a_step: float) -> dict:
        """Return the tokens a second of a run and, where the devices' peak is known, the MFU of all runs together."""
        rate = self.config.data.batch * self.config.data.length / seconds_a_step
        rates = {"tokens_per_second": rate}
        return rates | {"mfu": len(self.means) * rate * self.flops / self.peak} if self.peak else rates

    def _evaluate_and_save(self, stop: int) -> None:
        """Validate and save if that is due after this step; with keep_best, also save if the loss is the best yet."""
        train = self.config.train
        last = self.step == train.steps
        evaluate = self.valid and (last or self.step % train.eval_every == 0)
        save = stop or last or self.step % train.save_every == 0
        if not (evaluate or save):
            return
        while self.pending:
            self._receive()
        loss = math.inf
        if evaluate:
            with self.spent.on("evaluating"):
                loss = self._validate()
        if save or (train.keep_best and loss < self.best):
            self._write_spent()
            for log in self.logs:
                log.flush()  # a resumed run drops later lines, but cannot bring back earlier ones
            rest = self.state._asdict()
            with self.spent.on("saving"):
                self.checkpoints.save(self.step, rest.pop("params"), rest, self.data.get_state(), loss)
        self.best = min(self.best, loss)
        self.since = (time.perf_counter(), self.step)

    def _validate(self) -> float:
        """Return the mean loss over the validation batches, the same ones every time; of several runs the lowest."""
        parts = [self.evaluate(self.state.params, put(batch, self.mesh)) for batch in self.valid]
        total = jax.tree.map(lambda *values: sum(values), *parts)
        each = self._each(means(total))
        for values in each:
            if (bits := bits_per_byte(values["loss"], self.config.data)) is not None:
                values["bits_per_byte"] = bits
        self._write(self.step, [{f"valid_{name}": value for name, value in values.items()} for values in each])
        self.report(f"step {self.step} validation: {self._validation(each)}")
        return min((values["loss"] for values in each if math.isfinite(values["loss"])), default=math.inf)

    def _validation(self, each: list[dict]) -> str:
        (values,) = each
        return ", ".join(f"{name} {value:.4f}" for name, value in values.items())

    def _write(self, step: int, each: list[dict]) -> None:
        for log, values in zip(self.logs, each, strict=False):  # processes that are not the chief have no logs
            log.write(step, values)

    def _finish(self) -> dict:
        """Draw the curve and report the table from metrics.jsonl: of the whole run, however often it was resumed."""
        if not self.chief:
            return {}
        lines = metrics.read(self.workdir / metrics.FILE, self.report)
        summary = metrics.summary(lines, self.config) | metrics.goodput(lines)
        metrics.draw_curve(self.workdir / "curve.png", lines, self.config)
        files = {"checkpoint": self.checkpoints.directory / str(self.step), "curve": self.workdir / "curve.png"}
        self.report(metrics.table(summary | files))
        if skipped := summary.get("skipped"):
            self.report(f"{skipped} of {self.step} updates were skipped: loss, gradient or result was not finite")
        return summary
