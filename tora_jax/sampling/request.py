"""Requests for videos: settings over a config's own, trajectories, visual conditions.

The command line, batches, the web page and `tora_jax.generate` all use this module.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from tora_jax.backbones.assembly import Models
from tora_jax.conditioning import images, text, trajectory, trajectory_pictures
from tora_jax.conditioning.trajectory import Tracks
from tora_jax.configs import sampling
from tora_jax.configs.sampling import Settings
from tora_jax.errors import UserError, closest
from tora_jax.io import files
from tora_jax.sampling import segments
from tora_jax.sampling.generate import Progress, Result, video_size
from tora_jax.sampling.inputs import Inputs

INPUTS = ("trajectories", "conditions")


@dataclasses.dataclass(frozen=True)
class Request:
    """A request for one video.

    Attributes:
      settings: of the config, under those that were asked for.
      trajectories: None = plain Open-Sora, without the fusers.
      conditions: not read yet.
      lines: how trajectories were read, the presets aside.
      drawn: the given picture that each trajectory was drawn on; None = the video's frame. Empty = that for all.
      lost: what is lost of paths and prompts, in words; None before `place`.
    """

    settings: Settings
    trajectories: Sequence[trajectory.Trajectory] | None = None
    conditions: Sequence[images.Condition] = ()
    lines: tuple[str, ...] = ()
    drawn: Sequence[trajectory_pictures.Drawn | None] = ()
    lost: tuple[str, ...] | None = None

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompt of each part of the video, with its scores."""
        given = self.settings.prompt
        scores = {name: getattr(self.settings, name) for name in sampling.SCORES}
        return tuple(text.append_scores(each, **scores) for each in ([given] if isinstance(given, str) else given))

    @property
    def tracks(self) -> Tracks | None:
        """Of a request that is `placed`: the trajectories at each frame; they stay at the edges of the frame."""
        if self.trajectories is None:
            return None
        return trajectory.tracks(self.trajectories, self.settings.num_frames).clip(0, 1)

    @property
    def shape(self) -> tuple:
        """A key that is equal for requests that one call, of one compilation, can make together."""
        return self.settings.shared, self.trajectories is None, bool(self.conditions)

    @property
    def files(self) -> list[Path]:
        """The files named for trajectories and conditions."""
        named = [each.source for each in self.conditions if not isinstance(each.source, np.ndarray)]
        return [
            *(path for each in self.settings.trajectory for path in trajectory.files(each)),
            *map(files.path, named),
        ]

    def placed(self, size: tuple[int, int]) -> Request:
        """The request with its trajectories in the video's frame, of `size` (height, width).

        What the crop of a picture takes away is in `lost`.

        Raises:
          UserError: it takes away a whole path.
        """
        placed, words = self.trajectories, []
        if any(self.drawn):
            placed, words = trajectory_pictures.place(self.trajectories, self.drawn, size)
        return dataclasses.replace(self, trajectories=placed, drawn=(), lost=(*(self.lost or ()), *words))

    def warn(self, name: str = "") -> None:
        """Warns of what is `lost`.

        Args:
          name: before each warning, such as "line 3: ".
        """
        for each in self.lost or ():
            warnings.warn(f"{name}{each}", stacklevel=3)

    def read(self) -> dict[int, images.Given]:
        """Reads the conditions, by frame, not yet of the video's size.

        Raises:
          UserError: for a file that cannot be read, or does not fit into the video.
        """
        return images.read(self.conditions, self.settings.num_frames, self.settings.fps)


def make(section: Any, given: Mapping[str, Any]) -> Request:
    """Makes a request of settings, and reads its trajectories.

    Args:
      section: the sampling section of a config.
      given: settings by name, which win over the section's. "trajectories": file, preset, points, or a list of them;
        [] or None for no trajectory; without this key, those of the section. "conditions": a list of `Condition` or of
        texts "frame=file[:edit]".

    Raises:
      UserError: for the first mistake.
    """
    known = {*sampling.kinds(), *INPUTS} - {"trajectory"}
    for name in given.keys() - known:
        close = closest(name, known) or ", ".join(sorted(known))
        raise UserError(f"there is no setting {name!r}; did you mean {close}?")
    settings = sampling.resolve(section, {name: value for name, value in given.items() if name not in INPUTS})
    conditions = given.get("conditions") or ()
    if not isinstance(conditions, Sequence) or isinstance(conditions, str):
        raise UserError('conditions should be a list, such as ["0=first.png", "-1=last.png"]')
    conditions = [c if isinstance(c, images.Condition) else images.parse(c) for c in conditions]
    images.check(conditions, settings.num_frames)
    sources = given.get("trajectories", settings.trajectory)
    named = trajectory.names(sources)
    presets = bool(named) and all(trajectory.is_preset(trajectory.find(each)) for each in named)
    pictures = {} if presets or sources is None else images.sizes(conditions, settings.num_frames)
    readings = trajectory.readings(sources, settings.hints, pictures) or []
    settings = dataclasses.replace(settings, trajectory=named if readings else ())
    return Request(
        settings,
        [points for each in readings for points in each.trajectories] if readings else None,
        conditions,
        tuple(f"{each.name}: {each.line}" for each in readings if not trajectory.is_preset(files.path(each.name))),
        tuple(each.drawn for each in readings for _ in each.trajectories),
    )


def place(models: Models, wanted: Request) -> Request:
    """`Request.placed` for the size of the video that models make of it; what prompts lose is in `lost`, too."""
    if wanted.lost is not None:
        return wanted
    lost, negative = [], wanted.settings.negative_prompt
    if models.tokenizer is not None:
        names = (
            [f"prompt {i}" for i in range(1, len(wanted.prompts) + 1)] if len(wanted.prompts) > 1 else ["the prompt"]
        )
        texts = dict(zip(names, wanted.prompts, strict=True)) | {"the negative prompt": negative}
        lost = [f"{name} {loss}" for name, text in texts.items() for loss in models.tokenizer.losses(text)]
    placed = dataclasses.replace(wanted, lost=tuple(lost))
    return placed.placed(video_size(models, wanted.settings.height, wanted.settings.width))


def generate(
    models: Models,
    requests: Sequence[Request],
    given: Sequence[Mapping[int, images.Given]] | None = None,
    *,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> Iterator[list[Result]]:
    """`segments.generate_pieces` for requests of one shape.

    Args:
      given: of `Request.read`; None reads them.

    Warns:
      of what is lost, for requests that are not `place`d yet.
    """
    settings = requests[0].settings
    size = video_size(models, settings.height, settings.width)
    given = [each.read() for each in requests] if given is None else given
    placed = [place(models, each) for each in requests]
    for before, after in zip(requests, placed, strict=True):
        if before is not after:
            after.warn()
    inputs = [
        Inputs(each.prompts, each.tracks, images.fit(pictures, size))
        for each, pictures in zip(placed, given, strict=True)
    ]
    seeds = [each.settings.seed for each in requests]
    return segments.generate_pieces(models, inputs, settings, seeds=seeds, mesh=mesh, progress=progress)


def steps(models: Models, wanted: Request) -> int:
    """The number of the sampler's steps for a request, in all segments."""
    settings = wanted.settings
    plan = segments.plan(models, settings.num_frames, settings.segment, settings.overlap)
    return len(plan.starts) * settings.steps
