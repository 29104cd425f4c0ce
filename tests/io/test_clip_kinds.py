"""Each kind of clip shows the same through each way in: places within 2 pixels, colours within 4 of 255."""

import functools

import numpy as np
import pytest

from tests import known_clips, odd_videos
from tests.known_clips import FPS, FRAMES, HEIGHT, KINDS, WIDTH
from tora_jax.conditioning import images
from tora_jax.data.clips import Clips
from tora_jax.data.curate import cuts
from tora_jax.data.curate import probe as curate_probe
from tora_jax.io.clip_files import ClipError
from tora_jax.io.video import probe, read_video


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return functools.cache(lambda kind: known_clips.make(kind, tmp_path_factory.mktemp("clip")))


@pytest.mark.parametrize("kind", KINDS)
def test_as_a_file(clip, kind):
    frames, fps = read_video(clip(kind), strict=True)
    known_clips.check(frames, fps)
    assert probe(clip(kind)) == (len(frames), *frames.shape[1:3], fps)
    assert abs(len(frames) / fps - FRAMES / FPS) < 0.1
    some, _ = read_video(clip(kind).read_bytes(), only=range(34, 39, 2), strict=True)
    if kind == "interlaced":  # the first frame after a key frame has none before it
        some, frames = some[1:], frames[2:]
    np.testing.assert_array_equal(some, frames[34:39:2][: len(some)])


@pytest.mark.parametrize("kind", KINDS)
def test_as_a_condition(clip, kind):
    """At the video's frames a second, not the clip's; the page hands its uploads on the same way."""
    found = images.read([images.Condition(0, clip(kind))], 33, 8.0)
    known_clips.check(found[0].pixels, 8.0)


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_folder(clip, kind):
    """A record of training, at about half of the clip's rate."""
    clip(kind).with_suffix(".txt").write_text("A square.")
    scale = 5 if kind == "untagged HD" else 1
    bucket = {"frames": 20, "height": HEIGHT * scale, "width": WIDTH * scale, "fps": 12.5, "batch": 1, "weight": 1.0}
    config = {
        **{"sources": (str(clip(kind).parent),), "buckets": (bucket,), "motion": "none", "tracks": "flow"},
        **{"max_tracks": 1, "crop": 0, "object_masks": False, "frame_masks": {}},
    }
    clips = Clips(config, "train")
    assert not clips.damaged
    made = clips.loader(bucket, None, training=False, latent_frames=5)(0, np.random.default_rng(0))
    assert len(made["video"]) == 20
    known_clips.check(made["video"], float(made["fps"]))


@pytest.mark.parametrize("kind", KINDS)
def test_through_curation(clip, kind):
    video, look = curate_probe.probe(clip(kind), damaged_share=0.01, threshold=3.0)
    assert (video.traits or (None,))[-1] == KINDS[kind].trait
    (piece,) = cuts.plan(video, look, shortest=1.2, longest=16.0, loss=0.5)
    made = cuts.cut(clip(kind), video, piece)
    assert piece.copied == KINDS[kind].copied
    frames, fps = read_video(made, strict=True)
    known_clips.check(frames, fps, first=piece.start * video.tick - look.ticks[0] * video.tick)
    assert len(frames) / fps > 1.2


def test_a_rate_that_leaves_gaps_is_refused(tmp_path):
    """25 frames a second, then 6.25: no frame stands near most moments."""
    ticks = [*range(0, 1000, 40), *range(1000, 3000, 160)]
    path = known_clips.write(tmp_path / "a.mp4", map(known_clips.scene, np.array(ticks) / 1000), ticks=ticks)
    for read in (read_video, probe, lambda path: images.read([images.Condition(0, path)], 9, 8.0)):
        with pytest.raises(
            ClipError, match=r"a\.mp4: has a variable frame rate, and no frame for 0\.16 s after 1\.00 s"
        ):
            read(path)
    even = known_clips.write(
        tmp_path / "b.mp4", map(known_clips.scene, np.arange(10) * 0.16), ticks=range(0, 1600, 160)
    )
    assert probe(even) == (10, HEIGHT, WIDTH, 6.25)


@pytest.mark.parametrize("matrix", [[0.8, 0.6, -0.6, 0.8], [1, 0.5, 0, 1]])
def test_other_turns_are_refused(tmp_path, matrix):
    path = odd_videos.set_matrix(known_clips.plain(tmp_path / "a.mp4"), matrix)
    for read in (read_video, probe):
        with pytest.raises(ClipError, match=r"a\.mp4: is to be shown turned by .* degrees; turn it by quarters"):
            read(path)


def test_colours_of_a_rare_kind_are_refused(tmp_path):
    frames = [known_clips.scene(0).astype(np.uint16) * 257]
    for tags in ({"colorspace": 14}, {"color_trc": 8}):  # ICtCp; linear light
        path = known_clips.write(tmp_path / "a.mkv", frames, "ffv1", "yuv444p10le", tags=tags)
        with pytest.raises(ClipError, match=r"a\.mkv: has colours of a rare kind .* export it in BT\.709"):
            read_video(path)


def test_bright_light_keeps_its_order(tmp_path):
    """Of 203 to 1000 nits: each step is brighter than the one before; what is brighter still is white."""
    nits = np.array([50, 203, 400, 700, 1000, 4000])
    levels = np.round(known_clips.pq(nits / 203) * 65535).astype(np.uint16)
    frame = np.repeat(np.repeat(levels[None, :, None], 32, 0), 16, 1).repeat(3, 2)
    tags = {"colorspace": 9, "color_primaries": 9, "color_trc": 16}
    path = known_clips.write(tmp_path / "a.mkv", [frame, frame], "ffv1", "yuv444p10le", tags=tags)
    seen = read_video(path)[0][0, 16, 8::16].astype(int)
    assert (np.ptp(seen, axis=-1) <= 1).all()
    assert abs(seen[0, 0] - 255 * known_clips.srgb(np.array(50 / 203))) <= 2
    assert 235 <= seen[1, 0] < seen[2, 0] < seen[3, 0] <= seen[4, 0] == seen[5, 0] == 255
