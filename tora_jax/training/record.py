"""What a run is, noted in its folder before the first step, and held against whoever goes on with it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import subprocess
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tora_jax.errors import UserError
from tora_jax.io import files
from tora_jax.io.files import note_made

NAME = "run.json"
# Settings that change the losses by rounding alone, or not at all: where and how fast a run computes, how long it goes
# on, how often it looks and saves, and what it is judged by.
FREE = {
    *("config.mesh", "config.rules", "config.steps", "config.log_every", "config.eval_every", "config.save_every"),
    *("config.keep", "config.resume", "config.restartable", "config.resume_anyway", "config.skip_at_most"),
    *("config.skip_above", "config.hang_after"),
    *("config.evaluation", "config.data.validation", "config.data.workers", "config.data.prefetch"),
    "config.data.damaged_share",
}
FOLDERS = {"config.data.sources", "weights.folder"}  # may move; what is in them may not
PACKAGES = ("tora_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")


def read(workdir: Path) -> dict[str, Any] | None:
    """The record of the run in a folder; None where there is none.

    Raises:
      UserError: it cannot be read.
    """
    path = workdir / NAME
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it to go on without a record of the run") from None


def weights_of(workdir: Path, given: str | None, goes_on: bool) -> str | None:
    """The weights that a run begins with: those given, or of a run that is gone on with its own.

    What does not train is in no checkpoint, and is read from them again.

    Args:
      goes_on: whether there is a checkpoint that the run goes on from. A run that ended before its first one may have
        left a record, which binds nobody.

    Raises:
      UserError: they are gone.
    """
    before = read(workdir) if goes_on else None
    own = given or (before and before["weights"]["folder"])
    if own and not given and not files.path(own).is_dir():
        raise UserError(f"{workdir}: the run began with weights that are gone, {own}; name their folder by --weights")
    return own


def fingerprints(weights: str | None, frozen: Mapping[str, Any]) -> dict[str, str | None]:
    """What tells the weights of a run from others, as they are in memory: what trains is in its checkpoints.

    Args:
      weights: of `weights_of`; None = random ones, which the seed tells.
      frozen: path -> leaf, of `Job.split`.

    Returns:
      "folder" -> where they are, and each part with frozen leaves, and "tokenizer" -> a digest.
    """
    if weights is None:
        return {"folder": None}
    folder = files.path(weights).absolute()
    digests = {"tokenizer": hashlib.sha256((folder / "tokenizer.model").read_bytes())}
    for path in sorted(frozen):
        leaf = np.ascontiguousarray(frozen[path])
        digest = digests.setdefault(path.partition("/")[0], hashlib.sha256())
        digest.update(f"{path} {leaf.dtype} {np.shape(frozen[path])}".encode())
        digest.update(leaf.reshape(-1).view(np.uint8))
    return {"folder": str(folder), **{part: digest.hexdigest()[:32] for part, digest in digests.items()}}


def hold(
    workdir: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, str | None],
    data: Mapping[str, Any],
    mesh: Mesh,
    *,
    goes_on: bool,
    first: bool,
) -> None:
    """Notes what a run is before its first step; later on, holds the one that goes on with it against the note.

    Args:
      weights: of `fingerprints`.
      data: of `Batches.identity`.
      goes_on: as of `weights_of`.
      first: whether this process writes what is written once.

    Raises:
      UserError: what changes the losses is another than before, and the config has no `resume_anyway`.
    """
    now = {"config": config, "weights": weights, "data": data}
    now = json.loads(json.dumps(now))  # as it will be read: lists in place of tuples
    before = read(workdir) if goes_on else None
    differ = [] if before is None else list(_differences(before, now))
    if differ and not config["resume_anyway"]:
        raise UserError(
            f"{workdir}: the run began otherwise: {'; '.join(differ)}; go on as it began, or, if the change is meant, "
            "with --config.resume_anyway"
        )
    if differ and first:
        warnings.warn(f"{workdir}: goes on otherwise than it began: {'; '.join(differ)}", stacklevel=2)
    if first and (before is None or differ):
        changes = [] if before is None else [*before["changes"], differ]
        where = {"mesh": dict(mesh.shape), "processes": jax.process_count(), "git": _git(), "versions": _versions()}
        note_made(workdir / NAME, {**now, **where, "changes": changes})


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What changes the losses, each as "name: before -> now"."""
    ours, theirs = (
        {path: value for name in ("config", "weights", "data") for path, value in _flat(note[name], name)}
        for note in (before, now)
    )
    for path in sorted(ours.keys() | theirs.keys()):
        if ours.get(path) != theirs.get(path) and path not in FREE | FOLDERS:
            yield f"{path}: {_short(ours.get(path))} -> {_short(theirs.get(path))}"


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The leaves of nested settings; settings that are free stay whole."""
    if isinstance(value, Mapping) and path not in FREE:
        for name, each in value.items():
            yield from _flat(each, f"{path}.{name}")
    else:
        yield path, value


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _git() -> str | None:
    """The commit of the code, with "+" where files differ from it; None where it lies in no checkout."""
    asked = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(asked, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):  # no git here, or a disk that does not answer
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}
