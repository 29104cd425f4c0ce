"""Clips and motion maps -> the posteriors of their latents."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key, UInt8

from tora_jax import sharding
from tora_jax.backbones import assembly


def posterior(
    vae: nn.Module, params: Any, video: UInt8[Array, "b t h w 3"], keys: Key[Array, "b"]
) -> tuple[Float[Array, "b t4 h8 w8 c"], Float[Array, "b t4 h8 w8 c"]]:
    """Mean and standard deviation, float16, of the normalised latents that `VideoVAE.encode` draws.

    The spatial VAE's posterior is sampled once, with each clip's own key, so that a clip's latents do not depend on its
    batch.
    """

    def one(clip: Array, key: Array) -> tuple[Array, Array]:
        def moments(model: nn.Module) -> tuple[Array, Array]:
            latent = model.moments(clip[None], key).latent
            return (latent.mean - model.shift) / model.scale, jnp.exp(0.5 * latent.logvar) / model.scale

        return nn.apply(moments, vae)({"params": params})

    return jax.tree.map(lambda x: x[:, 0].astype(jnp.float16), jax.vmap(one)(video, keys))


def compiled(vae: nn.Module) -> Callable:
    """`posterior` of a VAE, compiled: (parameters, video, keys) -> mean and standard deviation."""
    return jax.jit(functools.partial(posterior, vae), compiler_options=dict(assembly.QUICK))


Encode = Callable[[np.ndarray, np.ndarray | None, Sequence[int]], dict[str, Array]]


def make_encoder(models: assembly.Models, seed: int = 0) -> Encode:
    """The function (video, maps, numbers of the clips) -> posteriors, compiled once for a shape; a call does not wait.

    It takes video, uint8 [b, t, h, w, 3], and maps, uint8 [b, k, t, h, w, 3], k draws of each clip's motion, or None.
    It returns latent_mean and latent_std, float16 [b, t4, h8, w8, c], and with maps motion_mean and motion_std, float16
    [b, k, t4, h8, w8, c]. Samples depend on the seed and the clip's number. As many of this process's devices as divide
    b take an equal share of the clips each.
    """
    motion = models.backbone.MOTION
    parts = ("vae", motion)
    run = {part: compiled(models.parts[part]) for part in parts}
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))

    @functools.cache
    def place(batch: int) -> tuple[NamedSharding, dict[str, Any]]:
        """Where a batch lies, and the weights on each of its devices."""
        count = math.gcd(batch, jax.local_device_count())
        mesh = sharding.make_mesh(f"data={count}", jax.local_devices())
        params = {part: models.params[part] for part in parts if part in models.params}
        return NamedSharding(mesh, PartitionSpec("data")), jax.device_put(params, NamedSharding(mesh, PartitionSpec()))

    def encode(video: np.ndarray, maps: np.ndarray | None, indices: Sequence[int]) -> dict[str, Array]:
        spread, params = place(len(video))
        keys = fold(jax.random.key(seed), jnp.asarray(indices))
        mean, std = run["vae"](params["vae"], *jax.device_put((video, keys), spread))
        encoded = {"latent_mean": mean, "latent_std": std}
        if maps is not None:
            b, k = maps.shape[:2]
            keys = jax.vmap(fold, in_axes=(0, None))(keys, jnp.arange(1, k + 1)).reshape(-1)
            both = run[motion](params[motion], *jax.device_put((maps.reshape(b * k, *maps.shape[2:]), keys), spread))
            encoded["motion_mean"], encoded["motion_std"] = (x.reshape(b, k, *x.shape[1:]) for x in both)
        return encoded

    return encode
