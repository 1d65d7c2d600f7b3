"""What the commands share: the --config flag, and errors that a user can mend as one line instead of a traceback.

Exit status of every command: 0 done; 1 a bug, with its traceback; 2 a mistake in flags, config, files or input; 4
another process of the run is gone or did not come (`launch/hosts.py`); 130 stopped by Ctrl-C. `launch.train` adds 3
(stopped after too many non-finite updates), and with `launch.sweep` 128 + n (saved and stopped on signal n).
"""

import contextlib
import dataclasses
import logging as stdlib_logging
import re
import signal
import sys
import traceback
import typing
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from launch import hosts, xla
from launch.hosts import USER_ERROR
from mamba3_jax.config import Config, DataConfig, check, no_field

flags.disclaim_key_flags()  # flags that are defined here count as the calling program's, so its --help lists them
MODULE = "config_config"  # the name that ml_collections gives to the file of the flag --config


def fail(message, status: int = USER_ERROR) -> typing.NoReturn:
    """Print one line and exit."""
    sys.unraisablehook = lambda _: None  # reads that are still under way (see `run`) may fail at exit
    hosts.pause()
    line = " ".join(str(message).split())
    print(f"error: {line}", file=sys.stderr, flush=True)
    error = SystemExit(status)
    error.add_note(line)  # which the other processes of a run say too
    raise error


def warn(message) -> None:
    """Print one line; the command goes on."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def user_errors():
    """Take a ValueError or OSError raised inside for a mistake of the user: print one line, exit with status 2.

    Put it around reading and checking what was asked for, not around computing: an error there is a bug.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        fail(error)


def run(main, *, alone: bool = False, saves: bool = False) -> None:
    """Run `main` as `absl.app.run` does: with a mistake in the flags as one line, and logs from warnings on.

    XLA compiles with the device's flags and keeps what it compiled (`launch/xla.py`). Several processes have joined
    before `main` begins (`launch/hosts.py`).

    Args:
        main: of absl.
        alone: the program is for one process: with several it stops with one line.
        saves: `main` handles a SIGTERM to any process; else it ends them all.
    """
    xla.set_flags()
    if not alone:
        flags.adopt_module_key_flags(hosts)  # for --help
    # Where one array of a checkpoint cannot be read, the reads of the others end after the event loop that Orbax ran
    # them in: from tensorstore's threads as "Event loop is closed", from asyncio as "never retrieved", at any time.
    sys.unraisablehook = _unraisable
    stdlib_logging.getLogger("asyncio").setLevel(stdlib_logging.CRITICAL)
    logging.get_absl_logger().addFilter(_is_news)
    app.run(_opened(main, alone, saves), flags_parser=parse)


def _opened(main, alone: bool, saves: bool):
    """Return `main` after the processes have joined and the cache is on; --help and mistakes in flags need neither."""

    def opened(argv):
        with user_errors():
            if alone and (here := hosts.place()):
                raise ValueError(f"this is {here}, and the command is for one: --processes=1 runs it alone")
            try:
                company = hosts.join(saves)
            except hosts.Missing as error:
                fail(error, hosts.LOST)
        with company or contextlib.nullcontext():
            xla.use_cache(warn)
            try:
                return main(argv)
            except KeyboardInterrupt:
                fail("stopped by Ctrl-C", 128 + signal.SIGINT)

    return opened


def _is_news(record) -> bool:
    """Tell whether a log record is news: an error that Orbax's threads log is not, since the failed save raises it."""
    return not (record.levelno >= stdlib_logging.ERROR and "orbax" in Path(record.pathname).parts)


def _unraisable(report) -> None:
    if not (isinstance(report.exc_value, RuntimeError) and str(report.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(report)


class _Text(flags.ArgumentParser):
    """The parser of `str` fields. A field's value in the file is its flag's default: a tuple of names is one too."""

    def parse(self, argument):
        return argument


config_flags.register_flag_parser_for_type(str, _Text())


def define_config():
    """Define --config=FILE.py and --config.section.field=VALUE; return the holder that `experiment` wants."""
    return config_flags.DEFINE_config_file("config", None, "Python file with get_config() -> Config", lock_config=False)


def define_path(name: str, default: str | None, description: str, required: bool = False):
    """Define the flag of a file or directory and refuse an empty one, which is no place, and a URL."""
    holder = flags.DEFINE_string(name, default, description, required=required)
    for fits, wish in (
        (str.strip, "an empty path: is a shell variable not set?"),
        # As a path it would be a folder of that name here.
        (lambda value: "://" not in value, "a URL: a path of a local or mounted file system is needed"),
    ):
        flags.register_validator(holder, lambda value, fits=fits: value is None or fits(value), wish)
    return holder


def experiment(holder) -> Config:
    """Return the config of the file with the overrides applied; for a value of wrong type or range exit with a line."""
    config = holder.value
    if not flags.FLAGS["config"].present:
        fail("flag --config=FILE.py is missing")
    if not isinstance(config, Config):
        wrong = f"--config={config_path()}: get_config() does not return a mamba3_jax.config.Config"
        fail(_why_no_config(config) or wrong)
    with user_errors():
        check(config)
        _check_globs(config.data)
    return config


def _check_globs(data: DataConfig) -> None:
    """Raise ValueError where flags change the text to train on, but not the file's own text to validate on."""
    given = [name for name in ("train_glob", "valid_glob") if f"config.data.{name}" in flags.FLAGS]
    if given == ["train_glob"] and data.valid_glob and data.source == "text":
        raise ValueError(
            f"--config.data.train_glob={data.train_glob} alone leaves data.valid_glob={data.valid_glob!r} of "
            f"{config_path()}: name --config.data.valid_glob too; empty, it is one file in twenty of train_glob"
        )


def config_path() -> str:
    """Return the file that --config names."""
    return config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]


def parse(argv):
    """Parse the flags, for `app.run`: a mistake among them, or what is none, is one line and exit status 2."""
    with user_errors():
        _check_overrides(argv)
    try:
        rest = flags.FLAGS(argv)
    except (Exception, SystemExit) as error:
        if message := of_config_file(error):
            fail(message)
        if not isinstance(error, (flags.Error, TypeError, ValueError, OSError)):
            raise
        # ml_collections puts the traceback of a failed get_config() into the message: its last line names the error.
        lines = [line for line in str(error).splitlines() if line.strip()]
        fail(f"--config: {lines[-1]}" if "Traceback" in str(error) else " ".join(lines))
    if flags.FLAGS["verbosity"].using_default_value:
        logging.set_verbosity(logging.WARNING)
    if rest[1:]:
        fail(f"unexpected argument {rest[1]!r}: flags are written --name=value")
    return rest


def of_config_file(error: BaseException | None) -> str:
    """Say at which line of the config file an error was raised, or what it called did; "" for other errors."""
    while error is not None:
        what = f"{type(error).__name__}: {error}"
        frames = [
            frame for frame in traceback.walk_tb(error.__traceback__) if frame[0].f_globals.get("__name__") == MODULE
        ]
        if frames:
            frame, line = frames[-1]
            return f"{frame.f_code.co_filename}:{line}: {what}"
        # The file itself does not parse; without a line number it is not text. A tuple in a flag's value that does not
        # parse is no fault of the file: `ast` gives it the file name <unknown>.
        if isinstance(error, SyntaxError) and error.filename != "<unknown>":
            return f"{error.filename or '--config'}:{error.lineno or 0}: {type(error).__name__}: {error.msg}"
        if isinstance(error, AttributeError) and error.name == "get_config":
            return f"{error.obj.__file__}: there is no get_config()"
        error = error.__cause__ or error.__context__
    return ""


def _why_no_config(config) -> str:
    """Say which OSError the config stands for: ml_collections raises it when a field is read, and not before."""
    try:
        config.model  # noqa: B018
    except OSError as error:
        return of_config_file(error) or str(error)
    except AttributeError:
        return ""
    return ""


def _check_overrides(argv) -> None:
    """Check the names in --config.a.b=... before config_flags does, which answers a wrong one with a traceback."""
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
            raise ValueError(f"{argument}: {no_field(path, name, fields)}")
        section, path = fields[name] if dataclasses.is_dataclass(fields[name]) else None, f"{path}.{name}"
    if section:
        fields = ", ".join(field.name for field in dataclasses.fields(section))
        raise ValueError(f"{argument}: {path} is a section, set one of its fields: {fields}")
