"""Compiled programs that outlive a process: the next one reads them, and traces and lowers nothing.

JAX's own cache of compiled programs is asked by a program's text, which takes a second or more of tracing to write.
What decides that text is known before: the function and its settings, the shapes, the versions, the device, and this
package's own code. Programs are kept by these, in a folder beside JAX's cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import pickle
import platform
import stat
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import flax
import flax.linen as nn
import jax
import jaxlib
import numpy as np
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from tora_jax.errors import UserError
from tora_jax.io.files import write_atomic

DIGEST = hashlib.sha256().digest_size
READING = "/tora_jax/read_program"  # seconds, to JAX's monitoring
LEVEL = "xla_backend_optimization_level"
KEPT = 200  # programs of a folder; those that were not used for longest go
# What a program's name says of code: this package by its text, these by their versions.
SAID = ("tora_jax", "jax", "flax", "numpy", "builtins")
# JAX's settings that say where things lie, or what is told of them, and nothing of what is computed.
APART = ("cache", "log", "platform", "profil", "dump", "coordinat", "traceback")
_wanted = False
_switching, _inside, _used = threading.Lock(), 0, True  # see `_without_cache`


def keep() -> None:
    """From here on programs are kept, beside JAX's own.

    For commands. In Python, where a function may be replaced while a process runs, a name says nothing certain of it.
    """
    global _wanted
    _wanted = True


class Program:
    """A function compiled for each shape of its arguments, as by `jax.jit`, and kept on disk after `keep`.

    It is kept for arguments on one device and static values that say what they are: modules, dataclasses, functions,
    plain values. Everywhere else, and where JAX looks into what runs (`jax_debug_nans`), it is a `jax.jit`.
    """

    def __init__(self, function: Callable, static_argnums: int | tuple[int, ...] = (), **options: Any) -> None:
        """Takes a pure function of positional arguments, and what `jax.jit` takes."""
        self._static = (static_argnums,) if isinstance(static_argnums, int) else static_argnums
        # All arguments stay, so that a program's text says which they are.
        self._jitted = jax.jit(function, static_argnums=static_argnums, keep_unused=True, **options)
        self._options = options
        self._ready: dict[Any, Callable | None] = {}
        self._finding: dict[Any, threading.Lock] = {}
        self.__wrapped__ = function
        self.lower = self._jitted.lower

    def __call__(self, *args: Any) -> Any:
        ready = self.prepare(*args)
        return self._jitted(*args) if ready is None else ready(*self._given(args))

    def prepare(self, *args: Any) -> Callable | None:
        """Finds or compiles the program for arguments without running it, so that a later call has it.

        A call that comes while another thread does this waits for that thread, and compiles nothing twice.

        Args:
          args: as of a call; a `jax.ShapeDtypeStruct` may stand for each array.

        Returns:
          the compiled function of those that are not static; None where programs are not kept, as `jax.jit` compiles
          when it is called.
        """
        given = self._given(args)
        leaves, tree = jax.tree.flatten(given)
        watched = jax.config.jax_disable_jit or jax.config.jax_debug_nans or jax.config.jax_debug_infs
        folder = _folder() if _wanted and not watched and all(map(_on_first_device, leaves)) else None
        if folder is None:
            return None
        static = [args[i] for i in self._static]
        shapes = [(leaf.shape, str(leaf.dtype), getattr(leaf, "weak_type", False)) for leaf in leaves]
        known = (*static, tree, *shapes)
        start = time.perf_counter()
        with self._finding.setdefault(known, threading.Lock()):
            if known in self._ready:
                jax.monitoring.record_event_duration_secs(READING, time.perf_counter() - start)  # of another thread
            else:
                self._ready[known] = self._find(folder, static, (str(tree), shapes), args)
        return self._ready[known]

    def _given(self, args: tuple) -> list:
        """Of a call's arguments, those that are not static."""
        return [arg for i, arg in enumerate(args) if i not in self._static]

    def _find(self, folder: Path, static: list, shapes: tuple, args: tuple) -> Callable | None:
        """Looks for the name of what decides a program, then for that of its text, which an edit may leave as it is."""
        if (what := description((self.__wrapped__, self._options, static))) is None:
            return None
        settings = [(name, str(value)) for name, value in sorted(jax.config.values.items()) if not _apart(name)]
        decides = (_surroundings(), settings, shapes)
        named = folder / _digest(*decides, what, code())
        if (found := read(named)) is None:
            lowered = self._jitted.lower(*args)
            text = folder / _digest(*decides, str(lowered.out_info), lowered.as_text())
            found = read(text) or write(text, _compile(lowered))
            _link(text, named)
        return found


def _link(text: Path, named: Path) -> None:
    """Gives a program its second name, and lets go of those that were not used for longest."""
    with contextlib.suppress(OSError):  # as in `_folder`; or a file system without links
        named.unlink(missing_ok=True)
        os.link(text, named)
        for old in sorted(text.parent.iterdir(), key=lambda each: each.stat().st_mtime)[:-KEPT]:
            old.unlink()


def _digest(*decides: Any) -> str:
    return hashlib.sha256(repr(decides).encode()).hexdigest()


def _compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    asked = LEVEL in os.environ.get("XLA_FLAGS", "")
    # On a CPU, LLVM's higher levels take longer to compile, and what they make runs no faster: docs/performance.md.
    options = {LEVEL: 1} if jax.default_backend() == "cpu" and not asked else None
    with _without_cache():
        return lowered.compile(options)


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Turns JAX's cache off while any thread is inside: on a CPU, a program from there cannot be written out again."""
    global _inside, _used
    with _switching:
        if not _inside:
            _used = jax.config.jax_enable_compilation_cache
            _switch_cache(False)
        _inside += 1
    try:
        yield
    finally:
        with _switching:
            _inside -= 1
            if not _inside:
                _switch_cache(_used)


def _switch_cache(used: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", used)
    compilation_cache.reset_cache()


def description(value: Any) -> str | None:
    """What a static value is, the same in each process; None where that cannot be said."""
    if value is None or isinstance(value, bool | int | float | str | np.dtype):
        return repr(value)
    if isinstance(value, functools.partial):
        value = ("partial", value.func, value.args, value.keywords)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        apart = ("name", "parent") if isinstance(value, nn.Module) else ()
        names = [field.name for field in dataclasses.fields(value) if field.init and field.name not in apart]
        value = (type(value), {name: getattr(value, name) for name in names})
    if isinstance(value, Mapping):
        value = ("mapping", *sorted(value.items()))
    if isinstance(value, tuple | list):
        inside = [description(each) for each in value]
        return None if None in inside else f"({', '.join(inside)})"
    name, module = getattr(value, "__qualname__", "<"), getattr(value, "__module__", "")
    return None if "<" in name or module.split(".")[0] not in SAID else f"{module}.{name}"


def _on_first_device(leaf: Any) -> bool:
    if isinstance(leaf, jax.core.Tracer):
        return False
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.sharding is None or leaf.sharding.device_set == {jax.devices()[0]}
    return isinstance(leaf, np.ndarray) or (isinstance(leaf, jax.Array) and leaf.devices() == {jax.devices()[0]})


def _apart(setting: str) -> bool:
    return any(word in setting for word in APART)


@functools.cache
def _folder() -> Path | None:
    """Where programs are kept; None where JAX keeps none, or, with a warning, where others may write."""
    kept = jax.config.jax_compilation_cache_dir
    if kept is None or "://" in kept or not hasattr(os, "geteuid"):
        return None  # a bucket's owner and mode say little, and Windows has neither
    folder = Path(kept) / "programs"
    with contextlib.suppress(OSError):  # a full or read-only disk costs the next process a second or two, no more
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return folder
        warnings.warn(f"{folder}: others may write there, so no program is taken from it; chmod 700", stacklevel=4)
    return None


@functools.cache
def _surroundings() -> tuple[str, ...]:
    """Versions, device and flags: what all programs of a process share."""
    device = jax.devices()[0]
    versions = (jax.__version__, jaxlib.__version__, flax.__version__, np.__version__, platform.python_version())
    devices = (device.client.platform_version, device.device_kind, _processor())
    return *versions, *devices, os.environ.get("XLA_FLAGS", ""), os.environ.get("LIBTPU_INIT_ARGS", "")


def _processor() -> str:
    """What machine code may use here: a home folder may be shared by machines that differ."""
    with contextlib.suppress(OSError):  # another system than Linux
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        return "".join(line for line in lines if line.startswith(("flags", "Features", "model name")))
    return platform.machine() + platform.processor()


@functools.cache
def code() -> str:
    """A digest of this package's code."""
    digest, root = hashlib.sha256(), Path(str(resources.files("tora_jax")))
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def read(path: Path) -> Callable | None:
    """The program of a file that `write` made; None where there is none, or, with a warning, where it is damaged."""
    start = time.perf_counter()
    try:
        content = path.read_bytes()
    except OSError:  # none yet
        return None
    try:
        if hashlib.sha256(content[DIGEST:]).digest() != content[:DIGEST]:
            raise ValueError("another checksum")
        program, given, out = pickle.loads(content[DIGEST:])  # of a folder where this user alone may write
        given, out = jax.tree.structure(given), jax.tree.structure(out)
        found = serialize_executable.deserialize_and_load(program, given, out, execution_devices=jax.devices()[:1])
    except Exception as error:  # whatever XLA makes of it: compiling again is right in every case
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        warnings.warn(f"{path}: is damaged ({reason}); its program is compiled again", stacklevel=5)
        return None
    with contextlib.suppress(OSError):  # a disk that can only be read: nothing goes there
        os.utime(path)
    jax.monitoring.record_event_duration_secs(READING, time.perf_counter() - start)
    return found


def write(path: Path, compiled: jax.stages.Compiled) -> jax.stages.Compiled:
    """Keeps a program, as far as there is room, and returns it."""
    program, given, out = serialize_executable.serialize(compiled)
    given, out = (jax.tree.unflatten(tree, range(tree.num_leaves)) for tree in (given, out))
    content = pickle.dumps((program, given, out))
    with contextlib.suppress(OSError, UserError), write_atomic(path) as aside:  # as in `_folder`
        aside.write_bytes(hashlib.sha256(content).digest() + content)
    return compiled
