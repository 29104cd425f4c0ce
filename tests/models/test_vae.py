"""Behaviour of the VAEs: sizes, causality, batches and micro-frames, sampling, precision."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tora_jax.errors import UserError
from tora_jax.io.video import from_float, to_float
from tora_jax.models import causal_vae
from tora_jax.models.autoencoder_kl import AutoencoderKL
from tora_jax.models.causal_vae import CausalConv, CausalVAE
from tora_jax.models.video_vae import VideoVAE

SPATIAL = {"channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_groups": 4}
TEMPORAL = {"filters": 8, "channel_multipliers": (1, 1, 2, 2), "num_res_blocks": 1, "norm_groups": 4}
MOTION = {**TEMPORAL, "channels": 3, "spatial_downsample": (True, True, True), "causal_norm": True}

open_sora_form = functools.partial(VideoVAE, SPATIAL, TEMPORAL)
motion_form = functools.partial(VideoVAE, None, MOTION)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def random_params(model, x):
    """Parameters of an ordinary size, none of them zero, without compiling an initialiser."""
    rng = np.random.default_rng(1)

    def leaf(path, like):
        w = rng.standard_normal(like.shape, dtype=np.float32)
        if len(like.shape) > 1:
            return w / np.float32(math.sqrt(math.prod(like.shape[:-1])))
        return np.float32(path[-1].key == "scale") + np.float32(0.1) * w

    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(model.init, jax.random.key(0), x))


def jitted(model, method: str, **static):
    return jax.jit(functools.partial(model.apply, method=method, **static))


def encoded_shape(model, *shape: int) -> tuple[int, ...]:
    """Shape of the latents; the decoder must turn them back into a video of the same length and channels."""
    video = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), video)
    z = jax.eval_shape(functools.partial(model.apply, method="encode"), variables, video)
    decode = functools.partial(model.apply, method="decode", num_frames=shape[1])
    cell = model.space_factor
    back = jax.eval_shape(decode, variables, z).shape
    assert back == (*shape[:2], shape[2] // cell * cell, shape[3] // cell * cell, 3)
    return z.shape


def first_change(a, b) -> int:
    """Index of the first frame that differs in any bit; the number of frames where none does."""
    changed = (np.asarray(a) != np.asarray(b)).any(axis=(0, 2, 3, 4))
    return int(np.argmax([*changed, True]))


# Sizes


def test_latent_frames_counts_what_the_vae_makes():
    assert [motion_form().latent_frames(n) for n in (1, 17, 20, 34, 51, 204)] == [1, 5, 6, 10, 15, 60]
    assert [motion_form(micro_frame_size=0).latent_frames(n) for n in (1, 16, 17, 51)] == [1, 4, 5, 13]
    half = {**MOTION, "temporal_downsample": (True, False, False)}
    assert VideoVAE(None, half, micro_frame_size=8).latent_frames(20) == 10


def test_latent_of_is_the_ceiling_within_a_micro_frame():
    vae = motion_form()
    assert [vae.latent_of(j, 34) for j in range(17)] == [math.ceil(j / 4) for j in range(17)]
    assert [vae.latent_of(17 + j, 34) for j in range(17)] == [5 + math.ceil(j / 4) for j in range(17)]
    # The rest of 6 frames has two zero frames in front.
    assert [vae.latent_of(j, 23) for j in range(17, 23)] == [5, 5, 6, 6, 6, 6]


def test_parts_and_their_first_frames():
    vae = motion_form()
    assert vae.parts(20) == [range(17), range(17, 20)]
    assert [vae.encoded_alone(part) for part in vae.parts(20)] == [True, False]
    assert motion_form(micro_frame_size=0).parts(20) == [range(20)]


def test_what_a_video_takes_over_from_the_one_before():
    """Whole micro-frames stand alone in both; anything else must be encoded again."""
    assert motion_form().reusable(51) == (5, 17, True)
    assert motion_form().reusable(51, latents=7) == (7, 22, False)
    assert motion_form().reusable(17) == (2, 5, False)
    assert motion_form().reusable(4) == (1, 4, False)
    assert motion_form(micro_frame_size=0).reusable(17) == (2, 5, False)


@pytest.mark.parametrize("frames", [1, 17, 34, 51])
def test_both_forms_give_the_same_grid(frames):
    grid = (2, motion_form().latent_frames(frames), 9, 16, 4)
    assert encoded_shape(open_sora_form(frame_batch=4), 2, frames, 72, 128, 3) == grid
    assert encoded_shape(motion_form(), 2, frames, 72, 128, 3) == grid


def test_odd_sizes_are_rounded_down_in_both_forms():
    assert encoded_shape(open_sora_form(), 1, 3, 20, 31, 3) == (1, 1, 2, 3, 4)
    assert encoded_shape(motion_form(), 1, 3, 20, 31, 3) == (1, 1, 2, 3, 4)


def test_factors():
    assert (motion_form().time_factor, motion_form().space_factor) == (4, 8)
    assert (open_sora_form().time_factor, open_sora_form().space_factor) == (4, 8)
    three = CausalVAE(temporal_downsample=(True, False, False), spatial_downsample=(False, True, True))
    assert (three.time_factor, three.space_factor) == (2, 4)


@pytest.mark.parametrize("form", [open_sora_form, motion_form])
def test_a_frame_under_one_cell_is_a_user_error(form):
    with pytest.raises(UserError, match="4x16 pixels are too small: give at least 8x8"):
        encoded_shape(form(), 1, 1, 16, 4, 3)


def test_wrong_latent_count_is_an_error():
    model, latents = motion_form(), jnp.zeros((1, 5, 2, 2, 4))
    variables = random_params(model, jnp.zeros((1, 1, 8, 8, 3)))
    with pytest.raises(ValueError, match="20 frames have 6 latent frames, got 5"):
        model.apply(variables, latents, 20, method="decode")


def test_wrong_number_of_levels_is_an_error():
    model = CausalVAE(temporal_downsample=(True, True))
    with pytest.raises(ValueError, match="4 levels want 3 entries"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1, 4, 4, 4)))


# Causality


SHORTCUT = {**TEMPORAL, "channels": 2, "latent_channels": 8, "shortcut": True, "causal_norm": True}


@pytest.mark.parametrize("frames", [1, 5, 8])
def test_a_shortcut_loses_nothing_at_first(frames):
    """The frames of a latent are its channels; zeros stand in front of the first."""
    model, x = CausalVAE(**SHORTCUT), jnp.asarray(noise(1, frames, 4, 4, 2))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    mean, logvar = jax.jit(functools.partial(model.apply, method="encode"))(variables, x)
    padded = np.concatenate([np.zeros((1, -frames % 4, 4, 4, 2), np.float32), x], 1)
    np.testing.assert_array_equal(mean[:, -1], np.concatenate(np.moveaxis(padded[:, -4:], 1, 0), -1))
    np.testing.assert_array_equal(logvar, causal_vae.SHORTCUT_LOGVAR)
    np.testing.assert_array_equal(jax.jit(model.apply)(variables, x), x)


def test_nets_add_to_a_shortcut():
    model, x = CausalVAE(**SHORTCUT), jnp.asarray(noise(1, 5, 4, 4, 2))
    assert np.abs(jax.jit(model.apply)(random_params(model, x), x) - x).mean() > 0.1


@pytest.mark.parametrize("change", [{"latent_channels": 6}, {"spatial_downsample": (True, False, False)}])
def test_a_shortcut_wants_a_channel_for_each_number(change):
    with pytest.raises(ValueError, match="latent_channels = 8"):
        CausalVAE(**SHORTCUT | change).init(jax.random.key(0), jnp.zeros((1, 5, 4, 4, 2)))


@pytest.mark.parametrize(("time", "space"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_causal_convolution_sees_no_later_frame(time, space):
    conv = CausalConv(4, time_stride=time, space_stride=space)
    x = noise(1, 6, 6, 8, 2)
    variables = random_params(conv, x)
    apply = jax.jit(conv.apply)
    y = apply(variables, x)
    assert y.shape == (1, 6 // time, 6 // space, 8 // space, 4)
    for j in range(x.shape[1]):
        # Frame j is the last that output j // time sees.
        assert first_change(y, apply(variables, np.where(np.arange(6)[:, None, None, None] == j, 1, x))) == j // time


def test_motion_form_is_strictly_causal():
    """Changing frame j changes the latent that it lives in, and none before; back likewise."""
    frames = 20
    model, x = motion_form(), noise(1, frames, 16, 16, 3)
    variables = random_params(model, x)
    encode, decode = jitted(model, "encode"), jitted(model, "decode", num_frames=frames)
    z = encode(variables, x)
    for j in range(frames):
        other = x.copy()
        other[:, j] += 1
        assert first_change(z, encode(variables, other)) == model.latent_of(j, frames)
    video = decode(variables, z)
    for i in range(z.shape[1]):
        first_frame = [model.latent_of(j, frames) for j in range(frames)].index(i)
        assert first_change(video, decode(variables, z.at[:, i].add(1))) == first_frame


def test_open_sora_form_is_causal_across_micro_frames():
    """Inside a micro-frame its norms mix all frames, as in the reference; across them nothing passes."""
    frames, size = 12, 5
    model, x = open_sora_form(micro_frame_size=size), noise(1, frames, 16, 16, 3)
    variables = random_params(model, x)
    encode = jitted(model, "encode")
    z = np.asarray(encode(variables, x))
    micro = np.array([0, 0, 1, 1, 2])  # the micro-frame of each latent: 5, 5 and 2 frames
    assert z.shape[1] == len(micro)
    for j in range(frames):
        other = x.copy()
        other[:, j] += 1
        changed = (z != np.asarray(encode(variables, other))).any(axis=(0, 2, 3, 4))
        np.testing.assert_array_equal(changed, micro == j // size)


# Frame batches and micro-frames


def test_frame_batches_change_nothing():
    x = noise(2, 7, 16, 24, 3)
    variables = random_params(open_sora_form(), x)
    whole = open_sora_form()
    z = jitted(whole, "encode")(variables, x)
    video = jitted(whole, "decode", num_frames=7)(variables, z)
    model = open_sora_form(frame_batch=3)  # does not divide 7
    np.testing.assert_allclose(jitted(model, "encode")(variables, x), z, atol=2e-5)
    got = jitted(model, "decode", num_frames=7)(variables, z)
    np.testing.assert_allclose(got, video, atol=2e-5)


def test_pixels_of_each_round_are_those_of_the_whole():
    """What `finish` makes of the frames at work, to the bit; and a video of uint8 is encoded as its floats are."""
    model, video = open_sora_form(frame_batch=3), np.random.default_rng(0).integers(0, 256, (1, 7, 16, 24, 3), np.uint8)
    variables = random_params(model, video.astype(np.float32))

    def encode(variables, video):
        return tuple(model.apply(variables, x, method="encode") for x in (video, to_float(video)))

    z, same = jax.jit(encode)(variables, video)
    np.testing.assert_array_equal(z, same)

    def finish(frames):
        return from_float(frames), jnp.isfinite(frames).all((-3, -2, -1))

    @jax.jit
    def decode(variables, z):
        decode = functools.partial(model.apply, variables, z, 7, method="decode")
        return decode(finish=finish), from_float(decode())

    (pixels, finite), whole = decode(variables, z)
    np.testing.assert_array_equal(pixels, whole)
    assert pixels.dtype == np.uint8
    assert finite.shape == (1, 7)
    assert finite.all()
    assert not decode(variables, z.at[0, 0].set(jnp.nan))[0][1].any()


def test_micro_frames_are_the_causal_vae_on_each_part():
    model, x = motion_form(micro_frame_size=5), noise(1, 12, 16, 16, 3)
    variables = random_params(model, x)
    vae, inner = CausalVAE(**MOTION), {"params": variables["params"]["temporal_vae"]}
    encode = jitted(vae, "encode")
    decode = {n: jitted(vae, "decode", num_frames=n) for n in (5, 2)}

    moments = jitted(model, "moments")(variables, x)
    parts = [encode(inner, part)[0] for part in (x[:, :5], x[:, 5:10], x[:, 10:])]
    want = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(moments.latent.mean, want, atol=2e-5)

    clip = jitted(model, "decode_clip", num_frames=12)(variables, want)
    back = [decode[5](inner, parts[0]), decode[5](inner, parts[1]), decode[2](inner, parts[2])]
    np.testing.assert_allclose(clip, np.concatenate(back, axis=1), atol=2e-5)


def test_the_program_does_not_grow_with_the_length():
    def length(frames):
        model = open_sora_form(frame_batch=2)
        x = jax.ShapeDtypeStruct((1, frames, 16, 16, 3), jnp.float32)
        return len(str(jax.make_jaxpr(model.init)(jax.random.key(0), x)))

    assert length(68) < 1.02 * length(34)


# Posteriors


def standardised(sample, posterior) -> np.ndarray:
    return np.asarray((sample - posterior.mean) / jnp.exp(0.5 * posterior.logvar))


def assert_standard_normal(x: np.ndarray):
    """Mean and standard deviation within five of their standard errors."""
    assert abs(x.mean()) < 5 / math.sqrt(x.size)
    assert abs(x.std() - 1) < 5 / math.sqrt(2 * x.size)


def test_both_posteriors_are_sampled():
    model, x = open_sora_form(), noise(2, 9, 32, 32, 3)
    variables = random_params(model, x)
    moments = jitted(model, "moments")
    mean, one, same, two = (moments(variables, x, key) for key in (None, *map(jax.random.key, (1, 1, 2))))
    np.testing.assert_array_equal(mean.clip, mean.spatial.mean * model.spatial_scaling)
    np.testing.assert_array_equal(one.clip, same.clip)
    draws = [standardised(m.clip / model.spatial_scaling, m.spatial) for m in (one, two)]
    for draw in draws:
        assert_standard_normal(draw)
    assert abs(np.corrcoef(*map(np.ravel, draws))[0, 1]) < 5 / math.sqrt(draws[0].size)

    draws = [standardised(mean.latent.sample(jax.random.key(seed)), mean.latent) for seed in range(20)]
    assert_standard_normal(np.stack(draws))


def test_encode_samples_and_normalises():
    model, x = motion_form(), noise(1, 5, 16, 16, 3)
    variables = random_params(model, x)
    shift, scale = (variables["params"][name] for name in ("shift", "scale"))
    latent = jitted(model, "moments")(variables, x).latent
    encode = jitted(model, "encode")
    np.testing.assert_allclose(encode(variables, x), (latent.mean - shift) / scale, rtol=1e-5, atol=1e-5)
    draws = [encode(variables, x, jax.random.key(seed)) for seed in range(60)]
    assert_standard_normal(standardised(np.stack(draws) * scale + shift, latent))
    np.testing.assert_array_equal(encode(variables, x, jax.random.key(3)), draws[3])


def test_shift_and_scale_start_at_the_given_values():
    def initial(model):
        return model.init(jax.random.key(0), method=lambda vae: (vae.shift, vae.scale))["params"]

    released = initial(motion_form())
    np.testing.assert_allclose(released["shift"], (-0.10, 0.34, 0.27, 0.98))
    np.testing.assert_allclose(released["scale"], (3.85, 2.32, 2.33, 3.06))
    plain = initial(motion_form(latent_shift=(0.0, 1.0), latent_scale=(2.0, 3.0)))
    np.testing.assert_array_equal(plain["shift"], (0, 1))
    np.testing.assert_array_equal(plain["scale"], (2, 3))


# Precision


@pytest.mark.parametrize("form", [open_sora_form, motion_form])
def test_bfloat16_compute_keeps_float32_latents(form):
    x = noise(1, 5, 16, 16, 3)
    variables = random_params(form(), x)
    z = jitted(form(), "encode")(variables, x)
    low = jitted(form(dtype=jnp.bfloat16), "encode")(variables, x)
    assert low.dtype == jnp.float32
    assert np.abs(low - z).max() < 0.1 * np.abs(z).max()
    assert (np.asarray(low) != np.asarray(z)).any()


def test_log_variance_is_clipped():
    model, x = AutoencoderKL(**SPATIAL), noise(1, 8, 8, 3)
    variables = random_params(model, x)
    variables["params"]["quant_conv"]["bias"] = np.float32([0, 0, 0, 0, 99, -99, 99, -99])
    _, logvar = jitted(model, "encode")(variables, x)
    np.testing.assert_array_equal(np.unique(logvar), [-30, 20])


def test_the_first_convolution_has_the_bare_width():
    """Whatever the first level multiplies it by, as in the reference: the first res block widens."""
    model = CausalVAE(
        filters=8, channel_multipliers=(2, 2), num_res_blocks=1, norm_groups=2, temporal_downsample=(True,)
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2, 4, 4, 4)))["params"]["encoder"]
    assert shapes["conv_in"]["conv"]["kernel"].shape == (3, 3, 3, 4, 8)
    assert "shortcut" in shapes["level_0_block_0"]
