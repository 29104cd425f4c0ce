"""What the commands share: a config among the flags, errors in one line, Ctrl-C, the compilation cache."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import faulthandler
import functools
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import flags
from ml_collections import ConfigDict

from tora_jax.backbones import assembly
from tora_jax.errors import UserError, closest
from tora_jax.io import files


def run(
    body: Callable[[list[str], Callable[[], None]], None],
    argv: list[str],
    left: str = "nothing was written",
    alone: bool = False,
) -> None:
    """Runs a command; exits with 2 after a user's mistake (one line on stderr, and its details), with 130 after Ctrl-C.

    Args:
      body: takes argv, and a function to call now and then, which raises KeyboardInterrupt once Ctrl-C was pressed.
      left: what it is told after Ctrl-C.
      alone: the process runs nothing else, and ends at once after an error. An orderly exit waits for threads that read
        from a lost bucket, for ever, and for the other processes, which wait for this one.
    """
    name, details = Path(argv[0]).name, ()
    # To the end of the process: threads may outlive the body. Orbax leaves coroutines behind when a write fails.
    sys.unraisablehook, threading.excepthook = _report_unraisable, _report_thread
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_ours(message, category, *where, **to) -> None:
            """Ours are for the user, in one line; those of libraries are for developers, who ask for them with -W."""
            if category is UserWarning:
                print(f"{name}: warning: {message}", file=sys.stderr)
            else:
                show(message, category, *where, **to)

        warnings.showwarning = show_ours
        try:
            with _remembered_interrupts() as check_interrupt:
                body(argv, check_interrupt)
        except UserError as error:
            message, details = error.message, error.details
        except OSError as error:
            message = f"{error.filename or 'a file'}: {error.strerror or error}"
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            first = str(error).partition("\n")[0] or "out of memory"
            full = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in first
            advice = "a smaller size or fewer frames need less memory" if full else f"start again; {left}"
            if jax.process_count() > 1:
                advice = f"another process may have ended: see what it wrote, and start all again; {left}"
            message = f"the device gave up ({first}); {advice}"
        except KeyboardInterrupt:
            print(f"\n{name}: stopped; {left}", file=sys.stderr, flush=True)
            os._exit(130)  # the compiler's threads may still run: an orderly exit can crash on them
        except Exception:  # not swallowed: shown as Python does, but without its wait for other threads
            if not alone:
                raise
            traceback.print_exc()
            _exit_now(1)
        else:
            return
        finally:
            end_if_hung(0)
    print(f"{name}: error: {_one_line(message)}", *map(_one_line, details), sep="\n", file=sys.stderr)
    if alone:
        _exit_now(2)
    atexit.register(_report_no_more)
    sys.exit(2)


def _exit_now(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


@contextlib.contextmanager
def _remembered_interrupts() -> Iterator[Callable[[], None]]:
    """Ctrl-C raises KeyboardInterrupt as always, and again from the function that this yields.

    Python drops an exception raised inside a garbage-collection callback, and JAX has one: a Ctrl-C that falls
    there would be lost, and the user would read of it in a traceback.
    """
    seen = []

    def remember(signal_number, frame):
        seen.append(signal_number)
        raise KeyboardInterrupt

    def check() -> None:
        if seen:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


def _report_unless_told(report: Callable[[Any], None], dropped: Any) -> None:
    """Of the exceptions in threads and callbacks, leaves out those that the command itself tells: Ctrl-C, a full disk.

    When one write of a checkpoint fails, Orbax closes its event loop, and each of the other writes fails with that.
    """
    error = dropped.exc_value
    full_disk = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if not (full_disk or isinstance(error, KeyboardInterrupt) or str(error) == "Event loop is closed"):
        report(dropped)


_report_unraisable = functools.partial(_report_unless_told, sys.unraisablehook)
_report_thread = functools.partial(_report_unless_told, threading.excepthook)


def _report_no_more() -> None:
    """Threads and handlers that fail at the exit after an error fail because of it."""
    sys.unraisablehook = threading.excepthook = lambda dropped: None


class Parser(argparse.ArgumentParser):
    """Flags of a command without a config. A mistake in them raises a `UserError`, which `run` tells in one line."""

    def __init__(self, prog: str, description: str | None = None, **options: Any):
        """Takes what `argparse.ArgumentParser` takes; the lines of the description stay as they are."""
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog, description=description, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def parse(
    argv: list[str], define: Callable[[flags.FlagValues, list[str]], None], usage: str, names: Iterable[str]
) -> flags.FlagValues:
    """Reads a command's flags, among them --config.

    Args:
      define: defines them.
      usage: printed before their help.
      names: of config fields, beside those of the models, for "did you mean".

    Raises:
      UserError: for whatever is wrong with a flag or a config file.
    """
    values = flags.FlagValues()
    try:
        define(values, argv)
        rest = values(argv)
        config = values.config
        config.keys()  # config_flags keeps what went wrong in a config file until it is used
        if not isinstance(config, ConfigDict):
            raise TypeError("get_config should return a ConfigDict")
    except flags.Error as error:
        raise UserError(last_line(error)) from None
    except Exception as error:  # a wrong name after --config., or whatever a config file of the user's own raises
        file = next((arg for arg in argv if arg.startswith(("--config=", "-config="))), "--config")
        message = "no such file" if isinstance(error, OSError) else last_line(error)
        if (field := message.strip("'\"")).isidentifier():  # what config_flags says of a field that is not there
            close = closest(field, assembly.field_names() | set(names))
            message = f"no field {field!r}" + (f'. Did you mean "{close}"?' if close else "")
        raise UserError(f"{file}: {message}") from None
    if values.help:
        print(usage + values.get_help(include_special_flags=False))
        sys.exit(0)
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; flags start with --, see --help")
    return values


def join_processes() -> None:
    """Makes this process one of several that compute together.

    Where the others are is read from Cloud TPU, GKE, SLURM or Open MPI, or else from JAX_COORDINATOR_ADDRESS
    (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. When one dies, the others end within a minute.

    Raises:
      UserError: nothing says where the others are, or they do not answer.
    """
    given = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    try:
        count, index = (None if text is None else int(text) for text in given)
        jax.distributed.initialize(num_processes=count, process_id=index, heartbeat_timeout_seconds=30)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"--distributed: {last_line(error)} Outside of Cloud TPU, GKE, SLURM and Open MPI set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from None


def end_if_hung(seconds: float) -> None:
    """Ends this process, with exit code 1, unless this is called again in time, or what `run` runs comes to its end.

    Stderr then has "Timeout" and what each thread waits for: a disk, a device, or processes that wait for another.
    Those that wait for this one notice that it has ended, see `join_processes`.

    Args:
      seconds: 0 = never.
    """
    faulthandler.cancel_dump_traceback_later()
    if seconds:
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)


def last_line(error: BaseException) -> str:
    """What went wrong, of a message that may hold a whole traceback, or another message as Python quotes it."""
    text = str(error.args[0] if error.args else type(error).__name__).replace("\\n", "\n").replace("\\'", "'")
    lines = [line.strip().strip("'") for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("ValueError: ") if lines else type(error).__name__


def use_compilation_cache() -> None:
    """Keeps compiled programs from run to run; JAX_COMPILATION_CACHE_DIR moves them."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(files.cache_folder()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
