"""What the parts of a backbone must have: Protocols, so that a new part is a file and no subclass.

Timesteps run from 1000 (noise) to 0 (clean). Videos are float32 [b, t, h, w, 3] in -1..1, latents float32
[b, t, h, w, c].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Bool, Float, Key, PRNGKeyArray, Real


@runtime_checkable
class VAE(Protocol):
    """A video <-> latents. The VAE alone knows how frames and latents stand to each other."""

    @property
    def space_factor(self) -> int:
        """Pixels for each latent cell, along one side."""

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of a video of `num_frames` (1 or more)."""

    def latent_of(self, frame: int, num_frames: int) -> int:
        """The latent frame that holds `frame` (0 .. num_frames - 1) of a video of `num_frames`."""

    def parts(self, num_frames: int) -> list[range]:
        """The frames of each part that is encoded for itself."""

    def encoded_alone(self, part: range) -> bool:
        """Whether the first frame of one of `parts` has a latent for itself: a still there is encoded as one frame."""

    def reusable(self, num_frames: int, latents: int = 0) -> tuple[int, int, bool]:
        """What a video can take over from the end of another one of that length; see `VideoVAE.reusable`."""

    def encode(self, video: Real[Array, "b t h w 3"], rng: PRNGKeyArray | None = None) -> Float[Array, "b t4 h8 w8 c"]:
        """Normalised latents (of uint8, too); `rng` samples the posterior, None takes its mean."""

    def decode(self, latents: Float[Array, "b t4 h8 w8 c"], num_frames: int, finish: Callable = ...) -> Any:
        """The video of `num_frames`, about -1..1, not clipped; `finish` makes of frames what is wanted of each."""


@runtime_checkable
class Denoiser(Protocol):
    """Noisy latents, conditions and motion features -> what the process calls a prediction."""

    in_channels: int
    given_channels: int  # in which a first frame is given beside the latents; 0 = frames are given in their places
    caption_channels: int
    caption_length: int
    patch: int
    depth: int

    def extract(self, motion: Float[Array, "b t h w c"]) -> Any:
        """Motion latents -> features, once for all steps."""

    def denoise(self, x: Float[Array, "b t h w c"], timestep: Float[Array, "b"], text: Array, **conditions) -> Array:
        """One forward pass; the first `c` channels are the prediction.

        Keywords: `features` of `extract` or None, `frame_mask`, `residual`, and what the backbone's conditions name.
        Sows what the blocks add as the one leaf of "intermediates", and takes it back as `residual`; a denoiser that
        sows nothing is never cached.
        """


@runtime_checkable
class Process(Protocol):
    """How noise comes into latents, and what a prediction says of them.

    A frozen dataclass: the steps are compiled for it.
    """

    def add_noise(self, x: Array, noise: Array, timestep: Float[Array, "b"]) -> Array:
        """The noisy latents at a timestep."""

    def target(self, x: Array, noise: Array, timestep: Float[Array, "b"]) -> Array:
        """What the denoiser should predict there."""

    def clean(self, x: Array, prediction: Array, timestep: Float[Array, "b"]) -> Array:
        """The clean latents that a prediction at noisy latents `x` stands for."""

    def times(self, steps: int, height: int, width: int, latent_frames: int) -> Float[np.ndarray, "steps_plus_2"]:
        """The sampler's timesteps [start, t_0, ..., t_{n-1}, end], falling; step i goes from t_i to the next one."""

    def draw_timesteps(
        self, keys: Key[Array, "b"], height: Array, width: Array, latent_frames: int, method: str, transform: bool
    ) -> Float[Array, "b"]:
        """Random timesteps of a training batch, one for each key.

        Args:
          height, width: of the videos in pixels.
          method, transform: the config's `timesteps` and `transform`.
        """


class Step(NamedTuple):
    """A step of the sampler, as a solver sees it.

    Attributes:
      times: the timestep before this one, this one, and the next one.
      coefficients: of `Solver.coefficients`.
      noise: Gaussian, of the latents' shape; None where neither the solver nor a given frame needs it.
      fresh: True = a latent frame that starts to move at this step: the memory says nothing of it. None = all False.
    """

    times: Float[Array, "3"]
    coefficients: Any = ()
    noise: Float[Array, "b t h w c"] | None = None
    fresh: Bool[Array, "b t"] | None = None


@runtime_checkable
class Solver(Protocol):
    """Steps from noise to data. A frozen dataclass: the steps are compiled for it.

    Attributes:
      process: the class of the processes that it solves.
      noisy: whether every step needs fresh noise.
    """

    process: type
    noisy: bool

    def init(self, x: Float[Array, "b t h w c"]) -> Any:
        """The memory that the first step finds; a pytree of arrays, () where none is needed."""

    def coefficients(self, process: Process, times: Float[np.ndarray, "steps_plus_2"], step: int) -> Any:
        """Numbers of step `step` (0 ..), reckoned on the host in any precision; a pytree, () where none are needed."""

    def step(self, process: Process, x: Array, prediction: Array, at: Step, memory: Any) -> tuple[Array, Any]:
        """The latents and the memory after a step; `prediction` is guided, and all are float32."""

    def clean(self, process: Process, x: Array, end: Array, at: Step, memory: Any) -> Array:
        """The clean latents that a step from `x` to `end` aimed at, for previews; `memory` is that after the step."""
