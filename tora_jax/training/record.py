"""What a run is, noted in its folder before the first step, and held against whoever goes on with it."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import subprocess
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tora_jax import sharding
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
SUMS = "sums_"  # before digests that are made of sums
SMALL = 1 << 20  # bytes of a leaf
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


def fingerprints(
    weights: str | None, frozen: Mapping[str, Any], before: Mapping[str, Any] | None
) -> dict[str, str | None]:
    """What tells the weights of a run from others, as they are in memory: what trains is in its checkpoints.

    All processes make the same call.

    Args:
      weights: of `weights_of`; None = random ones, which the seed tells.
      frozen: path -> leaf, of `Job.split`.
      before: of `read`, for a run that is gone on with: what it has of a part is compared with the same kind.

    Returns:
      "folder" -> where they are, and each part with frozen leaves, and "tokenizer" -> a digest.
    """
    if weights is None:
        return {"folder": None}
    folder = files.path(weights).absolute()
    noted = before["weights"] if before else {}
    found = {"tokenizer": hashlib.sha256((folder / "tokenizer.model").read_bytes()).hexdigest()[:32]}
    for part in sorted({path.partition("/")[0] for path in frozen}):
        leaves = {path: frozen[path] for path in sorted(frozen) if path.partition("/")[0] == part}
        whole = part in noted and not noted[part].startswith(SUMS)
        found[part] = _digest_of_bytes(leaves) if whole else SUMS + _digest_of_sums(leaves)
    return {"folder": str(folder), **found}


def _digest_of_sums(leaves: Mapping[str, Any]) -> str:
    """Of leaves that stay where they are, by sums that are the same on every mesh."""
    sums = [_sums(np.asarray(leaf), np) if _is_small(leaf) else _sums_on_devices(leaf) for leaf in leaves.values()]
    digest = hashlib.sha256()
    for (path, leaf), found in zip(leaves.items(), jax.device_get(sums), strict=True):
        digest.update(f"{path} {leaf.dtype} {leaf.shape} {[int(each) for each in found]}".encode())
    return digest.hexdigest()[:32]


def _is_small(leaf: Any) -> bool:
    """Whether to add up on the host: a program for each shape would take longer."""
    here = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated
    return here and leaf.nbytes <= SMALL


def _sums(leaf: Any, xp: ModuleType) -> list[Any]:
    """Two sums, modulo 2^32, over the elements: of a hash of the bits and place of each, so that their order counts.

    Args:
      leaf: of NumPy or JAX, of up to 4 bytes an element.
      xp: `numpy` or `jax.numpy`; the sums are of whole numbers, so that both find the same.
    """
    bits = leaf.reshape(leaf.shape or (1,)).view(f"uint{8 * leaf.dtype.itemsize}").astype(np.uint32)
    for axis, length in enumerate(bits.shape):
        place = _mixed(xp.arange(1, length + 1, dtype=np.uint32))
        bits = _mixed(bits ^ place.reshape(-1, *(1,) * (bits.ndim - axis - 1)))
    return [xp.sum(each, dtype=np.uint32) for each in (bits, _mixed(bits + np.uint32(0x9E3779B1)))]


_sums_on_devices = jax.jit(functools.partial(_sums, xp=jnp))


def _mixed(bits: Any) -> Any:
    """A one-to-one map of 32 bits that lets each bit count in most others (the finalizer of MurmurHash3)."""
    bits = (bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def _digest_of_bytes(leaves: Mapping[str, Any]) -> str:
    """What older records have: each leaf is put together on every host, one after the other."""
    digest = hashlib.sha256()
    for path, leaf in leaves.items():
        whole = np.ascontiguousarray(sharding.to_host(leaf))
        digest.update(f"{path} {leaf.dtype} {np.shape(leaf)}".encode())
        digest.update(whole.reshape(-1).view(np.uint8))
    return digest.hexdigest()[:32]


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
