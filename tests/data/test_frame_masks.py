"""Frame masks: what each of them gives, and how often it is drawn."""

import itertools

import numpy as np
import pytest

from tora_jax.data import frame_masks
from tora_jax.errors import UserError


def drawn(name, frames, times=300):
    """Different masks, as strings of the given (o) and the generated (-) frames."""
    rng = np.random.default_rng(0)
    found = (frame_masks.mask(rng, name, frames) for _ in range(times))
    return {"".join("-" if generate else "o" for generate in mask) for mask in found}


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("none", {"--------"}),
        ("interpolate", {"o-o-o-o-", "-o-o-o-o"}),
        ("image_head", {"o-------"}),
        ("image_tail", {"-------o"}),
        ("image_head_tail", {"o------o"}),
        ("image_random", {"-" * i + "o" + "-" * (7 - i) for i in range(8)}),
        ("quarter_head", {"o-------", "oo------"}),
        ("quarter_tail", {"-------o", "------oo"}),
        ("quarter_head_tail", {"o------o", "oo----oo"}),
        (
            "quarter_random",
            {"-" * i + "o" * n + "-" * (8 - n - i) for n in (1, 2) for i in range(9 - n)},
        ),
    ],
)
def test_masks_of_the_reference(name, want):
    assert drawn(name, 8) == want


def test_random_gives_a_share_of_0_1_to_0_9_but_never_all():
    rng = np.random.default_rng(0)
    given = np.array([1 - frame_masks.mask(rng, "random", 40).mean() for _ in range(2000)])
    assert abs(given.mean() - 0.5) < 0.02
    assert np.quantile(given, 0.1) < 0.25
    assert np.quantile(given, 0.9) > 0.75
    few = drawn("random", 3, times=2000)
    assert few == {"".join(mask) for mask in itertools.product("o-", repeat=3)} - {"ooo"}


@pytest.mark.parametrize("name", frame_masks.NAMES)
@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_short_clips_keep_something_to_generate(name, frames):
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = frame_masks.mask(rng, name, frames)
        assert mask.dtype == bool
        assert mask.shape == (frames,)
        assert mask.all() if frames == 1 else mask.any()


def test_shares():
    rng = np.random.default_rng(0)
    shares = {"image_head": 0.25, "interpolate": 0.15}
    frame_masks.check(shares)
    found = np.array([frame_masks.draw(rng, shares, 12).sum() for _ in range(4000)])
    for left, share in ((11, 0.25), (6, 0.15), (12, 0.6)):
        assert abs((found == left).mean() - share) < 0.025
    assert frame_masks.draw(rng, {}, 4).all()


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"identity": 1.0}, "unknown mask 'identity'; there are none, random"),
        ({"random": -0.1}, "the share of random is -0.1"),
        ({"random": 0.7, "interpolate": 0.5}, "add up to 1.2"),
        ({"random": 0.2, "none": 0.7}, "add up to 0.9"),
    ],
)
def test_shares_that_are_none(shares, message):
    with pytest.raises(UserError, match=message):
        frame_masks.check(shares)
