"""The input pipeline: sources -> clips of a bucket's size -> motion maps, tokens, frame masks -> batches.

Batch k is a function of the seed and k alone: not of the number of processes, of worker processes, or of what was
drawn before. So the state of an iterator is k, and a run that goes on from it sees what it would have seen.

A batch is a dict of arrays, with the samples on the leading axis:
  video         uint8 [b, t, h, w, 3]
  maps          uint8 [b, t, h, w, 3]: RGB motion maps, if motion is wanted
  fps, height, width   float32 [b]
  frame_mask    bool [b, t4], over latent frames, True = generate
  ids           int32 [b, n], and text_mask, bool [b, n]: tokens of the caption, if there is a tokenizer
From a precomputed set, in place of video and maps, normalised posteriors, and perhaps caption embeddings for tokens:
  latent_mean, latent_std   float16 [b, t4, h8, w8, c]
  motion_mean, motion_std   float16 [b, t4, h8, w8, c], one of the variants that are stored
  text          float16 [b, n, c]
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import cv2
import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from tora_jax.conditioning import text
from tora_jax.data import buckets, masks, motion, sources
from tora_jax.errors import UserError
from tora_jax.io.video import VideoInfo, cover, read_video, resize_crop
from tora_jax.models.video_vae import VideoVAE

BATCH_AXES = ("data", "fsdp")
TRIES = 16  # records in place of a damaged one
DAMAGED = "damaged"  # the entry of a batch that the iterator takes out

Batch = dict[str, Any]

DEFAULT_VAE = VideoVAE(None, {})  # 17 frames are 5 latents, as in every config


def batches(
    config: Mapping[str, Any],
    split: str,
    *,
    seed: int,
    tokenizer: text.Tokenizer | None = None,
    training: bool = True,
    latent_frames: Callable[[int], int] = DEFAULT_VAE.latent_frames,
    shard: tuple[int, int] | None = None,
) -> Batches:
    """Batches of a split, without end in training, else once in order (what fills no batch is left out).

    Args:
      config: plain mapping with all of
        sources: folders, see `sources.open_folder`; records are drawn from all of them alike.
        buckets: dicts of `frames`, `height`, `width`, `fps` (about which clips are thinned out to; 0 = as they
          are), `batch` (over all processes) and `weight` (the share of batches). A bucket takes all clips that
          are long and large enough for it; of precomputed sets, those of its size. Or Open-Sora's: all of them
          with `resolution` and `share` (the probabilities of `Buckets`) and the same `fps`; then each clip goes into
          one bucket, of its own aspect ratio, as `Buckets` draws it, the batches are shared out by the numbers of
          clips, and `height`, `width` and `weight` are not used.
        motion: "none", "dense", "sparse" or "mixed". tracks: "given" or "flow". max_tracks: of sparse motion.
        crop: pixels a side of a random square of each clip; 0 = the whole.
        frame_masks: shares of the masks by name, see `masks`.
        workers: worker processes; 0 = a thread. prefetch: batches that are made ahead (by each worker).
        damaged_share: of the records; when more are damaged, the iterator stops.
      split: "train", "validation" ...
      seed: of the order, and of everything that is drawn.
      tokenizer: for the captions; None = no captions.
      training: shuffled, without end; else in order, once, with the first frames and the middle of each clip.
      latent_frames: frames -> latent frames, of the VAE.
      shard: (index, count) of this process among those that read different clips, see `shard_of`; None = JAX's.

    Returns:
      an iterator over this process's part of each batch.

    Raises:
      UserError: a source is missing or empty, a bucket is larger than any clip, the number of processes does not
        divide a batch, or an option is none of those above.
    """
    index, count = (jax.process_index(), jax.process_count()) if shard is None else shard
    for bucket in config["buckets"]:
        if bucket["batch"] < 1 or bucket["batch"] % count:
            raise UserError(f"bucket {_size(bucket)}: {count} processes do not divide a batch of {bucket['batch']}")
    opened, parts = Opened(config, split), []
    chosen = opened.choose(seed)
    for bucket, fitting in chosen:
        load = opened.loader(bucket, tokenizer, training, latent_frames(bucket["frames"]), fitting=fitting)
        clips = grain.MapDataset.source(load.fitting)
        if training:
            clips = clips.shuffle(seed=seed).repeat()
        # Batches of one process, of which each process takes every count-th: the samples of batch k are the same
        # for any number of processes.
        local = clips.random_map(load, seed=seed).batch(bucket["batch"] // count, drop_remainder=True, batch_fn=_stack)
        parts.append(local[: len(clips) // bucket["batch"] * count][index::count])
    if not training and _of_table(config):
        parts = list(filter(len, parts))
    if not parts or not all(map(len, parts)):
        raise UserError(f"split {split!r} has too few clips for a batch of each bucket; make the batches smaller")
    weights = [bucket["weight"] for bucket, _ in chosen]
    joined = grain.MapDataset.mix(parts, weights) if training else grain.MapDataset.concatenate(parts)
    return Batches(joined, config["workers"], config["prefetch"], opened, config["damaged_share"])


class Batches(grain.DatasetIterator):
    """Iterates over batches; `close` it at the end. Grain's checkpoints take it, and so does JSON (`get_state`).

    Attributes:
      made: what the sources were precomputed with; None of clips.
      damaged: name of each damaged record met so far -> what is wrong with it. They are passed over, each with
        one warning, and another record, drawn at random, stands in.
    """

    def __init__(self, dataset: grain.MapDataset, workers: int, prefetch: int, opened: Opened, damaged_share: float):
        super().__init__()
        self._dataset, self._workers, self._prefetch = dataset, workers, prefetch
        self._records, self._share = len(opened.source), damaged_share
        self.made = opened.source.made
        self._next, self._batches = 0, None
        self.damaged: dict[str, str] = {}
        self._note(opened.damaged.items())

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
          UserError: more records are damaged than the config allows.
        """
        self.start_prefetch()
        batch = next(self._batches)
        self._next += 1
        self._note(batch.pop(DAMAGED))
        # Copied out of the worker's shared memory, which is freed with the last array in it.
        return {name: np.array(array) for name, array in batch.items()} if self._workers else batch

    def start_prefetch(self) -> None:
        self._assert_not_closed()
        if self._batches is None:
            self._batches = iterate(self._dataset[self._next :], self._workers, self._prefetch)
            self._batches.start_prefetch()

    def _note(self, damaged: Iterable[tuple[str, str]]) -> None:
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

    def _stop(self) -> None:
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def close(self) -> None:
        """Ends threads and worker processes."""
        self._stop()
        super().close()


def iterate(dataset: grain.MapDataset, workers: int, prefetch: int) -> grain.DatasetIterator:
    """Iterates over a data set whose elements are made ahead of time.

    Args:
      workers: processes that make them; 0 = a thread.
      prefetch: elements that are made ahead, by each worker.
    """
    ahead = 1 if workers else prefetch
    elements = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=ahead))
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain gives the workers a copy of the flags
            flags.FLAGS.mark_as_parsed()
        elements = elements.mp_prefetch(grain.MultiprocessingOptions(workers, prefetch))
    return iter(elements)


# ----------------------------------------------------------------------------------------------------------
# On devices
# ----------------------------------------------------------------------------------------------------------


def shard_of(mesh: Mesh) -> tuple[int, int]:
    """(index, count) of this process among those whose devices hold different samples of a batch.

    Processes that share a batch's samples (along the axes "seq" and "tensor") get the same index.

    Raises:
      UserError: the mesh gives processes uneven parts.
    """
    owner = np.vectorize(lambda device: device.process_index)(mesh.devices)
    return _share(owner.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1), jax.process_index())


def _share(owner: Int[np.ndarray, "ways others"], process: int) -> tuple[int, int]:
    """`shard_of` for the process of each device, a row for each part of the batch."""
    ways, mine = len(owner), np.flatnonzero((owner == process).any(1))
    if not len(mine) or ways % len(mine) or mine[0] % len(mine) or np.ptp(mine) != len(mine) - 1:
        raise UserError(f"process {process} of the mesh holds an uneven part of a batch; change data and fsdp")
    return int(mine[0]) // len(mine), ways // len(mine)


def place(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's part of a batch -> global arrays, split over the mesh's axes "data" and "fsdp".

    Raises:
      UserError: the axes do not divide the batch.
    """
    size, ways = len(next(iter(batch.values()))), mesh.shape["data"] * mesh.shape["fsdp"]
    if size * shard_of(mesh)[1] % ways:
        raise UserError(f"a batch of {size * shard_of(mesh)[1]} does not split over data x fsdp = {ways} devices")
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


class Placed(grain.DatasetIterator):
    """`place` over an iterator, `ahead` batches early; its state is that of what it has handed out."""

    def __init__(self, iterator: grain.DatasetIterator, mesh: Mesh, ahead: int = 2):
        super().__init__(iterator)
        self._iterator, self._mesh, self._ahead = iterator, mesh, ahead
        self._waiting: deque[tuple[dict[str, jax.Array], dict[str, Any]]] = deque()
        self._state = iterator.get_state()

    def __next__(self) -> dict[str, jax.Array]:
        self._assert_not_closed()
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


# ----------------------------------------------------------------------------------------------------------
# Clips
# ----------------------------------------------------------------------------------------------------------


class Opened:
    """The sources of a config with the sizes of their clips, which are all looked at once.

    Attributes:
      source: all records.
      infos: `video_io.VideoInfo` of each, zeros where it is damaged.
      damaged: name of each damaged record -> what is wrong with it.

    Raises:
      UserError: a source is missing, empty or unreadable, or an option is none of those of `batches`.
    """

    def __init__(self, config: Mapping[str, Any], split: str):
        for name, known in (("motion", motion.KINDS), ("tracks", motion.ORIGINS)):
            if config[name] not in known:
                raise UserError(f"data.{name} is {config[name]!r}; choose one of {', '.join(known)}")
        for name in ("sources", "buckets"):
            if not config[name]:
                raise UserError(f"data.{name} is empty; give at least one")
        if config["max_tracks"] < 1:
            raise UserError(f"data.max_tracks is {config['max_tracks']}; give at least 1")
        masks.check(config["frame_masks"])
        self.config = config
        self.source = sources.Joined([sources.open_folder(folder, split) for folder in config["sources"]])
        if not len(self.source):
            raise UserError(f"{', '.join(map(str, config['sources']))}: split {split!r} has no clips")
        made = self.source.made
        if made and (config["crop"] or config["motion"] not in ("none", made["motion"])):
            raise UserError(
                f"the precomputed sets hold {made['motion']} motion of whole clips: set data.motion to "
                f"{made['motion']!r} and data.crop to 0, or precompute again"
            )
        self.infos, damaged = sources.scan(self.source)
        self.damaged = {self.source.name(index): reason for index, reason in damaged.items()}
        if len(damaged) == len(self.source):
            name, reason = next(iter(self.damaged.items()))
            raise UserError(f"{name}: damaged ({reason}), and so are all others of the split")

    def choose(self, seed: int) -> list[tuple[Mapping[str, Any], list[int] | None]]:
        """The config's buckets, each with the numbers of the clips that go into it; None = all that fit.

        Of Open-Sora's table, those that clips are drawn into, by the clip's number and the seed.

        Raises:
          UserError: they are drawn into none, or the table is wrong.
        """
        if not _of_table(self.config):
            return [(bucket, None) for bucket in self.config["buckets"]]
        if self.source.made:
            raise UserError("precomputed sets hold clips of one size: give buckets with their frames, height and width")
        levels = {(bucket["resolution"], bucket["frames"]): bucket for bucket in self.config["buckets"]}
        table: dict[str, dict[int, Any]] = {}
        for (name, frames), bucket in levels.items():
            table.setdefault(name, {})[frames] = (bucket["share"], bucket["batch"])
        draw, found = buckets.Buckets(table), {}
        rate = self.config["buckets"][0]["fps"]
        for index, (frames, height, width, fps) in enumerate(self.infos):
            if choice := draw(int(frames), int(height), int(width), seed + index * len(levels), _step(fps, rate)):
                found.setdefault(choice, []).append(index)
        if not found:
            raise UserError("no clip fits any of the buckets; give longer or larger clips, or other buckets")
        sized = []
        for choice, indices in sorted(found.items()):
            level = levels[choice.resolution, choice.frames]
            size = {"height": choice.height, "width": choice.width, "weight": len(indices) / choice.batch}
            sized.append(({**level, **size}, indices))
        return sized

    def loader(
        self,
        bucket: Mapping[str, Any],
        tokenizer: text.Tokenizer | None,
        training: bool,
        latent_frames: int,
        draws: int = 0,
        fitting: Sequence[int] | None = None,
    ) -> Loader:
        """What makes a clip for a bucket of the number of a record.

        Args:
          draws: of the motion maps, on an axis of their own; 0 = one, without the axis.
          fitting: the numbers of the clips for it; None = of all that are long and large enough.

        Raises:
          UserError: the bucket is larger than any clip.
        """
        size, crop = [bucket[name] for name in ("frames", "height", "width")], self.config["crop"]
        if crop > min(size[1:]):
            raise UserError(f"data.crop is {crop}, more than a side of the bucket {_size(bucket)}")
        sizes = self.infos[:, :3]
        if fitting is None:
            fits = sizes == size if self.source.made else sizes >= size
            fitting = np.flatnonzero(fits.all(1)).tolist()
        if not fitting:
            largest = "x".join(f"{side:g}" for side in sizes.max(0))
            raise UserError(
                f"bucket {_size(bucket)} (frames x height x width): no clip fits; the longest, the highest and the "
                f"widest make {largest}; choose another bucket"
            )
        return Loader(self.source, self.infos, fitting, bucket, self.config, tokenizer, training, latent_frames, draws)


def _in_worker() -> bool:
    """In a worker process one thread does all: there is such a process for each core."""
    return multiprocessing.parent_process() is not None


def _of_table(config: Mapping[str, Any]) -> bool:
    return "resolution" in config["buckets"][0]


def _step(rate: float, fps: float) -> int:
    """Every how many frames of a clip of some rate make one of about `fps`; 0 = as it is."""
    return max(round(rate / fps), 1) if fps else 1


def _size(bucket: Mapping[str, Any]) -> str:
    return f"{bucket['frames']}x{bucket['height']}x{bucket['width']}"


@dataclasses.dataclass(frozen=True)
class Loader:
    """Number of a record -> the clip, ready for a batch. Runs in threads and in worker processes; see `Opened`."""

    source: sources.Joined
    infos: Float[np.ndarray, "n 4"]
    fitting: Sequence[int]
    bucket: Mapping[str, Any]
    config: Mapping[str, Any]
    tokenizer: text.Tokenizer | None
    training: bool
    latent_frames: int
    draws: int

    def __call__(self, index: int, rng: np.random.Generator) -> Batch:
        """A clip, or another one in place of a damaged one, which is then named under DAMAGED."""
        damaged = []
        if _in_worker():
            cv2.setNumThreads(1)
        for _ in range(TRIES):
            try:
                return {**self.clip(index, rng), DAMAGED: tuple(damaged)}
            except UserError as error:
                damaged.append((self.source.name(index), str(error)))
                index = self.fitting[rng.integers(len(self.fitting))]
        raise UserError(f"{TRIES} damaged records in a row, such as {damaged[0][0]} ({damaged[0][1]})")

    def clip(self, index: int, rng: np.random.Generator) -> Batch:
        """A clip.

        Raises:
          UserError: the record is damaged.
        """
        return self.make(self.source[index], index, rng)

    def make(self, record: Mapping[str, Any], index: int, rng: np.random.Generator) -> Batch:
        """The clip of a record that has been read; as `clip`."""
        clip = self._cached(record, rng) if self.source.made else self._fresh(record, index, rng)
        if "text" in record:
            states = record["text"]
            clip["text"] = np.zeros((self.source.made["caption_length"], states.shape[1]), states.dtype)
            clip["text"][: len(states)] = states
            clip["text_mask"] = np.arange(len(clip["text"])) < len(states)
        elif self.tokenizer is not None:
            ids, mask = self.tokenizer([text.clean(record["caption"])])
            clip["ids"], clip["text_mask"] = ids[0], mask[0]
        frames = len(clip["latent_mean"]) if "latent_mean" in clip else self.latent_frames
        clip["frame_mask"] = masks.draw(rng, self.config["frame_masks"], frames)
        return clip

    def _cached(self, record: Mapping[str, Any], rng: np.random.Generator) -> Batch:
        clip = {name: record[name] for name in ("latent_mean", "latent_std")}
        if self.config["motion"] != "none":
            variant = rng.integers(len(record["motion_mean"]))
            clip |= {name: record[name][variant] for name in ("motion_mean", "motion_std")}
        return clip | {name: np.float32(record[name]) for name in ("fps", "height", "width")}

    def _fresh(self, record: Mapping[str, Any], index: int, rng: np.random.Generator) -> Batch:
        clip, truth = self.cut(record, index, rng)
        if self.config["motion"] != "none":
            kind, origin, most = (self.config[name] for name in ("motion", "tracks", "max_tracks"))
            maps = motion.motion_maps(rng, kind, origin, most, clip["video"], **truth, draws=max(self.draws, 1))
            clip["maps"] = maps if self.draws else maps[0]
        return self._crop(clip, rng) if self.config["crop"] else clip

    def _crop(self, clip: Batch, rng: np.random.Generator) -> Batch:
        """A random square of a clip, and of its maps, which are blurred and coloured as those of whole clips."""
        side, size = self.config["crop"], clip["video"].shape[1:3]
        y, x = (int(rng.integers(n - side + 1)) if self.training else (n - side) // 2 for n in size)
        squares = {name: clip[name][..., y : y + side, x : x + side, :] for name in ("video", "maps") if name in clip}
        return {**clip, **squares, "height": np.float32(side), "width": np.float32(side)}

    def cut(
        self, record: Mapping[str, Any], index: int, rng: np.random.Generator
    ) -> tuple[Batch, dict[str, np.ndarray]]:
        """The part of a record that a clip of the bucket shows, before it is cropped.

        Returns:
          its video, fps, height and width; and where motion is wanted, its tracks, visible and labels, as far as
          they are given.

        Raises:
          UserError: the record is damaged.
        """
        config, info = self.config, VideoInfo(*self.infos[index])
        frames, height, width = (self.bucket[name] for name in ("frames", "height", "width"))
        rate, length = float(record.get("fps", info.fps)), int(info.frames)
        step = min(_step(rate, self.bucket["fps"]), (length - 1) // (frames - 1)) if frames > 1 else 1
        reach = (frames - 1) * step + 1
        start = int(rng.integers(length - reach + 1)) if self.training else 0
        wanted = range(start, start + reach, step)
        original, _ = read_video(record["video"], only=wanted, strict=True, threads=int(_in_worker()))
        if len(original) < frames:
            raise UserError(f"{len(original)} of {frames} frames decoded")
        video = resize_crop(original, height, width)
        scaled_height, scaled_width, top, left = cover(*original.shape[1:3], height, width)
        clip = {"video": video, "fps": np.float32(rate / step)}
        clip |= {"height": np.float32(height), "width": np.float32(width)}
        window = (top, left, height, width, scaled_height, scaled_width)
        return clip, _cut(record, wanted, window) if config["motion"] != "none" else {}


def _cut(record: Mapping[str, Any], wanted: range, window: tuple[int, ...]) -> dict[str, np.ndarray]:
    """A record's tracks and labels for the frames that are wanted, scaled and cut as the video was."""
    top, left, height, width, scaled_height, scaled_width = window
    truth = {}
    for name, axis in (("tracks", 1), ("visible", 1), ("labels", 0)):
        if name in record:
            if record[name].shape[axis] <= wanted[-1]:
                raise UserError(f"has {record[name].shape[axis]} frames in {name}, and more in its video")
            truth[name] = record[name].take(wanted, axis)
    if "tracks" in truth:
        scaled = truth["tracks"] * (scaled_width, scaled_height) - (left, top)
        truth["tracks"] = (scaled / (width, height)).astype(np.float32)
        inside = ((truth["tracks"] >= 0) & (truth["tracks"] <= 1)).all(-1)
        truth["visible"] = inside & truth.get("visible", True)
    if "labels" in truth:
        old_height, old_width = truth["labels"].shape[1:]
        rows = ((np.arange(height) + top + 0.5) * old_height / scaled_height).astype(int)
        columns = ((np.arange(width) + left + 0.5) * old_width / scaled_width).astype(int)
        truth["labels"] = truth["labels"][:, rows[:, None], columns]
    return truth


def _stack(clips: Sequence[Batch]) -> Batch:
    batch = {name: np.stack([clip[name] for clip in clips]) for name in clips[0] if name != DAMAGED}
    return {**batch, DAMAGED: tuple(found for clip in clips for found in clip[DAMAGED])}
