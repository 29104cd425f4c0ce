"""Where objects are: as labels say, or what moves; and squares around them."""

import numpy as np
import pytest

from tora_jax.data.object_masks import object_masks, square_around
from tora_jax.data.sprites.clips import make_clip
from tora_jax.errors import UserError


def test_labels_are_taken_as_they_are():
    clip = make_clip(0, size=32, frames=3)
    np.testing.assert_array_equal(object_masks(clip.video, clip.labels), clip.labels > 0)


def test_what_moves_is_an_object():
    """In the last frame too; DIS, which sees lightness alone, may lose it in some frames."""
    clip = make_clip(7, "benchmark_one")
    masks, truth = object_masks(clip.video), clip.labels > 0
    assert masks.shape == truth.shape
    overlap = (masks & truth).sum((1, 2)) / (masks | truth).sum((1, 2))
    assert np.median(overlap) > 0.5
    assert overlap[-1] > 0.3


def test_nothing_moves():
    still = np.repeat(make_clip(0, size=64, frames=1).video, 3, axis=0)
    assert not object_masks(still).any()


def test_a_single_frame_says_nothing():
    with pytest.raises(UserError, match="has no labels, and one frame does not show what moves"):
        object_masks(np.zeros((1, 32, 32, 3), np.uint8))


@pytest.mark.parametrize("spot", [(0, 0), (20, 31), (23, 39)])
def test_squares_hold_the_object(spot):
    mask = np.zeros((2, 24, 40), bool)
    mask[1][spot] = True
    rng = np.random.default_rng(0)
    squares = {square_around(rng, mask, 16) for _ in range(50)}
    assert len(squares) > 1 or spot != (20, 31)
    for top, left in squares:
        assert top <= spot[0] < top + 16 <= 40
        assert left <= spot[1] < left + 16
        assert 0 <= top <= 24 - 16
        assert 0 <= left <= 40 - 16
