"""Frame masks in training: which latent frames are given, and which are generated."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool

from tora_jax.errors import UserError

PLACES = ("random", "head", "tail", "head_tail")
NAMES = ("none", "random", "interpolate", *(f"{size}_{place}" for size in ("quarter", "image") for place in PLACES))


def check(shares: Mapping[str, float]) -> None:
    """Checks shares of the masks by name, each in 0..1; the rest up to 1 is "none".

    Raises:
      UserError: for an unknown name, a share outside 0..1, or a sum over 1.
    """
    for name, share in shares.items():
        if name not in NAMES:
            raise UserError(f"frame_masks: unknown mask {name!r}; there are {', '.join(NAMES)}")
        if not 0 <= share <= 1:
            raise UserError(f"frame_masks: the share of {name} is {share}; give 0 to 1")
    total = sum(shares.values())
    if total > 1 + 1e-6 or ("none" in shares and not math.isclose(total, 1, abs_tol=1e-6)):
        raise UserError(f"frame_masks: the shares add up to {total:g}, not 1")


def draw(rng: np.random.Generator, shares: Mapping[str, float], frames: int) -> Bool[np.ndarray, " frames"]:
    """Draws a mask's name by its share, and then the mask; see `mask`."""
    point = rng.random()
    for name, share in sorted(shares.items()):
        point -= share
        if point < 0:
            return mask(rng, name, frames)
    return mask(rng, "none", frames)


def mask(rng: np.random.Generator, name: str, frames: int) -> Bool[np.ndarray, " frames"]:
    """A mask over latent frames: False = given, True = generate.

    "none": all are generated. "random": each is given with one probability, drawn from 0.1..0.9. "interpolate": every
    second one is given, from the first or the second on. "image_...": one is given ("image_head_tail": two).
    "quarter_...": a piece of 1 to a quarter of all (at least 1) is given. Pieces and images lie somewhere ("random"),
    at the start ("head"), at the end ("tail") or at both.

    Of a clip with one latent frame nothing is given. Of others never all are given: the last one is generated then.

    Raises:
      ValueError: there is no such mask.

    Source: Open-Sora v1.2, opensora/utils/train_utils.py, MaskGenerator (its "identity" is "none", its
    "intepolate" is "interpolate"; fewer than four frames, where its quarter is empty and it fails, have a
    quarter of one).
    """
    if name not in NAMES:
        raise ValueError(f"no mask {name!r}; there are {', '.join(NAMES)}")
    generate = np.ones(frames, bool)
    if frames <= 1 or name == "none":
        return generate
    if name == "random":
        generate = rng.random(frames) > rng.uniform(0.1, 0.9)
    elif name == "interpolate":
        generate[rng.integers(2) :: 2] = False
    else:
        size, place = name.split("_", 1)
        count = 1 if size == "image" else int(rng.integers(1, max(frames // 4, 1) + 1))
        if place == "random":
            start = int(rng.integers(frames - count + 1))
            generate[start : start + count] = False
        if "head" in place:
            generate[:count] = False
        if "tail" in place:
            generate[-count:] = False
    generate[-1] |= not generate.any()
    return generate
