"""The video VAE: a spatial VAE on each frame, a causal VAE over time, and the latent's shift and scale.

The motion VAE is the same code with other parameters: either the video VAE's own architecture on trajectory
maps, or one causal net with strides in space and time on pixels (`spatial=None`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Real

from tora_jax import sharding
from tora_jax.errors import UserError
from tora_jax.io.video import as_float
from tora_jax.models.autoencoder_kl import AutoencoderKL
from tora_jax.models.causal_vae import CausalVAE
from tora_jax.models.layers import Dtype


class Gaussian(NamedTuple):
    """A posterior with a diagonal covariance."""

    mean: Float[Array, "b t h w c"]
    logvar: Float[Array, "b t h w c"]

    def sample(self, rng: PRNGKeyArray | None) -> Float[Array, "b t h w c"]:
        """A draw, or the mean where `rng` is None."""
        if rng is None:
            return self.mean
        noise = jax.random.normal(rng, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(0.5 * self.logvar) * noise


class Moments(NamedTuple):
    """What both halves make of a video.

    spatial: posterior of the spatial VAE, unscaled; None where there is none.
    clip: what the causal VAE gets: the spatial VAE's latents, scaled, or the pixels.
    latent: posterior of the causal VAE, before shift and scale.
    """

    spatial: Gaussian | None
    clip: Float[Array, "b t h w c"]
    latent: Gaussian


class Reusable(NamedTuple):
    """What a video can begin with, of the end of the one before.

    Attributes:
      latents: latent frames.
      frames: the frames in them.
      whole: they stand alone in both videos, so the latents themselves can be taken over; otherwise the frames are
        encoded again.
    """

    latents: int
    frames: int
    whole: bool


class VideoVAE(nn.Module):
    """A video <-> normalised latents, 8x smaller in height and width and 4x in time at the default sizes.

    Time is cut into micro-frames that know nothing of each other; full ones run through one scanned call and
    the rest through a second, so that neither compile time nor the memory of activations grows with the
    length. On a mesh each device takes a micro-frame, or frames, of its own. A height or width that is no multiple
    of the space factor is rounded down (see AutoencoderKL).

    Fields:
      spatial: fields of AutoencoderKL; None = the causal VAE works on pixels.
      temporal: fields of CausalVAE.
      micro_frame_size: frames that the causal VAE encodes together; 0 = all.
      frame_batch: frames of each video that the spatial VAE runs at once; 0 = all.
      spatial_scaling: of the spatial VAE's latents, towards unit variance.
      latent_shift, latent_scale: initial values of the parameters `shift` and `scale`, one number for each
        latent channel. They are parameters because the checkpoint carries them; training leaves them alone.
      dtype: of the matrix products; norms, posteriors and latents are float32.

    Source: Open-Sora v1.2, opensora/models/vae/vae.py (VideoAutoencoderPipeline, OpenSoraVAE_V1_2).
    """

    spatial: Mapping[str, Any] | None
    temporal: Mapping[str, Any]
    micro_frame_size: int = 17
    frame_batch: int = 0
    spatial_scaling: float = 0.18215
    latent_shift: tuple[float, ...] = (-0.10, 0.34, 0.27, 0.98)
    latent_scale: tuple[float, ...] = (3.85, 2.32, 2.33, 3.06)
    dtype: Dtype = jnp.float32

    @property
    def time_factor(self) -> int:
        """Frames for each latent frame."""
        return CausalVAE(**self.temporal, parent=None).time_factor

    @nn.nowrap
    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of a video of `num_frames` (1 or more).

        The true count, unlike the reference's frames // 17 * 5: 1 -> 1, 17 -> 5, 20 -> 6, 51 -> 15.
        """
        return sum(math.ceil(len(part) / self.time_factor) for part in self.parts(num_frames))

    @nn.nowrap
    def latent_of(self, frame: int, num_frames: int) -> int:
        """The latent frame that holds `frame` (0 .. num_frames - 1) of a video of `num_frames`.

        Micro-frames are padded in front, so frame j of one of 17 lives in latent ceil(j / 4), and frame 0 has its own.
        """
        size, factor = self.micro_frame_size or num_frames, self.time_factor
        micro, place = divmod(frame, size)
        front = -min(size, num_frames - micro * size) % factor
        return micro * math.ceil(size / factor) + (place + front) // factor

    @nn.nowrap
    def parts(self, num_frames: int) -> list[range]:
        """The frames of each part that is encoded for itself: the micro-frames, of which the last may be shorter."""
        size = self.micro_frame_size or num_frames
        return [range(start, min(start + size, num_frames)) for start in range(0, num_frames, size)]

    @nn.nowrap
    def encoded_alone(self, part: range) -> bool:
        """Whether the first frame of one of `parts` has a latent for itself: a still there is encoded as one frame."""
        return len(part) % self.time_factor == 1

    @nn.nowrap
    def reusable(self, num_frames: int, latents: int = 0) -> Reusable:
        """What a video of `num_frames` can take over from the end of another one of that length.

        Args:
          latents: the latent frames that are wanted; 0 = a micro-frame's where the video has several, else 2 (fewer
            where it has no more).
        """
        size = self.micro_frame_size
        usual = self.latent_frames(size) if 0 < size < num_frames else 2
        latents = latents or max(min(usual, self.latent_frames(num_frames) - 1), 1)
        frames = sum(self.latent_of(frame, num_frames) < latents for frame in range(num_frames))
        return Reusable(latents, frames, size > 0 and num_frames % size == 0 and frames % size == 0)

    @property
    def space_factor(self) -> int:
        """Pixels for each latent cell, along one side."""
        inner = 1 if self.spatial is None else AutoencoderKL(**self.spatial, parent=None).space_factor
        return inner * CausalVAE(**self.temporal, parent=None).space_factor

    def setup(self):
        if self.spatial is not None:
            self.spatial_vae = AutoencoderKL(**self.spatial, dtype=self.dtype)
        self.temporal_vae = CausalVAE(**self.temporal, dtype=self.dtype)
        self.shift = self.param("shift", lambda _: jnp.asarray(self.latent_shift, jnp.float32))
        self.scale = self.param("scale", lambda _: jnp.asarray(self.latent_scale, jnp.float32))

    def moments(self, video: Real[Array, "b t h w 3"], rng: PRNGKeyArray | None = None) -> Moments:
        """Both posteriors, for training the VAE; `rng` samples the spatial one, None takes its mean.

        The video is in [-1, 1], or uint8: then only the frames at work are ever floats.

        Raises:
          UserError: a frame is smaller than one latent cell.
        """
        _, t, h, w, _ = video.shape
        cell = self.space_factor
        if min(h, w) < cell:
            raise UserError(f"frames of {w}x{h} pixels are too small: give at least {cell}x{cell}")
        if self.spatial is None:
            spatial, clip = None, as_float(video)
        else:
            spatial = Gaussian(*self._each_frame(lambda vae, x: vae.encode(as_float(x)), video))
            clip = spatial.sample(rng) * self.spatial_scaling
        size = self.micro_frame_size or t
        latent = self._each_micro_frame(lambda vae, x, _: vae.encode(x), clip, t, size)
        return Moments(spatial, clip, Gaussian(*latent))

    def encode(self, video: Real[Array, "b t h w 3"], rng: PRNGKeyArray | None = None) -> Float[Array, "b t4 h8 w8 c"]:
        """A video in [-1, 1], or uint8 -> normalised latents, float32, `latent_frames(t)` of them.

        Args:
          rng: samples both posteriors; None takes their means.

        Raises:
          UserError: a frame is smaller than one latent cell.
        """
        first, second = (None, None) if rng is None else jax.random.split(rng)
        return (self.moments(video, first).latent.sample(second) - self.shift) / self.scale

    def decode_clip(self, z: Float[Array, "b t4 h8 w8 _"], num_frames: int) -> Float[Array, "b t h w c"]:
        """A sample of `moments(...).latent`, not normalised -> the clip, as `moments(...).clip`."""
        want = self.latent_frames(num_frames)
        if z.shape[1] != want:
            raise ValueError(f"{num_frames} frames have {want} latent frames, got {z.shape[1]}")
        size = math.ceil((self.micro_frame_size or num_frames) / self.time_factor)
        return self._each_micro_frame(CausalVAE.decode, z, num_frames, size)

    def decode_frames(self, clip: Float[Array, "b t h8 w8 _"], finish: Callable = lambda x: x) -> Any:
        """The causal VAE's clip -> pixels: the spatial VAE's decoder, where there is one; `finish`: see `decode`."""
        if self.spatial is None:
            return finish(clip)
        return self._each_frame(lambda vae, z: finish(vae.decode(z)), clip / self.spatial_scaling)

    def decode(self, latents: Float[Array, "b t4 h8 w8 _"], num_frames: int, finish: Callable = lambda x: x) -> Any:
        """Normalised latents -> the video of `num_frames` they were made from, about [-1, 1], not clipped.

        Args:
          finish: makes of frames [*l, h, w, 3] what is wanted of each, arrays [*l, ...]; called on the frames that are
            decoded at once, so that no more of them are ever floats.
        """
        return self.decode_frames(self.decode_clip(latents * self.scale + self.shift, num_frames), finish)

    def __call__(self, video: Float[Array, "b t h w 3"]) -> Float[Array, "b t h2 w2 3"]:
        """The reconstruction from the posteriors' means."""
        return self.decode(self.encode(video), video.shape[1])

    def _each_frame(self, run: Callable, x: Real[Array, "b t h w c"]):
        """run(spatial VAE, frames) on about `frame_batch` frames of each video at once."""

        def frames(vae, part):
            return jax.tree.map(lambda y: y[:, None], run(vae, part[:, 0]))

        return _in_parts(frames, self.spatial_vae, x, 1, self.frame_batch or x.shape[1])

    def _each_micro_frame(self, run: Callable, x: Float[Array, "b t h w c"], num_frames: int, size: int):
        """run(causal VAE, part, its frames) on each micro-frame; a full one takes `size` of x's frames."""
        length = self.micro_frame_size or num_frames
        full, rest = divmod(num_frames, length)
        parts = []
        if full:
            whole = x[:, : full * size]
            parts.append(_in_parts(lambda vae, y: run(vae, y, length), self.temporal_vae, whole, size, 1))
        if rest:
            parts.append(run(self.temporal_vae, x[:, full * size :], rest))
        return jax.tree.map(lambda *y: jnp.concatenate(y, axis=1), *parts)


def _in_parts(run: Callable, module: nn.Module, x: Real[Array, "b t h w c"], size: int, together: int):
    """run(module, parts) on parts of `size` of x's frames, compiled once.

    About `together` parts of each video run at once, as a batch, and as many on each device of a mesh; the others after
    them. The rounds are made even, and the last one is filled up with zeros that are cut again.
    """
    batch, count = len(x), x.shape[1] // size
    devices = sharding.shards("frames")
    if batch % sharding.shards("batch") == 0:
        devices //= sharding.shards("batch")
    rounds = math.ceil(count / (together * devices))
    each = math.ceil(count / (rounds * devices)) * devices
    x = einops.rearrange(x, "b (n t) h w c -> b n t h w c", t=size)
    x = jnp.pad(x, ((0, 0), (0, rounds * each - count), *((0, 0),) * 4))
    x = einops.rearrange(x, "b (r n) t h w c -> r (b n) t h w c", r=rounds)

    def on_devices(y: Array) -> Array:
        return nn.with_logical_constraint(y, ("frames", *(None,) * (y.ndim - 1)))

    def one(module, part):
        return jax.tree.map(on_devices, run(module, on_devices(part)))

    if rounds == 1:  # gradients of convolutions inside a loop are many times slower on a CPU
        y = jax.tree.map(lambda a: a[None], one(module, x[0]))
    else:
        scan = nn.scan(
            lambda module, carry, part: (carry, one(module, part)),
            variable_broadcast="params",
            split_rngs={"params": False},
        )
        _, y = scan(module, (), x)
    y = jax.tree.map(lambda a: einops.rearrange(a, "r (b n) ... -> b (r n) ...", b=batch)[:, :count], y)
    return jax.tree.map(lambda a: einops.rearrange(a, "b n t ... -> b (n t) ..."), y)
