"""Videos and stills: what is written can be read, and faults are one line."""

import io
import os
import warnings
import zlib
from pathlib import Path

import av
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from tora_jax.errors import UserError
from tora_jax.io.video import (
    cover,
    from_float,
    probe,
    read_image,
    read_video,
    resize_crop,
    to_float,
    write_video,
)


def clip(frames=12, height=64, width=96):
    """A yellow square over red and blue halves: saturated, so a wrong colour matrix shows."""
    video = np.empty((frames, height, width, 3), np.uint8)
    video[:, :, : width // 2], video[:, :, width // 2 :] = (200, 30, 40), (20, 60, 220)
    for t, frame in enumerate(video):
        frame[16:40, 2 * t : 2 * t + 24] = (240, 230, 20)
    return video


def contents(folder):
    return sorted(p.name for p in folder.iterdir())


def test_pixels_as_numbers_and_back():
    """By NumPy and by JAX; beyond the range they are clipped, and half a level is rounded to even."""
    pixels = np.arange(256, dtype=np.uint8).reshape(4, 64)
    for wrap in (np.asarray, jnp.asarray):
        video = to_float(wrap(pixels))
        assert isinstance(video, type(wrap(pixels)))
        assert video.dtype == np.float32
        assert (video.min(), video.max()) == (-1, 1)
        np.testing.assert_allclose(np.asarray(video)[:, 1:] - np.asarray(video)[:, :-1], 2 / 255, rtol=1e-4)
        np.testing.assert_array_equal(np.asarray(from_float(video)), pixels, strict=True)
        rounded = np.asarray(from_float(wrap(np.float32([-3, -1, 0, 0.0118, 1, 1.5]))))
        np.testing.assert_array_equal(rounded, np.uint8([0, 0, 128, 129, 255, 255]), strict=True)


@pytest.mark.parametrize("target", ["missing/a.mp4", "folder.mp4", "file/a.mp4"])
def test_places_that_cannot_be_written(tmp_path, target):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written") as error:
        write_video(tmp_path / target, clip(2), 8)
    assert str(tmp_path / target) in str(error.value)
    assert contents(tmp_path) == ["file", "folder.mp4"]


@pytest.mark.parametrize("call", ["touch", "replace"])
def test_a_folder_that_refuses(tmp_path, monkeypatch, call):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(*{"touch": (Path, "touch"), "replace": (os, "replace")}[call], refuse)
    with pytest.raises(UserError, match=r"a\.mp4: cannot be written \(Permission denied\)"):
        write_video(tmp_path / "a.mp4", clip(2), 8)
    assert contents(tmp_path) == []


# ---------------------------------------------------------------- videos


def test_mp4_there_and_back(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, clip(), 24)
    frames, fps = read_video(path)
    assert fps == 24
    assert frames.shape == clip().shape
    assert frames.dtype == np.uint8
    assert np.abs(frames.astype(int) - clip()).mean() < 3
    flat = frames[:, 50:60, 10:30].astype(int)  # chroma is exact away from edges
    assert np.abs(flat - (200, 30, 40)).max() <= 4
    assert contents(tmp_path) == ["a.mp4"]


def test_mp4_plays_everywhere(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, clip(), 24)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        assert (codec.name, codec.pix_fmt, stream.frames) == ("h264", "yuv420p", 12)
        assert codec.colorspace == codec.color_primaries == codec.color_trc == 1
    data = path.read_bytes()
    assert data.find(b"moov") < data.find(b"mdat")


def test_the_same_frames_give_the_same_bytes(tmp_path):
    coarse = np.random.default_rng(0).integers(0, 255, (20, 15, 20, 3), np.uint8)
    busy = coarse.repeat(16, axis=1).repeat(16, axis=2)
    for kind in ("mp4", "gif"):
        path = tmp_path / f"a.{kind}"
        for video in (clip(), busy):
            written, read = set(), set()
            for _ in range(4):
                write_video(path, video, 24)
                written.add(path.read_bytes())
                read.add(read_video(path)[0].tobytes())
            assert len(written) == len(read) == 1


def test_odd_sizes_are_padded_by_their_edge(tmp_path):
    write_video(tmp_path / "a.mp4", clip(3, 63, 95), 23.976)
    frames, fps = read_video(tmp_path / "a.mp4")
    assert frames.shape == (3, 64, 96, 3)
    assert fps == pytest.approx(23.976)
    assert np.abs(frames[:, :63, :95].astype(int) - clip(3, 63, 95)).mean() < 4


def test_gif_there_and_back(tmp_path):
    write_video(tmp_path / "a.gif", clip(), 10)
    frames, fps = read_video(tmp_path / "a.gif")
    assert fps == 10
    assert np.abs(frames.astype(int) - clip()).mean() < 3


def test_a_single_frame(tmp_path):
    for name in ("a.mp4", "a.gif"):
        write_video(tmp_path / name, clip(1), 24)
        assert len(read_video(tmp_path / name)[0]) == 1


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_frame_rates_that_make_no_sense(tmp_path, fps):
    with pytest.raises(UserError, match="fps"):
        write_video(tmp_path / "a.mp4", clip(2), fps)


def test_other_endings_and_no_frames(tmp_path):
    with pytest.raises(UserError, match=r"end it in \.mp4"):
        write_video(tmp_path / "a.txt", clip(2), 8)
    with pytest.raises(ValueError, match="not uint8"):
        write_video(tmp_path / "a.mp4", clip(0), 8)
    assert contents(tmp_path) == []


def test_max_frames(tmp_path):
    write_video(tmp_path / "a.mp4", clip(), 24)
    whole, _ = read_video(tmp_path / "a.mp4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        some, _ = read_video(tmp_path / "a.mp4", max_frames=5)
        more, _ = read_video(tmp_path / "a.mp4", max_frames=500)
    np.testing.assert_array_equal(some, whole[:5])
    np.testing.assert_array_equal(more, whole)


def test_a_rotated_phone_video_is_turned_upright(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, clip(2), 8)
    upright, _ = read_video(path)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44  # after its flags, times, id, duration, layer and volume (version 0)
    clockwise = [0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30]
    data[matrix : matrix + 36] = np.array(clockwise, ">i4").tobytes()
    path.write_bytes(data)
    turned, _ = read_video(path)
    np.testing.assert_array_equal(turned, np.rot90(upright, -1, axes=(1, 2)))


def packet_ends(path):
    with av.open(str(path)) as container:
        return sorted(p.pos + p.size for p in container.demux(video=0) if p.size)


@pytest.mark.parametrize("frame", [None, 0, 1, 7, 11])
def test_a_truncated_video(tmp_path, frame):
    path = tmp_path / "a.mp4"
    write_video(path, clip(), 24)
    end = 200 if frame is None else packet_ends(path)[frame] - 3  # in the index, or in a frame
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(UserError, match=r"a\.mp4: (cannot be decoded|is cut off|has no video)"):
        read_video(path)


def test_fewer_frames_than_declared_warn(tmp_path):
    """A file cut between two frames decodes without a murmur; the declared count tells."""
    path = tmp_path / "a.mp4"
    write_video(path, clip(), 24)
    path.write_bytes(path.read_bytes()[: packet_ends(path)[-3]])
    with pytest.warns(UserWarning, match="of 12 frames decoded"):
        frames, _ = read_video(path)
    assert 0 < len(frames) < 12


def test_what_is_no_video(tmp_path):
    path = tmp_path / "a.mp4"
    with pytest.raises(UserError, match="no such video"):
        read_video(path)
    with pytest.raises(UserError, match="no such video"):
        read_video(tmp_path)
    path.write_text("<html>not found</html>")
    with pytest.raises(UserError, match="cannot be decoded"):
        read_video(path)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(UserError, match="no video in it"):
        read_video(path)


def test_a_playlist_of_other_files_is_no_video(tmp_path):
    """Whatever its name: it would read what it names."""
    write_video(tmp_path / "other.mp4", clip(), 24)
    path = tmp_path / "a.mp4"
    path.write_text("ffconcat version 1.0\nfile other.mp4\n")
    with av.open(str(path)) as container:
        assert container.format.name == "concat"  # FFmpeg itself would take it
    for source in (path, path.read_bytes()):
        with pytest.raises(UserError, match="cannot be decoded as a video"):
            read_video(source)


# ---------------------------------------------------------------- stills


def save(folder, image, name="a.png", **options):
    image.save(folder / name, **options)
    return folder / name


def test_transparency_lies_over_white(tmp_path):
    rgba = np.zeros((4, 6, 4), np.uint8)
    rgba[:, :2] = (255, 0, 0, 255)
    rgba[:, 2:4] = (255, 0, 0, 51)
    image = read_image(save(tmp_path, Image.fromarray(rgba)))
    assert image[0, ::2].tolist() == [[255, 0, 0], [255, 204, 204], [255, 255, 255]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    grey = np.full((5, 7), 128, np.uint8)
    if mode == "I;16":
        source = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        source = Image.fromarray(grey).convert("RGB").convert(mode, palette=Image.Palette.ADAPTIVE)
    image = read_image(save(tmp_path, source, "a.tiff"))
    assert image.shape == (5, 7, 3)
    assert image.dtype == np.uint8
    assert mode == "1" or np.abs(image.astype(int) - 128).max() <= 3


def profile(primaries, gamma=2.2):
    """An ICC profile of a display: red, green and blue of these columns, in XYZ for D50."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(data[128:132], "big")
    entries = np.frombuffer(bytes(data[132 : 132 + 12 * count]), ">u4").reshape(count, 3)
    places = {bytes(entry[:1].astype(">u4")): (int(entry[1]), int(entry[2])) for entry in entries}
    for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), np.transpose(primaries), strict=True):
        start = places[name][0] + 8
        data[start : start + 12] = np.round(np.array(column) * 65536).astype(">i4").tobytes()
    start, size = places[b"rTRC"]  # the same for all three
    data[start : start + size] = (b"para" + bytes(8) + round(gamma * 65536).to_bytes(4, "big")).ljust(size, b"\0")
    return bytes(data)


# Of Adobe RGB (1998), for D50.
WIDE = ((0.60974, 0.20528, 0.14919), (0.31111, 0.62567, 0.06322), (0.01947, 0.06087, 0.74457))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("ending", ["png", "tiff", "webp"])
def test_an_embedded_profile_becomes_srgb(tmp_path, mode, ending):
    """What Adobe RGB calls (90, 200, 80) and (220, 90, 60)."""
    picture = np.zeros((8, 8, 3), np.uint8)
    picture[:4], picture[4:] = (90, 200, 80), (220, 90, 60)
    source = Image.fromarray(picture).convert(mode, palette=Image.Palette.ADAPTIVE)
    options = {"lossless": True} if ending == "webp" else {}
    image = read_image(save(tmp_path, source, f"a.{ending}", icc_profile=profile(WIDE), **options))
    np.testing.assert_allclose(image[1, 1], (0, 201, 67), atol=4)
    np.testing.assert_allclose(image[6, 6], (252, 90, 56), atol=4)


def test_profiles_of_grey_and_of_srgb(tmp_path):
    grey = Image.new("L", (4, 4), 100)
    seen = read_image(save(tmp_path, grey, icc_profile=profile(WIDE, gamma=1.0)))
    assert np.abs(seen.astype(int) - 168).max() <= 2  # the light 100 / 255 in sRGB
    itself = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = Image.fromarray(clip(1)[0])
    same = read_image(save(tmp_path, picture, icc_profile=itself))
    assert np.abs(same.astype(int) - clip(1)[0]).max() <= 1
    half = Image.fromarray(np.uint8([[[90, 200, 80, 51]]]))  # over white
    np.testing.assert_allclose(read_image(save(tmp_path, half, icc_profile=profile(WIDE))), [[(204, 244, 217)]], atol=4)


@pytest.mark.parametrize(
    ("stored", "chunks", "seen"),
    [
        (55, {b"gAMA": 100_000}, 128),  # linear light
        (128, {b"gAMA": 55_556}, 146),  # of old Macintosh screens
        (128, {b"gAMA": 45_455}, 128),
        (55, {b"gAMA": 100_000, b"sRGB": 0}, 55),  # which counts more
    ],
)
def test_a_png_of_another_gamma(tmp_path, stored, chunks, seen):
    more = PngInfo()
    for name, value in chunks.items():
        more.add(name, bytes([value]) if name == b"sRGB" else value.to_bytes(4, "big"))
    for mode in ("L", "RGB", "RGBA"):
        path = save(tmp_path, Image.new("L", (4, 4), stored).convert(mode), pnginfo=more)
        assert np.abs(read_image(path).astype(int) - seen).max() <= 1


def test_the_transparent_grey_of_16_bits(tmp_path):
    levels = np.uint16([[100 * 257, 200 * 257]])
    path = save(tmp_path, Image.fromarray(levels), transparency=100 * 257)
    np.testing.assert_array_equal(read_image(path)[..., 0], [[255, 200]])


def test_a_broken_profile_is_refused(tmp_path):
    path = save(tmp_path, Image.new("RGB", (4, 4)), icc_profile=b"no profile")
    with pytest.raises(UserError, match=r"a\.png: has a broken colour profile; save it again, as sRGB"):
        read_image(path)


def test_a_turned_photo_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn 90 degrees clockwise to view
    source = np.zeros((16, 32, 3), np.uint8)
    source[:, :16] = 255
    image = read_image(save(tmp_path, Image.fromarray(source), "a.jpg", exif=exif, quality=95))
    assert image.shape == (32, 16, 3)
    assert image[:12].min() > 200
    assert image[20:].max() < 50


def test_what_is_no_image(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(clip(1)[0]).save(buffer, "PNG")
    png = buffer.getvalue()
    for content in (
        b"",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"<html>",
        png[:40],
        png[:-40],
        png[8:],
    ):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.png: is broken or not an image"):
            read_image(tmp_path / "a.png")
    for path in (tmp_path / "gone.png", tmp_path):
        with pytest.raises(UserError, match="no such image"):
            read_image(path)


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_a_decompression_bomb_is_refused_unopened(tmp_path, side):
    path = save(tmp_path, Image.new("1", (8, 8)))
    data = bytearray(path.read_bytes())
    data[16:24] = np.array([side, side], ">u4").tobytes()  # the header's claim, and its checksum
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.png: has over 100 million pixels"):
        read_image(path)


# ---------------------------------------------------------------- resize_crop


def test_resize_crop_covers_and_takes_the_middle():
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = 200  # the middle square
    out = resize_crop(wide, 20, 20)
    assert out.shape == (20, 20, 3)
    assert (out[:, 2:-2] == 200).all()
    tall = resize_crop(wide.transpose(1, 0, 2), 20, 20)
    np.testing.assert_array_equal(tall, out.transpose(1, 0, 2))


def test_resize_crop_is_antialiased_and_leaves_a_fitting_video_alone():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(resize_crop(stripes, 16, 16).astype(int) - 127).max() < 30
    np.testing.assert_array_equal(resize_crop(clip(), 64, 96), clip())


@pytest.mark.parametrize("size", [(33, 77), (77, 33), (64, 96), (1, 1), (130, 200)])
def test_resize_crop_gives_the_size_asked_for(size):
    assert resize_crop(clip(2), *size).shape == (2, *size, 3)


# ---------------------------------------------------------------- videos in memory, and parts of them


def test_bytes_are_read_like_files(tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, clip(), 8)
    frames, fps = read_video(path.read_bytes())
    np.testing.assert_array_equal(frames, read_video(path)[0])
    assert fps == 8
    assert probe(path) == probe(path.read_bytes()) == (12, 64, 96, 8.0)
    with pytest.raises(UserError, match="video: cannot be decoded as a video"):
        read_video(b"no video")
    for read in (read_video, probe):
        with pytest.raises(UserError, match="no such video file"):
            read(tmp_path / "missing.mp4")


@pytest.mark.parametrize("only", [range(12), range(3, 4), range(2, 12, 3), range(0, 5)])
def test_wanted_frames(tmp_path, only):
    path = tmp_path / "clip.mp4"
    write_video(path, clip(), 8)
    np.testing.assert_array_equal(read_video(path, only=only)[0], read_video(path)[0][only])


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"g": 20, "bf": 3}),
        ("a.mp4", "libx264", {"g": 20, "bf": 3, "x264-params": "open-gop=1:scenecut=0"}),
        ("a.mp4", "libx265", {"x265-params": "keyint=20:open-gop=1:log-level=none"}),
        ("a.mp4", "mpeg4", {"g": 20}),
        ("a.mkv", "libx264", {"g": 20}),
        ("a.avi", "mpeg4", {"g": 20}),
        ("a.webm", "libvpx-vp9", {"g": 20, "deadline": "realtime", "cpu-used": 8}),
    ],
)
def test_frames_far_into_a_video(tmp_path, name, codec, options):
    """They are the same, however the file is stored; and only what they need is decoded, where that is known."""
    path, frames = tmp_path / name, clip(97)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8, options={key: str(value) for key, value in options.items()})
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    whole, _ = read_video(path)
    for start in (*range(38, 43), 59, 60, 61, 80, 96):
        only = range(start, min(start + 5, 97), 2)
        np.testing.assert_array_equal(read_video(path, only=only, strict=True)[0], whole[only], str(start))


def test_frames_after_the_end(tmp_path):
    write_video(tmp_path / "a.mp4", clip(), 8)
    assert len(read_video(tmp_path / "a.mp4", only=range(10, 40))[0]) == 2
    for start in (12, 200):
        with pytest.raises(UserError, match=rf"a\.mp4: has 12 frames, and none of number {start}"):
            read_video(tmp_path / "a.mp4", only=range(start, 300))


def write_with_key_frames(path):
    """97 frames, every 20th of them a key frame; the index is in front."""
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=8, options={"g": "20"})
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for frame in clip(97):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def test_what_lies_before_the_wanted_frames_is_not_decoded(tmp_path):
    path = tmp_path / "a.mp4"
    write_with_key_frames(path)
    whole, _ = read_video(path)
    content, (first, last) = bytearray(path.read_bytes()), packet_ends(path)[3:5]
    content[first:last] = bytes(last - first)
    with pytest.raises(UserError):
        read_video(bytes(content), strict=True)
    np.testing.assert_array_equal(read_video(bytes(content), only=range(80, 90), strict=True)[0], whole[80:90])


def test_wanted_frames_after_the_end_of_a_truncated_video(tmp_path):
    path = tmp_path / "a.mp4"
    write_with_key_frames(path)
    path.write_bytes(path.read_bytes()[: packet_ends(path)[30]])
    with pytest.raises(UserError, match=r"a\.mp4: "):
        read_video(path, only=range(80, 90), strict=True)


def test_strict_reading_raises_where_the_other_warns(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, clip(), 24)
    content = path.read_bytes()[: packet_ends(path)[-3]]
    with pytest.warns(UserWarning, match="of 12 frames decoded"):
        read_video(content)
    with pytest.raises(UserError, match="of 12 frames decoded"):
        read_video(content, strict=True)
    read_video(content, only=range(5), strict=True)  # these are there
    assert probe(content).frames == 12  # by its own word


def test_probe_counts_the_frames_that_no_header_counts(tmp_path):
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for frame in clip():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
    assert probe(path) == (12, 64, 96, 8.0)


@pytest.mark.parametrize("size", [(64, 96), (32, 32), (20, 80), (128, 100)])
def test_cover_says_where_pixels_go(size):
    """A bright spot is found where `cover` puts it."""
    frames = np.zeros((1, 64, 96, 3), np.uint8)
    frames[0, 30:34, 46:50] = 255
    height, width, top, left = cover(64, 96, *size)
    assert height >= size[0]
    assert width >= size[1]
    seen = resize_crop(frames, *size)[0, ..., 0].astype(float)
    y, x = (np.average(np.arange(n) + 0.5, weights=seen.sum(1 - axis)) for axis, n in enumerate(size))
    assert abs(y - (32 * height / 64 - top)) < 0.3
    assert abs(x - (48 * width / 96 - left)) < 0.3


def test_a_png_in_hdr_is_refused(tmp_path):
    """By its chunk cICP; one of sRGB is read."""
    Image.new("RGB", (4, 4), (9, 8, 7)).save(tmp_path / "a.png")
    plain = (tmp_path / "a.png").read_bytes()
    for coding, hdr in ((b"\x09\x10\x00\x01", True), (b"\x0c\x0d\x00\x01", True), (b"\x01\x0d\x00\x01", False)):
        chunk = b"cICP" + coding
        coded = plain[:33] + b"\0\0\0\4" + chunk + zlib.crc32(chunk).to_bytes(4, "big") + plain[33:]
        if hdr:
            with pytest.raises(UserError, match="save it as sRGB"):
                read_image(coded)
        else:
            assert read_image(coded)[0, 0].tolist() == [9, 8, 7]
