"""The page without a browser: what comes in, what is made, one at a time, cancelled, forgotten."""

import dataclasses
import json
import queue
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests import known_clips
from tora_jax.app import studio as app
from tora_jax.conditioning import images, trajectory
from tora_jax.errors import UserError
from tora_jax.io import video
from tora_jax.sampling import segments
from tora_jax.sampling.generate import Result

DRAWN = [[[0.1, 0.2, 0.0], [0.5, 0.5, 0.5], [0.9, 0.2, 1.0]], [[0.2, 0.8, 0], [0.8, 0.8, 1]]]
FORM = {"prompt": "a red star.", "size": "48x32", "num_frames": 5, "steps": 1, "seed": 3, "guidance": 1.0}

SECONDS = {"sample": {"run": 0.5, "compile": 0.0}}


@pytest.fixture
def studio(tiny_models, tiny_config, tmp_path):
    return app.Studio(dataclasses.replace(tiny_models, sampling=tiny_config["sampling"]), tmp_path / "results")


@pytest.fixture
def quick(monkeypatch):
    """In place of the model: frames of noise, a step each hundredth of a second."""
    running = []

    def generate_batch(models, inputs, settings, *, seeds, mesh, progress):
        running.append(threading.current_thread())
        assert len(running) == 1, "two at once"
        try:
            for i in range(settings.steps):
                time.sleep(0.01)
                progress(i + 1, None)
        finally:
            running.pop()
        size = settings.num_frames, settings.height, settings.width, 3
        video = np.random.default_rng(0).integers(0, 256, size, np.uint8)
        return [Result(video, None if inputs[0].tracks is None else video, SECONDS)]

    monkeypatch.setattr(segments, "generate_batch", generate_batch)


def generate(studio, name="anna", drawn=DRAWN, files=None, told=None, **changes):
    progress = (lambda *_: None) if told is None else (lambda done, total, clean: told.append((done, total)))
    return studio.generate(name, drawn, {**FORM, **changes}, files or {}, progress)


def test_a_drawing_becomes_a_video(studio):
    told = []
    made = generate(studio, told=told, num_frames=6, camera_motion="static", aesthetic_score=None)
    assert told == [(0, 2), (1, 2), (2, 2)]  # two segments
    assert all(path.is_file() for path in (*made.files, made.overlay, made.flow))
    names = ["tora.mp4", "tora_trajectory.mp4", "trajectories.json", "tora.json"]
    assert [path.name for path in made.files] == names
    first, _ = trajectory.load(made.folder / "trajectories.json")
    np.testing.assert_allclose(first, DRAWN[0])
    report = json.loads((made.folder / "tora.json").read_text())
    assert report["settings"]["seed"] == 3
    assert report["settings"]["camera_motion"] == "static"
    assert report["traj_error"] == pytest.approx(made.error, abs=0.01)
    assert "/" not in report["weights"]
    assert studio.visit("anna").made == [made]


@pytest.mark.usefixtures("quick")
def test_a_prompt_that_is_lost_is_said(studio):
    made = generate(studio, prompt="红色的星星")
    (told,) = made.lost
    assert told.startswith("the prompt is empty after cleaning: '红色的星星' is lost")
    assert json.loads((made.folder / "tora.json").read_text())["lost"] == [told]


def test_without_a_path(studio):
    made = generate(studio, drawn=[])
    assert made.error is made.overlay is made.flow is None
    assert len(made.files) == 2


def test_uploads_are_taken_as_players_show_them(studio, monkeypatch, tmp_path):
    """A clip that is stored mirrored: the reader of all commands."""
    taken = []

    def generate_batch(models, inputs, settings, **others):
        taken.append(inputs[0].images)
        return [Result(np.zeros((settings.num_frames, settings.height, settings.width, 3), np.uint8), None, SECONDS)]

    monkeypatch.setattr(segments, "generate_batch", generate_batch)
    clip = known_clips.make("mirrored", tmp_path)
    generate(studio, drawn=[], files={0: str(clip)}, num_frames=17)
    first = taken[0][0].pixels
    for (row, column), colour in (((3, 1), (0, 0)), ((3, 46), (0, 1)), ((28, 1), (1, 0)), ((28, 46), (1, 1))):
        np.testing.assert_allclose(first[:, row, column].mean(0), known_clips.PATCHES[colour], atol=4)


def test_a_look_is_compiled_before_the_first_one(studio, quick):
    """While the video begins: the same program that the look then runs."""
    prepared, ran = queue.Queue(), []

    class Decode:
        def prepare(self, frames, params, latents):
            prepared.put((frames, latents.shape, latents.dtype))

        def __call__(self, frames, params, latents):
            ran.append((frames, latents.shape, latents.dtype))
            return np.zeros((1, frames, 32, 48, 3), np.uint8), True

    vars(studio.models)["decode"] = Decode()
    generate(studio)
    studio._look(jnp.zeros((1, 5, 4, 6, studio.models.tora.in_channels)))
    assert prepared.get(timeout=60) == ran[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "x" * 3000},
        {"prompt": 3},
        {"prompt": ["a"] * 1000},
        {"size": "9999x9999"},
        {"size": ["48x32"]},
        {"num_frames": 10**9},
        {"num_frames": 0},
        {"num_frames": "many"},
        {"num_frames": float("nan")},
        {"steps": 10**6},
        {"steps": 1.5},
        {"seed": -1},
        {"seed": None},
        {"steps": None},
        {"num_frames": None},
        {"size": None},
        {"seed": float("inf")},
        {"guidance": "high"},
        {"guidance": float("nan")},
        {"drawn": [[[0, 0], [1, 1]]] * 1000},
        {"drawn": [[[0, 0], [float("nan"), 1]]]},
        {"drawn": [[[0, 0]]]},
        {"drawn": "<script>"},
        {"drawn": [[[0, 0, 0], [1, 1, 7]]]},
        {"drawn": {"trajectories": [[[0, 0], [1, 1]]]}},
        {"trajectory": "/etc/passwd"},
        {"conditions": ["0=/etc/passwd"]},
        {"trajectories": "/etc/passwd"},
    ],
)
def test_what_a_browser_may_not_ask_for(studio, quick, changes):
    with pytest.raises(UserError) as error:
        generate(studio, **changes)
    assert "\n" not in str(error.value)
    assert not studio.visit("anna").made
    generate(studio)  # still there


def test_clips_that_are_too_large(studio, quick, tmp_path, monkeypatch):
    path = tmp_path / "clip.mp4"
    video.write_video(path, np.zeros((5, 32, 48, 3), np.uint8), 8)
    monkeypatch.setattr(images, "MAX_CLIP_PIXELS", 4 * 32 * 48)
    with pytest.raises(UserError, match=r"^clip\.mp4: 5 frames of 48x32 are too much"):
        generate(studio, files={0: str(path)})
    monkeypatch.setattr(images, "MAX_CLIP_PIXELS", 5 * 32 * 48)
    generate(studio, files={0: str(path)})
    monkeypatch.setattr(video, "MAX_PIXELS", 32 * 48 - 1)
    with pytest.raises(UserError, match=r"^clip\.mp4: has frames of over"):
        generate(studio, files={0: str(path)})


def test_two_pictures_for_one_frame(studio, quick, tmp_path):
    Image.new("RGB", (48, 32)).save(tmp_path / "photo.png")
    with pytest.raises(UserError, match=r"photo\.png: frame 0 has a picture already") as error:
        generate(studio, num_frames=1, files=dict.fromkeys((0, -1), str(tmp_path / "photo.png")))
    assert str(tmp_path) not in str(error.value)


def test_one_at_a_time_and_each_its_own(studio, quick):
    """The stand-in fails if two run at once."""
    made = {}
    names = [f"visitor {i}" for i in range(4)]

    def visit(name, seed):
        made[name] = generate(studio, name, seed=seed, steps=3)

    threads = [threading.Thread(target=visit, args=(name, i)) for i, name in enumerate(names)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i, name in enumerate(names):
        assert studio.visit(name).made == [made[name]]
        assert made[name].settings["seed"] == i


def test_cancel_ends_within_a_step(studio, quick):
    done, ended = [], []

    def progress(step, total, clean):
        done.append(step)
        if step == 2:
            studio.visit("anna").cancel()

    with pytest.raises(app.CancelledError):
        studio.generate("anna", DRAWN, {**FORM, "steps": 50}, {}, progress)
    assert done[-1] == 2
    assert not list(studio.folder.iterdir())
    generate(studio, told=ended)  # the device is free, and the wish forgotten
    assert ended[-1] == (1, 1)


def test_a_closed_tab_stops_and_leaves_nothing(studio, quick):
    made = generate(studio)
    studio.leave("anna")
    assert not made.folder.exists()
    assert not studio.visit("anna").made


def test_a_tab_closed_after_the_last_step_leaves_nothing(studio, quick):
    def progress(step, total, clean):
        if step == total:
            studio.leave("anna")

    with pytest.raises(app.CancelledError):
        studio.generate("anna", DRAWN, FORM, {}, progress)
    assert not list(studio.folder.iterdir())


def test_a_second_wish_does_not_undo_the_first_ones_end(studio, quick):
    """Cancelled, and at once asked for again: the first ends all the same."""
    ended = []

    def progress(step, total, clean):
        if step == 1:
            studio.visit("anna").cancel()
            second.start()
            time.sleep(0.05)  # it waits for the device by then

    second = threading.Thread(target=lambda: ended.append(generate(studio, seed=4)))
    with pytest.raises(app.CancelledError):
        studio.generate("anna", DRAWN, {**FORM, "steps": 50}, {}, progress)
    second.join(60)
    assert studio.visit("anna").made == ended


def test_many_requests_leave_the_disk_flat(studio, quick):
    for i in range(40):
        generate(studio, f"visitor {i % 2}", seed=i)
    assert len(list(studio.folder.iterdir())) == 2 * app.KEPT
    assert [made.settings["seed"] for made in studio.visit("visitor 1").made][:2] == [39, 37]


def test_visits_are_bounded(studio, quick, monkeypatch):
    monkeypatch.setattr(app, "VISITS", 3)
    for i in range(5):
        generate(studio, f"visitor {i}")
    assert len(list(studio.folder.iterdir())) == 3


@pytest.mark.slow
def test_200_requests_leave_memory_flat(studio):
    """With the (tiny) models: what is compiled stays, and nothing is added to it."""

    def megabytes() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    for i in range(220):
        generate(studio, f"visitor {i}", seed=i, num_frames=6)
        if i == 20:
            before = megabytes()
    grown = megabytes() - before
    print(f"200 requests: {grown:+.1f} MB, of {before:.0f}")
    assert grown < 40
