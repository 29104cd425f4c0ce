"""CogVideoX's process: v-prediction with zero terminal SNR, its solvers, and its guidance.

A sample x with noise is a x + s noise, a^2 + s^2 = 1; the model predicts v = a noise - s x. At the last timestep, 999,
a is exactly 0. Timesteps are whole numbers, 0 (least noise) to 999; -1 stands for clean.

The two front ends of the released code differ in a few numbers, see `VPrediction.spacing`. Both compute coefficients on
the host; here that is float64, and latents are float32.

Source: alibaba/Tora at 9a23dce, discretizer.py, denoiser.py, sampling.py and guiders.py of
sat/sgm/modules/diffusionmodules; diffusers 0.42.1, schedulers/scheduling_dpm_cogvideox.py and
scheduling_ddim_cogvideox.py.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from tora_jax.typing import Step

START = 1000.0  # before the first step: no timestep of the table, as in `rectified_flow`
CLEAN = -1.0
SPACINGS = ("trailing", "sat")


class Levels(NamedTuple):
    """Signal levels a of one step, float64.

    Attributes:
      read: at which the prediction is turned into clean latents.
      before: at the step before; None at the first step.
      now, end: between which the solver steps; `end` 1 = clean.
    """

    read: float
    before: float | None
    now: float
    end: float


@dataclasses.dataclass(frozen=True)
class VPrediction:
    """The process.

    Attributes:
      spacing: of the sampler's timesteps:
        trailing  diffusers: round(1000 - k 1000 / n) - 1, each step ending 1000 // n before, which is not the next
                  timestep where n does not divide 1000
        sat       the authors' own: floor(999 - k 999 / n), each step ending at the next; levels are rescaled to zero
                  SNR among these n alone, and predictions are read at the nearest level of all 1000
      num_timesteps: 1000.
      beta_start, beta_end: of the noise schedule, linear in the square root.
      snr_shift: 1 = none, as for 5B.
    """

    spacing: str = "trailing"
    num_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    snr_shift: float = 1.0

    def __post_init__(self):
        if self.spacing not in SPACINGS:
            raise ValueError(f"unknown spacing {self.spacing!r}; choose {' or '.join(SPACINGS)}")

    def add_noise(
        self, x: Float[Array, "b t h w c"], noise: Float[Array, "b t h w c"], timestep: Float[Array, "b"]
    ) -> Float[Array, "b t h w c"]:
        """The noisy latents at a timestep."""
        signal, sigma = self._factors(timestep)
        return signal * x + sigma * noise

    def target(
        self, x: Float[Array, "b t h w c"], noise: Float[Array, "b t h w c"], timestep: Float[Array, "b"]
    ) -> Float[Array, "b t h w c"]:
        """v."""
        signal, sigma = self._factors(timestep)
        return signal * noise - sigma * x

    def clean(
        self, x: Float[Array, "b t h w c"], prediction: Float[Array, "b t h w c"], timestep: Float[Array, "b"]
    ) -> Float[Array, "b t h w c"]:
        """The clean latents that a prediction at noisy latents `x` stands for."""
        signal, sigma = self._factors(timestep)
        return signal * x - sigma * prediction

    def times(
        self, steps: int, height: float = 0, width: float = 0, latent_frames: int = 0
    ) -> Float[np.ndarray, "steps_plus_2"]:
        """The sampler's timesteps [START, t_0, ..., t_{n-1}, end]; `end` is where the last step ends, CLEAN or not.

        Size and length of the video change nothing.
        """
        count = self.num_timesteps
        if not 1 <= steps <= count:
            raise ValueError(f"steps is {steps}; give 1 to {count}")
        if self.spacing == "sat":
            t = np.linspace(count - 1, 0, steps, endpoint=False).astype(int)
            end = CLEAN
        else:
            t = np.round(np.arange(count, 0, -count / steps))[:steps].astype(int) - 1
            end = t[-1] - count // steps
        return np.asarray([START, *t, max(end, CLEAN)], np.float32)

    def levels(self, times: Float[np.ndarray, "steps_plus_2"], step: int) -> Levels:
        """Signal levels of a step.

        Args:
          times: of `times`.
          step: 0 ..
        """
        steps, table = len(times) - 2, signal_levels(self)
        if self.spacing == "sat":
            chosen = _zero_terminal(_unscaled_levels(self)[times[1:-1].astype(int)])
            read = table[np.abs(table - chosen[step]).argmin()]
            levels = [*chosen, 1.0]
            end = levels[step + 1]
        else:
            levels = table[times[1:-1].astype(int)]
            read = levels[step]
            after = int(times[step + 1]) - self.num_timesteps // steps
            end = table[after] if after >= 0 else 1.0
        return Levels(float(read), float(levels[step - 1]) if step else None, float(levels[step]), float(end))

    def draw_timesteps(
        self, keys: Key[Array, "b"], height: Array, width: Array, latent_frames: int, method: str, transform: bool
    ) -> Float[Array, "b"]:
        """Random training timesteps, one for each key: whole numbers, all as likely, as the released training has them.

        Size and length of the video change nothing.

        Raises:
          ValueError: for another method than "uniform", or a transform.
        """
        if method != "uniform" or transform:
            raise ValueError(f"timesteps {method!r}, transform {transform}: v-prediction draws uniform ones, unchanged")
        draw = lambda key: jax.random.randint(key, (), 0, self.num_timesteps)  # noqa: E731
        return jax.vmap(draw)(keys).astype(jnp.float32)

    def _factors(self, timestep: Array) -> tuple[Array, Array]:
        """Of signal and of noise at timesteps [b]; CLEAN or below has no noise."""
        signal = np.append(signal_levels(self), 1.0)  # the last entry is that of -1
        table = jnp.asarray(np.stack([signal, np.sqrt(1 - signal**2)]), jnp.float32)
        index = jnp.where(timestep < 0, self.num_timesteps, timestep.astype(jnp.int32))
        signal, sigma = table[:, index][..., None, None, None, None]
        return signal, sigma


@functools.cache
def signal_levels(process: VPrediction) -> Float[np.ndarray, "timesteps"]:
    """a of each timestep, float64, falling to 0."""
    return _zero_terminal(_unscaled_levels(process))


def _unscaled_levels(process: VPrediction) -> np.ndarray:
    betas = np.linspace(process.beta_start**0.5, process.beta_end**0.5, process.num_timesteps) ** 2
    squares = np.cumprod(1 - betas)
    return np.sqrt(squares / (process.snr_shift + (1 - process.snr_shift) * squares))


def _zero_terminal(levels: np.ndarray) -> np.ndarray:
    """Levels moved and stretched: the lowest becomes 0, the highest stays."""
    lowest, highest = levels.min(), levels.max()
    return (levels - lowest) * (highest / (highest - lowest) if len(levels) > 1 else 0.0)


# ----------------------------------------------------------------------------------------------------------
# Solvers
# ----------------------------------------------------------------------------------------------------------


class Coefficients(NamedTuple):
    """Of one step, float32: D = signal x - sigma v; the end is keep x + clean D + before D_before + noise n."""

    signal: np.float32
    sigma: np.float32
    keep: np.float32
    clean: np.float32
    before: np.float32
    noise: np.float32


def _coefficients(levels: Levels, keep: float, clean: float, before: float = 0.0, noise: float = 0.0) -> Coefficients:
    return Coefficients(*map(np.float32, (levels.read, math.sqrt(1 - levels.read**2), keep, clean, before, noise)))


def _step(x: Array, prediction: Array, at: Step, memory: Array) -> tuple[Array, Array]:
    """The end of a step, and its clean latents, which are the next one's memory."""
    c: Coefficients = at.coefficients
    clean = c.signal * x - c.sigma * prediction
    end = c.keep * x + c.clean * clean + c.before * memory
    return end if at.noise is None else end + c.noise * at.noise, clean


@dataclasses.dataclass(frozen=True)
class DPM2MSDE:
    """DPM-Solver++ 2M SDE: two steps' clean latents are extrapolated, and each step draws fresh noise.

    The first step and one that ends clean are of first order. The memory is the clean latents of the step before.
    """

    process: ClassVar[type] = VPrediction
    noisy: ClassVar[bool] = True

    def init(self, x: Array) -> Array:
        return jnp.zeros_like(x)

    def coefficients(self, process: VPrediction, times: np.ndarray, step: int) -> Coefficients:
        levels = process.levels(times, step)
        now, end = levels.now**2, levels.end**2
        drop = now * (1 - end) / ((1 - now) * end)
        clean, share = levels.end * (1 - drop), 0.0
        if levels.before is not None and end < 1:
            first, middle, last = (_log_snr(level) for level in (levels.before, levels.now, levels.end))
            share = (last - middle) / (middle - first) / 2  # 0 where the step before started from noise alone
        keep = math.sqrt((1 - end) / (1 - now) * drop)
        noise = math.sqrt((1 - end) * (1 - drop))
        return _coefficients(levels, keep, clean * (1 + share), -clean * share, noise)

    def step(self, process: VPrediction, x: Array, prediction: Array, at: Step, memory: Array) -> tuple[Array, Array]:
        return _step(x, prediction, at, memory)

    def clean(self, process: VPrediction, x: Array, end: Array, at: Step, memory: Array) -> Array:
        return memory


@dataclasses.dataclass(frozen=True)
class DDIM:
    """DDIM: first order, without noise. The memory is the clean latents of the step before, for previews."""

    process: ClassVar[type] = VPrediction
    noisy: ClassVar[bool] = False

    def init(self, x: Array) -> Array:
        return jnp.zeros_like(x)

    def coefficients(self, process: VPrediction, times: np.ndarray, step: int) -> Coefficients:
        levels = process.levels(times, step)
        keep = math.sqrt((1 - levels.end**2) / (1 - levels.now**2))
        return _coefficients(levels, keep, levels.end - levels.now * keep)

    def step(self, process: VPrediction, x: Array, prediction: Array, at: Step, memory: Array) -> tuple[Array, Array]:
        return _step(x, prediction, at, memory)

    def clean(self, process: VPrediction, x: Array, end: Array, at: Step, memory: Array) -> Array:
        return memory


def _log_snr(level: float) -> float:
    return math.log(level / math.sqrt(1 - level**2)) if level > 0 else -math.inf


# ----------------------------------------------------------------------------------------------------------
# Guidance
# ----------------------------------------------------------------------------------------------------------


def dynamic_guidance(guidance: float, times: Float[np.ndarray, "steps_plus_2"]) -> Float[np.ndarray, "steps"]:
    """The guidance of each step as both front ends compute it: 1 + g (1 - cos(pi ((n - t) / n)^5)) / 2.

    t is the timestep, not the number of the step, which looks like a mistake of the first release: the cosine's
    argument reaches millions, and the scale jumps between 1 and 1 + g. So it depends on every digit: Python's own
    float64 powers and cosines, and on the number of steps n.
    """
    steps = len(times) - 2
    return np.array(
        [1 + guidance * (1 - math.cos(math.pi * ((steps - int(t)) / steps) ** 5.0)) / 2 for t in times[1:-1]]
    )


def constant_guidance(guidance: float, times: Float[np.ndarray, "steps_plus_2"]) -> Float[np.ndarray, "steps"]:
    """The same guidance at each step."""
    return np.full(len(times) - 2, guidance, np.float64)


# By the name that configs use.
GUIDANCE = {"dynamic": dynamic_guidance, "constant": constant_guidance}
