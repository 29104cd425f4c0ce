"""A path that was drawn on a picture stays on what it was drawn on, when the picture is scaled and cropped."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tora_jax.conditioning import images
from tora_jax.conditioning.images import Condition
from tora_jax.errors import UserError
from tora_jax.io.video import ORIENTATION, resize_crop, write_video
from tora_jax.sampling import request

QUICK = settings(max_examples=25, deadline=None, derandomize=True)
SECTION = {"height": 64, "width": 96, "num_frames": 5, "fps": 8.0}
SIZE = (64, 96)
SPOT = (21, 52)  # x, y of the object on the photo, in its pixels
END = (40, 60)


def photo(height=90, width=60, spot=SPOT):
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[spot[1] - 4 : spot[1] + 4, spot[0] - 4 : spot[0] + 4] = 255
    return pixels


def tracks(trajectories, conditions, **said):
    """(x, y) in 0..1 of the frame, and the frame as the model gets it."""
    wanted = request.make(SECTION, {"trajectories": trajectories, "conditions": conditions, **said}).placed(SIZE)
    wanted.warn()
    frames = images.fit(wanted.read(), SIZE)
    pixels = next(iter(frames.values())).pixels
    return wanted.tracks, pixels if pixels.ndim == 3 else pixels[0], wanted.lines


def middle(frame):
    """Of what is bright, in 0..1."""
    y, x = np.nonzero(frame.mean(-1) > 128)
    return (x.mean() + 0.5) / frame.shape[1], (y.mean() + 0.5) / frame.shape[0]


@pytest.fixture
def files(tmp_path):
    Image.fromarray(photo()).save(tmp_path / "photo.png")
    turned = Image.fromarray(np.rot90(photo(), 1).copy())
    exif = turned.getexif()
    exif[ORIENTATION] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    turned.save(tmp_path / "turned.tif", exif=exif)
    write_video(tmp_path / "clip.mp4", np.repeat(photo()[None], 3, 0), 8)
    (tmp_path / "path.json").write_text(json.dumps({"canvas": [60, 90], "trajectories": [[SPOT, END]]}))
    (tmp_path / "plain.json").write_text(json.dumps([SPOT, END]))
    (tmp_path / "large.json").write_text(json.dumps([[10 * SPOT[0], 10 * SPOT[1]], [400, 600]]))
    (tmp_path / "part.json").write_text(json.dumps([[SPOT[0] / 60, SPOT[1] / 90], [0.5, 0.6]]))
    return tmp_path


@pytest.mark.parametrize("source", ["photo.png", "turned.jpg", "turned.tif", "clip.mp4", "pixels"])
@pytest.mark.parametrize("frame", [0, -1])
def test_the_path_begins_on_the_object(files, source, frame):
    condition = Condition(frame, photo() if source == "pixels" else files / source)
    found, seen, (line,) = tracks(files / "path.json", [condition])
    np.testing.assert_allclose(found[0, 0], middle(seen), atol=0.01)
    assert "on 60x90 of " in line


@pytest.mark.parametrize(
    ("name", "canvas"),
    [
        ("plain.json", "60x90"),
        ("plain.json", "image"),
        ("large.json", "600x900"),
        ("part.json", "image:1x1"),
    ],
)
def test_how_a_path_is_said_to_be_on_the_picture(files, name, canvas):
    found, seen, _ = tracks(files / name, [f"0={files / 'photo.png'}"], trajectory_canvas=canvas)
    np.testing.assert_allclose(found[0, 0], middle(seen), atol=0.01)


@pytest.mark.parametrize("canvas", ["frame:60x90", "1x1", "256x256", None])
def test_other_canvases_are_the_frame_and_the_line_says_so(files, canvas):
    name = "part.json" if canvas == "1x1" else "plain.json"
    found, _, (line,) = tracks(files / name, [f"0={files / 'photo.png'}"], trajectory_canvas=canvas)
    scale = np.array((60, 90) if canvas in ("frame:60x90", "1x1") else (256, 256))
    np.testing.assert_allclose(found[0, 0], np.array(SPOT) / scale, atol=1e-6)
    assert (canvas == "frame:60x90") or "--trajectory_canvas=image" in line


@QUICK
@given(
    st.tuples(st.integers(30, 60), st.integers(30, 60)),
    st.tuples(st.integers(24, 96), st.integers(24, 96)),
    st.tuples(st.floats(0.45, 0.55), st.floats(0.45, 0.55)),
)
def test_points_go_where_the_pixels_go(old, new, place):
    x, y = round(place[0] * old[1]), round(place[1] * old[0])
    picture = photo(*old, spot=(x, y))
    seen = resize_crop(picture, *new)
    wanted = request.make(
        {**SECTION, "height": new[0], "width": new[1]},
        {"trajectories": [[x, y], [x, y + 1]], "conditions": [Condition(0, picture)], "trajectory_canvas": "image"},
    )
    at = wanted.placed(new).tracks[0, 0] * new[::-1]
    bright = (seen.mean(-1) > 128)[max(int(at[1]) - 1, 0) : int(at[1]) + 2, max(int(at[0]) - 1, 0) : int(at[0]) + 2]
    assert bright.any()


def test_points_that_the_crop_takes_away_are_said(files):
    (files / "path.json").write_text(json.dumps({"canvas": [60, 90], "trajectories": [[SPOT, [21, 90]]]}))
    with pytest.warns(UserWarning, match=r"path\.json: 1 of 2 points lie in what the crop of .*photo\.png from 60x90"):
        found, _, _ = tracks(files / "path.json", [f"0={files / 'photo.png'}"])
    assert found.max() == 1
    np.testing.assert_allclose(found[0, :, 0], SPOT[0] / 60, atol=0.01)
    (files / "path.json").write_text(json.dumps({"canvas": [60, 90], "trajectories": [[[21, 80], [21, 90]]]}))
    with pytest.raises(UserError, match="take a video of its shape"):
        tracks(files / "path.json", [f"0={files / 'photo.png'}"])


def test_a_path_across_the_frame_between_points_beyond_it(files):
    (files / "path.json").write_text(json.dumps({"canvas": [60, 90], "trajectories": [[[30, 0], [30, 90]]]}))
    with pytest.warns(UserWarning, match="2 of 2 points"):
        found, _, _ = tracks(files / "path.json", [f"0={files / 'photo.png'}"])
    np.testing.assert_allclose(found[0], [(0.5, y) for y in (0, 0, 0.5, 1, 1)], atol=1e-6)


def test_which_picture(files):
    other = Condition(-1, np.zeros((40, 120, 3), np.uint8))
    both = [Condition(0, files / "photo.png"), other]
    found, seen, _ = tracks(files / "path.json", both)
    np.testing.assert_allclose(found[0, 0], middle(seen), atol=0.01)
    with pytest.raises(UserError, match="several shapes"):
        tracks(files / "plain.json", both, trajectory_canvas="image")
    with pytest.raises(UserError, match="none is given"):
        tracks(files / "plain.json", [], trajectory_canvas="image")


def test_points_off_the_canvas_name_the_picture(files):
    with pytest.raises(UserError, match=r"off the 256x256 canvas; .* or image for the pixels of .*photo\.png"):
        tracks(files / "large.json", [f"0={files / 'photo.png'}"])


def test_a_missing_picture_is_named_before_anything_is_made(files):
    with pytest.raises(UserError, match=r"absent\.png: no such image"):
        tracks(files / "path.json", ["0=absent.png"])
