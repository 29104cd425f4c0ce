"""The input pipeline: sources -> clips of a bucket's size -> motion maps, tokens, frame masks -> batches.

Batch k is a function of the seed and k alone: not of the number of processes, of worker processes, or of what was
drawn before. So the whole state of an iterator is k, and a run that goes on from it sees what it would have seen.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from tora_jax import text, video_io
from tora_jax.data import masks, motion, sources
from tora_jax.errors import UserError
from tora_jax.models import video_vae

BATCH_AXES = ("data", "fsdp")
TRIES = 16  # records in place of a damaged one
DAMAGED = "damaged"  # the entry of a batch that the iterator takes out

Batch = dict[str, Any]


def batches(
    config: Mapping[str, Any],
    split: str,
    *,
    seed: int,
    tokenizer: text.Tokenizer | None = None,
    training: bool = True,
    latent_frames: Callable[[int], int] = video_vae.latent_frames,
    shard: tuple[int, int] | None = None,
) -> Batches:
    """Batches of a split, without end in training, else once in order (what fills no batch is left out).

    Args:
      config: plain mapping with all of
        sources: folders (`sources.open_folder`); records are drawn from all of them alike.
        buckets: dicts of `frames`, `height`, `width`, `fps` (about which clips are thinned out to; 0 = as they
          are), `batch` (over all processes) and `weight` (the share of batches). A bucket takes all clips that
          are long and large enough for it.
        motion: "none", "dense", "sparse" or "mixed". tracks: "given" or "flow". max_tracks: of sparse motion.
        crop: pixels a side of a random square of each clip; 0 = the whole.
        frame_masks: shares of the masks by name, see `masks`; empty = no frame masks.
        workers: worker processes; 0 = a thread. prefetch: batches that are made ahead (by each worker).
        damaged_share: of the records; when more are damaged, the iterator stops.
      split: "train", "validation" ...
      seed: of the order, and of everything that is drawn.
      tokenizer: for the captions; None = no captions.
      training: shuffled, without end; else in order, once, with the first frames and the middle of each clip.
      latent_frames: frames -> latent frames, of the VAE.
      shard: (index, count) of this process among those that read different clips; None = JAX's.

    Returns:
      an iterator of dicts of arrays, this process's part of each batch (see docs/architecture.md for the names).

    Raises:
      UserError: a source is missing or empty, a bucket is larger than any clip, the number of processes does not
        divide a batch, or an option is not one of those above.
    """
    index, count = (jax.process_index(), jax.process_count()) if shard is None else shard
    _check(config, count)
    source = sources.Joined([sources.open_folder(folder, split) for folder in config["sources"]])
    if not len(source):
        raise UserError(f"{', '.join(map(str, config['sources']))}: split {split!r} has no clips")
    infos, damaged = sources.scan(source)
    parts = []
    for bucket in config["buckets"]:
        fitting = _fitting(infos, bucket)
        latents = latent_frames(bucket["frames"])
        load = _Load(source, infos, fitting, bucket, config, tokenizer, training, latents)
        clips = grain.MapDataset.source(fitting)
        if training:
            clips = clips.shuffle(seed=seed).repeat()
        local = clips.random_map(load, seed=seed).batch(bucket["batch"] // count, drop_remainder=True, batch_fn=_stack)
        whole = len(clips) // bucket["batch"] * count
        parts.append(local[:whole][index::count])
    if training:
        joined = grain.MapDataset.mix(parts, weights=[bucket["weight"] for bucket in config["buckets"]])
    else:
        joined = grain.MapDataset.concatenate(parts)
    if not len(joined):
        raise UserError(f"split {split!r} has too few clips ({len(source)}) for one batch; make the batch smaller")
    first = {source.name(place): reason for place, reason in damaged.items()}
    return Batches(joined, config["workers"], config["prefetch"], first, len(source), config["damaged_share"])


class Batches(grain.DatasetIterator):
    """Iterates over batches; `close` it at the end. Grain's checkpoints take it, and so does JSON (`get_state`).

    Attributes:
      damaged: name of each damaged record met so far -> what is wrong with it. They are passed over, each with
        one warning, and another record of the split, drawn at random, stands in.
    """

    def __init__(
        self,
        dataset: grain.MapDataset,
        workers: int,
        prefetch: int,
        damaged: Mapping[str, str],
        records: int,
        damaged_share: float,
    ):
        super().__init__()
        self._dataset, self._workers, self._prefetch = dataset, workers, prefetch
        self._records, self._share = records, damaged_share
        self._next, self._batches = 0, None
        self.damaged: dict[str, str] = {}
        self._note(damaged.items())

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
          UserError: more records are damaged than the config allows.
        """
        self._assert_not_closed()
        if self._batches is None:
            self._batches = self._start()
        batch = next(self._batches)
        self._next += 1
        self._note(batch.pop(DAMAGED))
        return batch

    def _start(self) -> grain.DatasetIterator:
        rest = self._dataset[self._next :]
        if not self._workers:
            return iter(rest.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=self._prefetch)))
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # worker processes get a copy of the flags, and Grain insists
        options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=self._prefetch)
        one = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        return iter(rest.to_iter_dataset(one).mp_prefetch(options))

    def _note(self, damaged: Sequence[tuple[str, str]]) -> None:
        for name, reason in damaged:
            if name not in self.damaged:
                self.damaged[name] = reason
                warnings.warn(f"{name}: damaged and passed over ({reason})", stacklevel=3)
        if len(self.damaged) > self._share * self._records:
            raise UserError(
                f"{len(self.damaged)} of {self._records} records are damaged, such as {next(iter(self.damaged))}; "
                f"mend or remove them, or raise damaged_share above {self._share:g}"
            )

    def get_state(self) -> dict[str, Any]:
        """The number of the next batch, and the damaged records."""
        return {"next": self._next, "damaged": dict(self.damaged)}

    def set_state(self, state: dict[str, Any]) -> None:
        self._stop()
        self._next, self.damaged = int(state["next"]), {**self.damaged, **state["damaged"]}

    def start_prefetch(self) -> None:
        self._batches = self._start() if self._batches is None else self._batches
        self._batches.start_prefetch()

    def _stop(self) -> None:
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def close(self) -> None:
        """Ends threads and worker processes."""
        self._stop()
        super().close()


def place(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's part of a batch -> global arrays, split over the mesh's batch axes.

    Raises:
      UserError: the axes do not divide the batch.
    """
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    try:
        return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
    except ValueError as error:
        ways = mesh.shape["data"] * mesh.shape["fsdp"]
        size = len(next(iter(batch.values()))) * jax.process_count()
        if size % ways:
            raise UserError(f"a batch of {size} does not split over data x fsdp = {ways} devices") from error
        raise


class Placed(grain.DatasetIterator):
    """`place` over an iterator, `ahead` batches early; its state is that of what it has handed out."""

    def __init__(self, iterator: grain.DatasetIterator, mesh: Mesh, ahead: int = 2):
        super().__init__(iterator)
        self._iterator, self._mesh, self._ahead = iterator, mesh, ahead
        self._waiting: deque[tuple[dict[str, jax.Array], dict[str, Any]]] = deque()
        self._state = iterator.get_state()

    def __next__(self) -> dict[str, jax.Array]:
        while len(self._waiting) <= self._ahead:
            try:
                batch = place(next(self._iterator), self._mesh)
            except StopIteration:
                break
            self._waiting.append((batch, self._iterator.get_state()))
        if not self._waiting:
            raise StopIteration
        batch, self._state = self._waiting.popleft()
        return batch

    def get_state(self) -> dict[str, Any]:
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        self._waiting.clear()
        self._iterator.set_state(state)
        self._state = self._iterator.get_state()

    def close(self) -> None:
        self._waiting.clear()
        super().close()


def _check(config: Mapping[str, Any], processes: int) -> None:
    for name, known in (("motion", motion.KINDS), ("tracks", motion.ORIGINS)):
        if config[name] not in known:
            raise UserError(f"data.{name} is {config[name]!r}; choose one of {', '.join(known)}")
    if not config["sources"] or not config["buckets"]:
        raise UserError("data.sources and data.buckets: give at least one of each")
    masks.check(config["frame_masks"])
    for bucket in config["buckets"]:
        if bucket["batch"] % processes or bucket["batch"] < 1:
            raise UserError(f"bucket {_size(bucket)}: {processes} processes do not divide a batch of {bucket['batch']}")
        if config["crop"] > min(bucket["height"], bucket["width"]):
            raise UserError(f"data.crop is {config['crop']}, more than a side of the bucket {_size(bucket)}")


def _size(bucket: Mapping[str, Any]) -> str:
    return f"{bucket['frames']}x{bucket['height']}x{bucket['width']}"


def _fitting(infos: Float[np.ndarray, "n 4"], bucket: Mapping[str, Any]) -> Int[np.ndarray, " m"]:
    """Numbers of the clips that are long and large enough for a bucket."""
    fitting = np.flatnonzero((infos[:, :3] >= [bucket[name] for name in ("frames", "height", "width")]).all(1))
    if not len(fitting):
        largest = "x".join(f"{size:g}" for size in infos[:, :3].max(0))
        raise UserError(
            f"bucket {_size(bucket)} (frames x height x width) is larger than any clip (longest, highest and widest: "
            f"{largest}); make it smaller"
        )
    return fitting


@dataclasses.dataclass(frozen=True)
class _Load:
    """Number of a record -> the clip, ready for a batch. Runs in threads and in worker processes."""

    source: sources.Source
    infos: Float[np.ndarray, "n 4"]
    fitting: Int[np.ndarray, " m"]
    bucket: Mapping[str, Any]
    config: Mapping[str, Any]
    tokenizer: text.Tokenizer | None
    training: bool
    latent_frames: int

    def __call__(self, index: int, rng: np.random.Generator) -> Batch:
        damaged = []
        for _ in range(TRIES):
            try:
                return {**self._clip(index, rng), DAMAGED: tuple(damaged)}
            except UserError as error:
                damaged.append((self.source.name(index), str(error)))
                index = self.fitting[rng.integers(len(self.fitting))]
        raise UserError(f"{TRIES} damaged records in a row, such as {damaged[0][0]} ({damaged[0][1]})")

    def _clip(self, index: int, rng: np.random.Generator) -> Batch:
        record, info, config = self.source[index], video_io.VideoInfo(*self.infos[index]), self.config
        frames, height, width = (self.bucket[name] for name in ("frames", "height", "width"))
        rate = float(record["fps"]) if "fps" in record else info.fps
        step = max(round(rate / self.bucket["fps"]), 1) if self.bucket["fps"] else 1
        step = min(step, (int(info.frames) - 1) // max(frames - 1, 1)) if frames > 1 else 1
        start = int(rng.integers(info.frames - (frames - 1) * step)) if self.training else 0
        wanted = range(start, start + (frames - 1) * step + 1, step)
        original, _ = video_io.read_video(record["video"], only=wanted, strict=True)
        if len(original) < frames:
            raise UserError(f"{len(original)} of {frames} frames decoded")
        new_height, new_width, top, left = video_io.cover(*original.shape[1:3], height, width)
        video = video_io.resize_crop(original, height, width)
        if crop := config["crop"]:
            spare = (height - crop, width - crop)
            down, right = rng.integers(np.add(spare, 1)) if self.training else np.floor_divide(spare, 2)
            video = video[:, down : down + crop, right : right + crop]
            top, left, height, width = top + down, left + right, crop, crop
        clip = {
            "video": video,
            "fps": np.float32(rate / step),
            "height": np.float32(height),
            "width": np.float32(width),
        }
        if config["motion"] != "none":
            window = (top, left, height, width, new_height, new_width)
            truth = _follow_window(record, wanted, window)
            kind, origin, most = (config[name] for name in ("motion", "tracks", "max_tracks"))
            clip["maps"] = motion.motion_maps(rng, kind, origin, most, video, **truth)
        if self.tokenizer is not None:
            ids, mask = self.tokenizer([text.clean(record["caption"])])
            clip["ids"], clip["text_mask"] = ids[0], mask[0]
        if config["frame_masks"]:
            clip["frame_mask"] = masks.draw(rng, config["frame_masks"], self.latent_frames)
        return clip


def _follow_window(record: Mapping[str, Any], wanted: range, window: tuple[int, ...]) -> dict[str, np.ndarray]:
    """A record's labels and tracks for the frames that are wanted, scaled and cut as the video was."""
    top, left, height, width, new_height, new_width = window
    truth = {}
    if "labels" in record:
        old_height, old_width = record["labels"].shape[1:]
        rows = ((np.arange(height) + top + 0.5) * old_height / new_height).astype(int)
        columns = ((np.arange(width) + left + 0.5) * old_width / new_width).astype(int)
        truth["labels"] = record["labels"][wanted][:, rows[:, None], columns]
    if "tracks" in record:
        scaled = record["tracks"][:, wanted] * (new_width, new_height) - (left, top)
        tracks = (scaled / (width, height)).astype(np.float32)
        inside = ((tracks >= 0) & (tracks <= 1)).all(-1)
        truth["tracks"] = tracks
        truth["visible"] = inside & record["visible"][:, wanted] if "visible" in record else inside
    return truth


def _stack(clips: Sequence[Batch]) -> Batch:
    batch = {name: np.stack([clip[name] for clip in clips]) for name in clips[0] if name != DAMAGED}
    return {**batch, DAMAGED: tuple(found for clip in clips for found in clip[DAMAGED])}
