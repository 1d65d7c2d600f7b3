"""What the commands share: the --config flag, and errors that a user can mend as one line instead of a traceback.

Exit status of every command: 0 done; 1 a bug, with its traceback; 2 a mistake in flags, config, files or input.
`launch.train` adds 3 (stopped after too many non-finite updates) and 128 + n (saved and stopped on signal n).
"""

import contextlib
import dataclasses
import difflib
import logging as stdlib_logging
import re
import sys
import typing
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from mamba3_jax.config import Config, DataConfig
from mamba3_jax.data import tokenizer, tokenizer_copy

USER_ERROR = 2


def fail(message, status: int = USER_ERROR) -> typing.NoReturn:
    """Prints one line and exits."""
    sys.unraisablehook = lambda _: None  # what the reads below leave unfinished ends at exit
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    raise SystemExit(status)


def warn(message) -> None:
    """Prints one line; the command goes on."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def user_errors():
    """A ValueError or OSError raised inside is the user's to mend: one line, exit status 2.

    Put it around reading and checking what was asked for, not around computing: an error there is a bug.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        fail(error)


def run(main) -> None:
    """`absl.app.run`, with mistakes in the flags as one line, and libraries' logs from warnings on (--verbosity)."""
    # Where one array of a checkpoint cannot be read, the reads of the others end after the event loop that Orbax ran
    # them in: from tensorstore's threads as "Event loop is closed", from asyncio as "never retrieved", at any time.
    sys.unraisablehook = _unraisable
    stdlib_logging.getLogger("asyncio").setLevel(stdlib_logging.CRITICAL)
    app.run(main, flags_parser=_parse)


def _unraisable(report) -> None:
    if not (isinstance(report.exc_value, RuntimeError) and str(report.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(report)


class _Text(flags.ArgumentParser):
    """The parser of `str` fields. A field's value in the file is its flag's default: a tuple of names is one too."""

    def parse(self, argument):
        return argument


config_flags.register_flag_parser_for_type(str, _Text())


def define_config():
    """The flags --config=FILE.py, --config.section.field=VALUE; pass what it returns to `experiment`."""
    return config_flags.DEFINE_config_file("config", None, "Python file with get_config() -> Config", lock_config=False)


def experiment(holder) -> Config:
    """The config of the file with the overrides applied, every field of its declared type; else a one-line error."""
    config = holder.value
    if config is None:
        fail("flag --config=FILE.py is missing")
    if not isinstance(config, Config):
        path = Path(config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0])
        wish = "get_config() does not return a mamba3_jax.config.Config" if path.is_file() else "no such file"
        fail(f"--config={path}: {wish}")
    with user_errors():
        check_types(config)
    return config


def data_with(data: DataConfig, tokenizer: str | None, eos: str | None) -> DataConfig:
    """Changes the data of a checkpoint as the flags --tokenizer and --eos (None: not given) say.

    A tokenizer that is not the checkpoint's own takes its place, with a line of warning.
    """
    if tokenizer is not None:
        if other := tokenizer_copy.differ(tokenizer, data.tokenizer):
            warn(f"--tokenizer={tokenizer} is not the tokenizer of the checkpoint, {data.tokenizer}")
        data = dataclasses.replace(data, tokenizer=tokenizer, eos="" if other else data.eos)
    return data if eos is None else dataclasses.replace(data, eos=eos)


def codec_of(data: DataConfig, vocab_size: int):
    """The tokenizer that the data names, or None; ValueError where the vocabulary is too small for its ids."""
    codec = tokenizer(data) if data.tokenizer else None
    if codec and codec.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer {data.tokenizer} has ids up to {codec.vocab_size - 1}, "
            f"the model's vocabulary is {vocab_size}"
        )
    return codec


def check_types(section, path: str = "config") -> None:
    """ValueError for the first field whose value is not of its declared type, nor of the one its metadata adds."""
    for field in dataclasses.fields(section):
        value, name = getattr(section, field.name), f"{path}.{field.name}"
        if dataclasses.is_dataclass(field.type):
            if not isinstance(value, field.type):
                raise ValueError(f"{name}={value!r} is not a {field.type.__name__}")
            check_types(value, name)
        elif not (_is(value, field.type) or _is(value, field.metadata.get("or", ()))):
            kind = field.type.__name__ if isinstance(field.type, type) else field.type
            raise ValueError(f"{name}={value!r} is not of type {kind}")


def _is(value, kind) -> bool:
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is(part, typing.get_args(kind)[0]) for part in value)
    if kind is float:
        kind = (int, float)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _parse(argv):
    with user_errors():
        _check_overrides(argv)
    try:
        rest = flags.FLAGS(argv)
    except (flags.Error, TypeError, ValueError, OSError) as error:
        # ml_collections puts the traceback of a failed get_config() into the message: its last line says it.
        lines = [line for line in str(error).splitlines() if line.strip()]
        fail(lines[-1] if "Traceback" in str(error) else " ".join(lines))
    if flags.FLAGS["verbosity"].using_default_value:
        logging.set_verbosity(logging.WARNING)
    if rest[1:]:
        fail(f"unexpected argument {rest[1]!r}: flags are written --name=value")
    return rest


def _check_overrides(argv) -> None:
    """Names in --config.a.b=... are checked first, since config_flags answers a wrong one with a traceback."""
    for argument in argv[1:]:
        if match := re.match(r"--?config=(.*)", argument):
            path = Path(match[1].split(":")[0])
            if not path.is_file():
                raise FileNotFoundError(f"--config={path}: no such file")
        elif match := re.match(r"--?(?:no)?config\.([^=]*)", argument):
            _check_path(argument, match[1].split("."))


def _check_path(argument: str, names: list[str]) -> None:
    section, path = Config, "config"
    for name in names:
        fields = {field.name: field.type for field in dataclasses.fields(section)} if section else {}
        if name not in fields:
            close = difflib.get_close_matches(name, fields, 1)
            hint = f", did you mean {close[0]}?" if close else ";"
            raise ValueError(f"{argument}: {path} has no field {name!r}{hint} it has {', '.join(fields) or 'none'}")
        section, path = fields[name] if dataclasses.is_dataclass(fields[name]) else None, f"{path}.{name}"
    if section:
        fields = ", ".join(field.name for field in dataclasses.fields(section))
        raise ValueError(f"{argument}: {path} is a section, set one of its fields: {fields}")
