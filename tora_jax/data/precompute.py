"""Caches what frozen models make of clips, so that they need not sit beside the trainer.

  python -m tora_jax.data.precompute --source DIR --weights RELEASE --out DIR --motion sparse --variants 4

Written are the posterior of each clip's latents, those of the latents of several independently drawn motion maps, and
the caption or its embedding. The result is a TFDS folder in ArrayRecord, which `sources` of a training config takes
like any other; `precompute.json` in it says what it was made with.

The work is done in shards, in a folder beside the result: a run that was interrupted goes on where it stopped, and
the result appears when it is whole.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath
from flax import linen as nn
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key, UInt8
from tqdm import tqdm

from tora_jax import sharding
from tora_jax.backbones import assembly
from tora_jax.data import motion, sources
from tora_jax.data.clips import ClipLoader, Clips
from tora_jax.data.pipeline import prefetched
from tora_jax.errors import UserError
from tora_jax.io.files import made_otherwise, note_made

SHARD = 256  # clips in a file
TEXTS = ("ids", "embedding")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is cached of each clip.

    Attributes:
      frames, height, width, fps: of the clips, as in a bucket of `pipeline.batches`; the first frames are taken.
      motion, tracks, max_tracks: the motion maps, as there.
      variants: independent draws of the maps; "dense" motion has one.
      text: "ids" stores the caption, "embedding" what the text encoder makes of it, which must be frozen then.
      seed: of all that is drawn, from it and the number of the clip.
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


# ----------------------------------------------------------------------------------------------------------
# Encoding
# ----------------------------------------------------------------------------------------------------------


def posterior(
    vae: nn.Module, params: Any, video: UInt8[Array, "b t h w 3"], keys: Key[Array, "b"]
) -> tuple[Float[Array, "b t4 h8 w8 c"], Float[Array, "b t4 h8 w8 c"]]:
    """Mean and standard deviation, float16, of the normalised latents that `VideoVAE.encode` draws.

    The spatial VAE's posterior is sampled, once, with each clip's own key, so that a clip's latents do not depend
    on the batch that it is in.
    """

    def one(clip: Array, key: Array) -> tuple[Array, Array]:
        def moments(model: nn.Module) -> tuple[Array, Array]:
            latent = model.moments(clip[None].astype(jnp.float32) / 127.5 - 1, key).latent
            return (latent.mean - model.shift) / model.scale, jnp.exp(0.5 * latent.logvar) / model.scale

        return nn.apply(moments, vae)({"params": params})

    return jax.tree.map(lambda x: x[:, 0].astype(jnp.float16), jax.vmap(one)(video, keys))


Encode = Callable[[np.ndarray, np.ndarray | None, Sequence[int]], dict[str, Array]]


def make_encoder(models: assembly.Models, seed: int = 0) -> Encode:
    """The function (video, maps, indices) -> posteriors, compiled once for a shape; a call does not wait.

    It takes video, uint8 [b, t, h, w, 3]; maps, uint8 [b, k, t, h, w, 3], k draws of each clip's motion, or None; and
    the numbers of the clips, from which (and from the seed) it draws what is sampled. It gives latent_mean and
    latent_std, float16 [b, t4, h8, w8, c], and with maps motion_mean and motion_std, float16 [b, k, t4, h8, w8, c].
    Of this process's devices, as many as divide b take an equal share of the clips each.
    """
    parts = ("vae", "motion_vae")
    run = {part: jax.jit(functools.partial(posterior, getattr(models, part))) for part in parts}
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))

    @functools.cache
    def place(batch: int) -> tuple[NamedSharding, dict[str, Any]]:
        """Where a batch lies, and the weights on each of its devices."""
        count = math.gcd(batch, jax.local_device_count())
        mesh = sharding.make_mesh(f"data={count}", jax.local_devices())
        params = {part: models.params[part] for part in parts if part in models.params}
        return NamedSharding(mesh, PartitionSpec("data")), jax.device_put(params, NamedSharding(mesh, PartitionSpec()))

    def encode(video: np.ndarray, maps: np.ndarray | None, indices: Sequence[int]) -> dict[str, Array]:
        spread, params = place(len(video))
        keys = fold(jax.random.key(seed), jnp.asarray(indices))
        mean, std = run["vae"](params["vae"], *jax.device_put((video, keys), spread))
        encoded = {"latent_mean": mean, "latent_std": std}
        if maps is not None:
            b, k = maps.shape[:2]
            keys = jax.vmap(fold, in_axes=(0, None))(keys, jnp.arange(1, k + 1)).reshape(-1)
            both = run["motion_vae"](
                params["motion_vae"], *jax.device_put((maps.reshape(b * k, *maps.shape[2:]), keys), spread)
            )
            encoded["motion_mean"], encoded["motion_std"] = (x.reshape(b, k, *x.shape[1:]) for x in both)
        return encoded

    return encode


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
      models: see `chain.load`.
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
    out = Path(out).absolute()
    if min(batch, options.variants) < 1 or options.text not in TEXTS:
        raise UserError(f"give at least 1 for batch and variants, and one of {', '.join(TEXTS)} for text")
    if options.motion in ("none", "dense"):
        options = dataclasses.replace(options, variants=1)
    made = {
        **dataclasses.asdict(options),
        "source": str(Path(source).absolute()),
        "split": split,
        "caption_length": models.tokenizer.max_length,
        "weights": models.origin,
        "checksum": _checksum(models, options),
    }
    if _holds(out, made):
        return out
    motions = {name: getattr(options, name) for name in ("motion", "tracks", "max_tracks")}
    bucket = {name: getattr(options, name) for name in ("frames", "height", "width", "fps")}
    opened = Clips({"sources": (source,), "buckets": (bucket,), "crop": 0, "frame_masks": {}, **motions}, split)
    if opened.source.made:
        raise UserError(f"{source}: is precomputed already; give the folder that it was made from")
    load = opened.loader(bucket, models.tokenizer, training=False, latent_frames=1, draws=options.variants)
    made["clips"] = len(load.fitting)
    aside = out.with_name(f".{out.name}.partial")
    _holds(aside, made)
    for name, reason in opened.damaged.items():
        warnings.warn(f"{name}: damaged and left out ({reason})", stacklevel=2)

    def check(lost: int) -> None:
        if lost > damaged_share * len(opened.source):
            raise UserError(f"{source}: {lost} of {len(opened.source)} clips are damaged; mend or remove them")

    shards = _parts(load.fitting, SHARD)
    name = split.partition("[")[0]
    paths = [aside / f"clips-{name}.array_record-{i:05d}-of-{len(shards):05d}" for i in range(len(shards))]
    features = _features(options)
    try:
        note_made(aside / sources.MADE, made)
        done = next((i for i, path in enumerate(paths) if not path.is_file()), len(paths))
        lengths = [ArrayRecordReader(str(path)).num_records() for path in paths[:done]]
        todo = [(i, part) for i in range(done, len(shards)) for part in _parts(shards[i], batch)]
        with (
            tqdm(total=len(load.fitting), initial=done * SHARD, unit="clip", disable=not progress) as bar,
            contextlib.closing(_encoded(models, load, options, todo, batch, workers)) as encoded,
        ):
            lost = len(opened.damaged) + len(load.fitting[: done * SHARD]) - sum(lengths)
            check(lost)
            for number, group in itertools.groupby(encoded, key=lambda item: item[0]):
                lengths.append(_write(paths[number], features, (one for _, records in group for one in records), bar))
                lost += len(shards[number]) - lengths[-1]
                check(lost)
        _finish(aside, name, features, lengths)
        os.rename(aside, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error}); mend that and run again") from error
    return out


def _parts(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


@dataclasses.dataclass(frozen=True)
class _Draw:
    """Numbers of clips -> records without their latents, and arrays to be encoded, filled up to a full batch."""

    load: ClipLoader
    seed: int
    batch: int

    def __call__(self, indices: Sequence[int]) -> dict[str, Any]:
        records, clips, good, damaged = [], [], [], []
        for index in indices:
            try:
                record = self.load.source[index]
                # The numbers depend on the clip alone, not on where a run began.
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


def _encoded(
    models: assembly.Models,
    load: ClipLoader,
    options: Options,
    todo: Sequence[tuple[int, Sequence[int]]],
    batch: int,
    workers: int,
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """(number of the shard, records) of each batch; the next one is encoded while one is written."""
    if not todo:
        return
    draws = grain.MapDataset.source([part for _, part in todo]).map(_Draw(load, options.seed, batch))
    encode, waiting = make_encoder(models, options.seed), None
    with contextlib.closing(prefetched(draws, workers, prefetch=2)) as drawn:
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


# ----------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------


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


def _write(path: Path, features: tfds.features.FeaturesDict, records: Iterable[dict[str, Any]], bar: tqdm) -> int:
    """Writes a shard, aside first; the number of records."""
    count, aside = 0, path.with_name(f".{path.name}")
    writer = ArrayRecordWriter(str(aside), "group_size:1")
    try:
        for record in records:
            writer.write(features.serialize_example(record))
            count += 1
            bar.update()
        writer.close()
    except RuntimeError as error:
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise
        raise OSError(None, str(error)) from error
    os.replace(aside, path)
    return count


def _finish(folder: Path, split: str, features: tfds.features.FeaturesDict, lengths: Sequence[int]) -> None:
    """Writes what TFDS wants to know of the shards, and removes what an interrupted run left."""
    for left in folder.glob(".*"):
        left.unlink()
    template = tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(folder), dataset_name="clips", split=split, filetype_suffix="array_record"
    )
    info = tfds.core.SplitInfo(name=split, shard_lengths=list(lengths), num_bytes=0, filename_template=template)
    tfds.folder_dataset.write_metadata(
        data_dir=epath.Path(folder), features=features, split_infos=[info], check_data=False
    )


def _holds(folder: Path, made: Mapping[str, Any]) -> bool:
    """Whether a folder is there, made (or begun) in the same way.

    Raises:
      UserError: it is there, and was not.
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


def _checksum(models: assembly.Models, options: Options) -> str:
    """Tells apart weights that were trained further under the same name: of the first numbers of each tensor."""
    used = ["vae", *(["motion_vae"] * (options.motion != "none")), *(["t5"] * (options.text == "embedding"))]
    digest = hashlib.sha256()
    for path, leaf in traverse_util.flatten_dict({part: models.params[part] for part in used}, sep="/").items():
        digest.update(path.encode() + np.asarray(leaf.reshape(-1)[:256], np.float32).tobytes())
    return digest.hexdigest()


def main(argv: list[str] | None = None) -> int:
    """`python -m tora_jax.data.precompute`"""
    parser = argparse.ArgumentParser(
        prog="python -m tora_jax.data.precompute", description="Caches the latents and the motion of clips."
    )
    parser.add_argument("--source", required=True, help="folder of clips, as in data.sources")
    parser.add_argument("--weights", required=True, help="release folder with the VAEs and the text encoder")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--split", default="train", help="such as train, or a part of it: train[:50%%]")
    parser.add_argument("--num_frames", type=int, required=True)
    parser.add_argument("--height", type=int, required=True)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--fps", type=float, default=Options.fps, help="thin clips out to about this; 0 = as they are")
    parser.add_argument("--motion", choices=motion.KINDS, default=Options.motion)
    parser.add_argument("--tracks", choices=motion.ORIGINS, default=Options.tracks, help="where sparse ones come from")
    parser.add_argument("--max_tracks", type=int, default=Options.max_tracks)
    parser.add_argument("--variants", type=int, default=Options.variants, help="draws of the motion for each clip")
    parser.add_argument("--text", choices=TEXTS, default=Options.text, help="ids: T5 trains along; embedding: frozen")
    parser.add_argument("--seed", type=int, default=Options.seed)
    parser.add_argument("--batch", type=int, default=8, help="clips encoded together")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode clips; 0 = a thread")
    parser.add_argument("--damaged_share", type=float, default=0.01, help="of the clips, that may be left out")
    args = parser.parse_args(argv)
    names = {field.name for field in dataclasses.fields(Options)} & vars(args).keys()
    options = Options(frames=args.num_frames, **{name: getattr(args, name) for name in names})
    try:
        models = assembly.load(weights=args.weights)
        how = {name: getattr(args, name) for name in ("split", "batch", "workers", "damaged_share")}
        print(precompute(models, args.source, args.out, options, **how))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
