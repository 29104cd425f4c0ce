"""One step of the sampler, of a model that is a plain function."""

import jax.numpy as jnp
import numpy as np

from tora_jax.diffusion import sampler
from tora_jax.diffusion.rectified_flow import RectifiedFlow
from tora_jax.diffusion.solvers import SOLVERS
from tora_jax.typing import Step


class Stepper:
    """Steps one after the other.

    Args:
      predict: (latents, timestep [b], frame mask or None) -> the passes of `guide`, stacked.
      times: of a process.
    """

    def __init__(self, predict, times, solver="euler", guidance=1.0, trajectory_guidance=1.0, edit=None):
        self.predict, self.edit = predict, edit
        self.times = np.asarray(times, np.float32)
        self.solver = SOLVERS[solver]
        self.weights = jnp.float32(guidance), jnp.float32(trajectory_guidance)
        self.memory, self.kept, self.done = None, None, 0

    def __call__(self, x, noise=None, passes=1):
        """The latents after one more step of so many passes."""
        process, batch = RectifiedFlow(), len(x)

        def denoise(params, x, timestep, text, *, features, frame_mask):
            frame_mask = frame_mask if frame_mask is None else frame_mask[:batch]
            out = self.predict(x[:batch], timestep[:batch], frame_mask)
            return out.reshape(-1, *out.shape[2:]), None

        method = sampler.Method(denoise, process, self.solver)
        if self.memory is None:
            self.memory = self.solver.init(x)
        i, self.done = self.done, self.done + 1
        coefficients = self.solver.coefficients(process, self.times, i)
        at = Step(jnp.asarray(self.times[i : i + 3]), coefficients, noise)
        told = sampler.Told({"text": jnp.zeros((passes * len(x), 1))}, None, self.edit)
        step = sampler.step.__wrapped__
        x, self.memory, self.kept = step(method, None, x, at, self.weights, told, self.memory, self.kept)
        return x
