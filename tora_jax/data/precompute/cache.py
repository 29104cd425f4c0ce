"""The cache of a split: what is in it, and how it is written."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from flax import traverse_util
from jaxtyping import Array
from tqdm import tqdm

from tora_jax.backbones import assembly
from tora_jax.data import array_record, inventory, sources
from tora_jax.data.clips import ClipLoader, Clips
from tora_jax.data.pipeline import prefetched
from tora_jax.data.precompute.encoding import make_encoder
from tora_jax.errors import UserError
from tora_jax.io import files
from tora_jax.io.buckets import BucketPath
from tora_jax.io.files import made_otherwise, note_made

NAME = "clips"
SHARD = 256  # clips in a file
TEXTS = ("ids", "embedding")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is cached of each clip.

    Attributes:
      frames, height, width, fps: of the clips, as in a bucket of `pipeline.batches`; the first frames are taken.
      motion, tracks, max_tracks: of the motion maps, as there.
      variants: independent draws of the maps; "dense" motion has one.
      text: "ids" stores the caption, "embedding" also its embedding; the text encoder must be frozen then.
      seed: of all draws, together with the number of the clip.
    """

    frames: int
    height: int
    width: int
    fps: float = 0.0
    motion: str = "none"
    tracks: str = "given"
    max_tracks: int = 16
    variants: int = 1
    text: str = "ids"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Job:
    """What is encoded: the clips of `load`, by the models, in batches that `workers` processes draw."""

    models: assembly.Models
    load: ClipLoader
    options: Options
    batch: int
    workers: int


def precompute(
    models: assembly.Models,
    source: str | Path,
    out: str | Path,
    options: Options,
    *,
    split: str = "train",
    batch: int = 8,
    workers: int = 0,
    damaged_share: float = 0.01,
    progress: bool = True,
) -> Path:
    """Encodes the clips of a split, as far as that is not done yet.

    Args:
      models: see `assembly.load`.
      source: a folder, see `sources.open_source`.
      out: the folder to write.
      batch: clips that are encoded together; it does not change the result.
      workers: processes that decode and draw maps; 0 = a thread.
      damaged_share: of the clips; more damaged ones are an error, fewer are left out, each with a warning.

    Returns:
      the folder.

    Raises:
      UserError: `out` holds something else or was made with other options, no clip fits, too many are damaged, or
        the folder cannot be written.
    """
    out = files.path(out).absolute()
    if min(batch, options.variants) < 1 or options.text not in TEXTS:
        raise UserError(f"give at least 1 for batch and variants, and one of {', '.join(TEXTS)} for text")
    if options.motion in ("none", "dense"):
        options = dataclasses.replace(options, variants=1)
    made = {
        **dataclasses.asdict(options),
        "source": str(files.path(source).absolute()),
        "split": split,
        "caption_length": models.tokenizer.max_length,
        "weights": models.origin,
        "checksum": checksum(models, options),
    }
    if _holds(out, made) and (out / array_record.DONE).exists():
        return out
    files.check_writable(out.parent, f"--out {out}")
    clips, load = _open(models, source, split, options)
    made["clips"] = len(load.fitting)
    if progress:
        bucket = {name: getattr(options, name) for name in ("frames", "height", "width", "fps")}
        print(inventory.table(clips, [(bucket, load.fitting)], models.tokenizer))
    # In a bucket no folder can be renamed, and what says that one is whole is its metadata.
    aside = out if isinstance(out, BucketPath) else out.with_name(f".{out.name}.partial")
    _holds(aside, made)
    for name, reason in clips.damaged.items():
        warnings.warn(f"{name}: damaged and left out ({reason})", stacklevel=2)

    def check(lost: int) -> None:
        lost, total = lost + len(clips.damaged), len(clips.source)
        if lost > damaged_share * total:
            raise UserError(f"{source}: {lost} of {total} clips are damaged; mend or remove them")

    try:
        note_made(aside / sources.MADE, made)
        _write(Job(models, load, options, batch, workers), aside, split.partition("[")[0], check, progress)
        if aside != out:
            os.rename(aside, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error}); mend that and run again") from error
    return out


def _open(models: assembly.Models, source: str | Path, split: str, options: Options) -> tuple[Clips, ClipLoader]:
    motions = {name: getattr(options, name) for name in ("motion", "tracks", "max_tracks")}
    bucket = {name: getattr(options, name) for name in ("frames", "height", "width", "fps")}
    whole = {"crop": 0, "object_masks": False, "frame_masks": {}}
    clips = Clips({"sources": (source,), "buckets": (bucket,), **whole, **motions}, split)
    if clips.source.made:
        raise UserError(f"{source}: is precomputed already; give the folder that it was made from")
    frames = models.vae.latent_frames(options.frames)
    return clips, clips.loader(bucket, models.tokenizer, False, frames, draws=options.variants)


def _holds(folder: Path, made: Mapping[str, Any]) -> bool:
    """Whether a folder is there, made (or begun) with the same settings.

    Raises:
      UserError: it is there, and was made with others.
    """
    if not folder.exists():
        return False
    try:
        differs = made_otherwise(folder / sources.MADE, made)
    except (OSError, ValueError):
        raise UserError(f"{folder}: is there, and is no precomputed set; choose another folder") from None
    if differs:
        name, before = differs
        raise UserError(
            f"{folder}: was made with {name} {before!r}, not {made[name]!r}; choose another folder, or remove this one"
        )
    return True


def checksum(models: assembly.Models, options: Options) -> str:
    """A digest of the first numbers of each tensor, which tells apart weights of one name that were trained further."""
    used = ["vae", *([models.backbone.MOTION] * (options.motion != "none")), *(["t5"] * (options.text == "embedding"))]
    digest = hashlib.sha256()
    for path, leaf in traverse_util.flatten_dict({part: models.params[part] for part in used}, sep="/").items():
        digest.update(path.encode() + np.asarray(leaf.reshape(-1)[:256], np.float32).tobytes())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------
# Writing
# ----------------------------------------------------------------------------------------------------------


def _write(job: Job, folder: Path, split: str, check: Callable[[int], None], progress: bool) -> None:
    """Writes the shards that are not there yet, and the metadata.

    Args:
      check: takes the number of clips that turned out to be damaged, and raises when there are too many.
    """
    fitting, features = job.load.fitting, _features(job.options)
    shards = _parts(fitting, SHARD)
    paths = [folder / array_record.shard_name(NAME, split, i, len(shards)) for i in range(len(shards))]
    done = next((i for i, path in enumerate(paths) if not path.is_file()), len(paths))
    lengths = [ArrayRecordReader(array_record.readable(path)).num_records() for path in paths[:done]]
    todo = [(i, part) for i in range(done, len(shards)) for part in _parts(shards[i], job.batch)]
    with (
        tqdm(total=len(fitting), initial=done * SHARD, unit="clip", disable=not progress) as bar,
        contextlib.closing(_encoded(job, todo)) as encoded,
    ):
        lost = len(fitting[: done * SHARD]) - sum(lengths)
        check(lost)
        for number, group in itertools.groupby(encoded, key=lambda item: item[0]):
            records = _counted((record for _, records in group for record in records), bar)
            with files.write_atomic(paths[number]) as aside:
                lengths.append(array_record.write_shard(aside, features, records))
            lost += len(shards[number]) - lengths[-1]
            check(lost)
    for left in folder.glob(".*"):  # of an interrupted run
        left.unlink()
    array_record.write_metadata(folder, NAME, features, {split: lengths})


def _parts(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _counted(records: Iterable[Mapping[str, Any]], bar: tqdm) -> Iterator[Mapping[str, Any]]:
    for record in records:
        yield record
        bar.update()


def _features(options: Options) -> tfds.features.FeaturesDict:
    def half(axes: int) -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=(None,) * axes, dtype=np.float16, encoding="bytes")

    features = {name: tfds.features.Scalar(np.float32) for name in ("fps", "height", "width")}
    features |= {"caption": tfds.features.Text(), "latent_mean": half(4), "latent_std": half(4)}
    if options.motion != "none":
        features |= {"motion_mean": half(5), "motion_std": half(5)}
    if options.text == "embedding":
        features["text"] = half(2)
    return tfds.features.FeaturesDict(features)


@dataclasses.dataclass(frozen=True)
class _Draw:
    """Numbers of clips -> records without latents, and the arrays to encode, filled up to a full batch."""

    load: ClipLoader
    seed: int
    batch: int

    def __call__(self, indices: Sequence[int]) -> dict[str, Any]:
        records, clips, good, damaged = [], [], [], []
        for index in indices:
            try:
                record = self.load.source[index]
                # The draws depend on the clip alone, not on where a run began.
                clip = self.load.clip(record, index, np.random.default_rng([self.seed, index]))
            except UserError as error:
                damaged.append(f"{self.load.source.name(index)}: damaged and left out ({error})")
                continue
            scalars = {name: clip[name] for name in ("fps", "height", "width")}
            records.append({"caption": record["caption"], **scalars})
            clips.append({name: clip[name] for name in ("video", "maps", "ids", "text_mask") if name in clip})
            good.append(index)
        fill = self.batch - len(clips) if clips else 0
        arrays = {name: np.stack([clip[name] for clip in clips + clips[-1:] * fill]) for name in (clips or [{}])[0]}
        return {"records": records, "arrays": arrays, "indices": good + good[-1:] * fill, "damaged": damaged}


def _encoded(job: Job, todo: Sequence[tuple[int, Sequence[int]]]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """(number of the shard, records) of each batch; the next batch is encoded while one is written."""
    if not todo:
        return
    models, options = job.models, job.options
    draws = grain.MapDataset.source([part for _, part in todo]).map(_Draw(job.load, options.seed, job.batch))
    encode, waiting = make_encoder(models, options.seed), None
    with contextlib.closing(prefetched(draws, job.workers, prefetch=2)) as drawn:
        for (number, _), clips in zip(todo, drawn, strict=True):
            for message in clips["damaged"]:
                warnings.warn(message, stacklevel=2)
            arrays, encoded = clips["arrays"], {}
            if arrays:
                encoded = encode(arrays["video"], arrays.get("maps"), clips["indices"])
            if arrays and options.text == "embedding":
                encoded["text"] = models.encode_text(models.params["t5"], arrays["ids"], arrays["text_mask"])
            if waiting is not None:
                yield waiting[0], _records(*waiting[1:])
            waiting = number, clips, encoded
    yield waiting[0], _records(*waiting[1:])


def _records(clips: Mapping[str, Any], encoded: Mapping[str, Array]) -> list[dict[str, Any]]:
    """Waits for the encoded arrays, and deals them out to the records."""
    encoded = {name: np.asarray(array, np.float16) for name, array in encoded.items()}
    for i, record in enumerate(clips["records"]):
        record |= {name: array[i] for name, array in encoded.items()}
        if "text" in record:
            record["text"] = record["text"][: clips["arrays"]["text_mask"][i].sum()]
        if not all(np.isfinite(record[name]).all() for name in encoded):
            raise UserError(f"clip {clips['indices'][i]}: not all is finite in float16; check the weights")
    return clips["records"]
