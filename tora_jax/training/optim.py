"""What trains, and how: leaves by regex, schedule, AdamW, accumulation, moving average.

Parameters are plain nested dicts. A leaf goes by its path, names joined by "/" ("tora/t_block/kernel"). Patterns match
whole paths; the first match wins; a pattern that never wins is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax.contrib
from flax import traverse_util
from jaxtyping import Array

from tora_jax import sharding
from tora_jax.errors import UserError

MAX_UNROLLED = 4  # micro-batches: each is compiled for itself


def match(paths: Iterable[str], rules: Sequence[tuple[str, Any]], default: Any, what: str) -> dict[str, Any]:
    """For each path the value of the first (regex, value) that matches all of it.

    Args:
      default: for paths without a match.
      what: name of the rules in messages.

    Raises:
      UserError: a regex is broken, or never wins.
    """
    try:
        compiled = [(re.compile(pattern), value) for pattern, value in rules]
    except re.error as error:
        raise UserError(f"{what}: {error.pattern!r} is no regular expression ({error})") from None
    found, idle = {}, {regex.pattern for regex, _ in compiled}
    for path in paths:
        fitting = [(regex, value) for regex, value in compiled if regex.fullmatch(path)]
        found[path] = fitting[0][1] if fitting else default
        idle -= {regex.pattern for regex, value in fitting if value == found[path]}
    if idle:
        raise UserError(
            f"{what}: {', '.join(sorted(map(repr, idle)))} fits no parameter, or only what patterns before it decide "
            f"otherwise; patterns fit whole paths, such as {next(iter(found), 'none')}"
        )
    return found


def _choose(paths: Iterable[str], patterns: Sequence[str], what: str) -> dict[str, bool]:
    """`match` with patterns that mean yes, or no with a "!" before them; a path without a match is a no."""
    rules = [(pattern.removeprefix("!"), not pattern.startswith("!")) for pattern in patterns]
    return match(paths, rules, False, what)


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """A nested dict -> path -> leaf."""
    return traverse_util.flatten_dict(params, sep="/")


def select(params: Mapping[str, Any], patterns: Sequence[str], buffers: str = "") -> dict[str, bool]:
    """Which leaves train, by path.

    Args:
      params: nested dict of arrays or shapes.
      patterns: regexes of what trains; a leading "!" freezes. Leaves without a match are frozen.
      buffers: regex of what never trains, `BUFFERS` of a backbone.

    Raises:
      UserError: a pattern never wins, or nothing trains.
    """
    flat = flatten(params)
    chosen = _choose((path for path in flat if not re.fullmatch(buffers, path)), patterns, "train")
    if not any(chosen.values()):
        raise UserError(f"train: {list(patterns)} leaves nothing to train")
    return {path: chosen.get(path, False) for path in flat}


def split(
    params: Mapping[str, Any], patterns: Sequence[str], buffers: str = ""
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Cuts a tree into what `select` chooses and the rest: two flat dicts, path -> leaf, for `join`.

    Gradients, the optimizer's state and the average exist for the first alone; the second cannot change.
    """
    chosen = select(params, patterns, buffers)
    flat = flatten(params)
    return ({k: v for k, v in flat.items() if chosen[k]}, {k: v for k, v in flat.items() if not chosen[k]})


def join(trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """The tree that `split` cut."""
    return traverse_util.unflatten_dict({**frozen, **trained}, sep="/")


def schedule(config: Mapping[str, Any], steps: int) -> optax.Schedule:
    """Step (from 0) -> learning rate: linear warm-up, then constant or a cosine.

    The warm-up is the reference's, lr (k + 1) / (warmup + 1) at step k. Optax's schedules give the same curve in other
    last bits.

    Args:
      config: lr, warmup (steps), decay ("constant" or "cosine"), final (share of lr at the end of the cosine).
      steps: of the whole training.

    Raises:
      UserError: the decay has another name.
    """
    lr, warmup, final = config["lr"], config["warmup"], config["final"]
    if config["decay"] not in ("constant", "cosine"):
        raise UserError(f"decay {config['decay']!r}: choose constant or cosine")
    if config["decay"] == "constant":
        final = 1.0

    def rate(step):
        done = jnp.clip((step - warmup) / max(1, steps - warmup), 0, 1)
        cosine = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        return lr * jnp.minimum(1, (step + 1) / (warmup + 1)) * cosine

    return rate


def make(config: Mapping[str, Any], trained: Mapping[str, Any], steps: int) -> optax.GradientTransformation:
    """The optimizer of `trained`, the first dict of `split`.

    Args:
      config: what `schedule` reads, and
        optimizer: "adamw" (b1, b2, eps; eps stands beside the root), "sgd" (plain) or "muon" (Jordan et al. 2024):
          kernels move by their momentum made orthogonal, with a root mean square of muon_rms at a rate of 1 (0.2
          is about AdamW's, Liu et al. 2025), and all else as by Adam, both with Nesterov's momentum. muon_kernels:
          which ones, patterns as in `select`;
        clip: largest global norm of the gradient, 0 = any;
        weight_decay, lr_multipliers: tuples of (regex, number); no match = 0 and 1. Decay is decoupled, times lr.
      trained: arrays or shapes.
      steps: of the whole training.

    Raises:
      UserError: a name is unknown, or a regex never wins.
    """
    if config["optimizer"] not in ("adamw", "muon", "sgd"):
        raise UserError(f"optimizer {config['optimizer']!r}: choose adamw, muon or sgd")
    decays = match(trained, config["weight_decay"], 0.0, "weight_decay")
    multipliers = match(trained, config["lr_multipliers"], 1.0, "lr_multipliers")

    if config["optimizer"] == "adamw":
        direction = optax.scale_by_adam(config["b1"], config["b2"], config["eps"])
    elif config["optimizer"] == "muon":
        chosen = _choose(trained, config["muon_kernels"], "muon_kernels")
        direction = optax.contrib.muon(
            -1.0,  # it turns around what it multiplies by a rate; ours comes last
            eps=config["eps"],
            adam_b1=config["b1"],
            adam_b2=config["b2"],
            muon_weight_dimension_numbers={
                path: _as_matrix(path, leaf.ndim) if chosen[path] else None for path, leaf in trained.items()
            },
            consistent_rms=config["muon_rms"],
        )
    else:
        direction = optax.identity()

    def decay_and_scale(updates, params):
        return {k: multipliers[k] * (u + decays[k] * params[k] if decays[k] else u) for k, u in updates.items()}

    return optax.chain(
        optax.clip_by_global_norm(config["clip"]) if config["clip"] else optax.identity(),
        direction,
        optax.stateless(decay_and_scale),
        optax.scale_by_learning_rate(schedule(config, steps)),
    )


def _as_matrix(path: str, ndim: int) -> optax.contrib.MuonDimensionNumbers | None:
    """The axes of a kernel's input (with those of a convolution) and output; None for what is no matrix."""
    stacked = int("blocks" in path.split("/"))  # of all layers in a loop: a matrix each
    if ndim - stacked < 2:
        return None
    return optax.contrib.MuonDimensionNumbers(tuple(range(stacked, ndim - 1)), ndim - 1)


def accumulate(function: Callable[[Any], Any], batch: Any, parts: int) -> Any:
    """The mean of `function` over `parts` micro-batches, one after the other.

    For means over samples this is `function(batch)` but for rounding, with the activations of one part. What is random
    belongs in the batch, as a key for each sample.

    Args:
      function: batch -> tree of arrays: losses, metrics, gradients.
      batch: tree of arrays [b, ...], b a multiple of `parts`. Part i takes the samples i, i + parts, ...: each device
        keeps its samples.

    Raises:
      UserError: the batch cannot be cut into as many equal parts.
    """
    if parts == 1:
        return function(batch)
    size = len(jax.tree.leaves(batch)[0])
    if size % parts:
        raise UserError(f"a batch of {size} cannot be accumulated in {parts} equal parts")
    # Few parts are unrolled on CPUs, where gradients of convolutions inside a loop are many times slower.
    unroll = parts if parts <= MAX_UNROLLED and sharding.platform() == "cpu" else 1
    cut = jax.tree.map(lambda x: x.reshape(size // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], cut))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(
        lambda total, part: (jax.tree.map(jnp.add, total, function(part)), None), zeros, cut, unroll=unroll
    )
    return jax.tree.map(lambda x: x / parts, total)


def ema_init(trained: Mapping[str, Array]) -> dict[str, Array]:
    """The average before the first step: a float32 copy (the trained leaves may be donated)."""
    return {path: jnp.array(leaf, jnp.float32) for path, leaf in trained.items()}


def ema_update(ema: Mapping[str, Array], trained: Mapping[str, Array], decay: float | Array) -> dict[str, Array]:
    """The exponential moving average after a step, in float32; the reference's decay is 0.99."""
    return {path: decay * mean + (1 - decay) * trained[path].astype(jnp.float32) for path, mean in ema.items()}
