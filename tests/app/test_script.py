"""What the page's script computes, in Node: the places and times of strokes."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

import tora_jax

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="JavaScript")

GEOMETRY = Path(tora_jax.__file__).parent / "app" / "web" / "geometry.js"


def run(expression):
    code = f"{GEOMETRY.read_text()}\nconsole.log(JSON.stringify({expression}));"
    return json.loads(subprocess.run(["node", "-e", code], capture_output=True, text=True, check=True).stdout)


def test_strokes_follow_the_photo_into_another_size():
    """On the windows that two sizes leave of a photo."""
    stroke = "{points: [[0.5, 0], [1, 1]], control: null, pauses: []}"
    moved = run(f"follow({stroke}, [0, 0.25, 1, 0.75], [0.25, 0, 0.75, 1])")
    assert moved == {"points": [[0.5, 0.25], [1.5, 0.75]], "control": None, "pauses": []}


def test_a_pause_and_easing_rise_in_time():
    stroke = "{points: [[0, 0], [1, 0]], speed: 'both', pauses: [{at: 0.5, rest: 0.2}]}"
    points = run(f"timed({stroke}, [1, 1])")
    times = [t for _, _, t in points]
    assert times == sorted(set(times))
    assert (times[0], times[-1]) == (0, 1)
    assert [t for x, _, t in points if x == 0.5] == pytest.approx([0.4, 0.6])


def test_paths_of_a_file_come_back_as_they_were():
    path = [[0.1, 0.2, 0], [0.5, 0.5, 0.25], [0.5, 0.5, 0.5], [0.9, 0.2, 1]]
    assert run(f"timed(strokeOf({path}, [3, 2]), [3, 2])") == [pytest.approx(point) for point in path]
    assert run("strokeOf([[0.5, 0.5], [0.5, 0.5]], [1, 1])") is None


def test_a_shared_path_has_few_points_and_is_the_same():
    path = "[...Array(201).keys()].map((i) => [i / 200, i < 100 ? 0.2 : 0.2 + (i - 100) / 200, i / 200])"
    thin = run(f"thinned({path}, 0.001)")
    assert thin == [[0, 0.2, 0], pytest.approx([0.5, 0.2, 0.5], abs=0.01), [1, 0.7, 1]]
