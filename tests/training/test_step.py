"""The training step: the same on any mesh and in any parts; what it starts from, and what it may not touch."""

import functools
import re

import flax.linen as nn
import flax.traverse_util as traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tora_jax.configs import common, tora

from tora_jax import sharding
from tora_jax.backbones import opensora
from tora_jax.data import placement
from tora_jax.errors import UserError
from tora_jax.models.tora import Tora
from tora_jax.models.video_vae import Gaussian, Moments
from tora_jax.training import lora, optim
from tora_jax.training import step as training

BATCH = 16  # two samples on each of 8 devices: for one alone, XLA sums in another order, which a tiny model amplifies
LATENTS = (2, 4, 4, 4)
OPTIM = {**common.training()["optim"], "warmup": 0, "clip": 0.0}
LOSS = {"timesteps": "logit_normal", "transform": True, "drop_text": 0.2, "drop_motion": 0.2, "path_weight": 0.0}
RULES = tuple(common.training()["rules"].items())
STAGE_1 = tuple(tora.get_config("stage=1").train)


@pytest.fixture(scope="module")
def parts(tiny_models):
    return tiny_models.parts


@pytest.fixture(scope="module")
def params(tiny_models):
    """The tiny models, with random numbers where they start from zeros (fusers, output)."""
    flat = traverse_util.flatten_dict(dict(tiny_models.params), sep="/")
    rng = np.random.default_rng(0)
    for path, leaf in flat.items():
        if not leaf.any():
            flat[path] = jnp.asarray(0.1 * rng.standard_normal(leaf.shape), leaf.dtype)
    return traverse_util.unflatten_dict(flat, sep="/")


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


def keep_gradients() -> optax.GradientTransformation:
    """Changes nothing; its state is the last gradient."""
    return optax.trace(decay=0.0)


def train(parts, params, patterns, optimizer, batches, spec: str = "", **options):
    """Trains on a mesh; the state, and for each step the loss and the gradients."""
    mesh = sharding.make_mesh(spec)
    if isinstance(patterns, dict):  # an adapter
        trained, frozen = patterns, optim.flatten(params)
    else:
        trained, frozen = optim.split(params, patterns)
    optimizer = optax.chain(keep_gradients(), optimizer)
    state = training.init_state(trained, optimizer)
    state = jax.device_put(state, sharding.param_shardings(state, mesh, RULES))
    frozen = jax.device_put(frozen, sharding.param_shardings(frozen, mesh, RULES))
    step = training.make_train_step(training.tora_loss(opensora, parts, LOSS), optimizer, **options)
    step = jax.jit(step, donate_argnums=0, out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), None))
    steps = []
    with sharding.use(mesh, RULES):
        for batch in batches:
            state, metrics = step(state, frozen, placement.place(batch, mesh), jax.random.key(0))
            gradients = jax.tree.map(np.asarray, state.opt_state[0].trace)
            steps.append((float(metrics["loss"]), gradients))
    return jax.tree.map(np.asarray, state), steps


@pytest.fixture(scope="module")
def on_one_device(parts, params):
    return train(parts, params, ("tora/.*", "t5/.*"), optax.sgd(1e-3), map(make_batch, range(5)))


def relative(found: dict, want: dict) -> dict[str, float]:
    """Distance of each leaf, relative to its norm."""
    return {path: float(np.linalg.norm(found[path] - leaf) / np.linalg.norm(leaf)) for path, leaf in want.items()}


@pytest.mark.parametrize("spec", ["data=8", "data=2,fsdp=4", "data=2,fsdp=2,tensor=2", "data=2,fsdp=2,seq=2"])
def test_sharded_equals_unsharded(parts, params, on_one_device, spec):
    """Losses, every gradient leaf and every updated parameter, over 5 steps."""
    state, steps = train(parts, params, ("tora/.*", "t5/.*"), optax.sgd(1e-3), map(make_batch, range(5)), spec)
    want_state, want_steps = on_one_device
    for (loss, gradients), (want_loss, want) in zip(steps, want_steps, strict=True):
        assert loss == pytest.approx(want_loss, rel=1e-5)
        far = {path: distance for path, distance in relative(gradients, want).items() if distance > 1e-5}
        assert not far
    assert max(relative(state.trained, want_state.trained).values()) < 1e-5
    moved = relative(want_state.trained, optim.split(params, ("tora/.*", "t5/.*"))[0])
    assert min(moved.values()) > 0


def adamw(trained, lr=1e-3):
    return optim.make({**OPTIM, "lr": lr}, trained, 20)


def without_motion(batch):
    return {name: array for name, array in batch.items() if not name.startswith("motion")}


def test_stage_1_starts_from_the_base_model(parts, tiny_models):
    """An untrained fuser changes nothing, so the first loss is that of the same weights without motion."""
    trained, _ = optim.split(tiny_models.params, STAGE_1)
    batch = make_batch(0)
    _, [(loss, gradients)] = train(parts, tiny_models.params, STAGE_1, adamw(trained), [batch])
    base = training.tora_loss(opensora, parts, LOSS)
    batch = on_device(batch)
    keys = training.sample_keys(jax.random.key(0), 0, batch)
    without, _ = jax.jit(base)(tiny_models.params, without_motion(batch), keys)
    assert loss == pytest.approx(float(without.mean()), rel=1e-6)
    assert any(np.any(leaf) for path, leaf in gradients.items() if "_fuser/" in path)  # and it can learn from there


def test_the_time_scale_of_the_weights_holds_in_training(parts, params):
    """Timesteps of the same draws: t' = s t / (1 + (s - 1) t) for a scale of s times as much."""

    def timesteps(scale: float) -> np.ndarray:
        seen = []

        class Recorder(Tora):
            def apply(self, variables, x, t, *args, **conditions):
                seen.append(np.asarray(t))
                return x

        recorder = Recorder(parts["tora"].stdit, time_scale=scale)
        batch = on_device(make_batch(0))
        keys = training.sample_keys(jax.random.key(0), 0, batch)
        training.tora_loss(opensora, {**parts, "tora": recorder}, LOSS)(params, batch, keys)
        return seen[0] / 1000

    one = timesteps(1.0)
    np.testing.assert_allclose(timesteps(5.0), 5 * one / (1 + 4 * one), rtol=1e-5)


def test_near_paths():
    """A cell that differs weighs more, with its neighbours in space and time; a still clip has none."""
    motion = np.zeros((2, 5, 8, 8, 3), np.float32) + np.float32([0.3, -1, 2])
    motion[0, 2, 4, 4] += 1
    near = np.asarray(training.near_paths(jnp.asarray(motion)))
    touched = np.zeros((5, 8, 8), bool)
    touched[1:4, 3:6, 3:6] = True
    assert near[0][touched].min() > 0.8
    assert np.abs(near[0][~touched]).max() == np.abs(near[1]).max() == 0


def test_weight_beside_the_paths(parts, params):
    """It changes the losses of samples with motion, and them alone."""
    batch = on_device(make_batch(0))
    keys = training.sample_keys(jax.random.key(0), 0, batch)

    def losses(batch, weight, drop):
        config = {**LOSS, "path_weight": weight, "drop_motion": drop}
        return np.asarray(training.tora_loss(opensora, parts, config)(params, batch, keys)[0])

    assert (losses(batch, 5.0, 0.0) > losses(batch, 0.0, 0.0)).all()
    np.testing.assert_array_equal(losses(batch, 5.0, 1.0), losses(batch, 0.0, 1.0))
    still = without_motion(batch)
    np.testing.assert_array_equal(losses(still, 5.0, 0.0), losses(still, 0.0, 0.0))


def test_what_is_frozen_does_not_change_by_a_bit(parts, params):
    trained, frozen = optim.split(params, STAGE_1)
    before = {path: np.array(leaf) for path, leaf in {**trained, **frozen}.items()}
    state, _ = train(parts, params, STAGE_1, adamw(trained), map(make_batch, range(20)))
    after = traverse_util.flatten_dict(optim.join(state.trained, frozen), sep="/")
    same = {path for path, leaf in after.items() if np.asarray(leaf).tobytes() == before[path].tobytes()}
    assert same == frozen.keys()
    assert all(re.search(r"extractor|blocks/temporal", path) for path in trained)
    for part in ("spatial/", "t_block", "final_layer", "vae/", "t5/", "text_embedder"):
        assert any(part in path for path in same)


@pytest.mark.parametrize("parts_of_batch", [2, 4])
def test_accumulation_gives_the_same_step(parts, params, on_one_device, parts_of_batch):
    _, want_steps = on_one_device
    sgd = optax.sgd(1e-3)
    _, steps = train(parts, params, ("tora/.*", "t5/.*"), sgd, [make_batch(0)], accumulate=parts_of_batch)
    assert steps[0][0] == pytest.approx(want_steps[0][0], rel=1e-6)
    assert max(relative(steps[0][1], want_steps[0][1]).values()) < 1e-5


def test_moving_average(parts, params):
    trained, _ = optim.split(params, STAGE_1)
    mean = {path: np.asarray(leaf, np.float64) for path, leaf in trained.items()}
    for count, decay in ((1, 1 / 10), (2, 0.15)):  # it starts with a small decay, (1 + step) / (10 + step)
        state, _ = train(parts, params, STAGE_1, adamw(trained), map(make_batch, range(count)), ema=0.15)
        mean = {path: decay * mean[path] + (1 - decay) * leaf for path, leaf in state.trained.items()}
    assert max(relative(state.ema, mean).values()) < 1e-6
    assert min(relative(state.trained, mean).values()) > 1e-5


def test_lora_trains_the_adapter_alone(parts, params, on_one_device):
    adapter = lora.init(params, lora.TEMPORAL, 2, jax.random.key(0))
    combine = functools.partial(lora.merge, alpha=4.0)
    state, steps = train(parts, params, adapter, adamw(adapter), [make_batch(0)] * 3, combine=combine)
    assert steps[0][0] == pytest.approx(on_one_device[1][0][0], rel=1e-6)  # it starts as the weights are
    assert steps[-1][0] != steps[0][0]
    assert state.trained.keys() == adapter.keys()
    merged = optim.flatten(combine(on_device(state.ema), params))
    changed = {path for path, leaf in optim.flatten(params).items() if np.any(merged[path] != leaf)}
    assert changed == {path.removesuffix("/a") for path in adapter if path.endswith("/a")}


def test_parts_that_a_step_uses():
    assert training.used_parts("motion_vae", None) == {"motion_vae"}
    assert training.used_parts("tora", None) == {"tora", "vae", "motion_vae", "t5"}
    assert training.used_parts("tora", {"text": "ids"}) == {"tora", "t5"}
    assert training.used_parts("tora", {"text": "embedding"}) == {"tora"}


def test_tokens_of_a_batch(parts):
    assert training.count_tokens(on_device(make_batch(0)), "tora", parts) == BATCH * 2 * 2 * 2
    video = {"video": jnp.zeros((3, 5, 32, 48, 3), jnp.uint8), "frame_mask": jnp.ones((3, 2), bool)}
    assert training.count_tokens(video, "vae", parts) == 3 * 2 * 4 * 6
    assert training.count_tokens(video, "tora", parts) == 3 * 2 * 2 * 3


class Means(nn.Module):
    """A VAE whose latents are the means of 8x8 pixels: it loses nothing of frames in cells of one colour."""

    def moments(self, video, rng):
        clip = nn.avg_pool(video, (1, 8, 8), strides=(1, 8, 8))
        posterior = Gaussian(clip, jnp.zeros_like(clip))
        return Moments(posterior, clip, posterior)

    def decode_frames(self, clip):
        return clip.repeat(8, axis=2).repeat(8, axis=3)


@pytest.mark.parametrize(("cell", "expected"), [(16, 0.0), (8, 0.25)])
def test_coarse_frames(cell, expected):
    """Means of 2x2 latents are to be half the frame: they are where cells are twice as wide as a latent's."""
    rows, columns = np.indices((24, 40)) // cell  # the latents' odd row and column have no half
    checks = np.where((rows + columns) % 2, 255, 0).astype(np.uint8)
    batch = {"video": jnp.asarray(np.broadcast_to(checks[None, None, :, :, None], (2, 3, 24, 40, 3)))}
    config = {**common.vae_loss("spatial"), "l1": 0.0, "kl_spatial": 0.0, "frame": 0.0, "coarse": 0.25}
    loss = training.vae_loss(Means(), "vae", config)
    total, terms = loss({"vae": {}}, batch, jax.random.split(jax.random.key(0), 2))
    np.testing.assert_allclose(total, [expected] * 2, atol=1e-6)
    np.testing.assert_allclose(terms["coarse"], 4 * expected, atol=1e-6)


def test_mistakes(parts, params):
    with pytest.raises(UserError, match="job 'flow': there are vae, motion_vae, tora"):
        training.loss_of(opensora, "flow", parts, LOSS)
    loss = training.loss_of(opensora, "motion_vae", parts, common.vae_loss("joint"))
    with pytest.raises(UserError, match="the batches hold no maps: motion_vae trains on clips"):
        loss(params, on_device(make_batch(0)), jax.random.split(jax.random.key(0), BATCH))
