"""Pickled arrays are read without pickle's powers, and CVAT's XML without XML's."""

import collections
import contextlib
import pickle
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.trajectory_forms import box, cvat_text, element, save, torch_save
from tora_jax.conditioning import trajectory, trajectory_pickles
from tora_jax.conditioning.trajectory_hints import hints
from tora_jax.errors import UserError

QUICK = settings(max_examples=30, deadline=None, derandomize=True)
AT = np.linspace(0, 1, 9)
PATHS = np.stack([np.stack([0.1 + 0.05 * i + 0.6 * AT, 0.2 + 0.1 * i + 0.1 * AT], -1) for i in range(3)])  # [n, t, 2]
SEEN = np.ones(PATHS.shape[:2], bool)
SEEN[1, 5:] = False


class Trap:
    def __init__(self, *call):
        self.call = call or (exec, ("raise SystemExit('opened')",))

    def __reduce__(self):
        return self.call


def load(path, **said):
    return trajectory.load(path, hints(**said))


def check(found, of=SEEN):
    for points, path, seen in zip(found, PATHS, of, strict=True):
        np.testing.assert_allclose(points[:, :2], path[seen], atol=1e-6)
        if points.shape[1] == 3:
            np.testing.assert_allclose(points[:, 2], AT[seen])


def refused(path, **said):
    with pytest.raises(UserError) as error:
        load(path, **said)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------- pickles


plain = arrays.arrays(
    st.sampled_from(["<f4", ">f8", "<f2", "i1", "<i8", ">i4", "u1", "?"]), arrays.array_shapes(max_dims=4, max_side=5)
)


@QUICK
@given(st.lists(plain, max_size=3), st.integers(2, pickle.HIGHEST_PROTOCOL), st.booleans())
def test_arrays_in_lists_and_dicts_come_back(content, protocol, fortran):
    content = [np.asfortranarray(each) if fortran else each for each in content]
    data = {"name": content, "more": collections.OrderedDict(number=1.5, text="a", nothing=None, raw=b"\0")}
    read = trajectory_pickles.loads(pickle.dumps(data, protocol), "file")
    assert read["more"] == dict(data["more"])
    for got, want in zip(read["name"], content, strict=True):
        np.testing.assert_array_equal(got, want)
        assert got.dtype == want.dtype


def clip(points=PATHS, seen=SEEN):
    return {"video": np.zeros((9, 4, 4, 3), np.uint8), "points": points.astype(np.float32), "occluded": ~seen}


@pytest.mark.parametrize("data", [{"boat": clip()}, [clip()], clip()])
def test_tap_vid(tmp_path, data):
    path = tmp_path / "tapvid.pkl"
    path.write_bytes(pickle.dumps(data))
    check(load(path))


def test_one_of_several_clips_is_asked_for(tmp_path):
    path = tmp_path / "tapvid.pkl"
    path.write_bytes(pickle.dumps({"boat": clip(), "car": clip()}))
    assert "2 clips (boat, car)" in refused(path)


@pytest.mark.parametrize("form", ["array", "dict", "list"])
def test_objects_in_npy_and_npz(tmp_path, form):
    pixels = PATHS * 256
    whole = {"tracks": pixels.swapaxes(0, 1)[None], "visibility": SEEN.T[None], "fps": 24}
    ragged = np.empty(3, object)
    ragged[:] = [each[:count] for each, count in zip(pixels, (9, 5, 9), strict=True)]
    data, axes = {"array": (pixels.astype(object), "nt"), "dict": (whole, None), "list": (ragged, None)}[form]
    np.save(tmp_path / "a.npy", data, allow_pickle=True)
    np.savez(tmp_path / "b.npz", tracks=data)
    for path in (tmp_path / "a.npy", tmp_path / "b.npz"):
        if form == "array":  # numbers as objects, one by one
            assert "no arrays of points" in refused(path, axes=axes)
        else:
            found = load(path, axes=axes)
            assert [len(each) for each in found] == [9, 5, 9]
            np.testing.assert_allclose(found[1][:, :2], PATHS[1, :5], atol=1e-6)


@pytest.mark.slow  # needs PyTorch
def test_tensors(tmp_path):
    import torch

    tracks = torch.tensor(PATHS.swapaxes(0, 1)[None] * 256, dtype=torch.float32)
    seen = torch.tensor(SEEN.T[None])
    torch.save({"pred_tracks": tracks, "pred_visibility": seen}, tmp_path / "cotracker.pt")
    check(load(tmp_path / "cotracker.pt"))
    turned = torch.tensor(PATHS * 256).permute(1, 0, 2)  # steps of a view
    torch.save(torch.nn.Parameter(turned), tmp_path / "parameter.pt")
    check(load(tmp_path / "parameter.pt", axes="tn"), np.ones_like(SEEN))
    for data in (turned, turned.clone().requires_grad_(), {"tracks": turned[None], "visibility": seen}):
        found = trajectory.parse(data, hints=hints(axes="tn"))
        check(found, SEEN if isinstance(data, dict) else np.ones_like(SEEN))
    half = trajectory.parse(turned.to(torch.bfloat16), hints=hints(axes="tn"))
    np.testing.assert_allclose(half, PATHS, atol=4e-3)


def test_arrays_of_jax():
    import jax.numpy as jnp

    check(trajectory.parse(jnp.asarray(PATHS * 256), hints=hints(axes="nt")), np.ones_like(SEEN))
    half = trajectory.parse(jnp.asarray(PATHS * 256, jnp.bfloat16), hints=hints(axes="nt"))
    np.testing.assert_allclose(half, PATHS, atol=4e-3)


def nested():
    """A few bytes that are a list of a billion."""
    data = [0]
    for _ in range(10):
        data = [data] * 10
    return data


def test_room_is_not_made_for_what_a_stream_claims():
    claims = b"\x80\x02]r" + (2**32 - 1).to_bytes(4, "little") + b"."
    with pytest.raises(UserError, match="too large"):
        trajectory_pickles.loads(claims, "file")


TRAPS = {
    "code": Trap(),
    "a command": Trap(__import__("os").system, ("false",)),
    "an attribute": Trap(getattr, ("", "join")),
    "a billion": nested(),
    "a set": {1, 2},
    "a state of a function": Trap(np.dtype, ("f4",), {"function": 1}),
    "objects of a dtype": np.zeros(3, [("x", "f4")]),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_nothing_else_is_opened(tmp_path, trap):
    plain = tmp_path / "a.pkl"
    plain.write_bytes(pickle.dumps(TRAPS[trap]))
    objects = tmp_path / "b.npy"
    holder = np.empty(1, object)
    holder[0] = TRAPS[trap]
    np.save(objects, holder, allow_pickle=True)
    saved = save(tmp_path / "c.pth", torch_save(TRAPS[trap]))
    for path in (plain, objects, saved):
        assert "numpy.savez" in refused(path)


@QUICK
@given(st.integers(0, 400), st.integers(0, 255))
def test_broken_streams_end_in_one_line(at, byte):
    stream = bytearray(pickle.dumps({"boat": clip()}, 4))
    stream[at % len(stream)] = byte
    with contextlib.suppress(UserError):
        assert not callable(trajectory_pickles.loads(bytes(stream), "file"))


@pytest.mark.parametrize(
    ("size", "stride"), [((9, 9), (1, 1)), ((-1, 2), (1, 1)), ((2, 2), (-1, 1)), ((2**40, 2), (0, 0))]
)
def test_tensors_stay_within_their_storage(size, stride):
    with pytest.raises(pickle.UnpicklingError):
        trajectory_pickles._tensor(np.zeros(6, np.float32), 0, size, stride)


# ---------------------------------------------------------------- CVAT


def cvat(*tracks, size=(640, 480), last=8):
    return cvat_text(tracks, size, last)


def write(folder, text):
    path = folder / "annotations.xml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("size", [(640, 480), (1920, 1080), (99, 301)])
def test_cvat(tmp_path, size):
    pixels = PATHS * size
    boxes = [box(i, *xy, rotation=30) for i, xy in enumerate(pixels[0])]
    gone = [box(i, *xy) for i, xy in enumerate(pixels[1, :5])] + [box(5, *pixels[1, 4], outside=1)]
    dots = [element("points", i, points=f"{x},{y};{x},{y + 1}") for i, (x, y) in enumerate(pixels[2])]
    reading = trajectory.readings(str(write(tmp_path, cvat(boxes, gone, dots, size=size))))[0]
    check(reading.trajectories[:3])
    np.testing.assert_allclose(reading.trajectories[3], PATHS[2] + [0, 1 / size[1]], atol=1e-6)
    assert f"4 paths of 5 to 9 points on {size[0]}x{size[1]}; from CVAT's XML" in reading.line


def test_cvat_keeps_the_time_of_the_clip(tmp_path):
    """Key frames alone, of a clip that begins before them and ends after them."""
    text = cvat([box(2, 100, 100), box(4, 300, 100)])
    (points,) = load(write(tmp_path, text))
    np.testing.assert_allclose(points, [(100 / 640, 100 / 480, 0.25), (300 / 640, 100 / 480, 0.5)])


def test_other_shapes_of_cvat(tmp_path):
    polygon = [element("polygon", i, points="1,2;3,4;5,6") for i in range(3)]
    ellipse = [element("ellipse", i, cx=64 * (i + 1), cy=48, rx=3, ry=4) for i in range(9)]
    reading = trajectory.readings(str(write(tmp_path, cvat(polygon, ellipse))))[0]
    np.testing.assert_allclose(reading.trajectories[0][:2], [(0.1, 0.1), (0.2, 0.1)])
    assert "1 track of other shapes left out" in reading.line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (cvat([element("polygon", 0, points="1,2;3,4")]), "without a centre"),
        (cvat([box(0, 9, 9), box(0, 19, 9)]), "two shapes in one frame"),
        (cvat([box("one", 9, 9)]), "a number that is none"),
        (cvat([box(0, 9, 9)], size=(0, 480)), "a number that is none"),
        (cvat([element("points", 0, points="1,2"), element("points", 1, points="1,2;3,4")]), "number of points"),
        (cvat(), "no tracks"),
        (cvat([box(0, 9, 9)] * 2).replace("</meta>", "<original_size/></meta>"), "several tasks"),
        (re.sub("<original_size>.*</original_size>", "", cvat([box(0, 9, 9), box(1, 9, 19)])), "--trajectory_canvas"),
        ("<annotations><image id='0'><box/></image></annotations>", "CVAT for images"),
        ("<annotations>", "broken XML"),
        ("<svg></svg>", "another kind (svg)"),
        ('<!DOCTYPE a [<!ENTITY b "&c;&c;">]><annotations>&b;</annotations>', "definitions of its own"),
    ],
)
def test_xml_that_is_refused(tmp_path, text, said):
    assert said in refused(write(tmp_path, text))
