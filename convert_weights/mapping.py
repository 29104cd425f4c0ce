"""Maps PyTorch checkpoints to our parameter trees, and back, by tables.

A table is a list of `Rule`s. A rule names a source tensor (a PyTorch state-dict key), a target leaf (a
parameter path joined by "/") and a `Layout`. `{name}` in the source stands for an index:

  * an index that the target repeats is carried over:  `down.{i}.conv.weight -> down_{i}/conv/kernel`
  * an index that the target leaves out is stacked on a new leading axis, in the order of the index, as
    `nn.scan` wants it:                                `blocks.{i}.fc.weight -> blocks/fc/kernel`

Tables are strict: each source key is used once or matches IGNORED, each target leaf is filled once and with
the right shape. All mismatches are raised together, as one list.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from tora_jax.errors import UserError

Shape = tuple[int, ...]


class ConversionError(UserError):
    """A checkpoint that does not fit its table; `details` lists every problem."""


class Layout(enum.Enum):
    """How one source tensor's axes are turned into ours. Each is the transpose of the source axes."""

    SAME = None
    LINEAR = (1, 0)  # [out, in] -> [in, out]
    CONV1D = (2, 1, 0)  # OIT -> TIO
    CONV2D = (2, 3, 1, 0)  # OIHW -> HWIO
    CONV3D = (2, 3, 4, 1, 0)  # OITHW -> THWIO
    # OITHW with stride = kernel -> [(t h w i), o], a linear layer on patches
    PATCH = (2, 3, 4, 1, 0, "to matrix")
    FLAT = ("to vector",)  # [1, c, 1, 1, 1] -> [c]

    @property
    def axes(self) -> tuple[int, ...] | None:
        axes = tuple(a for a in self.value or () if isinstance(a, int))
        return axes or None

    def shape(self, source: Shape) -> Shape:
        """The target shape, or the source's own where the rank does not fit (a mismatch is then reported)."""
        if self.axes and len(self.axes) != len(source):
            return source
        turned = tuple(source[i] for i in self.axes) if self.axes else source
        if self is Layout.PATCH:
            return (math.prod(turned[:-1]), turned[-1])
        return (math.prod(turned),) if self is Layout.FLAT else turned

    def forward(self, array: np.ndarray) -> np.ndarray:
        turned = array.transpose(self.axes) if self.axes else array
        return turned.reshape(self.shape(array.shape))

    def backward(self, array: np.ndarray, source_shape: Shape) -> np.ndarray:
        if not self.axes:
            return array.reshape(source_shape)
        turned = array.reshape([source_shape[i] for i in self.axes])
        return turned.transpose(np.argsort(self.axes))


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a table: `source` key pattern -> `target` path pattern, with the axes' `layout`."""

    source: str
    target: str
    layout: Layout = Layout.SAME

    def prefixed(self, source: str, target: str) -> Rule:
        """The same rule for a model that is a part of a larger one."""
        return Rule(source + self.source, target + self.target, self.layout)


def affine(source: str, target: str, layout: Layout, bias: bool = True) -> list[Rule]:
    """Rules for a linear or convolution layer: `.weight` -> `/kernel` and `.bias` -> `/bias`."""
    rules = [Rule(source + ".weight", target + "/kernel", layout)]
    return [*rules, Rule(source + ".bias", target + "/bias")] if bias else rules


def norm(source: str, target: str) -> list[Rule]:
    """Rules for an affine normalisation: `.weight` -> `/scale` and `.bias` -> `/bias`."""
    return [Rule(source + ".weight", target + "/scale"), Rule(source + ".bias", target + "/bias")]


@dataclasses.dataclass(frozen=True)
class Move:
    """One target leaf and its source tensors; `stacked`: on a new leading axis."""

    target: str
    sources: tuple[str, ...]
    layout: Layout
    stacked: bool
    source_shape: Shape
    target_shape: Shape


def flatten(tree: Mapping) -> dict[str, Any]:
    """A parameter tree as a flat dict, path joined by "/" -> leaf."""
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(flat, sep="/")


def pattern(source: str) -> re.Pattern[str]:
    """A rule's source as a regular expression, one group for each index."""
    parts = re.split(r"\{(\w+)\}", source)
    return re.compile("".join(rf"(?P<{p}>[0-9]+)" if i % 2 else re.escape(p) for i, p in enumerate(parts)))


def plan(
    table: Sequence[Rule],
    source: Mapping[str, Shape],
    target: Mapping[str, Shape],
    ignored: Iterable[str] = (),
) -> list[Move]:
    """Matches a checkpoint's keys and shapes against a model's, without touching a tensor.

    Args:
      table: the rules.
      source: state-dict key -> shape.
      target: parameter path -> shape (`flatten` of `jax.eval_shape`'s tree, leaf by leaf).
      ignored: regular expressions (full match) of source keys that carry nothing, such as constant buffers.

    Returns:
      One `Move` for each target leaf.

    Raises:
      ConversionError: with a "+" line for each source key that no rule takes, a "-" line for each target leaf
        that nothing fills, and a line for each doubled, missing or wrongly shaped tensor.
    """
    moves, problems = match(table, source, target, ignored)
    if problems:
        raise ConversionError(f"{len(problems)} mismatches:", problems)
    return moves


def match(
    table: Sequence[Rule],
    source: Mapping[str, Shape],
    target: Mapping[str, Shape],
    ignored: Iterable[str] = (),
) -> tuple[list[Move], list[str]]:
    """As `plan`, without raising: the moves that fit, and a line for each problem."""
    rules = [(rule, pattern(rule.source)) for rule in table]
    skip = [re.compile(p) for p in ignored]
    problems: list[str] = []
    filled: dict[str, tuple[Rule, dict[tuple[int, ...], str]]] = {}
    for key in source:
        matches = [(rule, m.groupdict()) for rule, regex in rules if (m := regex.fullmatch(key))]
        if not matches:
            if not any(p.fullmatch(key) for p in skip):
                problems.append(f"+ {key} {list(source[key])}: no place in the model")
            continue
        if len(matches) > 1:
            problems.append(f"! {key}: {len(matches)} rules match")
        rule, index = matches[0]
        path = rule.target.format(**index)
        stack = tuple(int(v) for name, v in index.items() if "{" + name + "}" not in rule.target)
        other, parts = filled.setdefault(path, (rule, {}))
        if other is not rule or stack in parts:
            problems.append(f"! {path}: filled twice, by {next(iter(parts.values()))} and {key}")
            continue
        parts[stack] = key

    moves = []
    for path, shape in target.items():
        shape = tuple(shape)
        if path not in filled:
            problems.append(f"- {path} {list(shape)}: missing in the checkpoint")
            continue
        rule, parts = filled.pop(path)
        stacked = () not in parts
        order = sorted(parts)
        sources = tuple(parts[i] for i in order)
        got = {rule.layout.shape(tuple(source[key])) for key in sources}
        want = shape[1:] if stacked else shape
        if stacked and order != [(i,) for i in range(shape[0] if shape else 0)]:
            have = ", ".join(str(i[0]) for i in order)
            problems.append(f"! {path}: wants layers 0 to {shape[0] - 1}, the checkpoint has {have}")
        elif got != {want}:
            problems.append(f"! {path}: wants {list(want)}, the checkpoint gives {sorted(map(list, got))}")
        else:
            moves.append(Move(path, sources, rule.layout, stacked, tuple(source[sources[0]]), shape))
    problems += [f"+ {key}: {path} is not in the model" for path, (_, p) in filled.items() for key in p.values()]
    return moves, sorted(problems)


def convert(moves: Sequence[Move], read: Callable[[str], np.ndarray]) -> dict:
    """Carries out a plan: reads each source tensor once, turns and stacks it; returns the parameter tree."""
    flat = {}
    for move in moves:
        parts = [move.layout.forward(read(key)) for key in move.sources]
        flat[move.target] = np.stack(parts) if move.stacked else np.asarray(parts[0], order="C")
    return unflatten(flat)


def revert(moves: Sequence[Move], params) -> dict[str, np.ndarray]:
    """The inverse of `convert`: our parameter tree as a PyTorch-named, PyTorch-shaped state dict."""
    flat = flatten(params)
    state = {}
    for move in moves:
        array = np.asarray(flat[move.target])
        for part, key in zip(array if move.stacked else (array,), move.sources, strict=True):
            state[key] = np.asarray(move.layout.backward(part, move.source_shape), order="C")
    return state


def from_state_dict(
    table: Sequence[Rule], state: Mapping[str, np.ndarray], target, ignored: Iterable[str] = ()
) -> dict:
    """`plan` and `convert` in one, for checkpoints that fit in memory.

    Args:
      table, ignored: see `plan`.
      state: state-dict key -> array.
      target: the model's parameter tree, of arrays or of `jax.ShapeDtypeStruct`.
    """
    shapes = {path: leaf.shape for path, leaf in flatten(target).items()}
    return convert(plan(table, {k: v.shape for k, v in state.items()}, shapes, ignored), state.__getitem__)
