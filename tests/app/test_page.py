"""The page as Gradio has it: it is built, and its functions answer what the script asks."""

import dataclasses
import gc
import json
import time

import numpy as np
import pytest
from PIL import Image

from tora_jax.app import studio

pytestmark = [
    pytest.mark.slow,  # needs Gradio
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

ASKED = {"prompt": "a red star.", "size": "48x32", "num_frames": 5, "steps": 2, "seed": 3}
DRAWN = [[[0.1, 0.2, 0.0], [0.9, 0.2, 1.0]]]


@pytest.fixture
def uploads(tmp_path):
    folder = tmp_path / "uploads"
    folder.mkdir()
    return folder


@pytest.fixture
def page(tiny_models, tiny_config, uploads):
    """The component, whose functions the script calls by name."""
    from tora_jax.app import page

    models = dataclasses.replace(tiny_models, sampling=tiny_config["sampling"])
    built = page.build(studio.Studio(models, uploads / "results"), uploads)
    (component,) = (block for block in built.blocks.values() if block.elem_id == "tora")
    yield component
    del built, component
    gc.collect()  # Gradio leaves event loops open; here nobody minds


def test_the_script_is_small(page):
    assert len(page.js_on_load.encode()) < 60_000
    # Gradio fills templates: these would mean something to it.
    for text in (page.html_template, page.css_template):
        assert text
        assert not [mark for mark in ("${", "{{", "`", "\\") if mark in text]


def test_the_page_begins_with_six_examples(page):
    begin = page.props["start"]
    assert len(begin["examples"]) == 6
    for each in begin["examples"]:
        for size in begin["sizes"].values():
            assert page.preview({"drawn": each["trajectories"], "asked": {**ASKED, "prompt": each["prompt"]}})["flow"]
            assert min(size) > 0
    assert [field["name"] for field in begin["fields"]][:2] == ["steps", "guidance"]
    json.dumps(begin)


def test_a_video(page, uploads):
    told = page.begin({"visit": "anna", "drawn": DRAWN, "asked": ASKED, "given": {}})
    assert "under way" in page.begin({"visit": "anna", "drawn": DRAWN, "asked": ASKED})["error"]
    while not {"made", "failed", "error"} & told.keys():
        time.sleep(0.05)
        told = page.look({"visit": "anna", "seen": 0})
    assert (told["done"], told["total"]) == (2, 2)
    assert told["picture"].startswith("data:image/webp;base64,")
    assert "picture" not in page.look({"visit": "anna", "seen": told["pictures"]})
    assert told["made"]["settings"]["seed"] == 3
    assert len(told["made"]["files"]) == 4
    assert page.preview({"drawn": DRAWN, "asked": ASKED})["seconds"] > 0  # it has learned how long one takes


def test_files(page, uploads):
    np.save(uploads / "tracks.npy", np.stack([np.linspace((10 * i, 20), (10 * i, 200), 9) for i in range(3)]))
    found = page.read({"path": str(uploads / "tracks.npy"), "size": "48x32", "num_frames": 5})
    assert found["kind"] == "paths"
    assert len(found["readings"]) > 1
    Image.new("RGB", (60, 120)).save(uploads / "photo.png")
    found = page.read({"path": str(uploads / "photo.png"), "size": "48x32"})
    assert found["kind"] == "picture"
    np.testing.assert_allclose(found["seen"], [0, 1 / 3, 1, 2 / 3], atol=0.01)
    (uploads / "request.json").write_text(json.dumps({"prompt": "a red star.", "width": 48, "height": 32}))
    found = page.read({"path": str(uploads / "request.json"), "size": "48x32"})
    assert found["asked"]["prompt"] == "a red star."
    assert "seconds" in page.preview({"asked": ASKED, "given": {"0": str(uploads / "photo.png")}})


def test_only_uploads_are_read(page, uploads, tmp_path):
    """The script's words come from a browser, so from anybody."""
    Image.new("RGB", (60, 120)).save(tmp_path / "photo.png")
    (uploads / "results" / "photo.png").write_bytes((tmp_path / "photo.png").read_bytes())
    (uploads / "link.png").symlink_to(tmp_path / "photo.png")
    for path in (
        "/etc/passwd",
        str(tmp_path / "photo.png"),
        str(uploads / ".." / "photo.png"),
        str(uploads / "results" / "photo.png"),
        str(uploads / "link.png"),
        str(uploads / "gone.png"),
        str(uploads),
        "photo.png",
        "x" * 5000,
        "a\0b",
        7,
        None,
    ):
        for answer in (
            page.read({"path": path, "size": "48x32"}),
            page.begin({"visit": "eve", "asked": ASKED, "given": {"0": path or ""}}) if path else {"error": "none"},
        ):
            assert answer.keys() == {"error"}
            assert str(tmp_path) not in answer["error"]


@pytest.mark.parametrize(
    "data", [None, [], "x", 3, {}, {"visit": 3}, {"visit": "a", "given": {"5": "x"}}, {"visit": "a", "asked": []}]
)
def test_nonsense_is_answered(page, data):
    for name in ("read", "preview", "begin"):
        assert getattr(page, name)(data).keys() == {"error"}
    assert {"error", "failed"} & page.look(data).keys()
