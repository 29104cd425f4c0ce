"""CogVideoX: a diffusion transformer with joint attention over text and video, and room for Tora's fusers.

Source: diffusers 0.42.1, models/transformers/cogvideox_transformer_3d.py, normalization.py and embeddings.py, as
alibaba/Tora at 9a23dce has them (diffusers-version/tora/transformer_3d.py). The authors' own code, built on
SwissArmyTransformer (sat/dit_video_concat.py), gives the same numbers but for what `final_eps` and `add_positions` say.
"""

from __future__ import annotations

import math

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tora_jax import sharding
from tora_jax.errors import UserError
from tora_jax.models import eight_bit, layers
from tora_jax.models.attention import attention
from tora_jax.models.cogvideox_motion import CONV, FEATURES, Fusion, MotionFuser
from tora_jax.models.cogvideox_positions import Places, rotary_tables, rotate, sinusoids
from tora_jax.models.layers import Dtype, dense, modulate
from tora_jax.models.stdit import Size, parse_variant

SIZES = {"5B": Size(42, 3072, 48, 2)}

EPS = 1e-5  # of the norms of tokens
HEAD_EPS = 1e-6  # of the norms of queries and keys

# Logical axes of the video's tokens [b, t, h, w, c] and of the text's [b, n, c]: each device holds some rows of all
# frames, and a part of the text. In attention it holds all tokens of some heads, [b, (t, h, w or) n, k, d].
VIDEO = ("batch", None, "space", None, None)
TEXT = ("batch", "space", None)
HEADS = "heads"


def size_of(variant: str) -> Size:
    """ "5B" is the released size; any other is written depth x width x heads / patch, see `stdit.parse_variant`."""
    return SIZES.get(variant) or parse_variant(variant)


# ----------------------------------------------------------------------------------------------------------
# Blocks
# ----------------------------------------------------------------------------------------------------------


def norm(eps: float, name: str) -> nn.LayerNorm:
    """LayerNorm with scale and bias, in float32."""
    return nn.LayerNorm(epsilon=eps, dtype=jnp.float32, use_fast_variance=False, name=name)


class ExpertNorm(nn.Module):
    """One LayerNorm for video and text, and a modulation of its own for each.

    Returns:
      Video and text, normalised and modulated, in float32, and the gates of both.
    """

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, video: Float[Array, "b t h w c"], text: Float[Array, "b n c"], time: Float[Array, "b _"]
    ) -> tuple[Float[Array, "b t h w c"], Float[Array, "b n c"], Float[Array, "b 1 1 1 c"], Float[Array, "b 1 c"]]:
        rows = dense(6 * video.shape[-1], dtype=self.dtype, name="modulation")(time).astype(jnp.float32)
        # Shift, scale and gate of the video, then of the text.
        video_rows, text_rows = einops.rearrange(rows, "b (two three c) -> two three b 1 c", two=2, three=3)
        shift, scale, gate = video_rows[:, :, None, None]
        normalise = norm(EPS, "norm")
        video = modulate(normalise(video), shift, scale)
        return video, modulate(normalise(text), text_rows[0], text_rows[1]), gate, text_rows[2]


class JointAttention(nn.Module):
    """Self-attention of text and video together, without a mask; rotary embedding of the video alone.

    On a mesh, queries, keys and values go by all-to-all from some tokens of all heads to all tokens of some heads, and
    the result goes back. Between, padding is cut off, so that the softmax never meets it. Heads that the mesh does not
    divide are whole on all devices.
    """

    num_heads: int
    backend: str = "auto"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, video: Float[Array, "b t h w c"], text: Float[Array, "b n c"], places: Places
    ) -> tuple[Float[Array, "b t h w c"], Float[Array, "b n c"]]:
        (*_, rows, columns, width), padded = video.shape, text.shape[1]

        def project(name: str, normalise: nn.LayerNorm | None = None) -> Float[Array, "b l k d"]:
            layer = dense(width, dtype=self.dtype, name=name)
            parts = []
            for x, names in ((text, TEXT), (video, VIDEO)):
                x = einops.rearrange(layer(x), "... (k d) -> ... k d", k=self.num_heads)
                if normalise is not None:
                    x = normalise(x).astype(self.dtype)
                x = sharding.constrain(x, (*names[:-1], "hidden", None))  # or else tokens are gathered for the product
                x = sharding.constrain(x, ("batch", *(None,) * (x.ndim - 3), HEADS, None))
                x = x[:, : places.text_length] if x.ndim == 4 else x[:, :, : places.rows]
                x = rotate(x, places) if normalise is not None and x.ndim == 6 else x
                parts.append(x.reshape(len(x), -1, *x.shape[-2:]))
            return jnp.concatenate(parts, axis=1)

        q, k = project("q", norm(HEAD_EPS, "q_norm")), project("k", norm(HEAD_EPS, "k_norm"))
        x = attention(q, k, project("v"), backend=self.backend, axes=("batch",), heads=HEADS)
        out = dense(width, dtype=self.dtype, name="proj")

        def back(x: Float[Array, "b *l k d"], axis: int, length: int) -> Float[Array, "b *l2 c"]:
            x = sharding.constrain(layers.pad_end(x, axis, length), ("batch", *(None,) * (x.ndim - 3), HEADS, None))
            names = TEXT if x.ndim == 4 else VIDEO
            x = sharding.constrain(x, (*names[:-1], "hidden", None))
            return out(einops.rearrange(x, "... k d -> ... (k d)"))

        y, x = jnp.split(x, [places.text_length], axis=1)
        x = einops.rearrange(x, "b (t h w) k d -> b t h w k d", h=places.rows, w=columns)
        return back(x, 2, rows), back(y, 1, padded)


class Block(nn.Module):
    """Joint attention and an MLP for both, each after an `ExpertNorm`; the fuser changes what attention sees.

    Attributes:
      width, num_heads: of the model.
      attention: a backend of `attention`.
      dtype: of matrix products.
    """

    width: int
    num_heads: int
    attention: str = "auto"
    dtype: Dtype = jnp.float32

    def setup(self):
        self.norm1, self.norm2 = ExpertNorm(self.dtype), ExpertNorm(self.dtype)
        self.attn = JointAttention(self.num_heads, self.attention, self.dtype)
        self.mlp = layers.MLP(4 * self.width, self.width, dtype=self.dtype)
        self.motion_fuser = MotionFuser(self.width, self.dtype)

    def __call__(
        self,
        hidden: tuple[Float[Array, "b t h w c"], Float[Array, "b n c"]],
        features: Float[Array, "b2 t h w m"] | Fusion | None,
        time: Float[Array, "b _"],
        places: Places,
        strength: Float[Array, "b"] | None,
    ) -> tuple[tuple[Float[Array, "b t h w c"], Float[Array, "b n c"]], None]:
        video, text = hidden
        video, text = sharding.constrain(video, VIDEO), sharding.constrain(text, TEXT)
        x, y, video_gate, text_gate = self.norm1(video, text, time)
        if features is not None:
            x = self.motion_fuser(x, features, strength, places.rows)
        x, y = self.attn(x.astype(self.dtype), y.astype(self.dtype), places)
        video, text = video + (video_gate * x).astype(video.dtype), text + (text_gate * y).astype(text.dtype)
        x, y, video_gate, text_gate = self.norm2(video, text, time)
        x, y = self.mlp(x.astype(self.dtype)), self.mlp(y.astype(self.dtype))
        video, text = video + (video_gate * x).astype(video.dtype), text + (text_gate * y).astype(text.dtype)
        return (sharding.constrain(video, VIDEO), sharding.constrain(text, TEXT)), None

    def fusion(self, carry: None, features: Float[Array, "b t h w m"]) -> tuple[None, Fusion]:
        """Gamma and beta of this block's fuser, for a scan over the blocks."""
        return carry, self.motion_fuser.fusion(features)


class FinalLayer(nn.Module):
    """Norm, modulation and projection of tokens to patches."""

    features: int
    eps: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"], time: Float[Array, "b _"]) -> Float[Array, "b t h w _"]:
        rows = dense(2 * x.shape[-1], dtype=self.dtype, name="modulation")(time).astype(jnp.float32)
        shift, scale = jnp.split(rows[:, None, None, None], 2, axis=-1)
        x = modulate(norm(self.eps, "norm")(norm(EPS, "norm_in")(x)), shift, scale)
        return dense(self.features, dtype=self.dtype, name="linear")(x.astype(self.dtype))


# ----------------------------------------------------------------------------------------------------------
# The model
# ----------------------------------------------------------------------------------------------------------


class CogVideoX(nn.Module):
    """The denoiser: noisy latents, a timestep and a caption -> v.

    Attributes:
      variant: see `size_of`.
      in_channels: of the latents and of what is given beside them: 16 for text to video, 32 for image to video.
      out_channels: of the latents.
      caption_channels, caption_length: of the text encoder's output; all of its tokens are attended to.
      time_channels: of the timestep's embedding.
      base_grid: (rows, columns) of patches at which rotary positions are whole numbers.
      learned_positions: tokens of text and video that the table of learned positions has; 0 = no table.
      add_positions: add that table. The released image-to-video weights hold one, and were trained and are run
        without adding it (sat/dit_video_concat.py); the diffusers form adds it.
      final_eps: of the last norm: 1e-5 in diffusers, 1e-6 in the authors' own code.
      remat: rematerialisation policy for a block, see `layers.remat`.
      eight_bit: the blocks' parameters are those of `eight_bit.quantize`.
      attention: a backend of `attention`.
      dtype: of matrix products; parameters are float32.
    """

    variant: str = "5B"
    in_channels: int = 16
    out_channels: int = 16
    caption_channels: int = 4096
    caption_length: int = 226
    time_channels: int = 512
    base_grid: tuple[int, int] = (30, 45)
    learned_positions: int = 0
    add_positions: bool = False
    final_eps: float = 1e-5
    remat: str = "none"
    eight_bit: bool = False
    attention: str = "auto"
    dtype: Dtype = jnp.float32

    def setup(self):
        size = size_of(self.variant)
        patch, options = (size.patch, size.patch), {"dtype": self.dtype, "conv_general_dilated": CONV}
        self.patch_embedder = nn.Conv(size.width, patch, strides=patch, padding="VALID", **options)
        self.text_embedder = dense(size.width, dtype=self.dtype, name="text_embedder")
        self.time_fc1, self.time_fc2 = (dense(self.time_channels, dtype=self.dtype, name=f"time_fc{i}") for i in (1, 2))
        if self.learned_positions:
            shape = (1, self.learned_positions, size.width)
            self.positions = self.param("positions", nn.initializers.normal(0.02), shape)
        scanned = {
            "variable_axes": {"params": 0},
            "split_rngs": {"params": True},
            "length": size.depth,
            "unroll": layers.unroll(size.depth),
        }
        methods = {"__call__": scanned | {"in_axes": (0, *(nn.broadcast,) * 3)}, "fusion": scanned | {"in_axes": 0}}
        block = eight_bit.restored(Block, self.dtype) if self.eight_bit and not self.is_initializing() else Block
        blocks = nn.scan(layers.remat(block, self.remat), methods=methods)
        self.blocks = blocks(size.width, size.num_heads, self.attention, self.dtype)
        self.final_layer = FinalLayer(size.patch**2 * self.out_channels, self.final_eps, self.dtype)

    def fusion(self, features: Float[Array, "depth b t h2 w2 m"]) -> Fusion:
        """Gamma and beta of all blocks, stacked: for each video once, where memory allows.

        On a mesh, rows that it does not divide are filled up, as the tokens' are.
        """
        return self.blocks.fusion(None, self._spread(features))[1]

    def __call__(
        self,
        x: Float[Array, "b t h w c"],
        timestep: Float[Array, "b"],
        text: Float[Array, "b n _"],
        *,
        given: Float[Array, "b t h w _"] | None = None,
        features: Float[Array, "depth b2 t h2 w2 m"] | Fusion | None = None,
        strength: Float[Array, "b"] | None = None,
        residual: Float[Array, "b t h2 w2 _"] | None = None,
    ) -> Float[Array, "b t h w c"]:
        """Predicts v. What the blocks add to the video's tokens is sown as "residual" in "intermediates".

        Args:
          x: noisy latents; their sides are multiples of the patch.
          timestep: 0 (clean) to 999 (noise).
          text: features of the caption, padded; all of them are attended to.
          given: channels beside those of x: latents of a given image, and zeros after its frame.
          features: of the extractor, or what `fusion` made of them; see `MotionFuser`. None = plain CogVideoX.
          strength: see `MotionFuser`.
          residual: what the blocks added at another step, in their place.

        Returns:
          v in float32, see `diffusion.v_prediction`.

        Raises:
          UserError: for a size that the learned positions do not have.
        """
        size = size_of(self.variant)
        frames, (h, w) = x.shape[1], x.shape[2:4]
        if h % size.patch or w % size.patch:
            raise ValueError(f"latents of {h}x{w}: both sides must be multiples of {size.patch}")
        x = x if given is None else jnp.concatenate([x, given.astype(x.dtype)], axis=-1)
        time = self.time_fc1(sinusoids(timestep, size.width).astype(self.dtype))
        time = nn.silu(self.time_fc2(nn.silu(time)))

        video, text = self.patch_embedder(x.astype(self.dtype)), self.text_embedder(text.astype(self.dtype))
        video, text = self._with_positions(video, text)
        tables = rotary_tables(frames, video.shape[2:4], size.width // size.num_heads, self.base_grid)
        places = Places(*tables, text.shape[1])
        # On a mesh, rows and text that it does not divide are filled up with zeros, which no other token sees: they
        # are cut off before the softmax, left out of the fusers' norms, and zeros are what stands around a frame there.
        video, text = layers.pad_axis(video, 2, VIDEO[2], "constant"), layers.pad_axis(text, 1, TEXT[1], "constant")
        if residual is None:
            before = sharding.constrain(video, VIDEO)
            features = self._spread(features) if isinstance(features, jax.Array) else features
            (video, _), _ = self.blocks((before, text), features, time, places, strength)
            self.sow("intermediates", "residual", video - before)
        else:
            video = video + residual.astype(video.dtype)
        video = self.final_layer(video, time)[:, :, : places.rows]
        p = size.patch
        return einops.rearrange(video, "b t h w (c p q) -> b t (h p) (w q) c", p=p, q=p).astype(jnp.float32)

    @nn.nowrap
    def check_grid(self, grid: tuple[int, int, int], text_length: int) -> None:
        """Checks that the learned positions, where they are added, are as many as the tokens.

        Args:
          grid: latent frames, rows and columns of patches.
          text_length: tokens of the caption.

        Raises:
          UserError: they are not.
        """
        tokens = text_length + math.prod(grid)
        if self.learned_positions and self.add_positions and tokens != self.learned_positions:
            raise UserError(
                f"these weights have {self.learned_positions} learned positions, but {text_length} text tokens and "
                f"{grid[0]} latent frames of {grid[1]}x{grid[2]} patches need {tokens}: use the size and the number "
                "of frames that they were made for"
            )

    def _spread(self, features: Float[Array, "depth b t h w m"]) -> Float[Array, "depth b t h2 w m"]:
        """Features on the devices whose rows of tokens they are for."""
        features = layers.pad_axis(features.astype(self.dtype), 3, FEATURES[2], "constant")
        return sharding.constrain(features, (None, *FEATURES))

    def _with_positions(self, video: Array, text: Array) -> tuple[Array, Array]:
        """Adds the learned positions, where they are to be added."""
        if not (self.learned_positions and self.add_positions) or self.is_initializing():  # of any size
            return video, text
        n, grid = text.shape[1], video.shape[1:4]
        self.check_grid(grid, n)
        table = self.positions[0].astype(self.dtype)
        return video + table[n:].reshape(*grid, -1), text + table[:n]
