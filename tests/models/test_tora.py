"""Tora around ST-DiT: what an untrained fuser and a null trajectory must leave untouched, and what masks mean."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from tests.parity.golden import assert_close
from tora_jax.models.motion_fuser import FUSERS, PLACEMENTS
from tora_jax.models.stdit import SIZES, LocalConv, STDiT, parse_variant
from tora_jax.models.tora import Tora

STDIT = {"variant": "2x16x2/2", "caption_channels": 8, "caption_length": 5, "base_resolution": 64.0}
BATCH, FRAMES, SIDE = 2, 3, 5  # the side is odd: it needs padding to the patch


def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (BATCH, FRAMES, SIDE, SIDE, 4)
    return {
        "x": jax.random.normal(keys[0], shape),
        "timestep": jnp.array([300.0, 900.0]),
        "text": jax.random.normal(keys[1], (BATCH, 5, 8)),
        "motion": jax.random.normal(keys[2], shape),
        "fps": jnp.full(BATCH, 24.0),
        "height": jnp.full(BATCH, 40.0),
        "width": jnp.full(BATCH, 40.0),
        "text_mask": jnp.arange(5)[None] < jnp.array([[3], [5]]),
        "has_motion": jnp.ones(BATCH, bool),
    }


@functools.cache
def init(fuser, placement):
    """A model with untrained fusers around blocks with random weights; only the fusers' are compiled, which is fast."""
    model = Tora(STDIT, fuser, placement, motion_features=8)

    def draw(key, kept):
        flat = traverse_util.flatten_dict(model.init(key, **inputs())["params"])
        return {path: leaf for path, leaf in flat.items() if kept(path)}

    fresh = jax.jit(functools.partial(draw, kept=of_a_fuser))(jax.random.key(1))
    shapes = jax.eval_shape(functools.partial(draw, kept=lambda path: not of_a_fuser(path)), jax.random.key(1))
    return model, traverse_util.unflatten_dict({**fresh, **shaken(jax.tree.map(lambda x: np.zeros(x.shape), shapes))})


def of_a_fuser(path):
    return any(part.endswith("_fuser") for part in path)


def shaken(params):
    """The same tree with random numbers where layers start at zero."""
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: leaf + 0.2 * rng.standard_normal(leaf.shape, np.float32), params)


COMPILED = {}  # of the models of `init`, which stay


def apply(model, params, **changes):
    compiled = COMPILED.setdefault(id(model), jax.jit(model.apply))
    return compiled({"params": params}, **{**inputs(), **changes})


PLAIN = jax.jit(STDiT(**STDIT).apply)


def plain(params):
    """The output of plain Open-Sora, on the tree without fusers."""
    flat = traverse_util.flatten_dict(params["stdit"])
    params = traverse_util.unflatten_dict({path: leaf for path, leaf in flat.items() if not of_a_fuser(path)})
    arguments = {name: value for name, value in inputs().items() if "motion" not in name}
    return PLAIN({"params": params}, **arguments)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("fuser", FUSERS)
class TestFusers:
    def test_untrained_changes_nothing(self, fuser, placement):
        """Bit for bit, around blocks with random weights."""
        model, params = init(fuser, placement)
        np.testing.assert_array_equal(apply(model, params), plain(params))

    def test_it_stands_where_its_placement_says(self, fuser, placement):
        _, params = init(fuser, placement)
        parts = {part for path in traverse_util.flatten_dict(params["stdit"]) for part in path}
        places = ("spatial", "temporal") if placement == "both" else (placement,)
        assert {part for part in parts if part.endswith("_fuser")} == {f"{place}_fuser" for place in places}

    def test_null_trajectory_changes_nothing(self, fuser, placement):
        """Bit for bit, for a whole batch and for one sample of it, with trained fusers."""
        model, params = init(fuser, placement)
        params = shaken(params)
        base = plain(params)
        np.testing.assert_array_equal(apply(model, params, motion=None), base)
        np.testing.assert_array_equal(apply(model, params, has_motion=jnp.zeros(BATCH, bool)), base)
        mixed = apply(model, params, has_motion=jnp.array([True, False]))
        np.testing.assert_array_equal(mixed[1], base[1])
        assert np.abs(mixed[0] - base[0]).max() > 1e-3


@pytest.mark.parametrize("fuser", FUSERS)
class TestFusersAtBothPlaces:
    def test_passes_of_guidance_share_features(self, fuser):
        model, params = init(fuser, "both")
        params, arguments = shaken(params), inputs()
        extract = jax.jit(functools.partial(model.apply, method="extract"))
        features = extract({"params": params}, arguments.pop("motion"))
        twice = {name: jnp.concatenate([value] * 2) for name, value in arguments.items()}
        denoise = jax.jit(functools.partial(model.apply, method="denoise"))
        got = denoise({"params": params}, features=features, **twice)
        want = denoise({"params": params}, features=jnp.concatenate([features] * 2, axis=1), **twice)
        np.testing.assert_allclose(got, want, atol=1e-5)

    def test_every_block_listens(self, fuser):
        """Each fuser's parameters have a gradient, in every pair of blocks."""
        model, params = init(fuser, "both")
        params = shaken(params)
        loss = jax.jit(jax.grad(lambda p: jnp.square(model.apply({"params": p}, **inputs())).sum()))
        flat = traverse_util.flatten_dict(loss(params), sep="/")
        fusers = {k: v for k, v in flat.items() if "_fuser" in k}
        for name, gradient in fusers.items():
            if not name.endswith("kv/bias"):  # softmax is blind to a shift of all keys
                assert (np.abs(gradient).reshape(len(gradient), -1).max(1) > 0).all(), name


@pytest.fixture(scope="module")
def trained():
    model, params = init("adaptive_norm", "temporal")
    return model, shaken(params)


def test_padded_text_never_matters(trained):
    model, params = trained
    noise = inputs()["text"] + jnp.where(inputs()["text_mask"][..., None], 0.0, 100.0)
    np.testing.assert_array_equal(apply(model, params), apply(model, params, text=noise))


def test_dropped_text_is_the_null_caption(trained):
    model, params = trained
    null = jnp.broadcast_to(params["stdit"]["null_caption"], (BATCH, 5, 8))
    dropped = apply(model, params, drop_text=jnp.array([True, False]))
    np.testing.assert_array_equal(dropped[0], apply(model, params, text=null)[0])
    np.testing.assert_array_equal(dropped[1], apply(model, params)[1])


def test_frame_mask_of_all_true_is_none(trained):
    model, params = trained
    mask = jnp.ones((BATCH, FRAMES), bool)
    np.testing.assert_allclose(apply(model, params, frame_mask=mask), apply(model, params), atol=1e-5)
    other = apply(model, params, frame_mask=mask.at[0, 1].set(False))
    assert np.abs(other[0] - apply(model, params)[0]).max() > 1e-3
    np.testing.assert_allclose(other[1], apply(model, params)[1], atol=1e-5)


@pytest.mark.parametrize("policy", ["nothing_saveable", "dots_saveable"])
def test_rematerialisation_keeps_gradients(trained, policy):
    model, params = trained
    remat = Tora({**STDIT, "remat": policy}, motion_features=8)
    loss = lambda m: jax.jit(jax.grad(lambda p: jnp.square(m.apply({"params": p}, **inputs())).sum()))  # noqa: E731
    jax.tree.map(lambda a, b: assert_close(b, a, 1e-5), loss(model)(params), loss(remat)(params))


def test_extracted_features_serve_every_step(trained):
    model, params = trained
    arguments = inputs()
    motion = arguments.pop("motion")
    features = model.apply({"params": params}, motion, method="extract")
    assert features.shape == (2, BATCH, FRAMES, 3, 3, 8)
    apart = jax.jit(functools.partial(model.apply, method="denoise"))(
        {"params": params}, features=features, **arguments
    )
    np.testing.assert_allclose(apart, apply(model, params), atol=1e-5)


def test_bfloat16_runs_close_to_float32(trained):
    model, params = trained
    half = Tora({**STDIT, "dtype": jnp.bfloat16}, motion_features=8)
    got, want = apply(half, params), apply(model, params)
    assert got.dtype == jnp.float32
    assert np.abs(got - want).mean() < 0.05 * np.abs(want).mean()


def test_fresh_local_convolutions_change_nothing():
    """And when trained, they do, in every pair of blocks."""
    model, params = init("adaptive_norm", "temporal")
    local = Tora({**STDIT, "local": True}, motion_features=8)
    shapes = jax.eval_shape(lambda: local.init(jax.random.key(1), **inputs())["params"])
    flat = traverse_util.flatten_dict(params)
    own = {path: np.zeros(leaf.shape) for path, leaf in traverse_util.flatten_dict(shapes).items() if path not in flat}
    assert {path[-2:] for path in own} == {("patch_neighbours", "kernel"), ("local_conv", "taps")}
    fresh = traverse_util.unflatten_dict({**flat, **own})
    np.testing.assert_array_equal(apply(local, fresh), apply(model, params))
    for path, leaf in own.items():
        for row in range(2 if "blocks" in path else 1):
            changed = np.copy(leaf)
            changed[row] = 0.2
            one = traverse_util.unflatten_dict({**flat, **own, path: changed})
            assert np.abs(apply(local, one) - apply(model, params)).max() > 1e-3, (path, row)


def test_local_conv_is_depthwise():
    x, taps = jax.random.normal(jax.random.key(0), (2, 1, 12, 5)), jax.random.normal(jax.random.key(1), (3, 3, 5))
    found = LocalConv((3, 4)).apply({"params": {"taps": taps}}, x)
    options = {"feature_group_count": 5, "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    added = jax.lax.conv_general_dilated(x.reshape(2, 3, 4, 5), taps[:, :, None], (1, 1), "SAME", **options)
    np.testing.assert_allclose(found, x + added.reshape(x.shape), atol=1e-5)


def test_variants():
    assert parse_variant("XL/2") == SIZES["XL/2"]
    assert parse_variant("3x24x2/2") == (3, 24, 2, 2)
    for wrong in ("XXL/2", "2x10x3/2", "0x16x2/2", "2x16x2"):
        with pytest.raises(ValueError, match="variant"):
            parse_variant(wrong)


@pytest.mark.parametrize(("variant", "billions"), [("XL/2", 1.2), ("3B/2", 3.0)])
def test_released_sizes(variant, billions):
    model = STDiT(variant)
    one = jnp.ones(1)
    x, text = jnp.zeros((1, 1, 2, 2, 4)), jnp.zeros((1, 1, 4096))
    shapes = jax.eval_shape(
        functools.partial(model.init, fps=one, height=one, width=one), jax.random.key(0), x, one, text
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert abs(count / 1e9 - billions) < 0.15 * billions


@pytest.mark.parametrize("field", ["fuser", "placement"])
def test_unknown_names(field):
    with pytest.raises(ValueError, match="unknown"):
        Tora(STDIT, **{field: "sideways"}).init(jax.random.key(0), **inputs())


def test_with_data_std_the_output_is_the_data_under_much_noise():
    """What the velocity says of the data, x_t + t v, is the output at t = 1, and x_t where there is no noise."""
    plain_tora, params = init("adaptive_norm", "temporal")
    tora, x = plain_tora.clone(data_std=0.25), inputs()["x"]
    for timestep, weight in ((1000.0, 1.0), (0.0, 0.0)):
        timestep = jnp.full(BATCH, timestep)
        output = apply(plain_tora, shaken(params), timestep=timestep)
        found = apply(tora, shaken(params), timestep=timestep)
        assert_close(x + weight * found[..., :4], weight * output[..., :4] + (1 - weight) * x, 1e-5)
        assert_close(found[..., 4:], output[..., 4:], 1e-6)


@pytest.mark.parametrize("std", [0.25, 1.0])
def test_data_std_is_that_of_data_for_which_an_output_of_zero_is_best(std):
    """Of Gaussian data the best velocity is a multiple of x_t; with an output of zero the velocity is that."""
    tora, params = init("adaptive_norm", "temporal")
    tora, params = tora.clone(data_std=std), jax.tree.map(jnp.zeros_like, params)
    noise, data = jax.random.normal(jax.random.key(3), (2, BATCH, FRAMES, 40, 40, 4))
    apply = jax.jit(tora.apply)
    for t in (0.1, 0.5, 0.9):
        x_t, velocity = (1 - t) * std * data + t * noise, std * data - noise
        changes = {"x": x_t, "motion": None, "timestep": jnp.full(BATCH, 1000 * t)}
        found = apply({"params": params}, **inputs() | changes)[..., :4]
        best = (velocity * x_t).sum() / jnp.square(x_t).sum()  # of so many numbers, to about 1 %
        np.testing.assert_allclose(found, best * x_t, atol=0.02 * jnp.abs(velocity).max())


def test_a_data_std_of_zero_is_refused():
    with pytest.raises(ValueError, match="data_std=0: it must be over 0, or None"):
        Tora(STDIT, data_std=0).init(jax.random.key(0), **inputs())
