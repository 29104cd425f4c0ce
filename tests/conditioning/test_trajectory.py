"""Trajectory files, their faults, and resampling."""

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tora_jax.conditioning import trajectory
from tora_jax.conditioning.trajectory_hints import hints
from tora_jax.errors import UserError

EXAMPLES = sorted(Path(trajectory.__file__).parent.parent.glob("assets/trajectories/*.txt"))
QUICK = settings(max_examples=25, deadline=None, derandomize=True)
unit = st.integers(0, 256).map(lambda i: i / 256)
paths = st.lists(st.tuples(unit, unit), min_size=2, max_size=12).map(np.array)

XY = [[64, 0], [128, 256], [192, 32]]
UNIT = np.array(XY) / 256


def write(folder, content):
    path = folder / "points.any"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def npy(folder, array):
    path = folder / "points.npy"
    np.save(path, array)
    return path


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize(
    "content",
    [
        "64,0\n128,256\n192,32\n",
        "\ufeff64, 0\r\n\r\n128, 256\r\n  192 , 32",
        json.dumps(XY),
        json.dumps([{"x": x, "y": y} for x, y in XY]),
        json.dumps({"trajectories": [XY]}),
        json.dumps({"canvas": [512, 128], "trajectories": [[[2 * x, y / 2] for x, y in XY]]}),
        json.dumps({"canvas": [1, 1], "trajectories": [UNIT.tolist()]}),
    ],
)
def test_every_text_form_gives_the_same_points(tmp_path, content):
    (points,) = trajectory.load(write(tmp_path, content))
    np.testing.assert_array_equal(points, UNIT)


@pytest.mark.parametrize("form", ["list", "dicts", "canvas", "npy"])
def test_several_trajectories_in_one_file(tmp_path, form):
    pair = [XY, XY[::-1]]
    path = {
        "list": lambda: write(tmp_path, json.dumps(pair)),
        "dicts": lambda: write(tmp_path, json.dumps([[{"x": x, "y": y} for x, y in p] for p in pair])),
        "canvas": lambda: write(tmp_path, json.dumps({"canvas": [256, 256], "trajectories": pair})),
        "npy": lambda: npy(tmp_path, np.array(pair)),
    }[form]()
    first, second = trajectory.load(path, hints(axes="nt"))
    np.testing.assert_array_equal(first, UNIT)
    np.testing.assert_array_equal(second, UNIT[::-1])


def test_times_are_kept_and_not_scaled(tmp_path):
    timed = [[*p, t] for p, t in zip(XY, (0, 0.25, 1), strict=True)]
    dicts = [{"x": x, "y": y, "t": t} for x, y, t in timed]
    for path in (write(tmp_path, json.dumps(timed)), npy(tmp_path, np.array(timed))):
        (points,) = trajectory.load(path)
        np.testing.assert_array_equal(points, np.column_stack([UNIT, [0, 0.25, 1]]))
        np.testing.assert_array_equal(points, trajectory.parse(dicts)[0])


def test_arrays_in_memory_take_a_canvas_and_stay_as_they_are():
    array = UNIT.astype(np.float32)
    (points,) = trajectory.parse(array, canvas=(1, 1))
    points += 1
    np.testing.assert_array_equal(array, UNIT)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_load_without_a_warning(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (points,) = trajectory.load(path)
    assert len(points) > 20


def test_the_examples_are_there():
    assert {p.stem for p in EXAMPLES} >= {"arc", "circle", "infinity", "pause", "wave"}


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "empty"),
        (" \n\n", "empty"),
        ("10,20\n", "single point"),
        ("10,20\nhello\n", "line 2: 'hello'"),
        ("10,20\n10,20,30\n", "line 2"),
        ("10,20\n30 40\n", "line 2"),
        ("10,20\nnan,5\n", "point 2 is not finite"),
        ("10,20\n5,-inf\n", "point 2 is not finite"),
        ("1,2\n" * 1_000_000, "over 100000 points"),
        ("[[1,2],[3,4]" + ",[5,6]" * 100_000 + "]", "over 100000 points"),
        ("[]", "no points"),
        ("[[]]", "must be two numbers"),
        ('{"canvas": [256, 256], "trajectories": []}', "no points"),
        ("[[1,2],[3,4]", "not valid JSON"),
        ("[" * 100_000, "JSON"),
        ("[[1,2],[3]]", "must be two numbers"),
        ("[[1,2,0,5],[3,4,1,5]]", "must be two numbers"),
        ('[["1","2"],["3","4"]]', "must be two numbers"),
        ('[{"x":1,"y":2},{"x":1}]', "must be two numbers"),
        ("[[1,null],[3,4]]", "must be two numbers"),
        ("[[1,NaN],[3,4]]", "point 1 is not finite"),
        ("[[1,2],[3,1e999]]", "point 2 is not finite"),
        ("[1,2,3]", "must be two numbers"),
        ("[[[1,2],[3,4]],5]", "mixes"),
        ("[[[1,2]],[[1,2]]]", "trajectory 1: has a single point"),
        ('{"canvas": [256, 0], "trajectories": [[[1,2],[3,4]]]}', "canvas"),
        ('{"canvas": 256, "trajectories": [[[1,2],[3,4]]]}', "canvas"),
        ('{"canvsa": [9, 9], "trajectories": [[[1,2],[3,4]]]}', "keys canvsa"),
        ('{"points": [[1,2],[3,4]]}', "keys points"),
        ('{"trajectories": 5}', "not a list"),
        ("[[1,2,0],[3,4,0]]", "point 2 is not later"),
        ("[[1,2,0],[3,4,7]]", "times run from 0 to 7"),
        (bytes(range(256)), "is not a trajectory"),
        (b"\x93NUMPY\x01\x00junk", "is not a readable array"),
    ],
)
def test_a_fault_is_one_clear_line_that_names_the_file(tmp_path, content, fault):
    path = write(tmp_path, content)
    with pytest.raises(UserError) as error:
        trajectory.load(path)
    message = str(error.value)
    assert message.startswith(str(path))
    assert fault in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "array", [np.zeros((3, 4)), np.zeros((2, 2, 2, 2)), np.zeros((0, 2)), np.array(["a", "b"]), np.array(3.0)]
)
def test_arrays_of_another_shape(tmp_path, array):
    with pytest.raises(UserError, match=r"points\.npy"):
        trajectory.load(npy(tmp_path, array))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match=r"gone\.txt: no such"):
        trajectory.load(tmp_path / "gone.txt")
    with pytest.raises(UserError, match="is a folder"):
        trajectory.load(tmp_path)


def test_points_off_the_canvas_are_refused_or_clipped_with_one_warning(tmp_path):
    path = write(tmp_path, "-5,10\n128,300\n256,256\n1e300,0\n")
    with pytest.raises(UserError, match=r"3 of 4 points lie off the 256x256 canvas; .*--trajectory_canvas"):
        trajectory.load(path)
    with pytest.warns(UserWarning, match="3 of 4 points lie off the 256x256 canvas") as seen:
        (points,) = trajectory.load(path, hints(canvas="256x256:clip"))
    assert len(seen) == 1
    np.testing.assert_array_equal(points, np.array([[0, 10], [128, 256], [256, 256], [256, 0]]) / 256)


def test_fractions_without_a_canvas_are_pointed_out(tmp_path):
    with pytest.raises(UserError, match="one corner"):
        trajectory.load(write(tmp_path, "[[0.1, 0.2], [0.8, 0.9]]"))


@pytest.mark.parametrize("frames", [0, -3])
def test_no_frames_is_an_error(frames):
    for call in (lambda: trajectory.resample(UNIT, frames), lambda: trajectory.tracks([], frames)):
        with pytest.raises(UserError, match="at least 1"):
            call()


# ---------------------------------------------------------------- resampling


@QUICK
@given(paths, st.integers(2, 40), st.booleans())
def test_the_ends_are_kept(points, frames, arc_length):
    track = trajectory.resample(points, frames, arc_length)
    assert track.shape == (frames, 2)
    assert track.dtype == np.float32
    np.testing.assert_array_equal(track[[0, -1]], points[[0, -1]])


@QUICK
@given(paths)
def test_as_many_frames_as_points_changes_nothing(points):
    np.testing.assert_array_equal(trajectory.resample(points, len(points)), points)


@QUICK
@given(paths, paths, st.integers(3, 12), st.integers(8, 60))
def test_a_pause_stays_a_pause(before, after, held, frames):
    points = np.concatenate([before, np.repeat(before[-1:], held, axis=0), after])
    track = trajectory.resample(points, frames)
    index = np.linspace(0, len(points) - 1, frames)
    # One index beyond each end is left out: there linspace's rounding decides.
    paused = (index > len(before) - 1) & (index < len(before) + held - 1)
    np.testing.assert_array_equal(track[paused], np.broadcast_to(before[-1], (paused.sum(), 2)))


def test_one_frame_is_the_start():
    np.testing.assert_array_equal(trajectory.resample(UNIT, 1), UNIT[:1])


def test_times_decide_when_points_are_reached():
    points = np.array([[0, 0, 0.25], [1, 0.5, 0.5]])
    track = trajectory.resample(points, 9)  # at 0, 1/8, ... 1
    np.testing.assert_allclose(track[:, 0], [0, 0, 0, 0.5, 1, 1, 1, 1, 1])


def test_arc_length_evens_out_the_speed_and_drops_pauses():
    points = np.array([[0, 0], [0.1, 0], [0.1, 0], [0.1, 0], [1, 0], [1, 0]])
    np.testing.assert_allclose(trajectory.resample(points, 5, arc_length=True)[:, 0], np.arange(5) / 4, atol=1e-7)
    still = np.full((3, 2), 0.5)
    np.testing.assert_array_equal(trajectory.resample(still, 4, arc_length=True), np.full((4, 2), 0.5))


def test_tracks_stack_and_may_be_none():
    assert trajectory.tracks([UNIT, UNIT[:2]], 7).shape == (2, 7, 2)
    assert trajectory.tracks([], 7).shape == (0, 7, 2)


# ---------------------------------------------------------------- the released arithmetic


def test_released_points_thin_out_and_lose_the_end():
    line = [(2 * i, 0) for i in range(20)]
    got = trajectory.released_points(line, 8, 256, 256)
    assert got[:, 0].tolist() == [0, 4, 8, 12, 16, 20, 24, 28]  # stride 20 // 8, then cut


def test_released_points_fill_the_first_gaps_and_cut_to_whole_numbers():
    got = trajectory.released_points([(0, 0), (10, 0), (20, 30)], 6, 128, 512)
    want = [
        (0, 0),
        (3, 0),
        (6, 0),
        (10, 0),
        (15, 15),
        (20, 30),
    ]  # two more in the first gap, one in the second
    assert got.tolist() == [[2 * x, math.floor(y / 2)] for x, y in want]


@QUICK
@given(paths.map(lambda p: (p * 255).astype(int)), st.integers(2, 30))
def test_released_points_lie_in_the_pixel_of_the_float_path(points, frames):
    """Where neither path has to resample, both put a canvas point into the same pixel."""
    whole = trajectory.released_points(points, len(points), 64, 96)
    track = trajectory.resample(trajectory.parse(points)[0], len(points)).astype(np.float64)
    pixel = track * (96, 64) - 0.5
    assert (np.abs(pixel - whole) <= 0.5 + 1e-6).all()
    assert trajectory.released_points(points, frames, 64, 96).shape == (frames, 2)
