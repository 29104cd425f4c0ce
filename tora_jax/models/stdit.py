"""ST-DiT: Open-Sora v1.2's spatial-temporal diffusion transformer (STDiT3), with room for Tora's fusers.

Source of every detail that looks odd: opensora/models/stdit/stdit3.py and layers/blocks.py at tag v1.2.0.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import einops
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tora_jax.models import layers
from tora_jax.models.layers import Dtype, layer_norm, modulate
from tora_jax.models.motion_fuser import FRAMES, FUSERS, fuse

ZEROS = nn.initializers.zeros

# As FRAMES, where each device holds whole tracks.
TRACKS = ("batch", None, "space", None)


class Size(NamedTuple):
    """What a `variant` string stands for."""

    depth: int
    width: int
    num_heads: int
    patch: int


SIZES = {"XL/2": Size(28, 1152, 16, 2), "3B/2": Size(28, 1872, 26, 2)}


def parse_variant(variant: str) -> Size:
    """ "XL/2" and "3B/2" are the released sizes; any other is written depth x width x heads / patch.

    >>> parse_variant("4x128x4/2")
    Size(depth=4, width=128, num_heads=4, patch=2)
    """
    if variant in SIZES:
        return SIZES[variant]
    if match := re.fullmatch(r"(\d+)x(\d+)x(\d+)/(\d+)", variant):
        size = Size(*map(int, match.groups()))
        if min(size) < 1 or size.width % size.num_heads or size.width % 4 or size.width // size.num_heads % 2:
            raise ValueError(
                f"variant {variant!r}: the width must be a multiple of 4 and of the number of heads, "
                "and the width of a head even"
            )
        return size
    raise ValueError(
        f"unknown variant {variant!r}; use {', '.join(SIZES)} or DEPTHxWIDTHxHEADS/PATCH, such as 4x128x4/2"
    )


class STDiTBlock(nn.Module):
    """One transformer block: adaLN self-attention over space or time, attention to the text, adaLN MLP."""

    num_heads: int
    temporal: bool
    qk_norm: bool = True
    attention: str = "auto"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t s c"],
        text: Float[Array, "b n c"],
        text_mask: Bool[Array, "b n"] | None,
        modulation: Float[Array, "b t_or_1 6 c"],
        valid: Bool[Array, "b t"] | None = None,
    ) -> Float[Array, "b t s c"]:
        """Applies the block.

        Args:
          x: tokens.
          text, text_mask: embedded caption; True = a valid token.
          modulation: from the timestep; one row for all frames, or one for each where frames are conditioned.
          valid: False = a frame that is padding; None = all True.
        """
        c, s = x.shape[-1], x.shape[2]
        layout = FRAMES
        if self.temporal:
            # On a mesh, spatial blocks hold whole frames and temporal blocks whole tracks; the switch is one
            # all-to-all, of tracks that the mesh divides.
            layout = TRACKS
            x = nn.with_logical_constraint(layers.pad_axis(x, 2, "space"), FRAMES)
        x = nn.with_logical_constraint(x, layout)
        # Temporal blocks start as the identity: the reference starts from an image model (initialize_weights).
        out_init = ZEROS if self.temporal else None
        table = self.param("scale_shift_table", nn.initializers.normal(c**-0.5), (6, c))
        rows = (table + modulation.astype(jnp.float32))[:, :, :, None, :]
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = (rows[:, :, i] for i in range(6))

        attend = layers.SelfAttention(
            self.num_heads,
            self.qk_norm,
            rotary=self.temporal,
            out_init=out_init,
            backend=self.attention,
            axes=("batch", "space" if self.temporal else "time"),
            dtype=self.dtype,
            name="attn",
        )
        y = modulate(layer_norm(x), shift_attn, scale_attn).astype(self.dtype)
        y = attend(y.swapaxes(1, 2), valid).swapaxes(1, 2) if self.temporal else attend(y)
        x = x + (gate_attn * y).astype(x.dtype)

        cross = layers.CrossAttention(
            self.num_heads,
            out_init=out_init,
            backend=self.attention,
            axes=layout[:3],
            dtype=self.dtype,
            name="cross_attn",
        )
        x = x + cross(x, text, text_mask)

        y = modulate(layer_norm(x), shift_mlp, scale_mlp).astype(self.dtype)
        y = layers.MLP(4 * c, c, out_init=out_init, dtype=self.dtype, name="mlp")(y)
        # Without this second one, XLA may give the MLP's two sides different layouts, and then its partitioner sums
        # the kernels' gradients over one of the two sharded axes alone.
        x = nn.with_logical_constraint(x + (gate_mlp * y).astype(x.dtype), layout)
        return nn.with_logical_constraint(x, FRAMES)[:, :, :s]


class LocalConv(nn.Module):
    """Adds a depthwise 3x3 convolution over a frame's (h, w) grid of tokens, zero at first.

    Source: Chu et al. 2021, "Conditional positional encodings for vision transformers", section 3.
    """

    grid: tuple[int, int]

    @nn.compact
    def __call__(self, x: Float[Array, "b t s c"]) -> Float[Array, "b t s c"]:
        taps, (h, w) = self.param("taps", ZEROS, (3, 3, x.shape[-1])), self.grid
        tokens = einops.rearrange(x, "b t (h w) c -> b t h w c", h=h)
        tokens = jnp.pad(tokens, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
        # Sums of shifted tokens: XLA's CPU backend is slow at convolutions of single channels.
        added = sum(taps[i, j] * tokens[:, :, i : i + h, j : j + w] for i in range(3) for j in range(3))
        return x + einops.rearrange(added, "b t h w c -> b t (h w) c").astype(x.dtype)


class BlockPair(nn.Module):
    """A spatial block and a temporal block, each with a fuser before it where `placement` says so."""

    num_heads: int
    qk_norm: bool
    fuser: str | None
    placement: str
    attention: str
    dtype: Dtype
    grid: tuple[int, int] | None  # of the tokens, where there is a `LocalConv`

    @nn.compact
    def __call__(self, x, features, has_motion, text, text_mask, modulation, valid):
        if self.grid is not None:
            x = LocalConv(self.grid, name="local_conv")(x)
        for kind in ("spatial", "temporal"):
            if features is not None and self.placement in (kind, "both"):
                fuser = FUSERS[self.fuser](self.num_heads, self.dtype, name=f"{kind}_fuser")
                x = fuse(fuser, x, features, has_motion)
            block = STDiTBlock(self.num_heads, kind == "temporal", self.qk_norm, self.attention, self.dtype, name=kind)
            x = block(x, text, text_mask, modulation, valid)
        return x, None


class FinalLayer(nn.Module):
    """Modulated projection of tokens to patches."""

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t s c"],
        t: Float[Array, "b c"],
        t0: Float[Array, "b c"] | None,
        frame_mask: Bool[Array, "b t"] | None,
    ) -> Float[Array, "b t s _"]:
        c = x.shape[-1]
        table = self.param("scale_shift_table", nn.initializers.normal(c**-0.5), (2, c))

        def modulated(x: Array, embedding: Array) -> Array:
            shift, scale = (table + embedding.astype(jnp.float32)[:, None])[:, :, None, None, :].swapaxes(0, 1)
            return modulate(layer_norm(x), shift, scale)

        x = modulated(nn.with_logical_constraint(x, FRAMES), t)
        if frame_mask is not None:
            # The reference takes the t = 0 branch from the tensor that is already modulated. The released
            # weights were trained so, hence it stays.
            x = jnp.where(frame_mask[:, :, None, None], x, modulated(x, t0))
        return layers.dense(self.features, dtype=self.dtype, name="linear")(x.astype(self.dtype))


class STDiT(nn.Module):
    """The denoiser: noisy latents, a timestep and a caption -> velocity.

    Attributes:
      variant: see `parse_variant`.
      in_channels: of the latents; the output has twice as many, the velocity first.
      caption_channels, caption_length: of the text encoder's output; the length is that of the null caption.
      qk_norm: RMS norm of queries and keys.
      base_resolution: pixels a side at which position embeddings are not stretched (`input_sq_size`).
      fuser: a name in FUSERS, or None for plain Open-Sora.
      placement: the blocks that get a fuser before them: "temporal" (best in the paper), "spatial" or "both".
      remat: rematerialisation policy for a pair of blocks, a name in `jax.checkpoint_policies` or "none".
      attention: a backend of `attention`; "auto" = the kernel of the devices.
      dtype: of matrix products; parameters are float32.
      local: 3x3 convolutions that bring neighbours together without attention: one beside the patch embedding, over
        patches, and a `LocalConv` before each pair of blocks. The released weights have none; a small net that is
        trained from nothing learns sooner with them.
    """

    variant: str = "XL/2"
    in_channels: int = 4
    caption_channels: int = 4096
    caption_length: int = 300
    qk_norm: bool = True
    base_resolution: float = 512.0
    fuser: str | None = None
    placement: str = "temporal"
    remat: str = "none"
    attention: str = "auto"
    dtype: Dtype = jnp.float32
    local: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t h w c"],
        timestep: Float[Array, "b"],
        text: Float[Array, "b n _"],
        *,
        fps: Float[Array, "b"],
        height: Float[Array, "b"],
        width: Float[Array, "b"],
        text_mask: Bool[Array, "b n"] | None = None,
        drop_text: Bool[Array, "b"] | None = None,
        frame_mask: Bool[Array, "b t"] | None = None,
        features: Float[Array, "depth b2 t2 h2 w2 m"] | None = None,
        has_motion: Bool[Array, "b"] | None = None,
        residual: Float[Array, "b _ _ _"] | None = None,
    ) -> Float[Array, "b t h w c2"]:
        """Predicts the velocity. What the blocks add is sown as "residual" in "intermediates".

        Args:
          x: noisy latents; sides that are no multiple of the patch are padded and the output is cut.
          timestep: 0 (clean) to 1000 (noise).
          text: caption embedding of the text encoder.
          fps: frames per second of the video; an image has 120.
          height, width: of the video in pixels.
          text_mask: True = a valid token; padding never changes the output. None = all valid.
          drop_text: True = the null caption in place of `text`; the mask stays (as under guidance in the
            reference). None = all False.
          frame_mask: True = a frame to generate; False = a clean, given frame, treated as timestep 0. None is
            the same as all True.
          features: motion features of the extractor, already on the patch grid; their batch divides b, see
            `fuse`. None = no trajectory at all.
          has_motion: see `fuse`.
          residual: what the blocks added at another step, in their place.

        Returns:
          float32; the first `in_channels` channels are the velocity, data minus noise.
        """
        size = parse_variant(self.variant)
        c, frames, (h, w) = size.width, x.shape[1], x.shape[2:4]
        # Frames that the mesh does not divide are filled up with the last, as at the ends of the fusers' convolutions.
        x = layers.pad_axis(x, 1, "time")
        valid = None if x.shape[1] == frames else jnp.broadcast_to(jnp.arange(x.shape[1]) < frames, x.shape[:2])
        frame_mask = None if frame_mask is None else layers.pad_axis(frame_mask, 1, "time")
        features = None if features is None else layers.pad_axis(features, 2, "time")

        def embed(value: Array, name: str, **init) -> Array:
            return layers.ScalarEmbedder(c, dtype=self.dtype, name=name, **init)(value)

        # Timesteps of a batch and the timestep 0 of conditioned frames go through the same embedder together.
        both = embed(jnp.stack([timestep, jnp.zeros_like(timestep)]), "t_embedder")
        fps_init = {"kernel_init": nn.initializers.normal(0.02), "out_init": ZEROS}
        t, t0 = both + embed(fps, "fps_embedder", **fps_init)
        per_frame = t[:, None] if frame_mask is None else jnp.where(frame_mask[..., None], t[:, None], t0[:, None])
        modulation = layers.dense(6 * c, dtype=self.dtype, name="t_block")(nn.silu(per_frame))
        modulation = einops.rearrange(modulation, "b t (six c) -> b t six c", six=6)
        modulation = nn.with_logical_constraint(modulation, ("batch", None, None, None))  # both layouts need it

        null = self.param(
            "null_caption",
            nn.initializers.normal(self.caption_channels**-0.5),
            (self.caption_length, self.caption_channels),
        )
        if drop_text is not None:
            text = jnp.where(drop_text[:, None, None], null.astype(text.dtype), text)
        text = layers.MLP(c, c, dtype=self.dtype, name="text_embedder")(text.astype(self.dtype))

        x = layers.patchify(x.astype(self.dtype), size.patch)
        grid = x.shape[2:4]
        patches, x = x, layers.dense(c, dtype=self.dtype, name="patch_embedder")(x)
        if self.local:
            options = {"dtype": self.dtype, "conv_general_dilated": layers.gathered_conv3d}
            x += nn.Conv(c, (1, 3, 3), use_bias=False, kernel_init=ZEROS, name="patch_neighbours", **options)(patches)
        x = einops.rearrange(x, "b t h w c -> b t (h w) c")
        positions = layers.position_embedding(grid, c, height, width, self.base_resolution)
        x = nn.with_logical_constraint(x + positions[:, None].astype(x.dtype), FRAMES)

        fields = (size.num_heads, self.qk_norm, self.fuser, self.placement, self.attention, self.dtype)
        blocks = nn.scan(
            layers.remat(BlockPair, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, *(nn.broadcast,) * 5),
            length=size.depth,
            unroll=layers.unroll(size.depth),
        )(*fields, grid if self.local else None, name="blocks")
        if residual is None:
            before = x
            x, _ = blocks(x, features, has_motion, text, text_mask, modulation, valid)
            self.sow("intermediates", "residual", x - before)
        else:
            x = x + residual.astype(x.dtype)

        features_out = size.patch**2 * 2 * self.in_channels
        x = FinalLayer(features_out, self.dtype, name="final_layer")(x, t, t0, frame_mask)[:, :frames]
        x = einops.rearrange(x, "b t (h w) c -> b t h w c", h=grid[0])
        return layers.unpatchify(x, size.patch, (h, w)).astype(jnp.float32)
