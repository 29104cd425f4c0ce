"""Curation: what files are refused for, scenes, and clips that are copied or encoded anew."""

import itertools

import av
import numpy as np
import pytest

from tests import moving, odd_videos
from tora_jax.data.curate import cuts, probe
from tora_jax.data.curate.probe import UnusableError
from tora_jax.io.video import read_video, write_video

TRAITS = {
    "variable.mp4": "variable rate",
    "rotated.mp4": "rotated",
    "deep.mp4": "10 bit",
    "odd.mkv": "odd size",
    "name.mp4": "wrong name",
}


def look_at(path):
    return probe.probe(path, damaged_share=0.01, threshold=3.0)


def plan(found, shortest=2.0, longest=16.0, loss=0.5):
    return cuts.plan(*found, shortest, longest, loss)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    return folder, odd_videos.make_all(folder)


def test_each_odd_file_has_its_reason(odd):
    folder, reasons = odd
    for name, reason in reasons.items():
        if reason in ("", "same file"):
            video, seen = look_at(folder / name)
            assert video.traits == ((TRAITS[name],) if name in TRAITS else ())
            assert len(seen.ticks) == 25 if name == "variable.mp4" else 17
            assert video.seconds == pytest.approx(3.31 if name == "variable.mp4" else 2.125, abs=0.01)
            assert (video.fps, seen.cuts) == (8.0, [])
        elif reason == "too short":
            assert plan(look_at(folder / name)) == []
        else:
            with pytest.raises(UnusableError, match=reason):
                look_at(folder / name)


def test_odd_files_make_plain_clips(odd):
    folder, reasons = odd
    for name in (name for name, reason in reasons.items() if not reason):
        found = look_at(folder / name)
        (piece,) = plan(found)
        clip = cuts.cut(folder / name, found[0], piece)
        got, fps = read_video(clip, strict=True)
        want, _ = read_video(folder / name)
        assert piece.copied == (name in ("good.mp4", "name.mp4", "deep.mp4"))
        assert fps == 8.0
        if name == "variable.mp4":  # the nearest frame to each tick of the rate
            times = odd_videos.uneven(25) / 1000
            wanted = np.arange(len(got)) / 8 + 1 / 16
            want = want[np.searchsorted(times, wanted) - 1]
        want = want[:, : want.shape[1] // 2 * 2, : want.shape[2] // 2 * 2]
        if piece.copied:
            np.testing.assert_array_equal(got, want)
        else:
            assert got.shape == want.shape
            assert np.abs(got.astype(int) - want).mean() < 4  # most of it by 4:2:0, where there was 4:4:4
        assert cuts.cut(folder / name, found[0], piece) == clip


def test_a_copied_piece_of_each_container(tmp_path):
    """Two scenes, with a key frame at the cut, in files with and without times of decoding."""
    frames = np.concatenate([odd_videos.good(seed=0), odd_videos.good("still", 1)])
    for name, codec in (("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.ts", "libx264"), ("a.webm", "libvpx-vp9")):
        path = odd_videos.write(tmp_path / name, frames, codec, g=17, keyint_min=17)
        found = look_at(path)
        assert found[1].cuts == [17], name
        first, second = plan(found)
        assert (first.copied, second.copied) == (True, True), name
        whole, _ = read_video(path)
        for piece, start in ((first, 0), (second, 17)):
            clip, fps = read_video(cuts.cut(path, found[0], piece), strict=True)
            # The last frames of the first piece may need those of the second.
            assert 14 <= len(clip) <= 17, name
            assert fps == 8.0
            np.testing.assert_array_equal(clip, whole[start : start + len(clip)])


def test_no_copy_where_the_file_cannot_be_cut(tmp_path):
    frames = np.concatenate([odd_videos.good(seed=0), odd_videos.good("still", 1)])
    path = odd_videos.write(tmp_path / "a.mp4", frames, g=250, sc_threshold=0)  # one key frame
    found = look_at(path)
    first, second = plan(found)
    assert (first.copied, second.copied) == (True, False)
    clip, _ = read_video(cuts.cut(path, found[0], second), strict=True)
    assert len(clip) == 17
    assert np.abs(clip.astype(int) - read_video(path)[0][17:]).mean() < 3
    old = odd_videos.write(tmp_path / "a.avi", frames, "mpeg4", g=17)
    assert not any(piece.copied for piece in plan(look_at(old)))


def test_a_bare_stream_is_counted(tmp_path):
    frames = odd_videos.good()
    path = odd_videos.write(tmp_path / "a.h264", frames, format="h264", bf=0)
    found = look_at(path)
    (piece,) = plan((found[0], found[1]), shortest=0.5)
    assert not piece.copied
    clip, fps = read_video(cuts.cut(path, found[0], piece), strict=True)
    assert (len(clip), fps) == (len(found[1].ticks), pytest.approx(odd_videos.FPS))
    assert read_video(path, strict=True)[1] == odd_videos.FPS


def fake(count, fps=8.0, keys=(0,), cuts_at=(), codec="h264", traits=(), black=(), frozen=()):
    """A video that was looked at, without a file; a tick is 1/1000 s."""
    video = probe.Video(144, 192, fps, count / fps, codec, traits, 0.001, True)
    flags = [np.isin(np.arange(count), list(which)) for which in (keys, black, frozen)]
    return video, probe.Look(np.round(np.arange(count) * 1000 / fps).astype(np.int64), *flags, list(cuts_at))


def frames_of(pieces, fps=8.0):
    return [(round(piece.start * fps / 1000), round(piece.stop * fps / 1000), piece.copied) for piece in pieces]


def test_plan():
    # Scenes under 2 s are left out; 16 frames are 2 s.
    assert frames_of(plan(fake(60, keys=(0, 15, 40), cuts_at=(15, 40)))) == [(15, 40, True), (40, 60, True)]
    # A key frame half a second later is good enough; one that is later is not, nor one that leaves too little.
    assert frames_of(plan(fake(40, keys=(4,)))) == [(4, 40, True)]
    assert frames_of(plan(fake(40, keys=(5,)))) == [(0, 40, False)]
    assert frames_of(plan(fake(18, keys=(4,)))) == [(0, 18, False)]
    # Long scenes are cut at the last key frame that fits, else at 16 s = 128 frames.
    assert frames_of(plan(fake(300, keys=range(0, 300, 50)))) == [(0, 100, True), (100, 200, True), (200, 300, True)]
    assert frames_of(plan(fake(300))) == [(0, 128, True), (128, 256, False), (256, 300, False)]
    assert frames_of(plan(fake(130))) == [(0, 114, True), (114, 130, False)]
    assert frames_of(plan(fake(40, codec="mpeg4"))) == [(0, 40, False)]
    assert frames_of(plan(fake(40, traits=("rotated",)))) == [(0, 40, False)]
    assert frames_of(plan(fake(40, traits=("10 bit", "wrong name")))) == [(0, 40, True)]


@pytest.mark.parametrize("seed", range(20))
def test_pieces_lie_in_scenes_and_have_their_length(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(16, 800))
    keys, at = (sorted(rng.choice(np.arange(1, count), min(n, count - 1), replace=False).tolist()) for n in (12, 6))
    pieces = frames_of(plan(fake(count, keys=(0, *keys), cuts_at=at)))
    scenes = list(zip((0, *at), (*at, count), strict=True))
    for start, stop, copied in pieces:
        assert any(first <= start and stop <= last for first, last in scenes)
        assert 16 <= stop - start <= 128
        assert not copied or start in (0, *keys)
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(pieces))
    for first, last in scenes:  # nothing is lost but what is looked over for a key frame
        inside = sum(stop - start for start, stop, _ in pieces if first <= start < last)
        parts = sum(first <= start < last for start, _, _ in pieces)
        assert inside >= last - first - 4 * parts if last - first >= 16 else inside == 0


def film(cuts_at, count):
    """Drawn shots between hard cuts, at 25 frames a second."""
    kinds = ("still, object", "pan, object", "shake, object", "zoom")
    shots = [
        moving.make(kinds[i % 4], i, max(stop - start, 2), 72, 96).video[: stop - start]
        for i, (start, stop) in enumerate(itertools.pairwise((0, *cuts_at, count)))
    ]
    return np.concatenate(shots)


@pytest.mark.parametrize(
    "cuts_at",
    [
        (10, 110, 120, 200),
        (1, 2, 100, 201),  # at the ends
        (60, 61, 130, 132),  # shots of a frame or two
        (20, 22, 24, 26, 28),
    ],
)
def test_no_piece_holds_a_cut(tmp_path, cuts_at):
    """However near to each other, or to an end, the cuts lie; scenes that are too short are left out."""
    write_video(tmp_path / "a.mp4", film(cuts_at, 202), 25)
    video, look = look_at(tmp_path / "a.mp4")
    pieces = frames_of(plan((video, look)), fps=25 * 1000 * video.tick)
    long = [(start, stop) for start, stop in itertools.pairwise((0, *cuts_at, 202)) if stop - start >= 50]
    assert [(start, stop) for start, stop, _ in pieces] == long


def test_cuts_in_numbers():
    quiet = np.full(30, 4.0)

    def found(**changes):
        numbers = quiet.copy()
        numbers[[int(name[1:]) for name in changes]] = list(changes.values())
        return probe.find_cuts(numbers, 3.0)

    assert found() == []
    assert found(_10=14.9) == []  # under the least change
    assert found(_10=15.0, _11=4.0) == [10]
    assert found(_1=20.0, _29=20.0) == [1, 29]
    assert found(_10=40.0, _11=40.0) == [10, 11]
    assert found(_10=20.0, _11=20.0, _12=20.0, _13=20.0) == []  # a movement
    assert probe.find_cuts(np.full(30, 20.0), 3.0) == []
    assert probe.find_cuts(np.array([0.0, 50.0]), 3.0) == [1]


def test_no_piece_holds_a_gap(tmp_path):
    """A pause of a variable rate ends a piece, and so does the slow part, where each frame is alone."""
    video, look = fake(90, keys=(0, 40))
    ticks = look.ticks.copy()
    ticks[40:] += 3000
    ticks[70:] = ticks[69] + 400 * np.arange(1, 21)
    pieces = plan((video, look._replace(ticks=ticks, gaps=[40, *range(70, 90)])))
    assert [(piece.start, piece.stop) for piece in pieces] == [(0, 5000), (8000, 11750)]


def test_black_and_frozen_frames(tmp_path):
    (piece,) = plan(fake(40, black=range(10), frozen=(*range(1, 5), *range(20, 29))))
    assert (piece.black, piece.frozen) == (0.25, 9 / 8)
    moving = odd_videos.good(frames=17)
    frames = np.concatenate([np.zeros_like(moving[:4]), moving[:9], np.repeat(moving[9:10], 8, 0)])
    path = tmp_path / "a.mkv"
    odd_videos.write(path, frames, "ffv1", "bgr0")
    _, seen = look_at(path)
    assert seen.black.tolist() == [True] * 4 + [False] * 17
    assert np.flatnonzero(seen.frozen).tolist() == [1, 2, 3, *range(14, 21)]


def test_streams_that_are_no_video(tmp_path):
    """A song with a cover: a picture among the streams is no video."""
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        song = container.add_stream("aac", rate=16000, layout="mono")
        cover = container.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        container.mux(cover.encode(picture.reformat(format="yuvj420p")))
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        for stream, frame in ((song, sound), (song, None), (cover, None)):
            container.mux(stream.encode(frame))
    with pytest.raises(UnusableError, match="no video stream"):
        look_at(path)
    with pytest.raises(UnusableError, match="not a video"), probe.opened(b"nothing"):
        pass
