"""The released Tora's models where the golden files say nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tora_jax import typing
from tora_jax.errors import UserError
from tora_jax.models import eight_bit
from tora_jax.models.cogvideox import size_of
from tora_jax.models.cogvideox_positions import rotary_tables
from tora_jax.models.cogvideox_tora import CogVideoXTora
from tora_jax.models.cogvideox_vae import CogVideoXVAE, decoded_frames

FIELDS = {"variant": "2x32x2/2", "caption_channels": 8, "caption_length": 3, "time_channels": 16, "base_grid": (2, 3)}
VAE = CogVideoXVAE(channels=(4, 4, 4, 4), layers_per_block=1, norm_groups=2, latent_channels=4)


def tiny(**fields) -> CogVideoXTora:
    return CogVideoXTora(FIELDS | fields, motion_features=8)


def inputs(batch: int = 2):
    keys = jax.random.split(jax.random.key(0), 3)
    x, motion = (jax.random.normal(key, (batch, 3, 4, 6, 16)) for key in keys[:2])
    return x, jnp.linspace(0, 999, batch), jax.random.normal(keys[2], (batch, 3, 8)), motion


@pytest.fixture(scope="module")
def params():
    return jax.jit(tiny().init)(jax.random.key(1), *inputs())["params"]


def shaken(params):
    """All parameters moved, also those that start at zero."""
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: leaf + 0.05 * rng.standard_normal(leaf.shape, np.float32), params)


def test_an_untrained_fuser_changes_nothing(params):
    apply = jax.jit(lambda motion: tiny().apply({"params": params}, *inputs()[:3], motion))
    np.testing.assert_array_equal(apply(inputs()[3]), apply(None))


def test_rematerialised_gradients(params):
    """The same gradients, of every parameter, whether activations are kept or computed again."""
    params = shaken(params)

    def gradient(remat: str):
        loss = lambda p: jnp.square(tiny(remat=remat).apply({"params": p}, *inputs())).mean()  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    kept, again = gradient("none"), gradient("nothing_saveable")
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), kept, again)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(kept))


def test_bfloat16_stays_close(params):
    params = shaken(params)
    want, got = (
        jax.jit(tiny(dtype=dtype).apply)({"params": params}, *inputs()) for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert got.dtype == jnp.float32
    assert 0 < jnp.sqrt(jnp.mean((got - want) ** 2) / jnp.mean(want**2)) < 0.05


def test_eight_bits(params):
    """Kernels of the blocks in 8 bits: half of bfloat16's room, about its error, and the same shapes at the start."""
    params = shaken(params)
    blocks = eight_bit.quantize(params["cogvideox"]["blocks"])
    want_shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), eight_bit.shapes(params["cogvideox"]["blocks"]))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), blocks) == want_shapes
    assert blocks["attn"]["q"]["kernel"].dtype == np.int8
    assert np.abs(blocks["attn"]["q"]["kernel"]).max() == 127
    small = {**params, "cogvideox": {**params["cogvideox"], "blocks": blocks}}
    want = jax.jit(tiny().apply)({"params": params}, *inputs())
    got = jax.jit(tiny(eight_bit=True).apply)({"params": small}, *inputs())
    assert 0 < jnp.sqrt(jnp.mean((got - want) ** 2) / jnp.mean(want**2)) < 0.02
    fresh = jax.eval_shape(tiny(eight_bit=True).init, jax.random.key(1), *inputs())["params"]
    assert jax.tree.structure(fresh) == jax.tree.structure(params)


def test_the_full_size():
    """480x720 and 49 frames, with an image: shapes and the number of parameters, without computing anything."""
    model = CogVideoXTora({"in_channels": 32, "learned_positions": 17776, "dtype": "bfloat16"})
    x = jax.ShapeDtypeStruct((2, 13, 60, 90, 16), jnp.float32)
    text, t = jax.ShapeDtypeStruct((2, 226, 4096), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
    init = lambda x, t, text: model.init(jax.random.key(0), x, t, text, x, given=x)["params"]  # noqa: E731
    params = jax.eval_shape(init, x, t, text)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert round(count / 1e9, 3) == 6.319

    features = jax.eval_shape(lambda p, x: model.apply({"params": p}, x, method="extract"), params, x)
    assert features.shape == (42, 2, 13, 30, 45, 128)
    fusion = jax.eval_shape(lambda p, f: model.apply({"params": p}, f, method="fusion"), params, features)
    assert fusion.gamma.shape == fusion.beta.shape == (42, 2, 13, 30, 45, 3072)
    assert fusion.gamma.dtype == jnp.bfloat16
    denoise = functools.partial(model.apply, method="denoise")
    v = jax.eval_shape(
        lambda p, x, t, y, f: denoise({"params": p}, x, t, y, given=x, features=f), params, x, t, text, fusion
    )
    assert v.shape == x.shape
    assert isinstance(model, typing.Denoiser)
    assert (model.depth, model.patch, model.in_channels) == (42, 2, 16)
    assert (model.caption_channels, model.caption_length) == (4096, 226)


def test_learned_positions_are_for_one_size():
    model = tiny(learned_positions=100, add_positions=True)
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs())
    with pytest.raises(UserError, match="100 learned positions"):
        jax.eval_shape(model.apply, params, *inputs())


def test_sizes_that_cannot_be():
    assert size_of("5B") == (42, 3072, 48, 2)
    with pytest.raises(ValueError, match="multiples of 16"):
        rotary_tables(1, (2, 2), 24, (2, 2))
    x, timestep, text, _ = inputs()
    with pytest.raises(ValueError, match="multiples of 2"):
        jax.eval_shape(tiny().init, jax.random.key(0), x[:, :, :3], timestep, text, None)


# ----------------------------------------------------------------------------------------------------------
# VAE
# ----------------------------------------------------------------------------------------------------------


def drawn():
    """Parameters of the VAE; drawing them is faster than compiling `init`."""
    shapes = jax.eval_shape(VAE.init, jax.random.key(0), jnp.zeros((1, 1, 8, 8, 3)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32), shapes)


@pytest.mark.parametrize("whole", [False, True])
def test_frames_and_latents(whole):
    """The VAE's own count is that of its nets, at any number of frames."""
    assert isinstance(VAE, typing.VAE)
    vae = VAE.clone(encoder_chunk=0) if whole else VAE
    params = jax.eval_shape(vae.init, jax.random.key(0), jnp.zeros((1, 1, 8, 8, 3)))
    encode = functools.partial(vae.apply, method="encode")
    for frames in (1, 2, 3, 6, 8, 9, 12, 15, 17):
        latents = jax.eval_shape(encode, params, jax.ShapeDtypeStruct((1, frames, 16, 8, 3), jnp.float32))
        assert latents.shape == (1, vae.latent_frames(frames), 2, 1, 4)
        places = [vae.latent_of(i, frames) for i in range(frames)]
        assert places == sorted(places)
        assert sorted(set(places)) == list(range(latents.shape[1]))
        if frames % 8 == 1:
            assert places == [-(-i // 4) for i in range(frames)]
            assert decoded_frames(latents.shape[1]) == frames


def test_decoding_wants_the_right_number_of_frames():
    params = jax.eval_shape(VAE.init, jax.random.key(0), jnp.zeros((1, 1, 8, 8, 3)))
    for latents in (1, 2, 4, 5):
        z, frames = jax.ShapeDtypeStruct((1, latents, 1, 1, 4), jnp.float32), decoded_frames(latents)
        decode = functools.partial(VAE.apply, method="decode", num_frames=frames)
        assert jax.eval_shape(decode, params, z).shape == (1, frames, 8, 8, 3)
        with pytest.raises(ValueError, match=f"{frames} frames, not {frames + 1}"):
            jax.eval_shape(functools.partial(VAE.apply, method="decode", num_frames=frames + 1), params, z)


def test_chunks_in_a_loop_are_chunks_one_by_one(monkeypatch):
    """Accelerators loop over the equal chunks; a CPU unrolls them."""
    video = jax.random.uniform(jax.random.key(0), (1, 25, 8, 8, 3), minval=-1)
    variables = drawn()
    want = jax.jit(functools.partial(VAE.apply, method="encode"))(variables, video)
    monkeypatch.setattr("tora_jax.models.cogvideox_vae.sharding.platform", lambda: "tpu")
    got = jax.jit(lambda *args: VAE.apply(*args, method="encode"))(variables, video)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_later_chunk_reaches_no_earlier_one():
    video = jax.random.uniform(jax.random.key(0), (1, 17, 8, 8, 3), minval=-1)
    variables = drawn()
    encode = jax.jit(functools.partial(VAE.apply, method="encode"))
    want, got = encode(variables, video), encode(variables, video.at[:, 9:].set(0))
    np.testing.assert_array_equal(got[:, :3], want[:, :3])
    assert (got[:, 3:] != want[:, 3:]).any()


def test_frames_that_are_too_small():
    with pytest.raises(UserError, match="8x8"):
        jax.eval_shape(VAE.init, jax.random.key(0), jnp.zeros((1, 1, 4, 8, 3)))
