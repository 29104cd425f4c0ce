"""The training step: the same on any mesh and in any parts; what it starts from, and what it may not touch."""

import functools
import re

import flax.traverse_util as traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tora_jax.configs import common, tora

from tests.training.batches import LOSS, make_batch, on_device, without_motion
from tora_jax import sharding
from tora_jax.backbones import opensora
from tora_jax.data import placement
from tora_jax.training import lora, optim
from tora_jax.training.losses import STATISTICS, sample_keys, tora_loss
from tora_jax.training.step import init_state, make_train_step

OPTIM = {**common.training()["optim"], "warmup": 0, "clip": 0.0}
RULES = tuple(common.training()["rules"].items())
STAGE_1 = tuple(tora.get_config("stage=1").train)


def keep_gradients() -> optax.GradientTransformation:
    """Changes nothing; its state is the last gradient."""
    return optax.trace(decay=0.0)


def train(parts, params, patterns, optimizer, batches, spec: str = "", **options):
    """Trains on a mesh; the state, and for each step the loss and the gradients."""
    mesh = sharding.make_mesh(spec)
    if isinstance(patterns, dict):  # an adapter
        trained, frozen = patterns, optim.flatten(params)
    else:
        trained, frozen = optim.split(params, patterns, opensora.BUFFERS)
    optimizer = optax.chain(keep_gradients(), optimizer)
    state = init_state(trained, optimizer)
    state = jax.device_put(state, sharding.param_shardings(state, mesh, RULES))
    frozen = jax.device_put(frozen, sharding.param_shardings(frozen, mesh, RULES))
    step = make_train_step(tora_loss(opensora, parts, LOSS), optimizer, **options)
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


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param("data=8", marks=pytest.mark.slow),
        pytest.param("data=2,fsdp=4", marks=pytest.mark.slow),
        "data=2,fsdp=2,tensor=2",
        "data=2,fsdp=2,seq=2",
    ],
)
def test_sharded_equals_unsharded(parts, params, on_one_device, spec):
    """Losses, every gradient leaf and every updated parameter, over 5 steps."""
    state, steps = train(parts, params, ("tora/.*", "t5/.*"), optax.sgd(1e-3), map(make_batch, range(5)), spec)
    want_state, want_steps = on_one_device
    for (loss, gradients), (want_loss, want) in zip(steps, want_steps, strict=True):
        assert loss == pytest.approx(want_loss, rel=1e-5)
        far = {path: distance for path, distance in relative(gradients, want).items() if distance > 1e-5}
        assert not far
    assert max(relative(state.trained, want_state.trained).values()) < 1e-5
    moved = relative(want_state.trained, optim.split(params, ("tora/.*", "t5/.*"), opensora.BUFFERS)[0])
    assert min(moved.values()) > 0


def adamw(trained, lr=1e-3):
    return optim.make({**OPTIM, "lr": lr}, trained, 20)


def test_stage_1_starts_from_the_base_model(parts, tiny_models):
    """An untrained fuser changes nothing, so the first loss is that of the same weights without motion."""
    trained, _ = optim.split(tiny_models.params, STAGE_1, opensora.BUFFERS)
    batch = make_batch(0)
    _, [(loss, gradients)] = train(parts, tiny_models.params, STAGE_1, adamw(trained), [batch])
    base = tora_loss(opensora, parts, LOSS)
    batch = on_device(batch)
    keys = sample_keys(jax.random.key(0), 0, batch)
    without, _ = jax.jit(base)(tiny_models.params, without_motion(batch), keys)
    assert loss == pytest.approx(float(without.mean()), rel=1e-6)
    assert any(np.any(leaf) for path, leaf in gradients.items() if "_fuser/" in path)  # and it can learn from there


def test_what_is_frozen_does_not_change_by_a_bit(parts, params):
    trained, frozen = optim.split(params, STAGE_1, opensora.BUFFERS)
    before = {path: np.array(leaf) for path, leaf in {**trained, **frozen}.items()}
    state, _ = train(parts, params, STAGE_1, adamw(trained), map(make_batch, range(20)))
    after = traverse_util.flatten_dict(optim.join(state.trained, frozen), sep="/")
    same = {path for path, leaf in after.items() if np.asarray(leaf).tobytes() == before[path].tobytes()}
    assert same == frozen.keys()
    assert all(re.search(r"extractor|blocks/temporal", path) for path in trained)
    for part in ("spatial/", "t_block", "final_layer", "vae/", "t5/", "text_embedder"):
        assert any(part in path for path in same)


def test_accumulation_gives_the_same_step(parts, params, on_one_device):
    _, want_steps = on_one_device
    sgd = optax.sgd(1e-3)
    _, steps = train(parts, params, ("tora/.*", "t5/.*"), sgd, [make_batch(0)], accumulate=2)
    assert steps[0][0] == pytest.approx(want_steps[0][0], rel=1e-6)
    assert max(relative(steps[0][1], want_steps[0][1]).values()) < 1e-5


def test_moving_average(parts, params):
    trained, _ = optim.split(params, STAGE_1, opensora.BUFFERS)
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


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize(("bad", "loss"), [(np.nan, np.nan), (np.inf, np.inf), (0.0, 0.0)])
def test_a_step_that_is_not_finite_is_skipped(bad, loss, accumulated):
    """Also where the gradient alone is not: the root's at 0. The state stays to the bit but for its count of steps."""
    trained = {"w": jnp.ones(3), "mean": jnp.ones(())}

    def root(params, batch, keys):
        losses = jnp.sqrt(batch["x"] * params["w"][0]) + params["w"].sum() - 1.5
        return losses, {STATISTICS: {"mean": batch["x"].mean()}}

    optimizer = optim.make({**OPTIM, "lr": 0.1}, trained, 10)
    step = make_train_step(root, optimizer, combine=lambda trained, frozen: trained, accumulate=accumulated)
    step = jax.jit(step)
    state, metrics = step(init_state(trained, optimizer), {}, {"x": jnp.full(4, 0.25)}, jax.random.key(0))
    assert not metrics["skipped"]
    assert state.trained["mean"] == 0.25
    batch = {"x": jnp.array([bad, 0.25, 0.25, 0.25])}
    after, metrics = step(state, {}, batch, jax.random.key(0))
    assert metrics["skipped"]
    assert np.isfinite(metrics["loss"]) == np.isfinite(loss)
    jax.tree.map(np.testing.assert_array_equal, after, state.replace(step=jnp.int32(2)))
    again, metrics = step(after, {}, {"x": jnp.full(4, 0.25)}, jax.random.key(0))
    assert not metrics["skipped"]
    assert again.trained["w"][0] < after.trained["w"][0]


def test_a_spike_is_skipped():
    """A loss far above all of late; not in the first steps, where it is not known what is usual."""
    optimizer = optax.sgd(0.0)
    step = jax.jit(
        make_train_step(
            lambda params, batch, keys: (batch["x"] * params["w"], {}),
            optimizer,
            combine=lambda trained, frozen: trained,
            skip_above=10.0,
        )
    )
    state, skipped = init_state({"w": jnp.ones(())}, optimizer), []
    for loss in (0.1, 5.0, *[1.0] * 98, 11.0, 300.0, 90.0, np.nan, 2000.0, 1.0):
        state, metrics = step(state, {}, {"x": jnp.full(4, loss)}, jax.random.key(0))
        skipped.append(bool(metrics["skipped"]))
    assert skipped == [False] * 101 + [True, False, True, True, False]
    assert int(state.step) == 106
