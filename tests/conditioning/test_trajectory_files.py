"""Trajectory files of other tools: each is read right, or refused in one line that says what to do."""

import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tora_jax.configs import sampling

from tests.trajectory_forms import dicts, lines, save
from tora_jax.conditioning import trajectory
from tora_jax.conditioning.trajectory_hints import hints
from tora_jax.errors import UserError
from tora_jax.sampling import request

QUICK = settings(
    max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
ENDS = [(0.1, 0.25), (0.9, 0.75)]
FIVE = np.stack([np.linspace((20, 50 + 10 * i), (180, 150 + 10 * i), 33) for i in range(5)])  # [n, t, 2] on 256x256


def curve(width=1, height=1, count=16):
    at = np.linspace(0, 1, count)
    return np.stack([(0.1 + 0.8 * at) * width, (0.25 + 0.5 * at**2) * height], -1)


def write(folder, content, name="file.any"):
    return save(folder / name, content)


def load(folder, content, **said):
    return trajectory.load(write(folder, content), hints(**said))


def refusal(folder, content, name="file.any", **said):
    path = write(folder, content, name)
    with pytest.raises(UserError) as error:
        trajectory.load(path, hints(**said))
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------- one path, in the forms of editors and tables


ONE = {  # beside those of trajectory_forms
    "quoted": lambda p: f"'{json.dumps(p.tolist())}'",
    "header, tabs": lambda p: lines(p.tolist(), "\t", head="X\tY\n"),
    "semicolons": lambda p: lines(p.tolist(), ";"),
    "boxes": lambda p: lines([[x - 3, y - 2, x + 3, y + 2] for x, y in p.tolist()], head="x_min,y_min,x_max,y_max\n"),
    "[p, 2]": lambda p: p,
    "[1, p, 2]": lambda p: p[None],
    "[t, 1, 2]": lambda p: p[:, None],
    "[n, t, 1, 2]": lambda p: p[None, :, None],
    "float32": lambda p: p.astype(np.float32),
}


@pytest.mark.parametrize("form", ONE)
@pytest.mark.parametrize("size", [(720, 480), (1280, 720), (37, 512)])
def test_one_path_on_its_canvas(tmp_path, form, size):
    (points,) = load(tmp_path, ONE[form](curve(*size)), canvas="x".join(map(str, size)))
    np.testing.assert_allclose(points, curve(), atol=1e-6)


def test_a_canvas_is_asked_for(tmp_path):
    for content in (json.dumps(dicts(curve(720, 480))), curve(1280, 720), curve()):
        assert "--trajectory_canvas" in refusal(tmp_path, content)
    (corner,) = load(tmp_path, json.dumps(dicts(curve(256, 256))), canvas="512x512")
    np.testing.assert_allclose(corner[[0, -1]], np.array(ENDS) / 2)


def test_normalized_splines_are_refused(tmp_path):
    turned = 1 - curve(832, 480) / 480
    for said in ({}, {"canvas": "1x1"}):
        assert "coord_str" in refusal(tmp_path, json.dumps(dicts(turned)), **said)
    square = json.dumps(dicts(1 - curve()))  # all in 0..1: nothing tells
    assert "coord_str" in refusal(tmp_path, square)
    with pytest.warns(UserWarning, match="coord_str"):
        load(tmp_path, square, canvas="1x1")


# ---------------------------------------------------------------- several paths


def test_several_paths_with_an_axis_of_one(tmp_path):
    np.testing.assert_allclose(load(tmp_path, FIVE[:, :, None]), FIVE / 256)


@QUICK
@given(st.integers(2, 9), st.integers(2, 9), st.sampled_from(["nt", "tn", "ntyx", "tnyx"]), st.integers(0, 99))
def test_axes_that_are_not_said_are_asked_for(tmp_path, a, b, axes, seed):
    array = np.random.default_rng(seed).uniform(1, 255, (a, b, 2))
    assert "--trajectory_axes" in refusal(tmp_path, array)
    written = array if axes.startswith("nt") else array.swapaxes(0, 1)
    found = load(tmp_path, array, axes=axes)
    np.testing.assert_allclose(found, (written[..., ::-1] if axes.endswith("yx") else written) / 256, atol=1e-4)


def test_lists_of_the_points_of_each_frame(tmp_path):
    frames = FIVE.swapaxes(0, 1).tolist()
    for data in (frames, [frames], [[dicts(points) for points in frames]]):
        np.testing.assert_allclose(load(tmp_path, json.dumps(data), axes="tn"), FIVE / 256)
    np.testing.assert_allclose(trajectory.parse([frames]), FIVE / 256)
    np.testing.assert_allclose(trajectory.parse([[dicts(points) for points in FIVE]]), FIVE / 256)
    own = json.dumps({"canvas": [256, 256], "trajectories": frames})  # says what it lists
    np.testing.assert_allclose(load(tmp_path, own), np.array(frames) / 256)
    assert "more points than others" in refusal(tmp_path, "[[[1, 2], [3, 4]], [[5, 6]]]", axes="tn")


def test_fractions(tmp_path):
    assert "1x1" in refusal(tmp_path, FIVE / 256, axes="nt")
    np.testing.assert_allclose(load(tmp_path, FIVE / 256, axes="[n, t, 2]", canvas="1x1"), FIVE / 256)
    np.testing.assert_allclose(load(tmp_path, FIVE / 256, canvas="1x1"), FIVE / 256)  # as TAP-Vid's are
    assert "--trajectory_axes" in refusal(tmp_path, FIVE.swapaxes(0, 1) / 256, canvas="1x1")
    assert "--trajectory_axes" in refusal(tmp_path, FIVE[:, ::8] / 256, canvas="1x1")


def test_a_custom_of_axes_yields_to_what_the_points_do(tmp_path):
    np.testing.assert_allclose(load(tmp_path, FIVE.swapaxes(0, 1)[None]), FIVE / 256)
    assert "--trajectory_axes" in refusal(tmp_path, FIVE[None])  # with the leading axis of TAPIR's batches


@QUICK
@given(st.integers(2, 9), st.integers(2, 40), st.integers(0, 99), st.booleans())
def test_fractions_are_never_read_the_other_way(tmp_path, n, t, seed, paths):
    """Points without any order, and paths: as frames, then paths, they are asked for."""
    noise = np.random.default_rng(seed).uniform(0.01, 0.99, (t, n, 2))
    array = np.sort(noise, axis=0) if paths else noise
    assert "--trajectory_axes" in refusal(tmp_path, array, canvas="1x1")


def test_a_point_at_rest_among_paths(tmp_path):
    moving, still = load(tmp_path, "[[[144, 80], [288, 240], [432, 80]], [[500, 300]]]", canvas="576x320")
    np.testing.assert_allclose(moving, [(0.25, 0.25), (0.5, 0.75), (0.75, 0.25)])
    np.testing.assert_allclose(trajectory.resample(still, 4), np.full((4, 2), [500 / 576, 300 / 320]), atol=1e-6)


def test_visibility_beside_tracks(tmp_path):
    """Wan-Move's two files."""
    seen = write(tmp_path, LATE[None, :, None], "a_visibility.npy")
    tracks = write(tmp_path, FIVE[:1].swapaxes(0, 1)[None], "a_tracks.npy")
    (reading,) = trajectory.readings([str(tracks)])
    assert len(reading.trajectories[0]) == LATE.sum()
    assert "a_visibility.npy" in reading.line
    assert trajectory.files(tracks) == [tracks, seen]  # a batch makes the line again when one of them changes
    write(tmp_path, np.full((1, 33, 1), 0.5), "a_visibility.npy")
    assert "threshold" in refusal(tmp_path, FIVE[:1].swapaxes(0, 1)[None], name="a_tracks.npy")


def test_tracks_are_chosen(tmp_path):
    text = json.dumps([[[9, 9], [9, 9 + 10 * step]] for step in (3, 9, 1, 5)])
    chosen = {"1": [9], "2": [9, 5], "3,": [5], "0,2": [3, 1], "9": [3, 9, 1, 5]}
    for said, steps in chosen.items():
        found = load(tmp_path, text, tracks=said)
        np.testing.assert_allclose([256 * (p[-1, 1] - p[0, 1]) / 10 for p in found], steps)
    assert "takes 0 to 3" in refusal(tmp_path, text, tracks="0,4")


# ---------------------------------------------------------------- hidden points and times


LATE = np.arange(33) >= 10


@pytest.mark.parametrize("form", ["NaN", "npz", "occluded", "three values", "table", "empty cells", "rows missing"])
def test_hidden_points_are_left_out(tmp_path, form):
    path, holes = FIVE[0], np.where(LATE[:, None], FIVE[0], np.nan)
    rows = [[i, *xy, seen] for i, (xy, seen) in enumerate(zip(path.tolist(), LATE, strict=True))]
    other = [[i, 7, 5, 5] for i in range(33)]
    found = load(
        tmp_path,
        {
            "NaN": holes[None],
            "npz": {"tracks": np.where(LATE[:, None], path, 0)[None], "visibility": LATE[None]},
            "occluded": {"points": path[None], "occluded": ~LATE[None]},
            "three values": {"trajs_2d": path[:, None], "visibilities": np.where(LATE, 1, 2)[:, None]},
            "table": lines(rows, head="frame,x,y,visible\n"),
            "empty cells": lines([[i, x, y] if seen else [i, "", ""] for i, x, y, seen in rows], head="frame,x,y\n"),
            "rows missing": lines([[i, 0, x, y] for i, x, y, seen in rows if seen] + other, head="frame,id,x,y\n"),
        }[form],
    )
    np.testing.assert_allclose(found[0], np.column_stack([path / 256, np.arange(33) / 32])[LATE], atol=1e-6)
    track = trajectory.resample(found[0], 33)
    np.testing.assert_allclose(track[LATE], path[LATE] / 256, atol=1e-6)
    np.testing.assert_allclose(track[~LATE], np.broadcast_to(path[10] / 256, (10, 2)), atol=1e-6)


def test_zeros_at_an_end_are_pointed_out(tmp_path):
    with pytest.warns(UserWarning, match="corner"):
        load(tmp_path, np.where(LATE[:, None], FIVE[0], 0)[None])
    with pytest.warns(UserWarning, match="1 of 33 points"):
        load(tmp_path, json.dumps(np.where(np.arange(33)[:, None] == 7, 0, FIVE[0]).tolist()))


def test_hidden_points_may_be_infinite(tmp_path):
    """PointOdyssey's float16."""
    path = np.where(LATE[:, None], FIVE[0], np.inf)[:, None].astype(np.float16)
    (points,) = load(tmp_path, {"trajs_2d": path, "visibilities": np.where(LATE, 1, 2)[:, None]})
    assert len(points) == LATE.sum()


def test_times_that_do_not_fill_the_video_are_said(tmp_path):
    rows = [[i / 10, *xy] for i, xy in enumerate(FIVE[0, :9].tolist())]
    (reading,) = trajectory.readings([str(write(tmp_path, lines(rows, head="time,x,y\n")))])
    assert "times from 0 to 0.8 of the video" in reading.line


def test_a_tracked_point_of_after_effects_is_one_path(tmp_path):
    size, columns = "\tSource Width\t256\n\tSource Height\t256\n", "\tFrame\tX pixels\tY pixels\n"
    text = f"Adobe After Effects 8.0 Keyframe Data\n{size}"
    for name in ("Feature Center", "Attach Point", "Attach Point Offset", "Feature Size"):
        points = 0.5 + 0 * FIVE[0] if name.endswith(("Offset", "Size")) else FIVE[0]
        rows = [["", i, *xy] for i, xy in enumerate(points)]
        text += f"\nMotion Trackers\tTracker #1\tTrack Point #1\t{name}\n{columns}" + lines(rows, "\t")
    np.testing.assert_allclose(load(tmp_path, text), FIVE[:1] / 256)
    attached = text.replace("Feature Center", "Search Offset")
    np.testing.assert_allclose(load(tmp_path, attached), FIVE[:1] / 256)


def test_one_point_a_frame(tmp_path):
    text = json.dumps(FIVE[0].tolist())
    for frames in (9, 17, 33, 49):
        (points,) = load(tmp_path, text, times="frames", num_frames=frames)
        want = FIVE[0][np.minimum(np.arange(frames), 32)] / 256
        np.testing.assert_allclose(trajectory.resample(points, frames), want, atol=1e-6)
    (points,) = load(tmp_path, text, times="points", num_frames=9)
    np.testing.assert_allclose(trajectory.resample(points, 9), FIVE[0][::4] / 256, atol=1e-6)


@pytest.mark.parametrize("third", [[2, 3, 4], [0.9, 0.8, 0.9], [0.5, 0.5, 0.5], [-1, 0, 1]])
def test_a_third_number_that_is_no_time(tmp_path, third):
    points = np.column_stack([[40, 130, 220], [128] * 3, third])
    for content in (points, json.dumps(points.tolist()), lines(points.tolist())):
        assert "if it is no time" in refusal(tmp_path, content)
        (found,) = load(tmp_path, content, axes="xyz")
        np.testing.assert_allclose(found, points[:, :2] / 256)


def test_a_third_number_that_may_be_a_time_is_said(tmp_path):
    with pytest.warns(UserWarning, match="from 0.81 on, was taken as the time"):
        load(tmp_path, "[[40, 128, 0.81], [128, 128, 0.85], [216, 128, 0.93]]")


def test_depth_in_an_array_of_tracks(tmp_path):
    deep = np.concatenate([FIVE[:2], np.full((2, 33, 1), 3.5)], -1).swapaxes(0, 1)
    assert "if it is no time" in refusal(tmp_path, deep, axes="tn")
    np.testing.assert_allclose(load(tmp_path, deep, axes="t,n,xyz"), FIVE[:2] / 256)


@pytest.mark.parametrize("several", [False, True])
def test_tables_of_deep_lab_cut(tmp_path, several):
    heads = [["individuals", *["a"] * 3, *["b"] * 3]] if several else []
    rows = [["scorer", *["net"] * 6], *heads, ["bodyparts", *["nose"] * 3, *["tail"] * 3]]
    rows += [["coords", *["x", "y", "likelihood"] * 2]]
    rows += [[i, *FIVE[0, i], 0.99, *FIVE[1, i], 0.99 if seen else 0.2] for i, seen in enumerate(LATE)]
    nose, tail = load(tmp_path, lines(rows), canvas="256x256")
    np.testing.assert_allclose(nose, FIVE[0] / 256)
    np.testing.assert_allclose(tail[:, :2], FIVE[1, LATE] / 256)


def test_tables_of_tap_vid(tmp_path):
    rows = [["clip", 10, 20, *np.column_stack([p / 256, ~LATE]).ravel().tolist()] for p in FIVE]
    found = load(tmp_path, lines(rows))
    np.testing.assert_allclose([p[0, :2] for p in found], FIVE[:, 10] / 256)
    assert "several clips" in refusal(tmp_path, lines([*rows, ["other", *rows[0][1:]]]))


def test_y_upwards(tmp_path):
    text = lines([[i + 1, 120 + 24 * i, 405] for i in range(5)], ";", "frame;x;y\n")
    assert "--trajectory_axes=up" in refusal(tmp_path, text, canvas="640x540")
    (points,) = load(tmp_path, text, canvas="640x540", axes="up")
    np.testing.assert_allclose(points[[0, -1]], [(0.1875, 0.25), (0.3375, 0.25)])
    (points,) = load(tmp_path, text, canvas="640x540", axes="down")
    np.testing.assert_allclose(points[[0, -1]], [(0.1875, 0.75), (0.3375, 0.75)])


# ---------------------------------------------------------------- what is refused


REFUSED = {
    "frame and x": (lines([[i, 25.6 + i] for i in range(33)]), "write a header"),
    "frame, x, y without a header": (lines([[i, 25.6 + i, 3] for i in range(33)]), "write a header"),
    "key": ('[{"x": 1, "y": 2, "weight": 3}, {"x": 2, "y": 3, "weight": 3}]', "weight, which is not known"),
    "column": ("x,y,weight\n1,2,3\n4,5,6\n", "'weight' is not known"),
    "box or centre": ("x,y,w,h\n1,2,3,4\n4,5,6,7\n", "corner or the centre"),
    "boxes of each frame": (np.full((5, 2, 2), 9.0), "--trajectory_axes"),
    "boxes of each frame in JSON": (json.dumps([[[i, i], [i + 9, i + 5]] for i in range(5)]), "--trajectory_axes"),
    "points of each frame in JSON": (json.dumps(FIVE.swapaxes(0, 1).tolist()), "--trajectory_axes"),
    "fractions, some off the frame": (FIVE[0] / 150, "1x1"),
    "no number of a path": ("frame,id,x,y\n0,,1,2\n1,,2,3\n2,,3,4\n", "no number of its path"),
    "points and boxes": ("frame,id,left,top,w,h,x,y\n1,1,2,2,5,5,-1,-1\n2,1,3,3,5,5,-1,-1\n", "boxes; leave"),
    "two points a row": ("frame,x1,y1,x2,y2\n0,9,9,2,2\n1,8,8,1,1\n", "ends before it begins"),
    "boxes without frames": ("left,top,w,h,id\n1,1,5,5,1\n1,1,5,5,2\n2,2,5,5,1\n", "in which frame"),
    "box from the lower right": (json.dumps([[[80, 60], [40, 20], [60, 40], [70, 45], [90, 60]]]), "SG-I2V"),
    "frame twice": ("frame,x,y\n1,2,3\n1,5,6\n", "point_id"),
    "detections": (lines([[i, -1, 5, 5, 9, 9, 0.9, -1, -1, -1] for i in range(1, 4)]), "tracker"),
    "visibility alone": (np.ones((1, 9, 2), bool), "no places"),
    "confidences": ({"tracks": FIVE[:1], "visibility": np.full((1, 33), 0.7)}, "threshold"),
    "visibility of other frames": ({"tracks": FIVE[:1], "visibility": np.ones((1, 32), bool)}, "does not fit"),
    "hidden throughout": ({"tracks": FIVE[:1], "visibility": np.zeros((1, 33), bool)}, "nothing to follow"),
    "no places": ({"video": np.zeros(3)}, "has the arrays video"),
    "space and camera": (
        {"tracks_XYZ": np.ones((4, 2, 3)), "fx_fy_cx_cy": np.ones(4), "visibility": np.ones((4, 2), bool)},
        "name its size",
    ),
    "space": ({"tracks_XYZ": np.zeros((4, 2, 3)), "visibility": np.ones((4, 2), bool)}, "in space"),
    "box, then centres": (json.dumps([[[40, 20], [80, 60], [60, 40], [70, 45], [90, 60]]]), "SG-I2V"),
    "box beside centres": (json.dumps([[[40, 20], [80, 60]], [[60, 40], [70, 45], [90, 60]]]), "SG-I2V"),
    "RealEstate10K": ("https://example.org/clip\n" + lines([[0] * 19], " "), "camera"),
    "camera without the address": (lines([[0.5] * 19] * 3, " "), "camera"),
    "camera in JSON": (json.dumps([[0.5] * 12] * 16), "camera"),
    "camera by frames": ('{"frame0": {"cam01": "[1 0 0] "}}', "camera"),
    "DeepLabCut's other table": ("scorer,a,a\nbodyparts,b,b\ncoords,x,y\n0,1,2\n1,2,3\n", "DeepLabCut"),
    "cut header": (b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'shape': (3, 2,".ljust(128), "not a readable array"),
    "HDF5": (b"\x89HDF\r\n\x1a\n\0\0", "SLEAP"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_in_one_line(tmp_path, what):
    content, said = REFUSED[what]
    assert said in refusal(tmp_path, content)


def test_a_header_settles_what_counts(tmp_path):
    (points,) = load(tmp_path, lines([[i, 25.6 + i] for i in range(33)], head="x,y\n"))
    np.testing.assert_allclose(points[:, 0], np.arange(33) / 256)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        ({"canvas": "720"}, "trajectory_canvas"),
        ({"canvas": "0x480"}, "trajectory_canvas"),
        ({"axes": "abc"}, "trajectory_axes"),
        ({"axes": ""}, "trajectory_axes"),
        ({"times": "seconds"}, "trajectory_times"),
        ({"tracks": "all"}, "trajectory_tracks"),
        ({"tracks": "0"}, "trajectory_tracks"),
        ({"tracks": "-1"}, "trajectory_tracks"),
    ],
)
def test_hints_of_another_form(said, fault):
    with pytest.raises(UserError, match=fault):
        hints(**said)


def test_settings_reach_the_reader_and_the_line_says_how(tmp_path):
    path = write(tmp_path, json.dumps([dicts(curve(720, 480))] * 2))
    section = {"num_frames": 5, "height": 32, "width": 32}
    wanted = request.make(section, {"trajectories": ["circle", str(path)], "trajectory_canvas": "720x480"})
    assert wanted.lines == (f"{path}: 2 paths of 16 points on 720x480, 5 frames; from JSON",)
    np.testing.assert_allclose(wanted.trajectories[2], curve(), atol=1e-9)
    (track,) = request.make(section, {"trajectories": curve(), "trajectory_canvas": [1, 1]}).tracks
    np.testing.assert_allclose(track, trajectory.resample(curve(), 5))
    given = {"trajectories": curve(), "trajectory_canvas": "1x1", "trajectory_times": "frames"}
    np.testing.assert_allclose(request.make(section, given).tracks[0], curve()[:5], atol=1e-6)


def test_configs_and_reports_without_hints_stay_as_they_were():
    assert not {*sampling.READING} & {*sampling.section()}
    plain = request.make({"num_frames": 5, "height": 32, "width": 32}, {})
    assert not {*sampling.READING} & {*plain.settings.report()}
    said = request.make({"num_frames": 5, "height": 32, "width": 32}, {"trajectory_tracks": "1"})
    assert said.shape == plain.shape
    assert math.prod(said.tracks.shape) == math.prod(plain.tracks.shape)
