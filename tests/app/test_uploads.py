"""What is dropped on the canvas: taken for what it is, read as it is meant, or refused."""

import base64
import io
import json
import zlib

import numpy as np
import pytest
from PIL import Image

from tora_jax.app import uploads
from tora_jax.errors import UserError
from tora_jax.io import video

SIZE = (32, 48)  # height, width of the video


def bomb(width, height):
    """A PNG of a few kilobytes that says it has so many pixels."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    data = chunk(b"IDAT", zlib.compress(bytes(10**6)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


UPLOADS = {
    "svg.png": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
    "page.png": b"<html><script>alert(1)</script></html>",
    "large.png": bomb(20_000, 20_000),
    "bomb.png": bomb(100_000, 100_000),
    "cut.jpg": b"\xff\xd8\xff\xe0\x00\x10JFIF",
    "empty.png": b"",
    "clip.mp4": b"no video",
}


@pytest.mark.parametrize("name", UPLOADS)
def test_uploads_that_are_refused(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(UPLOADS[name])

    def dropped():
        if (kind := uploads.kind(str(path))) != "paths":
            uploads.picture(str(path), SIZE)
        raise UserError(f"{path}: is {kind}")

    for read in (lambda: uploads.picture(str(path), SIZE), lambda: uploads.readings(str(path), SIZE, 5)):
        with pytest.raises(UserError) as error:
            read()
        assert name in str(error.value)
        assert str(tmp_path) not in str(error.value)  # where files lie is nobody's business
    with pytest.raises(UserError, match=name), uploads.named(str(path)):
        dropped()


def test_each_is_taken_for_what_it_is(tmp_path):
    """By the content: the names say nothing."""
    Image.new("RGB", (90, 60), "red").save(tmp_path / "a", "PNG")
    video.write_video(tmp_path / "b.mp4", np.zeros((5, 32, 48, 3), np.uint8), 8)
    (tmp_path / "b.mp4").rename(tmp_path / "b")
    (tmp_path / "c").write_text("0,0\n256,128\n")
    np.save(tmp_path / "d.npy", np.zeros((9, 2)))
    (tmp_path / "e").write_text(json.dumps({"prompt": "a red star.", "trajectories": []}))
    (tmp_path / "f").write_text(json.dumps({"trajectories": [[[0, 0], [1, 1]]]}))
    (tmp_path / "g").write_text("[" * 100_000)
    kinds = {path.name: uploads.kind(str(path)) for path in tmp_path.iterdir()}
    assert kinds == {
        "a": "picture",
        "b": "clip",
        "c": "paths",
        "d.npy": "paths",
        "e": "request",
        "f": "paths",
        "g": "paths",
    }


def test_pictures_come_as_the_model_sees_them(tmp_path):
    Image.new("RGB", (90, 60), "red").save(tmp_path / "photo.png")
    address, seen = uploads.picture(str(tmp_path / "photo.png"), SIZE)
    kind, _, content = address.partition(",")
    assert kind == "data:image/webp;base64"
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (48, 32)
    np.testing.assert_allclose(seen, (0, 0, 1, 1))  # of the same shape
    video.write_video(tmp_path / "clip.mp4", np.full((5, 64, 48, 3), 200, np.uint8), 8)
    address, seen = uploads.picture(str(tmp_path / "clip.mp4"), SIZE)
    still = np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))
    np.testing.assert_allclose(still, 200, atol=4)
    np.testing.assert_allclose(seen, (0, 0.25, 1, 0.75))


def test_imported_paths(tmp_path):
    path = tmp_path / "path.txt"
    path.write_text("0,0\n256,128\n")
    (reading,) = uploads.readings(str(path), SIZE, 5)
    assert reading["paths"] == [[[0, 0], [1, 0.5]]]
    assert reading["line"] == f"{path.name}: 1 path of 2 points on 256x256, 5 frames; from lines of text"


def test_imported_paths_stay_on_the_photo(tmp_path):
    """A photo of which a third is cropped away above and below."""
    Image.new("RGB", (60, 120)).save(tmp_path / "photo.png")
    photo, path = str(tmp_path / "photo.png"), tmp_path / "path.json"
    _, (left, top, right, bottom) = uploads.picture(photo, SIZE)
    np.testing.assert_allclose([left, top, right, bottom], [0, 1 / 3, 1, 2 / 3], atol=0.01)
    path.write_text(json.dumps([[30, 120 * top], [45, 60], [60, 120]]))
    (reading,) = uploads.readings(str(path), SIZE, 5, photo, {"trajectory_canvas": "image"})
    np.testing.assert_allclose(reading["paths"], [[[0.5, 0], [0.75, 0.5], [1, 1]]], atol=0.01)
    assert reading["line"] == (
        "path.json: 1 path of 3 points on 60x120 of photo.png, 5 frames; from JSON; path.json: 1 of 3 points lie in "
        "what the crop of photo.png from 60x120 to 48x32 takes away; the paths stay at the frame's edge there"
    )


def test_what_can_be_read_in_two_ways_comes_in_each(tmp_path):
    path = tmp_path / "tracks.npy"
    np.save(path, np.stack([np.linspace((10 * i, 20), (10 * i, 200), 9) for i in range(3)]))
    found = uploads.readings(str(path), SIZE, 5)
    assert [np.shape(each["paths"]) for each in found][:2] == [(3, 9, 2), (9, 3, 2)]
    assert [each["said"]["trajectory_axes"] for each in found][:2] == ["nt", "tn"]
    assert all(each["line"].startswith("tracks.npy: ") for each in found)
    (said,) = uploads.readings(str(path), SIZE, 5, None, {"trajectory_axes": "nt", "trajectory_tracks": "2"})
    assert np.shape(said["paths"]) == (2, 9, 2)


def test_points_without_a_canvas_may_be_fractions_or_pixels(tmp_path):
    """Off the canvas that is usual, so nobody knows."""
    path = tmp_path / "path.json"
    path.write_text(json.dumps([[30, 20], [300, 200]]))
    found = uploads.readings(str(path), (480, 720), 5)
    assert [each["said"] for each in found] == [
        {"trajectory_canvas": "720x480"},
        {"trajectory_canvas": "256x256:clip"},
    ]
    np.testing.assert_allclose(found[0]["paths"], [[[30 / 720, 20 / 480], [300 / 720, 200 / 480]]])


def test_on_the_photo_or_on_the_frame(tmp_path):
    """Beside a photo, a file that names no canvas may mean either."""
    Image.new("RGB", (512, 256)).save(tmp_path / "photo.png")
    path = tmp_path / "path.txt"
    path.write_text("10,20\n200,128\n")
    frame, picture, *_ = uploads.readings(str(path), (128, 128), 5, str(tmp_path / "photo.png"))
    np.testing.assert_allclose(frame["paths"], [[[10 / 256, 20 / 256], [200 / 256, 0.5]]])
    assert picture["said"] == {"trajectory_canvas": "image"}
    np.testing.assert_allclose(picture["paths"][0][1], [200 / 256 - 0.5, 0.5])


@pytest.mark.parametrize("said", [{"trajectory_axes": 3}, {"prompt": "x"}, {"trajectory_axes": "diagonal"}])
def test_settings_of_reading_are_checked(tmp_path, said):
    (tmp_path / "path.txt").write_text("0,0\n256,128\n")
    with pytest.raises(UserError):
        uploads.readings(str(tmp_path / "path.txt"), SIZE, 5, None, said)


def test_the_strip_is_the_flow_map():
    def strip(points):
        address, frames = uploads.flow_strip(points, SIZE, 5)
        picture = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
        assert (picture.size, frames) == ((48, 5 * 32), 5)
        return np.asarray(picture.convert("RGB"))

    assert strip([np.array([[0.1, 0.2], [0.9, 0.2]])])[32:].min() < 200
    assert strip([]).min() > 250
