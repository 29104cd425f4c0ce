"""The released code's integer points, its maps, and torchvision's colours."""

import re

import numpy as np
import pytest

from tests.parity import golden
from tora_jax.conditioning import motion_maps, trajectory

GOLDEN = golden.load("trajectory_flow")
CASES = sorted(key.removeprefix("points/") for key in GOLDEN.tensors if key.startswith("points/"))


def geometry(case: str) -> tuple[list[str], tuple[int, int, int]]:
    """`name+name_FRAMESxHEIGHTxWIDTH`; the names may hold "_"."""
    names, *size = re.fullmatch(r"(.+)_(\d+)x(\d+)x(\d+)", case).groups()
    return names.split("+"), tuple(map(int, size))


def test_there_is_a_case():
    assert CASES


@pytest.mark.parametrize("case", CASES)
def test_points_are_exact(case):
    names, (frames, height, width) = geometry(case)
    points = [trajectory.released_points(GOLDEN.config["points"][n], frames, height, width) for n in names]
    np.testing.assert_array_equal(np.stack(points), GOLDEN[f"points/{case}"])


@pytest.mark.parametrize("case", CASES)
def test_maps_and_colours(case):
    _, (_, height, width) = geometry(case)
    maps = motion_maps.released_maps(GOLDEN[f"points/{case}"], height, width)
    golden.assert_close(maps, GOLDEN[f"flow/{case}"], 1e-5)
    assert not maps[0].any()
    # From the golden flow: at the wheel's seam, the sign of a rounding error of 1e-20 decides between two colours.
    level = np.abs(motion_maps.flow_to_rgb(GOLDEN[f"flow/{case}"]).astype(int) - GOLDEN[f"rgb/{case}"])
    assert level.max() <= 1


def test_colours_of_random_flow():
    maps = GOLDEN["in/random_flow"].transpose(0, 2, 3, 1)
    want = GOLDEN["out/random_rgb"].transpose(0, 2, 3, 1).astype(int)
    assert np.abs(motion_maps.flow_to_rgb(maps) - want).max() <= 1
    # The models' picture is the same one before rounding down.
    in_levels = (motion_maps.flow_to_color(maps) + 1) * 127.5
    assert np.abs(np.floor(in_levels + 1e-3) - want).max() <= 1
