"""Batches of a precomputed set, out of random numbers, and what a loss of them takes."""

import jax
import jax.numpy as jnp
import numpy as np

BATCH = 16  # two samples on each of 8 devices: for one alone, XLA sums in another order, which a tiny model amplifies
LATENTS = (2, 4, 4, 4)
LOSS = {"timesteps": "logit_normal", "transform": True, "drop_text": 0.2, "drop_motion": 0.2, "path_weight": 0.0}


def make_batch(number: int, size: int = BATCH) -> dict[str, np.ndarray]:
    """Of a precomputed set, with captions as tokens."""
    rng = np.random.default_rng(number)
    batch = {}
    for name in ("latent", "motion"):
        batch[f"{name}_mean"] = rng.standard_normal((size, *LATENTS)).astype(np.float16)
        batch[f"{name}_std"] = rng.uniform(0.1, 0.2, (size, *LATENTS)).astype(np.float16)
    lengths = rng.integers(1, 13, size)
    batch["ids"] = rng.integers(1, 1000, (size, 12)).astype(np.int32)
    batch["text_mask"] = np.arange(12) < lengths[:, None]
    batch["frame_mask"] = np.stack([np.ones(size, bool), rng.random(size) < 0.7], 1)
    side = np.full(size, 32, np.float32)
    return {**batch, "fps": np.full(size, 8, np.float32), "height": side, "width": side}


def on_device(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(array) for name, array in batch.items()}


def without_motion(batch):
    return {name: array for name, array in batch.items() if not name.startswith("motion")}
