"""Pictures and clips for frames: as text, read from files, fitted to the video."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tora_jax.conditioning import images
from tora_jax.errors import UserError
from tora_jax.io.video import write_video


def moving(count, value=0):
    return np.stack([np.full((8, 8, 3), value + 10 * i, np.uint8) for i in range(count)])


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("0=a.png", (0, "a.png", 0.0)),
        ("-1=a.mp4:0.25", (-1, "a.mp4", 0.25)),
        ("3=c:/a=b.png:1", (3, "c:/a=b.png", 1.0)),
        ("3=c:/a.png", (3, "c:/a.png", 0.0)),
    ],
)
def test_conditions_as_text(text, want):
    assert images.parse(text) == want


def test_a_file_with_a_colon_and_a_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a:1").touch()
    assert images.parse("0=a:1") == (0, "a:1", 0.0)
    assert images.parse("0=a:1:0.5") == (0, "a:1", 0.5)


class TestFiles:
    @pytest.fixture(autouse=True)
    def files(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Image.fromarray(moving(1, 200)[0]).save("still.png")
        write_video("clip.mp4", moving(6).repeat(4, 1).repeat(4, 2), fps=16)

    def read(self, *conditions, num_frames=5, fps=8.0):
        return images.read([images.parse(c) for c in conditions], num_frames, fps)

    def test_stills(self):
        found = self.read("1=still.png:0.5", "-1=still.png")
        assert found.keys() == {1, 4}
        assert found[1].edit == 0.5
        assert found[4].pixels.shape == (8, 8, 3)

    def test_a_clip_is_taken_at_the_videos_frame_rate(self):
        """Six frames at 16 a second are three at 8 a second: the first, third and fifth."""
        (found,) = self.read("0=clip.mp4").values()
        np.testing.assert_allclose(found.pixels.mean((1, 2, 3)), [0, 20, 40], atol=2)
        assert self.read("2=clip.mp4").keys() == {2}

    def test_a_clip_before_a_negative_frame(self):
        assert self.read("-1=clip.mp4").keys() == {2}
        assert self.read("-3=clip.mp4").keys() == {0}

    @pytest.mark.parametrize("condition", ["3=clip.mp4", "-4=clip.mp4"])
    def test_a_clip_that_is_too_long(self, condition):
        with pytest.raises(UserError, match="longer than the 2 frames"):
            self.read(condition)

    def test_a_clip_that_starts_where_a_picture_is(self):
        with pytest.raises(UserError, match="frame 2 has a picture already"):
            self.read("2=still.png", "-1=clip.mp4")

    @pytest.mark.parametrize(("name", "content"), [("a.png", b"<svg>"), ("a.mp4", b"no video"), ("absent", None)])
    def test_broken_files(self, name, content):
        if content is not None:
            Path(name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            self.read(f"0={name}")

    def test_fit(self):
        found = images.fit(self.read("0=still.png", "1=clip.mp4"), (16, 24))
        assert [found[i].pixels.shape for i in (0, 1)] == [(16, 24, 3), (3, 16, 24, 3)]
