"""What the page does, without the page: makes videos one at a time, shows how far they are, keeps results."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import shutil
import statistics
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from tora_jax.app import uploads
from tora_jax.app.form import Form
from tora_jax.app.pace import Pace
from tora_jax.backbones.assembly import Models
from tora_jax.conditioning import trajectory
from tora_jax.configs.sampling import Settings
from tora_jax.errors import UserError
from tora_jax.evals import track_lk, traj_error
from tora_jax.sampling import request, writer
from tora_jax.sampling.generate import Progress, video_size

KEPT = 12  # results of a visit
VISITS = 200  # that are remembered; the one longest unused goes first
WAITING = 50  # requests for the device
LOOKS = 6  # at a video while it is made
WARM_UP = "warm-up"  # the visit of nobody

Tell = Callable[[int, int, Callable[[], Array] | None], None]  # steps done, steps in all, the clean latents' estimate


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
    def overlay(self) -> Path | None:
        return self._if_there("tora_trajectory.mp4")

    @property
    def flow(self) -> Path | None:
        return self._if_there("tora_flow.mp4")

    @property
    def files(self) -> list[Path]:
        """To be downloaded: the video, the same with its paths, the trajectories, the settings."""
        optional = (self.overlay, self._if_there("trajectories.json"))
        return [self.video, *filter(None, optional), self.folder / "tora.json"]

    def _if_there(self, name: str) -> Path | None:
        return path if (path := self.folder / name).is_file() else None


@dataclasses.dataclass
class Work:
    """A video that is being made, as the page shows it.

    Attributes:
      wanted: the request.
      place: requests before it; None from its start on.
      done, total: steps.
      left: seconds, as far as anybody knows.
      picture: the first frame as it is now, as an address; `pictures` counts them.
      made, error: how it ended; `error` is also "cancelled".
    """

    wanted: request.Request
    place: int | None = 0
    done: int = 0
    total: int = 0
    left: float | None = None
    picture: str = ""
    pictures: int = 0
    made: Made | None = None
    error: str | None = None
    stamps: collections.deque[float] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=5))

    def wait(self, place: int) -> None:
        self.place = place

    def step(self, done: int, total: int, pace: Pace) -> None:
        """What is left goes by the last steps; at the beginning, where programs compile, by what other videos took."""
        self.place, self.done, self.total = None, done, total
        self.left = pace.seconds(self.wanted, done)
        self.stamps.append(time.monotonic())
        if done > 2:
            each = statistics.median(after - before for before, after in itertools.pairwise(self.stamps))
            self.left = each * (total - done) + (pace.seconds(self.wanted, total) or 0)


@dataclasses.dataclass
class Visit:
    """What one browser tab has made, the latest first, and the wishes to stop, one for each video that is wanted."""

    made: list[Made] = dataclasses.field(default_factory=list)
    wishes: set[threading.Event] = dataclasses.field(default_factory=set)
    work: Work | None = None  # the latest

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
        self.models, self.folder, self.form, self.pace = models, folder, Form(models), Pace(models)
        folder.mkdir(parents=True, exist_ok=True)
        self._line: list[object] = []  # those who wait for the device, and the one who has it
        self._moved = threading.Condition()
        self._guard = threading.Lock()
        self._visits: collections.OrderedDict[str, Visit] = collections.OrderedDict()

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

    # ------------------------------------------------------------------------------------------------ generating

    def expect(self, drawn: Any, asked: Any, files: Mapping[int, str | None]) -> float | None:
        """How many seconds a video will take; None = nobody knows yet.

        Raises:
          UserError: it cannot be made.
        """
        with uploads.named(*filter(None, files.values())):
            if self.form.needs_picture and not files.get(0):
                raise UserError("these weights need a first frame: drop a photo on the canvas")
            if files and any(files.values()) and not self.form.takes_picture:
                raise UserError("these weights take no pictures; remove what is given")
            return self.pace.seconds(self.form.request(drawn, asked, files))

    def begin(self, name: str, drawn: Any, asked: Any, files: Mapping[int, str | None]) -> Work:
        """`generate`, in a thread of its own; the `Work` tells how far it is.

        Raises:
          UserError: for what cannot be, or a visit that has a video under way.
        """
        wanted, visit, wish = self.form.request(drawn, asked, files), self.visit(name), threading.Event()
        with self._guard:
            if any(not each.is_set() for each in visit.wishes):
                raise UserError("this visit has a video under way; wait for it, or cancel it")
            visit.wishes.add(wish)
        self.visit(WARM_UP).cancel()  # what is compiled of it stays
        visit.work = work = Work(wanted)

        def tell(done: int, total: int, clean: Callable[[], Array] | None) -> None:
            work.step(done, total, self.pace)
            if clean is not None and done < total and done % max(total // LOOKS, 1) == 0:
                work.picture, work.pictures = uploads.address(self._look(clean())), work.pictures + 1

        def run() -> None:
            try:
                work.made = self.generate(name, drawn, asked, files, tell, work.wait, wish)
            except CancelledError:
                work.error = "cancelled"
            except UserError as error:
                work.error = str(error)
            except Exception:  # a bug of ours, or no memory: the page lives on, and the log has the rest
                traceback.print_exc()
                work.error = "the video failed; the server's log says why"
            finally:
                visit.wishes.discard(wish)

        threading.Thread(target=run, daemon=True).start()
        return work

    def generate(
        self,
        name: str,
        drawn: Any,
        asked: Any,
        files: Mapping[int, str | None],
        progress: Tell,
        waits: Callable[[int], None] = lambda place: None,
        wish: threading.Event | None = None,
    ) -> Made:
        """Makes a video for a visit, when the device is free.

        Args:
          name: of the visit.
          drawn, asked, files: of `Form.request`.
          progress: told of each step.
          waits: told the number of requests before this one.
          wish: to stop, set by somebody; None = the visit's `cancel` alone sets one.

        Raises:
          UserError: for what cannot be.
          CancelledError: within one step of the wish to stop.
        """
        visit, cancelled = self.visit(name), wish or threading.Event()
        with uploads.named(*filter(None, files.values())):
            wanted = request.place(self.models, self.form.request(drawn, asked, files))
        total = request.steps(self.models, wanted)

        def step(done: int, clean: Callable[[], Array] | None = None) -> None:
            if cancelled.is_set():
                raise CancelledError
            progress(done, total, clean)

        folder = self.folder / uuid.uuid4().hex
        visit.wishes.add(cancelled)
        threading.Thread(target=self._prepare_look, args=(wanted.settings,), daemon=True).start()
        try:
            with self._device(cancelled, waits):
                step(0)
                with uploads.named(*filter(None, files.values())):
                    given = wanted.read()  # one at a time: a clip may take gigabytes
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

    def warm_up(self) -> None:
        """Makes a video of two steps, of the weights' own size: what is compiled stays, and the pace is known after it.

        The first request ends it."""
        own = self.form.defaults
        drawn = [[[0.2, 0.5, 0.0], [0.8, 0.5, 1.0]]]
        size = next(iter(self.form.sizes))
        asked = {"prompt": own.prompt, "size": size, "num_frames": own.num_frames, "steps": 2, "seed": 0}
        if self.form.needs_picture:
            return  # there is none

        def look(done: int, total: int, clean: Callable[[], Array] | None) -> None:
            if clean is not None and done == 1:
                self._look(clean())

        try:
            self.generate(WARM_UP, drawn, asked, {}, look)
        except CancelledError:
            pass  # somebody waits
        finally:
            self.leave(WARM_UP)

    @contextlib.contextmanager
    def _device(self, cancelled: threading.Event, waits: Callable[[int], None]) -> Iterator[None]:
        """The device, in the order of requests."""
        with self._moved:
            if len(self._line) > WAITING:
                raise UserError(f"{WAITING} requests wait already; try again in some minutes")
            self._line.append(cancelled)
        try:
            with self._moved:
                while (place := self._line.index(cancelled)) and not cancelled.is_set():
                    waits(place)
                    self._moved.wait(0.2)  # a wish to stop wakes nobody
            yield
        finally:
            with self._moved:
                self._line.remove(cancelled)
                self._moved.notify_all()

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
            if tracks is not None:
                error = self._error(video, tracks)
                report["traj_error"] = round(error, 2)
                text = json.dumps({"canvas": [1, 1], "trajectories": [p.tolist() for p in wanted.trajectories]})
                (folder / "trajectories.json").write_text(text)
            self.pace.learn(wanted, report["seconds"])
        return Made(folder, error, settings, wanted.lost)

    def _prepare_look(self, settings: Settings) -> None:
        """Compiles what `_look` runs, so that the steps need not wait for it."""
        size = video_size(self.models, settings.height, settings.width)
        cells = (side // self.models.vae.space_factor for side in size)
        latent = jax.ShapeDtypeStruct((1, 1, *cells, self.models.tora.in_channels), jnp.float32)
        self.models.decode.prepare(1, self.models.params["vae"], latent)

    def _look(self, clean: Array) -> UInt8[np.ndarray, "h w 3"]:
        """The first frame of latents [1, t, h, w, c]."""
        video, _ = self.models.decode(1, self.models.params["vae"], clean[:, :1])
        return np.asarray(video)[0, 0]

    def _error(self, video: UInt8[np.ndarray, "t h w 3"], tracks: trajectory.Tracks) -> float:
        height, width = video.shape[1:3]
        tracked, visible = track_lk.track_lk(video, tracks[:, 0])
        return traj_error.traj_error(tracks, tracked, visible, (width, height))["l1"]
