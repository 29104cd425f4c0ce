"""Named sizes and lengths."""

import pytest

from tora_jax.conditioning import resolutions
from tora_jax.errors import UserError


def test_sizes():
    assert resolutions.image_size("480p", "16:9") == (480, 854)
    assert resolutions.image_size("480p", "9:16") == (854, 480)


def test_lengths():
    assert resolutions.frame_count("4s") == 102
    assert resolutions.frame_count("17") == 17


@pytest.mark.parametrize(
    ("names", "message"),
    [(("481p", "16:9"), "choose one of 144p"), (("480p", "16:10"), r"not in the table for 480p; choose one of 8:3")],
)
def test_unknown_sizes(names, message):
    with pytest.raises(UserError, match=message):
        resolutions.image_size(*names)


def test_unknown_lengths():
    with pytest.raises(UserError, match="'long' is neither a whole number nor one of"):
        resolutions.frame_count("long")
