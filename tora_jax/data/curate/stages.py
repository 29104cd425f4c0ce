"""The stages that look at one source video each: what is in it, its clips, how they move, how they look.

Each writes a file for each source video, unless it is there. Between stages travel only names; videos, clips and tracks
lie in the files, so that memory does not grow with the data.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import apache_beam as beam
import cv2
import numpy as np

from tora_jax.data.curate import appearance, camera, cuts, probe, tracks, work
from tora_jax.data.curate.probe import UnusableError
from tora_jax.data.curate.work import WorkFiles
from tora_jax.io.files import local

STAGES = ("probe", "clips", "motion", "looks")


class SourceVideo(NamedTuple):
    """A source video: the digest of its content, and where it lies."""

    key: str
    path: str


class Stage(beam.PTransform):
    """SourceVideo videos -> the same, once the stage's file of each is there.

    Args:
      name: "probe", "clips", "motion" or "looks"; each needs the files of those before it (but "looks" not those of
        "motion").
    """

    def __init__(self, name: str, files: WorkFiles):
        super().__init__(label=name)
        self._name, self._files = name, files

    def expand(self, sources: beam.PCollection) -> beam.PCollection:
        return sources | beam.ParDo(_Fill(self._name, self._files))


class _Fill(beam.DoFn):
    def __init__(self, stage: str, files: WorkFiles):
        self._stage, self._files = stage, files

    def setup(self) -> None:
        cv2.setNumThreads(1)  # there is a process for each core
        make = {"probe": _probe, "clips": _clips, "motion": _motion, "looks": _appearance}[self._stage]
        self._fill = make(self._files)

    def process(self, source: SourceVideo) -> Iterator[SourceVideo]:
        path = self._files.path(self._stage, source.key)
        if not work.exists(path):
            self._fill(source, path)
        yield source


Fill = Callable[[SourceVideo, str], None]


def _probe(files: WorkFiles) -> Fill:
    options = files.options["probe"]

    def fill(source: SourceVideo, path: str) -> None:
        found: dict[str, Any] = {"reason": ""}
        try:
            video, look = probe.probe(local(source.path), options["damaged_share"], options["threshold"])
            pieces = cuts.plan(video, look, *(options[name] for name in ("shortest", "longest", "loss")))
            found |= {"video": dataclasses.asdict(video), "pieces": [dataclasses.asdict(piece) for piece in pieces]}
            starts = look.ticks[[0, *look.cuts]]
            used = {int(np.searchsorted(starts, piece.start, "right")) for piece in pieces}
            found |= {"scenes": len(starts), "short scenes": len(starts) - len(used)}
            if not pieces:
                raise UnusableError("variable rate" if look.gaps else "too short")
        except UnusableError as error:
            found["reason"] = str(error)
        work.write_json(path, found)

    return fill


def _clips(files: WorkFiles) -> Fill:
    def fill(source: SourceVideo, path: str) -> None:
        found, damaged = work.read_json(files.path("probe", source.key)), []
        video = probe.Video(**{**found["video"], "traits": tuple(found["video"]["traits"])})

        def members() -> Iterator[tuple[str, bytes]]:
            for i, piece in enumerate(found["pieces"]):
                try:
                    yield f"{i:05d}.mp4", cuts.cut(here, video, cuts.Piece(**piece))
                except UnusableError:
                    damaged.append(i)

        here = local(source.path)
        work.write_zip(path, members(), lambda: {"damaged": damaged})

    return fill


def _motion(files: WorkFiles) -> Fill:
    options = files.options["motion"]
    flow = camera.make_flow(options["method"], options["weights"])

    def fill(source: SourceVideo, path: str) -> None:
        scores: dict[int, dict[str, Any]] = {}

        def members() -> Iterator[tuple[str, bytes]]:
            for i, clip in work.each_clip(files, source.key):
                rng = np.random.default_rng(int(work.digest(work.clip_name(source.key, i))[:8], 16))
                try:
                    scores[i], arrays = measure(clip, flow, options, rng)
                except UnusableError:
                    continue
                for name, array in arrays.items():
                    np.save(file := io.BytesIO(), array)
                    yield f"{i:05d}.{name}.npy", file.getvalue()

        work.write_zip(path, members(), lambda: scores)

    return fill


def _appearance(files: WorkFiles) -> Fill:
    options = files.options["looks"]
    judge = appearance.make_judge(options["clip"], options["head"]) if options["clip"] else None

    def fill(source: SourceVideo, path: str) -> None:
        found: dict[int, dict[str, Any]] = {}
        for i, clip in work.each_clip(files, source.key):
            try:
                frames, _ = appearance.read_frames(clip, appearance.spread, options["short"])
            except UnusableError:
                continue
            score = judge(frames) if judge else None
            found[i] = {"hash": appearance.perceptual_hash(frames).hex(), "aesthetic": score}
        work.write_json(path, found)

    return fill


def measure(
    clip: bytes, flow: camera.Flow, options: Mapping[str, Any], rng: np.random.Generator
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Size, motion scores and tracks of a clip.

    Args:
      options: with all of
        short: pixels of the shorter side, and fps: frames a second, at which flow is found. static: see
          `camera.analyse`. track_seconds: between the first frames of tracks. tracks: from each such frame, at most.

    Raises:
      UnusableError: "damaged".
    """

    def sampled(count: int, rate: float) -> np.ndarray:
        wanted = min(max(round((count - 1) * options["fps"] / rate) + 1, 2), count)
        return np.round(np.linspace(0, count - 1, wanted)).astype(int)

    video, info = appearance.read_frames(clip, sampled, options["short"])
    at = sampled(info.frames, info.fps)
    seconds = (info.frames - 1) / info.fps / max(len(at) - 1, 1)
    forward = flow(video)
    found = camera.analyse(video, forward, seconds, options["static"])
    paths, seen = np.zeros((0, len(at), 2), np.float32), np.zeros((0, len(at)), bool)
    if found.masks.any():
        backward = flow(video[::-1])[::-1]
        starts = max(round(options["track_seconds"] / seconds), 1)
        paths, seen = tracks.inside_objects(rng, video, forward, backward, found.masks, starts, options["tracks"])
    paths, seen = tracks.to_all_frames(paths, seen, at)
    scores = {**info._asdict(), "flow": camera.flow_score(forward, seconds)}
    scores |= {field.name: getattr(found, field.name) for field in dataclasses.fields(found) if field.name != "masks"}
    return scores, {"tracks": paths, "visible": seen}
