"""What the page does, without the page: checks what comes from a browser, makes videos one at a time, keeps results."""

from __future__ import annotations

import base64
import collections
import contextlib
import dataclasses
import io
import json
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from tora_jax.backbones.assembly import Models
from tora_jax.conditioning import images, motion_maps, trajectory, trajectory_hints, trajectory_pictures
from tora_jax.configs import sampling
from tora_jax.errors import UserError
from tora_jax.evals import track_lk, traj_error
from tora_jax.io.video import cover, read_image, resize_crop
from tora_jax.sampling import request, writer
from tora_jax.sampling.generate import Progress, video_size

KEPT = 12  # results of a visit
VISITS = 200  # that are remembered; the one longest unused goes first
LONGEST = 8  # times the model's own length
MOST_STEPS, MOST_TEXT, MOST_PATHS = 100, 2000, 32
PREVIEW_SIDE, PREVIEW_FRAMES = 160, 24  # of the flow map that is shown while drawing


class CancelledError(Exception):
    """The person does not want it any more."""


@dataclasses.dataclass(frozen=True)
class Made:
    """A result: its files, how far its objects are from the paths, in pixels (None without a path), and what was lost
    of the words."""

    folder: Path
    error: float | None
    settings: Mapping[str, Any]
    lost: tuple[str, ...] = ()

    @property
    def video(self) -> Path:
        return self.folder / "tora.mp4"

    @property
    def poster(self) -> Path:
        """The frame in the middle, for a gallery."""
        return self.folder / "poster.webp"

    @property
    def overlay(self) -> Path | None:
        return self._if_there("tora_trajectory.mp4")

    @property
    def flow(self) -> Path | None:
        return self._if_there("tora_flow.mp4")

    @property
    def files(self) -> list[Path]:
        """To be downloaded: the video, the trajectories, the settings."""
        return [self.video, *filter(None, [self._if_there("trajectories.json")]), self.folder / "tora.json"]

    def _if_there(self, name: str) -> Path | None:
        return path if (path := self.folder / name).is_file() else None


@dataclasses.dataclass
class Visit:
    """What one browser tab has made, the latest first, and the wishes to stop, one for each video that is wanted."""

    made: list[Made] = dataclasses.field(default_factory=list)
    wishes: set[threading.Event] = dataclasses.field(default_factory=set)

    def cancel(self) -> None:
        """Stops what is wanted now, and nothing that is asked for later."""
        for wish in self.wishes.copy():
            wish.set()


class Studio:
    """The models, and everything that visitors ask of them.

    Args:
      models: with the sampling section of their config.
      folder: of the results; the caller removes it.
    """

    def __init__(self, models: Models, folder: Path):
        self.models, self.folder = models, folder
        folder.mkdir(parents=True, exist_ok=True)
        self._device = threading.Lock()  # one generation at a time
        self._guard = threading.Lock()
        self._visits: collections.OrderedDict[str, Visit] = collections.OrderedDict()
        defaults = sampling.resolve(models.sampling, {})
        height, width = video_size(models, defaults.height, defaults.width)
        self.defaults = dataclasses.replace(defaults, height=height, width=width)
        self.sizes = _sizes(models, height, width)

    # ------------------------------------------------------------------------------------------------ visits

    def visit(self, name: str) -> Visit:
        """The visit of a browser tab."""
        with self._guard:
            visit = self._visits.setdefault(name, Visit())
            self._visits.move_to_end(name)
            while len(self._visits) > VISITS:
                self._forget(*self._visits.popitem(last=False))
            return visit

    def leave(self, name: str) -> None:
        """The tab was closed: what it still wants is stopped, and what it made is removed."""
        with self._guard:
            if name in self._visits:
                self._forget(name, self._visits.pop(name))

    def _forget(self, name: str, visit: Visit) -> None:
        visit.cancel()
        for made in visit.made:
            shutil.rmtree(made.folder, ignore_errors=True)

    # ------------------------------------------------------------------------------------------------ drawing

    def trajectories(self, drawn: Any) -> list[trajectory.Trajectory] | None:
        """The canvas's value -> trajectories; None where nothing is drawn.

        Raises:
          UserError: it holds something else.
        """
        drawn = drawn.get("trajectories") if isinstance(drawn, dict) else None
        if not drawn:
            return None
        if not isinstance(drawn, list) or len(drawn) > MOST_PATHS:
            raise UserError(f"give at most {MOST_PATHS} paths")
        return trajectory.parse({"canvas": [1, 1], "trajectories": drawn}, name="the drawing")

    def read_trajectories(
        self, path: str, size: str, num_frames: int, picture: str | None = None, **said: str | None
    ) -> tuple[list[list[list[float]]], str]:
        """An uploaded file -> points in 0..1 for the canvas, and a word on how it was read.

        Args:
          picture: the first frame; paths that were drawn on it stay on it.
          said: settings of reading (`sampling.READING`).
        """
        shape = self._size(size)
        with _named(path, *filter(None, [picture])):
            hints = trajectory_hints.hints(
                *(said.get(name) or None for name in sampling.READING), num_frames=self._frames(num_frames)
            )
            pictures = images.sizes([images.Condition(0, picture)], 1) if picture else {}
            (reading,) = trajectory.readings([path], hints, pictures)
            paths = reading.trajectories
            paths, words = trajectory_pictures.place(paths, [reading.drawn] * len(paths), shape)
        points = [np.column_stack([each[:, :2].clip(0, 1), each[:, 2:]]).tolist() for each in paths]
        lines = [f"{path}: {reading.line}", *words]
        return points, _by_name("; ".join(lines), path, picture or path)

    def preview(self, drawn: Any, size: str, num_frames: int) -> str:
        """The flow map of a drawing, small and moving: the address of a picture, with the picture in it."""
        points = self.trajectories(drawn)
        height, width = self._size(size)
        scale = min(PREVIEW_SIDE / min(height, width), 1)
        length = self._frames(num_frames)
        frames = min(length, PREVIEW_FRAMES)
        tracks = trajectory.tracks(points or [], frames)
        maps = motion_maps.displacement_maps(tracks, round(height * scale), round(width * scale))
        return _address(motion_maps.flow_to_rgb(maps)[min(1, frames - 1) :], 1000 * length / self.defaults.fps / frames)

    def picture(self, path: str, size: str) -> tuple[str, list[float]]:
        """An uploaded picture as the model will see it, as an address; and what the crop leaves of it.

        Returns:
          the address, and left, top, right, bottom in 0..1 of the picture.
        """
        with _named(path):
            picture = read_image(path)
        high, wide = self._size(size)
        height, width, top, left = cover(*picture.shape[:2], high, wide)
        seen = [left / width, top / height, (left + wide) / width, (top + high) / height]
        return _address(resize_crop(picture, high, wide)[None]), seen

    # ------------------------------------------------------------------------------------------------ generating

    def generate(
        self,
        name: str,
        drawn: Any,
        form: Mapping[str, Any],
        files: Mapping[int, str | None],
        progress: Callable[[int, int], None],
    ) -> Made:
        """Makes a video for a visit, when the device is free.

        Args:
          name: of the visit.
          drawn: the canvas's value.
          form: prompt, size and settings of sampling.
          files: frame -> an uploaded picture or clip.
          progress: told (steps done, steps in all).

        Raises:
          UserError: for what cannot be.
          CancelledError: within one step of the wish to stop.
        """
        visit, cancelled = self.visit(name), threading.Event()
        with _named(*filter(None, files.values())):
            wanted = request.place(self.models, self._request(drawn, form, files))
            given = wanted.read()
        total = request.steps(self.models, wanted)

        def step(done: int, _: Any = None) -> None:
            if cancelled.is_set():
                raise CancelledError
            progress(done, total)

        folder = self.folder / uuid.uuid4().hex
        visit.wishes.add(cancelled)
        try:
            with self._device:
                step(0)
                made = self._make(folder, wanted, given, step)
            with self._guard:
                if self._visits.get(name) is not visit:  # the tab was closed in the meantime
                    raise CancelledError
                visit.made.insert(0, made)
                old, visit.made[KEPT:] = visit.made[KEPT:], []
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            visit.wishes.discard(cancelled)
        for each in old:
            shutil.rmtree(each.folder, ignore_errors=True)
        return made

    def _request(self, drawn: Any, form: Mapping[str, Any], files: Mapping[int, str | None]) -> request.Request:
        form = {key: value for key, value in form.items() if value not in (None, "") or key == "prompt"}
        texts = [form[key] for key in ("prompt", "negative_prompt", "camera_motion") if key in form]
        if not all(isinstance(each, str) and len(each) <= MOST_TEXT for each in texts):
            raise UserError(f"a prompt is a text of at most {MOST_TEXT} letters")
        height, width = self._size(form.pop("size", ""))
        form |= {"height": height, "width": width, "num_frames": self._frames(form.get("num_frames"))}
        for key in ("steps", "seed"):
            form[key] = _whole(form.get(key), key)
        if form["steps"] > MOST_STEPS:
            raise UserError(f"steps is {form['steps']}; it may be {MOST_STEPS} here")
        conditions = [images.Condition(frame, path) for frame, path in files.items() if path]
        # What sampling is asked for beside the form stands in the config: sizes there would be in the way.
        section = {k: v for k, v in self.models.sampling.items() if k not in ("resolution", "height", "width")}
        section |= {"segment": self.defaults.segment}
        points = self.trajectories(drawn)
        wanted = request.make(section, {**form, "trajectories": None, "conditions": conditions})
        return dataclasses.replace(wanted, trajectories=points)

    def _make(self, folder: Path, wanted: request.Request, given: Mapping, step: Progress) -> Made:
        tracks = wanted.tracks
        settings = {k: v for k, v in wanted.settings.report().items() if k != "trajectory"}
        report: dict[str, Any] = {"settings": settings, "lost": wanted.lost, "weights": Path(self.models.origin).name}
        pieces = []
        with writer.open_files(folder / "tora.mp4", tracks, report) as write:
            for (piece,) in request.generate(self.models, [wanted], [given], progress=step):
                write(piece)
                pieces.append(piece.video)
            video, error = np.concatenate(pieces), None
            Image.fromarray(video[len(video) // 2]).save(folder / "poster.webp")
            if tracks is not None:
                error = self._error(video, tracks)
                report["traj_error"] = round(error, 2)
                text = json.dumps({"canvas": [1, 1], "trajectories": [p.tolist() for p in wanted.trajectories]})
                (folder / "trajectories.json").write_text(text)
        return Made(folder, error, settings, wanted.lost)

    def _error(self, video: UInt8[np.ndarray, "t h w 3"], tracks: trajectory.Tracks) -> float:
        height, width = video.shape[1:3]
        tracked, visible = track_lk.track_lk(video, tracks[:, 0])
        return traj_error.traj_error(tracks, tracked, visible, (width, height))["l1"]

    # ------------------------------------------------------------------------------------------------ checks

    def _size(self, name: Any) -> tuple[int, int]:
        if not isinstance(name, str) or name not in self.sizes:
            raise UserError(f"the size {str(name)[:20]!r} is not one of {', '.join(self.sizes)}")
        return self.sizes[name]

    def _frames(self, count: Any) -> int:
        count, most = _whole(count, "frames"), LONGEST * self.defaults.segment
        if not 1 <= count <= most:
            raise UserError(f"frames is {count}; it may be from 1 to {most} here")
        return count


def _whole(value: Any, name: str) -> int:
    if value is None:
        raise UserError(f"{name} is empty; give a whole number")
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or value % 1:
        raise UserError(f"{name} is {str(value)[:20]!r}; give a whole number")
    return int(value)


def _sizes(models: Models, height: int, width: int) -> dict[str, tuple[int, int]]:
    """The config's own size, and landscape, portrait and square of about its area, by name."""
    cell = 2 * models.vae.space_factor
    side = (height * width) ** 0.5
    shapes = {(height, width)}
    for ratio in (9 / 16, 1, 16 / 9):
        shapes.add(tuple(max(round(side * factor / cell), 1) * cell for factor in (ratio**0.5, ratio**-0.5)))
    return {f"{w}x{h}": (h, w) for h, w in sorted(shapes, key=lambda s: (s != (height, width), s))}


@contextlib.contextmanager
def _named(*paths: str) -> Iterator[None]:
    """What goes wrong inside has the names of files in place of where they lie."""
    try:
        yield
    except UserError as error:
        raise UserError(_by_name(str(error), *paths)) from None


def _by_name(text: str, *paths: str) -> str:
    """Names of files in place of where they lie."""
    for path in paths:
        text = text.replace(str(path), Path(path).name)
    return text


def _address(frames: UInt8[np.ndarray, "t h w 3"], milliseconds: float = 100.0) -> str:
    first, *rest = map(Image.fromarray, frames)
    file = io.BytesIO()
    options = {"save_all": True, "append_images": rest, "duration": round(milliseconds), "loop": 0} if rest else {}
    first.save(file, "WEBP", quality=85, method=0, **options)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
