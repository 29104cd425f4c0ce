"""The state of a training in a folder, over Orbax's CheckpointManager."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import math
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from tora_jax.checkpoints.weights import orbax_path
from tora_jax.errors import UserError
from tora_jax.io import files
from tora_jax.io.buckets import BucketPath

SIZES = "sizes.json"  # in a checkpoint: file -> bytes
WHOLE = "commit_success.txt"  # in a checkpoint in a bucket, where Orbax cannot rename it: the last that is written


class Restored(NamedTuple):
    """What `Manager.restore` gives.

    Attributes:
      state: like the target.
      data: what this process gave `Manager.save` as the position of its data; where another number of processes saved
        it, what the first of them gave, for batches are counted over all processes.
      step: that it was saved at.
    """

    state: Any
    data: Any
    step: int


def whole_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, upwards, without those that are half-written."""
    steps = (path for path in folder.glob("*") if path.name.isdecimal())
    in_bucket = isinstance(folder, BucketPath)
    return sorted(int(path.name) for path in steps if not in_bucket or (path / WHOLE).exists())


def holds_any(folder: Path) -> bool:
    """Whether a folder holds a checkpoint, readable or not; a half-written one counts as none."""
    return bool(whole_steps(folder)) or any(path.name.endswith(".broken") for path in folder.glob("*"))


@dataclasses.dataclass
class Manager:
    """Keeps the state of a training in a folder, one checkpoint a step; they appear whole or not at all.

    Saving goes on in the background while the training does; an error of it is raised by the next call. All processes
    make the same calls. `with` closes it.

    Attributes:
      folder: made if need be.
      keep: how many of the newest checkpoints stay.
      best: name of a metric; the checkpoint where it is lowest stays too. "" = none.
    """

    folder: str | Path
    keep: int
    best: str = ""

    def __post_init__(self):
        self.folder, folder = files.path(self.folder).absolute(), orbax_path(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_not_a_traceback_of_orbax)
        self._stop = threading.Event()
        self._handler = None
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, lambda *_: self._stop.set())
        self._saved: int | None = None
        self._put_aside(self._truncated())
        options = ocp.CheckpointManagerOptions(
            best_fn=self._metric,  # has the metrics written; what stays is the policy's to say
            preservation_policy=_Keep(self),
            cleanup_tmp_directories=True,  # of a process that was killed while saving
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_sizes),
        )
        state = ocp.PyTreeCheckpointHandler(use_compression=False)  # as in `weights.save`
        handlers = {"state": state, "data": ocp.JsonCheckpointHandler()}
        self._orbax = ocp.CheckpointManager(folder, options=options, item_handlers=handlers)

    def __enter__(self) -> Manager:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _metric(self, metrics: Mapping[str, float] | None) -> float:
        value = (metrics or {}).get(self.best, math.inf)
        return value if math.isfinite(value) else math.inf

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, upwards, with the one that is being saved."""
        return sorted(self._orbax.all_steps())

    def save(self, step: int, state: Any, data: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Starts to save; arrays are copied before it returns, and may be donated then.

        Args:
          step: number of steps done; a second call for the same one does nothing.
          state: tree of arrays and numbers.
          data: position of this process's data, as JSON can hold it: the state of a Grain iterator.
          metrics: name -> number, where measured.

        Raises:
          UserError: the disk is full, or the bucket takes nothing, now or while the checkpoint before was written.
        """
        if step == self._saved:
            return
        positions = _from_all_processes(json.dumps(data))
        with self._refused():
            self._orbax.wait_until_finished()
            self._saved = step
            arguments = ocp.args.Composite(state=ocp.args.PyTreeSave(state), data=ocp.args.JsonSave(positions))
            self._orbax.save(step, args=arguments, metrics=dict(metrics or {}), force=True)

    def restore(self, target: Any, step: int | None = None, added: str = "") -> Restored | None:
        """Reads a checkpoint, on whatever mesh the target lies.

        Args:
          target: tree of arrays, or of shapes with shardings (no sharding = the first device).
          step: None = the newest that can be read; broken ones are passed over with a warning and put aside as
            "<step>.broken".
          added: a field of the target, a `flax.struct`, that older checkpoints lack; it is then as in the target.

        Returns:
          None when the folder holds no checkpoint.

        Raises:
          UserError: no checkpoint (or not that of `step`) can be read into the target.
        """
        single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def abstract(leaf: Any) -> Any:
            if not hasattr(leaf, "shape"):
                return leaf
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or single)

        given, target = target, jax.tree.map(abstract, target)
        self._wait()
        if step is not None and step not in self.steps():
            raise UserError(f"{self.folder}: holds no checkpoint of step {step}, but of {self.steps()}")
        broken: dict[int, str] = {}
        for candidate in reversed(self.steps()) if step is None else [step]:
            try:
                wanted, lacks = target, added and added not in self._orbax.item_metadata(candidate)["state"].tree
                if lacks:
                    wanted = {name: value for name, value in vars(target).items() if name != added}
                self._check_fit(candidate, wanted)
                state = ocp.args.PyTreeRestore(wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted))
                arguments = ocp.args.Composite(state=state, data=ocp.args.JsonRestore())
                found, failure = self._orbax.restore(candidate, args=arguments), ""
            except UserError:
                raise
            except Exception as error:  # a damaged file may raise anything
                found, failure = None, _first_line(error)
            failures = [f for f in _from_all_processes(failure) if f]
            if failures:
                broken[candidate] = failures[0]
                continue
            if broken:
                self._put_aside(broken)
                self._orbax.reload()
            mine = jax.process_index() if len(found.data) == jax.process_count() else 0
            state = given.replace(**found.state) if lacks else found.state
            return Restored(state, json.loads(found.data[mine]), candidate)
        if broken:
            failure = f"the checkpoint of step {max(broken)} cannot be read ({broken[max(broken)]})"
            raise UserError(f"{self.folder}: {failure}" + (", nor any older one" if len(broken) > 1 else ""))
        if aside := sorted(folder.name for folder in self.folder.glob("*.broken")):
            raise UserError(
                f"{self.folder}: holds broken checkpoints alone ({', '.join(aside)}); remove them to start anew"
            )
        return None

    def _check_fit(self, step: int, target: Any) -> None:
        trees = self._orbax.item_metadata(step)["state"].tree, jax.eval_shape(_without_keys, target)
        flat = (ocp.tree.to_flat_dict(tree, sep="/") for tree in trees)
        stored, wanted = ({k: getattr(leaf, "shape", ()) for k, leaf in tree.items() if leaf != {}} for tree in flat)
        if differ := sorted(path for path in stored.keys() | wanted.keys() if stored.get(path) != wanted.get(path)):
            path = differ[0]
            raise UserError(
                f"{self.folder}: the checkpoint of step {step} is of another config: {path} is "
                f"{stored.get(path, 'missing')}, this config wants {wanted.get(path, 'none')} "
                f"({len(differ)} leaves differ)"
            )

    def _write_sizes(self) -> None:
        """Lists the files of a checkpoint inside it, before Orbax gives it its name."""
        in_bucket = isinstance(self.folder, BucketPath)
        written = [self.folder / str(self._saved)] if in_bucket else self.folder.glob(f"{self._saved}.*tmp*")
        for folder in written if jax.process_index() == 0 else ():
            sizes = {name: size for name, size in files.sizes(folder).items() if "/" in name}
            (folder / SIZES).write_text(json.dumps(sizes))

    def _truncated(self) -> dict[int, str]:
        """Step -> what is wrong, for checkpoints whose files are missing or have another size than listed."""

        wrong = {}
        for listed in sorted(self.folder.glob(f"*/{SIZES}"), reverse=True):
            folder = listed.parent
            try:
                sizes = json.loads(listed.read_text())
            except ValueError:
                sizes = {SIZES: -1}
            there = files.sizes(folder)
            differ = [file for file, bytes in sizes.items() if there.get(file) != bytes]
            if differ and folder.name.isdecimal():
                wrong[int(folder.name)] = f"{differ[0]} is missing or truncated"
        return wrong

    def _put_aside(self, broken: Mapping[int, str]) -> None:
        multihost_utils.sync_global_devices("broken checkpoints are found")
        for step, failure in broken.items():
            warnings.warn(f"{self.folder}/{step}: broken, passed over ({failure})", stacklevel=4)
            if jax.process_index() == 0:
                aside = self.folder / f"{step}.broken"
                files.remove(aside)
                (self.folder / str(step)).rename(aside)
        multihost_utils.sync_global_devices("broken checkpoints are aside")

    def best_step(self) -> int | None:
        """The step whose `best` metric is the lowest; None when none has it."""
        self._wait()
        found = [(self._metric(self._orbax.metrics(step)), step) for step in self.steps()]
        value, step = min(found, default=(math.inf, None))
        return step if math.isfinite(value) else None

    def preempted(self, step: int) -> bool:
        """Whether to save and stop now, because SIGTERM came. Ask after each step.

        With several processes, SIGTERM to one is enough, and all are told at the same step.
        """
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._stop.is_set()

    def close(self) -> None:
        """Waits until all is written.

        Raises:
          UserError: as `save`.
        """
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
        self._wait()
        self._orbax.close()

    def _wait(self) -> None:
        with self._refused():
            self._orbax.wait_until_finished()

    @contextlib.contextmanager
    def _refused(self) -> Iterator[None]:
        """One line of what a full disk raises, or a bucket that takes nothing however often it was tried."""
        try:
            yield
        except Exception as error:
            self._saved = None
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(
                sign in str(error) for sign in ("No space left", "ENOSPC", "Disk quota exceeded")
            )
            other = not isinstance(self.folder, BucketPath) or isinstance(error, jax.errors.JaxRuntimeError)
            if not full and other:
                raise
            reason = "no space left" if full else f"cannot be written ({_first_line(error)})"
            with contextlib.nullcontext() if full else contextlib.suppress(Exception):  # as the first failure
                self._orbax.reload()  # it has forgotten those that it meant to delete afterwards
                reason += f"; whole are the checkpoints of steps {', '.join(map(str, self.steps())) or 'none'}"
            raise UserError(f"{self.folder}: {reason}") from error


@dataclasses.dataclass
class _Keep:
    """Orbax's policy of what stays: the newest, and the best."""

    manager: Manager

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        del context
        stay = {info.step for info in checkpoints[-self.manager.keep :]}
        value, best = min((self.manager._metric(info.metrics), info.step) for info in checkpoints)
        if math.isfinite(value):
            stay.add(best)
        return [info.step in stay for info in checkpoints]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _without_keys(state: Any) -> Any:
    """Random keys as the numbers that they are stored as."""

    def numbers(leaf: Any) -> Any:
        is_key = jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    return jax.tree.map(numbers, state)


def _from_all_processes(text: str) -> list[str]:
    """The text of each process."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(data.size)).ravel()
    padded = multihost_utils.process_allgather(np.pad(data, (0, lengths.max() - data.size)))
    return [row[:length].tobytes().decode() for row, length in zip(padded, lengths, strict=True)]


def _not_a_traceback_of_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs hundreds of lines for what it then raises, and leaves failed tasks for asyncio to log."""
    return not (record.name == "asyncio" or (record.exc_info and "orbax" in record.pathname))
