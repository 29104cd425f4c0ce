"""Positions of CogVideoX's tokens: where a grid of patches lies, rotary tables, sinusoids of timesteps.

Source: diffusers 0.42.1, models/embeddings.py, as alibaba/Tora at 9a23dce has it (diffusers-version/tora).
"""

from __future__ import annotations

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Table = Float[Array, "t h w d"]


class Places(flax.struct.PyTreeNode):
    """The places of the tokens that there are. What stands behind the last row or the last text token is padding.

    Attributes:
      cos, sin: of `rotary_tables`.
      text_length: tokens of the caption.
    """

    cos: Table
    sin: Table
    text_length: int = flax.struct.field(pytree_node=False)

    @property
    def rows(self) -> int:
        """Of patches in a frame."""
        return self.cos.shape[1]


def fit_grid(grid: tuple[int, int], base: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The place of a grid (rows, columns) inside a base grid: enlarged or shrunk to fit, its ratio kept, centred.

    Returns:
      (top, left), (bottom, right); halves are rounded to even numbers.
    """
    (h, w), (base_h, base_w) = grid, base
    tall = h / w > base_h / base_w
    fitted = (base_h, round(base_h / h * w)) if tall else (round(base_w / w * h), base_w)
    top, left = (round((whole - part) / 2) for whole, part in zip(base, fitted, strict=True))
    return (top, left), (top + fitted[0], left + fitted[1])


def rotary_tables(frames: int, grid: tuple[int, int], head_dim: int, base: tuple[int, int]) -> tuple[Table, Table]:
    """Cosines and sines of the rotary embedding of each token.

    The first quarter of a head's channels is for time, the next three eighths for height, the last for width. In
    height and width, positions go from the near edge of the grid's place in the base grid (see `fit_grid`) to a
    share (n - 1) / n of the far one: the near edge is not scaled, as in the reference.

    Args:
      frames: t.
      grid: (rows, columns) of patches.
      head_dim: d; a multiple of 16.
      base: the grid at which positions are whole numbers.

    Raises:
      ValueError: for another `head_dim`.
    """
    if head_dim % 16:
        raise ValueError(
            f"heads of {head_dim} channels: rotary positions in time, height and width want multiples of 16"
        )
    near, far = fit_grid(grid, base)
    positions = [np.arange(frames)]
    positions += [np.linspace(a, b * (n - 1) / n, n) for a, b, n in zip(near, far, grid, strict=True)]
    channels = head_dim // 4, 3 * head_dim // 8, 3 * head_dim // 8
    angles = [
        np.repeat(np.outer(position, 10000.0 ** (-np.arange(0, d, 2) / d)), 2, axis=-1)
        for position, d in zip(positions, channels, strict=True)
    ]

    def table(function) -> Table:
        parts = []
        for axis, angle in enumerate(angles):
            shape = [1, 1, 1, angle.shape[-1]]
            shape[axis] = len(angle)
            part = jnp.asarray(function(angle), jnp.float32).reshape(shape)
            parts.append(jnp.broadcast_to(part, (frames, *grid, angle.shape[-1])))
        return jnp.concatenate(parts, axis=-1)

    return table(np.cos), table(np.sin)


def rotate(x: Float[Array, "b t h w k d"], places: Places) -> Float[Array, "b t h w k d"]:
    """Rotary embedding with interleaved pairs: channels 2i and 2i + 1 turn together; float32 inside."""
    cos, sin = (table[..., None, :] for table in (places.cos, places.sin))
    # A product exchanges neighbours, as in `layers.rotate`.
    swap = np.kron(np.eye(x.shape[-1] // 2), [[0, 1], [-1, 0]]).astype(x.dtype)
    other = jnp.matmul(x, swap, precision="highest").astype(jnp.float32)
    return (x.astype(jnp.float32) * cos + other * sin).astype(x.dtype)


def sinusoids(timestep: Float[Array, "b"], features: int) -> Float[Array, "b c"]:
    """A timestep as cosines and sines of falling frequencies, cosines first."""
    half = features // 2
    # Rounded to float32 where the reference rounds: times a timestep of 999, the last bit is seen.
    exponent = np.float32(-np.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    angle = timestep.astype(jnp.float32)[:, None] * np.exp(exponent.astype(np.float64)).astype(np.float32)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
