"""Clips of a bucket's size, made of the records of the sources."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float

from tora_jax.conditioning import text
from tora_jax.data import buckets, frame_masks, motion, object_masks, sources
from tora_jax.errors import UserError
from tora_jax.io.video import VideoInfo, cover, read_image, read_video, resize_crop

TRIES = 16  # records in place of a damaged one
DAMAGED = "damaged"  # the entry of a clip that the iterator over batches takes out

Clip = dict[str, Any]  # the entries of a batch, see `pipeline`, without the leading axis


class Clips:
    """The clips of a split in the sources of a config, with their sizes, which are all read at once.

    Attributes:
      source: all records.
      infos: `VideoInfo` of each, zeros where the record is damaged.
      damaged: name of each damaged record -> what is wrong with it.
      reasons: number of each -> the same in few words.

    Raises:
      UserError: a source is missing, empty or unreadable, or an option is none of those of `pipeline.batches`.
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
        frame_masks.check(config["frame_masks"])
        self.config = config
        self.source = sources.Joined(config["sources"], split)
        if not len(self.source):
            what = ", ".join(f"{count} {name}" for name, count in self.source.passed_over.items())
            others = f" (passed over: {what})" if what else ""
            raise UserError(f"{', '.join(map(str, config['sources']))}: split {split!r} has no clips{others}")
        made = self.source.made
        if made and config["object_masks"]:
            raise UserError(
                "data.object_masks needs clips, and the sets are precomputed: give the clips as data.sources"
            )
        if made and (config["crop"] or config["motion"] not in ("none", made["motion"])):
            raise UserError(
                f"the precomputed sets hold {made['motion']} motion of whole clips: set data.motion to "
                f"{made['motion']!r} and data.crop to 0, or precompute again"
            )
        self.infos, damaged = sources.scan(self.source)
        self.damaged = {self.source.name(index): str(error) for index, error in damaged.items()}
        self.reasons = {index: getattr(error, "reason", "") or "damaged" for index, error in damaged.items()}
        if len(damaged) == len(self.source):
            name, reason = next(iter(self.damaged.items()))
            raise UserError(f"{name}: damaged ({reason}), and so are all others of the split")

    def fill_buckets(self, seed: int) -> list[tuple[Mapping[str, Any], list[int] | None]]:
        """The config's buckets, each with the numbers of its clips; None = all that fit.

        Of Open-Sora's table these are the buckets that the clips are drawn into, by the clip's number and the seed.

        Raises:
          UserError: no clip is drawn into any, or the table is wrong.
        """
        if not uses_table(self.config):
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
            if choice := draw(int(frames), int(height), int(width), seed + index * len(levels), stride(fps, rate)):
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
    ) -> ClipLoader:
        """The function that makes a clip for a bucket of the number of a record.

        Args:
          latent_frames: of a clip, for its frame mask.
          draws: of the motion maps, on an axis of their own; 0 = one, without the axis.
          fitting: the numbers of the bucket's clips; None = of all that are long and large enough.

        Raises:
          UserError: the bucket is larger than any clip.
        """
        size, crop = [bucket[name] for name in ("frames", "height", "width")], self.config["crop"]
        if crop > min(size[1:]):
            raise UserError(f"data.crop is {crop}, more than a side of the bucket {size_name(bucket)}")
        sizes = self.infos[:, :3]
        if fitting is None:
            fits = sizes == size if self.source.made else sizes >= size
            fitting = np.flatnonzero(fits.all(1)).tolist()
        if not fitting:
            largest = "x".join(f"{side:g}" for side in sizes.max(0))
            raise UserError(
                f"bucket {size_name(bucket)} (frames x height x width): no clip fits; the longest, the highest and the "
                f"widest make {largest}; choose another bucket"
            )
        return ClipLoader(
            self.source, self.infos, fitting, bucket, self.config, tokenizer, training, latent_frames, draws
        )


@dataclasses.dataclass(frozen=True)
class ClipLoader:
    """Number of a record -> the clip, ready for a batch. Runs in threads and in worker processes.

    Attributes:
      source, infos, config: of `Clips`.
      fitting: the numbers of the records that fit the bucket.
      bucket, tokenizer, training, latent_frames, draws: see `Clips.loader`.
    """

    source: sources.Source
    infos: Float[np.ndarray, "n 4"]
    fitting: Sequence[int]
    bucket: Mapping[str, Any]
    config: Mapping[str, Any]
    tokenizer: text.Tokenizer | None
    training: bool
    latent_frames: int
    draws: int

    def __call__(self, index: int, rng: np.random.Generator) -> Clip:
        """A clip, or another one in place of a damaged one, which is then named under DAMAGED."""
        damaged = []
        if _in_worker():
            cv2.setNumThreads(1)
        for _ in range(TRIES):
            try:
                return {**self.clip(self.source[index], index, rng), DAMAGED: tuple(damaged)}
            except UserError as error:
                damaged.append((self.source.name(index), str(error)))
                index = self.fitting[rng.integers(len(self.fitting))]
        raise UserError(f"{TRIES} damaged records in a row, such as {damaged[0][0]} ({damaged[0][1]})")

    def clip(self, record: Mapping[str, Any], index: int, rng: np.random.Generator) -> Clip:
        """The clip of a record.

        Args:
          index: the record's number.

        Raises:
          UserError: the record is damaged.
        """
        clip = self._cached(record, rng) if self.source.made else self._fresh(record, index, rng)
        if "text" in record:
            states = record["text"]
            clip["text"] = np.zeros((self.source.made["caption_length"], states.shape[1]), states.dtype)
            clip["text"][: len(states)] = states
            clip["text_mask"] = np.arange(len(clip["text"])) < len(states)
        elif self.tokenizer is not None:
            ids, mask = self.tokenizer([self.tokenizer.clean(record["caption"])])
            clip["ids"], clip["text_mask"] = ids[0], mask[0]
        frames = len(clip["latent_mean"]) if "latent_mean" in clip else self.latent_frames
        clip["frame_mask"] = frame_masks.draw(rng, self.config["frame_masks"], frames)
        return clip

    def _cached(self, record: Mapping[str, Any], rng: np.random.Generator) -> Clip:
        clip = {name: record[name] for name in ("latent_mean", "latent_std")}
        if self.config["motion"] != "none":
            variant = rng.integers(len(record["motion_mean"]))
            clip |= {name: record[name][variant] for name in ("motion_mean", "motion_std")}
        return clip | {name: np.float32(record[name]) for name in ("fps", "height", "width")}

    def _fresh(self, record: Mapping[str, Any], index: int, rng: np.random.Generator) -> Clip:
        clip, truth = self.excerpt(record, index, rng)
        if self.config["object_masks"]:
            clip["object_mask"] = object_masks.object_masks(clip["video"], truth.get("labels"))
        if self.config["motion"] != "none":
            kind, origin, most = (self.config[name] for name in ("motion", "tracks", "max_tracks"))
            maps = motion.motion_maps(rng, kind, origin, most, clip["video"], **truth, draws=max(self.draws, 1))
            clip["maps"] = maps if self.draws else maps[0]
        return self._crop(clip, rng) if self.config["crop"] else clip

    def _crop(self, clip: Clip, rng: np.random.Generator) -> Clip:
        """A random square of a clip, of its maps and of its object mask, around objects where there are any.

        Blur and colours of the maps are those of the whole clip.
        """
        side, size = self.config["crop"], clip["video"].shape[1:3]
        if self.training and "object_mask" in clip and clip["object_mask"].any():
            y, x = object_masks.square_around(rng, clip["object_mask"], side)
        else:
            y, x = (int(rng.integers(n - side + 1)) if self.training else (n - side) // 2 for n in size)
        squares = {name: clip[name][..., y : y + side, x : x + side, :] for name in ("video", "maps") if name in clip}
        if "object_mask" in clip:
            squares["object_mask"] = clip["object_mask"][:, y : y + side, x : x + side]
        return {**clip, **squares, "height": np.float32(side), "width": np.float32(side)}

    def excerpt(
        self, record: Mapping[str, Any], index: int, rng: np.random.Generator
    ) -> tuple[Clip, dict[str, np.ndarray]]:
        """The part of a record that a clip of the bucket shows, before the random crop.

        Returns:
          video, fps, height and width; and where motion or object masks are wanted, those of tracks, visible and labels
          that are given.

        Raises:
          UserError: the record is damaged.
        """
        config, info = self.config, VideoInfo(*self.infos[index])
        frames, height, width = (self.bucket[name] for name in ("frames", "height", "width"))
        rate, length = float(record.get("fps", info.fps)), int(info.frames)
        step = min(stride(rate, self.bucket["fps"]), (length - 1) // (frames - 1)) if frames > 1 else 1
        reach = (frames - 1) * step + 1
        start = int(rng.integers(length - reach + 1)) if self.training else 0
        wanted = range(start, start + reach, step)
        if "picture" in record:
            original = read_image(record["picture"])[None]
        else:
            original, _ = read_video(record["video"], only=wanted, strict=True, threads=int(_in_worker()))
        if len(original) < frames:
            raise UserError(f"{len(original)} of {frames} frames decoded")
        video = resize_crop(original, height, width)
        scaled_height, scaled_width, top, left = cover(*original.shape[1:3], height, width)
        clip = {"video": video, "fps": np.float32(rate / step)}
        clip |= {"height": np.float32(height), "width": np.float32(width)}
        window = (top, left, height, width, scaled_height, scaled_width)
        needed = config["motion"] != "none" or config["object_masks"]
        return clip, _truth(record, wanted, window) if needed else {}


def _truth(record: Mapping[str, Any], wanted: range, window: tuple[int, ...]) -> dict[str, np.ndarray]:
    """A record's tracks and labels of the wanted frames, scaled and cut as the video was."""
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


def uses_table(config: Mapping[str, Any]) -> bool:
    """Whether the buckets of a config are those of Open-Sora's table."""
    return "resolution" in config["buckets"][0]


def size_name(bucket: Mapping[str, Any]) -> str:
    """Frames, height and width of a bucket, for people: "17x128x128"."""
    return f"{bucket['frames']}x{bucket['height']}x{bucket['width']}"


def stride(rate: float, fps: float) -> int:
    """The step between the frames that are kept of a clip, so that its rate becomes about `fps`; 0 = as it is."""
    return max(round(rate / fps), 1) if fps else 1


def _in_worker() -> bool:
    """Whether this is a worker process. One thread does all there: there is such a process for each core."""
    return multiprocessing.parent_process() is not None
