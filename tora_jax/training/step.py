"""The training step, and the state that it changes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from tora_jax import sharding
from tora_jax.training import optim
from tora_jax.training.job import Job
from tora_jax.training.losses import STATISTICS, Loss, sample_keys

SPIKES_FROM = 10  # steps; what a loss usually is must be known first
PEAK_DECAY = 0.99  # of the largest loss of late, a step: after a hundred it counts for a third


class TrainState(flax.struct.PyTreeNode):
    """What a step changes, and all that a checkpoint holds.

    Attributes:
      step: number of steps done.
      trained: path -> leaf, of `optim.split` (or of `lora.init`).
      opt_state: of the optimizer.
      ema: the moving average of `trained`, float32.
      peak: the largest loss of late, float32; infinity = not known yet.
    """

    step: Any  # not Array: a tree of shardings has this form, too
    trained: dict[str, Any]
    opt_state: Any
    ema: dict[str, Any]
    peak: Any


def init_state(trained: Mapping[str, Any], optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step, of copies: its arrays are donated, and others may hold `trained`, too."""
    trained = {path: jnp.array(leaf) for path, leaf in trained.items()}
    peak = jnp.full((), jnp.inf, jnp.float32)
    return TrainState(jnp.zeros((), jnp.int32), trained, optimizer.init(trained), optim.ema_init(trained), peak)


def jit_init_state(
    trained: Mapping[str, Any], optimizer: optax.GradientTransformation, place: sharding.Place
) -> TrainState:
    """`init_state` where the parts of a state lie: each device makes its own shards."""
    init = functools.partial(init_state, optimizer=optimizer)
    return jax.jit(init, out_shardings=place(jax.eval_shape(init, trained)))(trained)


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    combine: Callable[[Any, Any], Any] = optim.join,
    ema: float = 0.99,
    accumulate: int = 1,
    skip_above: float = 0.0,
) -> Callable:
    """The step (state, frozen, batch, key) -> (state, metrics), to be jitted with the state donated.

    Where the loss or the norm of the gradient is not finite, or the loss is a spike, the state stays as it is but for
    the number of steps, and the metric "skipped" is 1.

    Args:
      loss: of a job.
      combine: (trained, frozen) -> the parameters that the loss takes.
      ema: decay of the moving average, once there are enough steps for it.
      accumulate: micro-batches that the batch is cut into.
      skip_above: a spike is a loss of more than so many times the largest of late; 0 = nothing is. Buckets and masks
        have losses of their own, so that spikes are told from the largest, and no mean.
    """

    def train_step(state: TrainState, frozen: Any, batch: Mapping[str, Array], key: PRNGKeyArray):
        def loss_and_grad(part):
            def mean(trained):
                losses, metrics = loss(combine(trained, frozen), part["batch"], part["keys"])
                return losses.mean(), metrics

            (value, metrics), grads = jax.value_and_grad(mean, has_aux=True)(state.trained)
            return {"loss": value, **metrics}, grads

        keys = sample_keys(key, state.step, batch)
        metrics, grads = optim.accumulate(loss_and_grad, {"batch": batch, "keys": keys}, accumulate)
        metrics["grad_norm"] = optax.tree.norm(grads)
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        if skip_above:
            good &= (state.step < SPIKES_FROM) | (metrics["loss"] <= skip_above * state.peak)
        metrics["skipped"] = ~good

        def kept(after, before):
            """Of elements, so that it is a part of the loops that make them, and no pass of its own."""
            return jax.tree.map(lambda new, old: jnp.where(good, new, old), after, before)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
        opt_state = kept(opt_state, state.opt_state)
        trained = optax.apply_updates(state.trained, updates)
        moved = metrics.pop(STATISTICS, {})
        trained = kept({path: moved.get(path, leaf) for path, leaf in trained.items()}, state.trained)
        # In a short run, or early in a long one, the average must not remember the first weights.
        decay = jnp.minimum(ema, (1 + state.step) / (10 + state.step))
        average = optim.ema_update(state.ema, trained, jnp.where(good, decay, 1.0))
        loss_now = metrics["loss"].astype(jnp.float32)
        known = jnp.where(jnp.isfinite(state.peak), PEAK_DECAY * state.peak, loss_now)
        peak = kept(jnp.maximum(known, loss_now), state.peak)
        return TrainState(state.step + 1, trained, opt_state, average, peak), metrics

    return train_step


def jit_train_step(job: Job, optimizer: optax.GradientTransformation, state: TrainState) -> Callable:
    """`make_train_step` of a job, to be called where `sharding.use` holds.

    Args:
      state: of arrays or shapes with shardings, where the next one shall lie, too; it is donated.
    """
    settings = {name: job.config[name] for name in ("ema", "accumulate", "skip_above")}
    step = make_train_step(job.loss(), optimizer, combine=job.combine, **settings)
    return jax.jit(step, donate_argnums=0, out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), None))
