"""Where parameters lie; the model on meshes: the same numbers as on one device, and what devices send."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from jax.sharding import PartitionSpec as P

from benchmarks.aot import sent
from configs import common, tora
from tora_jax import sharding
from tora_jax.backbones import assembly, opensora
from tora_jax.errors import UserError
from tora_jax.models.cogvideox import CogVideoX
from tora_jax.models.cogvideox_vae import CogVideoXVAE
from tora_jax.models.tora import Tora
from tora_jax.models.video_vae import VideoVAE
from tora_jax.training import optim

RULES = tuple(common.training()["rules"].items())


@functools.cache
def released_shapes():
    parts = assembly.modules(tora.get_config().to_dict())
    return jax.eval_shape(functools.partial(assembly.init_params, opensora, parts), jax.random.key(0))


class TestParameters:
    def test_released_sizes(self):
        """Every large leaf is split, the blocks' in four, and no device holds more than 30 %."""
        mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")
        shapes = released_shapes()
        shardings = sharding.param_shardings(shapes, mesh, RULES)
        flat = traverse_util.flatten_dict(shapes, sep="/")
        held = {}
        for path, placed in traverse_util.flatten_dict(shardings, sep="/").items():
            held[path] = math.prod(placed.shard_shape(flat[path].shape))
            if flat[path].size >= 1 << 20 and path != "tora/stdit/null_caption":
                assert flat[path].size // held[path] == 4, path
            if path.startswith("tora/stdit/blocks/") and path.endswith("/kernel"):
                assert flat[path].size // held[path] == 4, path
        assert sum(held.values()) < 0.3 * sum(leaf.size for leaf in flat.values())

    @pytest.mark.parametrize(
        ("path", "spec"),
        [
            ("tora/stdit/blocks/temporal/attn/qkv/kernel", P(None, "fsdp", "tensor")),
            ("tora/stdit/blocks/spatial/mlp/fc2/kernel", P(None, "tensor", "fsdp")),
            ("tora/stdit/blocks/temporal_fuser/gamma_temporal/kernel", P(None, None, None, None, "fsdp", "tensor")),
            ("tora/stdit/t_block/kernel", P("fsdp", "tensor")),
            ("tora/stdit/blocks/spatial/mlp/fc1/bias", P()),
            ("tora/stdit/blocks/spatial/scale_shift_table", P()),
            ("t5/blocks/mlp/wo/kernel", P(None, ("fsdp", "seq"), "tensor")),
        ],
    )
    def test_table(self, path, spec):
        mesh = sharding.make_mesh("fsdp=2,tensor=4")
        shape = traverse_util.flatten_dict(released_shapes(), sep="/")[path]
        assert sharding.param_shardings({path: shape}, mesh, RULES)[path].spec == spec

    def test_models_that_no_device_holds(self):
        """Their parameters lie over `seq` as well: for one video, `fsdp` has nothing to cut."""
        leaf, mesh = jax.ShapeDtypeStruct((2, 64, 64), jnp.float32), sharding.make_mesh("fsdp=2,seq=2,tensor=2")
        got = sharding.param_shardings({f"tora/cogvideox/x/{name}/kernel": leaf for name in ("q", "proj")}, mesh, RULES)
        assert got["tora/cogvideox/x/q/kernel"].spec == P(None, ("fsdp", "seq"), "tensor")
        assert got["tora/cogvideox/x/proj/kernel"].spec == P(None, "tensor", ("fsdp", "seq"))

    def test_what_does_not_divide_is_whole(self):
        mesh = sharding.make_mesh("fsdp=8")
        leaf = jax.ShapeDtypeStruct((12, 40), jnp.float32)
        got = sharding.param_shardings({"tora/x/qkv/kernel": leaf, "tora/x/proj/kernel": leaf}, mesh, RULES)
        assert got["tora/x/qkv/kernel"].spec == P(None, "tensor")
        assert got["tora/x/proj/kernel"].spec == P("tensor", "fsdp")

    def test_state_lies_like_its_parameters(self):
        mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")
        trained, frozen = optim.split(released_shapes(), ["tora/.*"], opensora.BUFFERS)
        state = {"opt": jax.eval_shape(optax.adamw(1e-3).init, trained), "ema": trained, "rng": jax.random.key(0)}
        want = sharding.param_shardings(trained, mesh, RULES)
        got = sharding.param_shardings(state, mesh, RULES)
        for same in (got["ema"], got["opt"][0].mu, got["opt"][0].nu):
            assert same == want
        assert got["opt"][0].count.spec == got["rng"].spec == P()
        nested = sharding.param_shardings(released_shapes(), mesh, RULES)
        flat = traverse_util.flatten_dict(nested, sep="/")
        assert {**want, **sharding.param_shardings(frozen, mesh, RULES)} == flat


def test_batch():
    mesh = sharding.make_mesh("data=2,fsdp=2,seq=2")
    assert sharding.batch_sharding(mesh, RULES, 8).spec == P(("data", "fsdp"))
    with pytest.raises(UserError, match=r"a batch of 6 does not divide over 4 parts .* multiple of 4"):
        sharding.batch_sharding(mesh, RULES, 6)


# ----------------------------------------------------------------------------------------------------------
# The model on meshes
# ----------------------------------------------------------------------------------------------------------

WIDTH = 64  # a token is wider than a motion feature, and than what is predicted for it


def inputs(batch, frames, height=16, width=8):
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (batch, frames, height, width, 4)  # 8 x 4 tokens a frame
    return {
        "x": jax.random.normal(keys[0], shape),
        "timestep": jnp.linspace(100.0, 900.0, batch),
        "text": jax.random.normal(keys[1], (batch, 5, 8)),
        "motion": jax.random.normal(keys[2], shape),
        "fps": jnp.full(batch, 24.0),
        "height": jnp.full(batch, 64.0),
        "width": jnp.full(batch, 32.0),
        "text_mask": jnp.arange(5)[None] < 5 - jnp.arange(batch)[:, None] % 3,
        "frame_mask": jnp.ones((batch, frames), bool).at[0, 0].set(False),
        "has_motion": jnp.arange(batch) != 1,
    }


@functools.cache
def model(fuser="adaptive_norm", placement="temporal", depth=1):
    stdit = {"variant": f"{depth}x{WIDTH}x4/2", "caption_channels": 8, "caption_length": 5, "base_resolution": 64.0}
    module = Tora(stdit, fuser, placement, motion_features=8)
    params = jax.jit(functools.partial(module.init, **inputs(1, 1)))(jax.random.key(1))["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    shaken = [leaf + 0.1 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return module, {"tora": tree.unflatten(shaken)}


def loss_and_grad(module):
    def loss(params, batch):
        return jnp.square(module.apply({"params": params["tora"]}, **batch)[..., :4] - batch["x"]).mean()

    return jax.jit(jax.value_and_grad(loss))


def on_mesh(spec, params, batch, function):
    """`function` on a mesh: (result, text of the compiled module)."""
    mesh = sharding.make_mesh(spec)
    params = jax.device_put(params, sharding.param_shardings(params, mesh, RULES))
    batch = jax.device_put(batch, sharding.batch_sharding(mesh, RULES, len(batch["x"])))
    with sharding.use(mesh, RULES):
        compiled = function.lower(params, batch).compile()
        return compiled(params, batch), compiled.as_text()


@pytest.mark.parametrize(
    ("spec", "fuser", "placement", "batch", "size"),
    [
        pytest.param("data=2,seq=4", "adaptive_norm", "temporal", 4, (4,), marks=pytest.mark.slow),
        ("data=2,fsdp=2,seq=2", "adaptive_norm", "both", 4, (5, 14, 10)),  # 5 frames and 35 tracks on two devices
        pytest.param("fsdp=2,seq=2,tensor=2", "cross_attention", "temporal", 2, (4,), marks=pytest.mark.slow),
        ("seq=8", "extra_channels", "spatial", 2, (3,)),
        pytest.param("data=2,fsdp=2,tensor=2", "adaptive_norm", "temporal", 4, (3,), marks=pytest.mark.slow),
    ],
)
def test_the_same_loss_and_gradients(spec, fuser, placement, batch, size):
    module, params = model(fuser, placement)
    batch = inputs(batch, *size)
    function = loss_and_grad(module)
    (want_loss, want), (got_loss, got) = function(params, batch), on_mesh(spec, params, batch, function)[0]
    np.testing.assert_allclose(got_loss, want_loss, rtol=1e-6)
    for path, gradient in traverse_util.flatten_dict(want, sep="/").items():
        other = np.asarray(traverse_util.flatten_dict(got, sep="/")[path])
        assert np.abs(other - gradient).max() <= 1e-5 * np.abs(gradient).max(), path


@pytest.mark.parametrize("size", [(8, 16, 8), (7, 14, 10)])  # what four devices divide, and what they do not
def test_what_sequence_parallelism_sends(size):
    """Tokens move by all-to-all alone, once between the blocks of a pair and once between pairs."""
    depth = 2
    module, params = model(depth=depth)
    batch = inputs(4, *size)  # two samples for each of the two parts of the batch
    forward = jax.jit(lambda params, batch: module.apply({"params": params["tora"]}, **batch))
    tracks = size[1] * size[2] // 4
    part = 2 * -(-size[0] // 4) * (tracks + -tracks % 4) * WIDTH  # of two samples' tokens, on one device
    features = 2 * size[0] * tracks * 8
    frames = size[0] + -size[0] % 4
    modulation = 2 * frames * 6 * WIDTH  # a few rows for each frame, which both kinds of blocks need
    predicted = 2 * frames * tracks * 32  # put together where padded frames are cut off
    for function, switches in ((forward, 2 * depth), (loss_and_grad(module), None)):
        found = [(kind, elements) for kind, elements, _ in sent(on_mesh("data=2,seq=4", params, batch, function)[1])]
        gathered = {count for kind, count in found if kind == "all-gather" and count >= min(part, features)}
        assert gathered <= {modulation, predicted if size[0] % 4 else 0}
        moved = [count for kind, count in found if kind == "all-to-all" and count >= part]
        assert moved
        assert set(moved) == {part}  # never anything wider than the tokens themselves
        if switches:
            assert len(moved) == switches
    halo = [count for kind, count in found if kind == "collective-permute"]
    assert halo  # of the fusers' convolutions over time
    assert max(halo) < part


def test_cogvideox_on_a_mesh():
    """What one device computes, with rows and text that two devices do not divide; tokens move by all-to-all alone."""
    fields = {"caption_channels": 8, "caption_length": 5, "time_channels": 8, "base_grid": (3, 2)}
    module, rng = CogVideoX("1x96x2/2", **fields), np.random.default_rng(0)
    batch = {
        "x": rng.standard_normal((2, 3, 10, 6, 16), np.float32),  # 3 frames of 5x3 patches
        "timestep": np.float32([100, 900]),
        "text": rng.standard_normal((2, 5, 8), np.float32),
        "features": rng.standard_normal((1, 2, 3, 5, 3, 8), np.float32),
        "strength": np.float32([1, 0.5]),
    }
    shapes = jax.eval_shape(lambda key: module.init(key, **jax.tree.map(jnp.asarray, batch)), jax.random.key(1))
    params = jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes["params"])

    def run(params, batch):
        # Features have a leading axis of blocks, so that they cannot be split like the rest of a batch.
        told = batch | {"features": batch["features"][None]}
        return module.apply({"params": params["tora"]["cogvideox"]}, **told)

    batch["features"], params = batch["features"][0], {"tora": {"cogvideox": params}}
    quick = {"xla_backend_optimization_level": 0}  # run once: fast to compile beats fast to run
    forward = jax.jit(run, compiler_options=quick)
    (out, text), want = on_mesh("fsdp=2,seq=2", params, batch, forward), forward(params, batch)
    assert np.abs(np.asarray(out) - want).max() <= 1e-5 * np.abs(want).max()
    whole = 3 * 6 * 3 * 96  # one sample's tokens, with a row of padding; half of them on each device
    parts = sent(text)
    moved = [count for kind, count, _ in parts if kind == "all-to-all"]
    assert moved
    assert max(moved) <= 3 * whole // 2  # queries, keys and values at most
    leaves = jax.tree.leaves(params)
    kernels = {leaf.size for leaf in leaves} | {leaf[0].size for leaf in leaves}
    gathered = [count for kind, count, _ in parts if kind == "all-gather" and count not in kernels]
    assert max(gathered, default=0) < whole  # such as the predicted patches, which are narrower
    halo = [count for kind, count, _ in parts if kind == "collective-permute"]
    assert max(halo) < whole // 4  # rows of the motion features


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "batch"), [("seq=8", 1), ("data=2,fsdp=2,seq=2", 4)])
def test_vae(tiny_config, spec, batch):
    """Each device has micro-frames and frames of its own; what does not divide is filled up."""
    vae = VideoVAE(**tiny_config["vae"], micro_frame_size=4, frame_batch=2)
    video = jax.random.uniform(jax.random.key(0), (batch, 14, 16, 8, 3), minval=-1)  # 3 micro-frames, and half of one
    params = jax.jit(vae.init)(jax.random.key(1), video[:1, :4])["params"]

    def run(params, video):
        def loss(params):
            latents = vae.apply({"params": params}, video, method="encode")
            out = vae.apply({"params": params}, latents, 14, method="decode")
            return jnp.square(out - video).mean(), (latents, out)

        return jax.value_and_grad(loss, has_aux=True)(params)

    want = jax.jit(run)(params, video)
    mesh = sharding.make_mesh(spec)
    placed = jax.device_put(params, sharding.param_shardings({"vae": params}, mesh, RULES)["vae"])
    split = jax.device_put(video, sharding.batch_sharding(mesh, RULES, batch))
    with sharding.use(mesh, RULES):
        got = jax.jit(run)(placed, split)
    # Norms of one or two channels make much of rounding (4e-5 of the largest value, where the batch is split), and what
    # is before them has gradients that are nothing else.
    for there, here in zip(jax.tree.leaves(got[0]), jax.tree.leaves(want[0]), strict=True):
        assert np.abs(np.asarray(there) - here).max() <= 1e-4 * np.abs(here).max()
    largest = max(np.abs(gradient).max() for gradient in jax.tree.leaves(want[1]))
    for there, here in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        assert np.abs(np.asarray(there) - here).max() <= 1e-4 * largest


@pytest.mark.slow
def test_cogvideox_vae():
    """Rows that four devices do not divide, filled up by XLA: what one device decodes and encodes."""
    vae = CogVideoXVAE(channels=(4, 4, 4, 4), layers_per_block=1, norm_groups=2, latent_channels=4)
    shapes, rng = jax.eval_shape(vae.init, jax.random.key(0), jnp.zeros((1, 1, 8, 8, 3))), np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes)
    latents = rng.standard_normal((1, 3, 6, 2, 4), np.float32)
    video = rng.standard_normal((1, 9, 48, 16, 3), np.float32)
    run = jax.jit(
        lambda variables, latents, video: (
            vae.apply(variables, latents, 9, method="decode"),
            vae.apply(variables, video, method="encode"),
        )
    )
    want = run(variables, latents, video)
    with sharding.use(sharding.make_mesh("seq=4"), RULES):
        compiled = run.lower(variables, latents, video).compile()
        got = compiled(variables, latents, video)
    for there, here in zip(got, want, strict=True):
        assert np.abs(np.asarray(there) - here).max() <= 1e-5 * np.abs(here).max()
    largest = max(count for kind, count, _ in sent(compiled.as_text()) if kind == "collective-permute")
    assert largest < video.size // 4  # rows at edges, no maps


def test_names_mean_nothing_without_a_mesh():
    module, params = model()
    batch = inputs(1, 2)
    forward = jax.jit(lambda params, batch: module.apply({"params": params["tora"]}, **batch))
    lowered = forward.lower(params, batch).as_text()
    assert "sharding" not in lowered
