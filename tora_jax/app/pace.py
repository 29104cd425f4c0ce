"""How long videos take here: learned from those that were made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tora_jax.backbones.assembly import Models
from tora_jax.sampling import segments
from tora_jax.sampling.generate import video_size
from tora_jax.sampling.request import Request


class Pace:
    """Seconds of videos, in proportion to their latents, and of sampling also to steps and passes.

    Compilation comes on top for a shape that was not made yet.
    """

    def __init__(self, models: Models):
        self._models = models
        self._step = self._rest = self._compile = 0.0  # seconds: a latent's pass, a latent's other parts, a shape
        self._shapes: set[tuple] = set()

    def learn(self, wanted: Request, seconds: Mapping[str, Mapping[str, float]]) -> None:
        """Takes the seconds of a video that was made, as a `Result` has them."""
        latents, passes = self._size(wanted)
        rest = sum(spent["run"] for part, spent in seconds.items() if part != "sample")
        self._step = seconds["sample"]["run"] / (latents * passes * wanted.settings.steps)
        self._rest = rest / latents
        self._compile = max(self._compile, sum(spent["compile"] for spent in seconds.values()))
        self._shapes.add(self._shape(wanted))

    def seconds(self, wanted: Request, done: int = 0) -> float | None:
        """What is left of a video after `done` steps of all its segments; None before anything was learned."""
        if not self._shapes:
            return None
        latents, passes = self._size(wanted)
        steps = wanted.settings.steps - done / self._segments(wanted)
        new = 0.0 if done or self._shape(wanted) in self._shapes else self._compile
        return latents * (max(steps, 0) * passes * self._step + self._rest) + new

    def _plan(self, wanted: Request) -> segments.Segments:
        settings = wanted.settings
        return segments.plan(self._models, settings.num_frames, settings.segment, settings.overlap)

    def _segments(self, wanted: Request) -> int:
        return len(self._plan(wanted).starts)

    def _size(self, wanted: Request) -> tuple[int, int]:
        """The cells of all latents, and the passes of each step."""
        settings, plan, vae = wanted.settings, self._plan(wanted), self._models.vae
        height, width = video_size(self._models, settings.height, settings.width)
        cells = vae.latent_frames(plan.length) * (height // vae.space_factor) * (width // vae.space_factor)
        third = wanted.trajectories is not None and settings.trajectory_guidance != 1
        return len(plan.starts) * cells, 3 if third else 1 if settings.guidance == 1 else 2

    def _shape(self, wanted: Request) -> tuple[Any, ...]:
        """What programs are compiled for."""
        settings, (_, passes) = wanted.settings, self._size(wanted)
        moving, length = wanted.trajectories is not None, self._plan(wanted).length
        return settings.height, settings.width, length, passes, moving, bool(wanted.conditions)
