"""The page in Chromium: videos in the canvas, files that are dropped, requests that are shared."""

import json
import urllib.parse

import numpy as np
import pytest
from PIL import Image

from tora_jax.io import video

pytestmark = pytest.mark.browser


def frame(tab):
    return tab.page.locator(".count").text_content()


def test_the_video_plays_in_the_canvas(visit):
    tab = visit()
    page = tab.page
    tab.clear()
    tab.stroke((0.2, 0.3), (0.8, 0.6))
    page.click("[data-view=video]")
    empty = tab.pixels()
    tab.make(1, steps=1)
    page.wait_for_function("() => document.querySelector('[data-do=play]').ariaLabel === 'Pause'")  # it plays by itself
    assert frame(tab).endswith("/ 5")
    page.click("[data-do=next]")
    page.wait_for_timeout(500)
    seen = set()
    for i in range(5):  # frame by frame, each another picture
        page.locator(".scrub").fill(str(i))
        page.wait_for_timeout(300)
        assert frame(tab) == f"{i + 1} / 5"
        seen.add(tuple(tab.pixels()))
    assert len(seen) > 1
    assert tuple(empty) not in seen
    alone = tab.pixels()
    page.click("[data-view=paths]")
    page.wait_for_timeout(100)
    with_paths = tab.pixels()
    assert with_paths != alone
    page.click("[data-do=back]")
    page.wait_for_timeout(300)
    assert tab.pixels() != with_paths
    page.click("[data-view=flow]")
    page.wait_for_timeout(300)
    assert np.mean(tab.pixels()) > np.mean(alone) + 20  # the map is white where nothing moves
    assert not tab.faults


def test_the_video_before_beside_it(visit):
    """The next path is drawn on the last video; a slider compares."""
    tab = visit()
    page = tab.page
    assert page.locator("[data-do=compare]").is_disabled()
    for seed in (1, 2):
        tab.stroke((0.2, 0.3), (0.8, 0.1 + 0.4 * seed))
        tab.make(seed, steps=1)
    page.click("[data-view=video]")
    page.click("[data-do=back]")
    page.click("[data-do=compare]")
    pictures = []
    for place in (0, 50, 100):
        page.locator(".split").fill(str(place))
        page.wait_for_timeout(500)
        pictures.append(np.reshape(tab.pixels(), (16, 16, 4))[..., :3].astype(float))
    now, both, before = pictures
    assert np.abs(now - before).mean() > 5
    assert np.abs(both[:, 9:] - now[:, 9:]).mean() < 3
    assert np.abs(both[:, :7] - before[:, :7]).mean() < 3
    assert not tab.faults


def test_two_clicks_to_a_video_and_back_to_its_request(visit, tmp_path):
    tab = visit()
    page = tab.page
    assert page.locator(".examples button").count() == 6
    page.locator(".examples button").nth(3).click()
    prompt, paths = page.locator("[name=prompt]").input_value(), tab.paths(tmp_path)
    assert len(prompt.split()) > 30
    page.click(".run")
    tab.wait_for("seed 0")
    page.locator(".examples button").nth(5).click()
    page.fill("[name=seed]", "9") if page.locator("[name=seed]").is_visible() else tab.settings(seed=9)
    assert tab.paths(tmp_path) != paths
    page.locator(".visit button").first.click()
    tab.wait_for("seed 0")
    assert page.locator("[name=prompt]").input_value() == prompt
    assert page.locator(".settings [name=seed]").input_value() == "0"
    for back, path in zip(tab.paths(tmp_path), paths, strict=True):
        np.testing.assert_allclose(back, path, atol=1e-5)
    assert not tab.faults


def test_anything_dropped_is_taken_for_what_it_is(visit, tmp_path):
    tab = visit()
    page = tab.page
    tab.clear()
    Image.new("RGB", (90, 60), (250, 10, 10)).save(tmp_path / "photo.png")
    video.write_video(tmp_path / "clip.mp4", np.zeros((5, 32, 48, 3), np.uint8), 8)
    (tmp_path / "path.csv").write_text("frame,x,y\n0,20,20\n1,200,100\n2,220,200\n")
    tab.drop(tmp_path / "photo.png")
    tab.wait_for("photo.png: the first frame")
    page.wait_for_timeout(300)
    assert np.reshape(tab.pixels(), (-1, 4))[:, 0].mean() > 200  # it lies in the canvas
    tab.drop(tmp_path / "clip.mp4")
    tab.wait_for("clip.mp4: the video leads up to it")
    assert page.locator(".given .chip").count() == 2
    page.click("[aria-label='Remove photo.png']")
    page.click("[aria-label='Remove clip.mp4']")
    tab.drop(tmp_path / "path.csv")
    tab.wait_for("path.csv: 1 path of 3 points")
    assert len(tab.paths(tmp_path)) == 1
    (tmp_path / "pasted.json").write_text('{"canvas": [1, 1], "trajectories": [[[0.1, 0.1], [0.9, 0.9]]]}')
    tab.drop(tmp_path / "pasted.json", paste=True)
    tab.wait_for("pasted.json: 1 path")
    assert len(tab.paths(tmp_path)) == 2
    tab.drop(tmp_path / "photo.png", paste=True)
    tab.wait_for("photo.png: the first frame")
    tab.make(4, steps=1)
    assert not tab.faults


def test_a_file_with_two_readings_asks_in_place(visit, tmp_path):
    tab = visit()
    page = tab.page
    tab.clear()
    np.save(tmp_path / "tracks.npy", np.stack([np.linspace((10 * i, 20), (10 * i, 200), 9) for i in range(3)]))
    tab.drop(tmp_path / "tracks.npy")
    page.wait_for_selector(".choose[open]")
    assert page.locator(".ways button").count() >= 2
    assert page.locator(".ways canvas").count() == page.locator(".ways button").count()  # a preview of each
    page.locator(".ways button").first.click()
    tab.wait_for("3 paths of 9 points")
    assert len(tab.paths(tmp_path)) == 3
    (tmp_path / "notes.txt").write_text("nothing of the kind")
    tab.drop(tmp_path / "notes.txt")
    page.wait_for_selector(".choose[open]")
    assert "notes.txt" in page.locator("#tora-choose").text_content()
    page.keyboard.press("Escape")
    assert not tab.faults


def test_seen_while_it_works(visit):
    """Steps, the time left, the picture of the latents."""
    tab = visit()
    page = tab.page
    tab.clear()
    page.click("[data-view=video]")
    tab.make(1, steps=1, frames=4)  # now the pace is known
    tab.stroke((0.2, 0.3), (0.8, 0.6))
    page.wait_for_function("() => document.querySelector('.about').textContent.startsWith('about')")
    page.click("[data-do=back]")
    page.click("[data-view=video]")
    page.wait_for_timeout(300)
    still = tab.pixels()
    tab.settings(steps=100, frames=39, seed=2)
    page.click(".run")
    tab.wait_for("step [1-9][0-9]* of [0-9]+, about [0-9]+ (s|minutes) left", ".left")
    for _ in range(600):
        if tab.pixels() != still:
            break
        page.wait_for_timeout(100)
    assert tab.pixels() != still
    page.click(".stop")
    tab.wait_for("cancelled")
    page.wait_for_timeout(300)
    assert tab.pixels() == still  # the video of before is there again
    assert not tab.faults


def test_a_link_and_a_file_take_a_request_to_someone_else(visit, tmp_path):
    tab = visit(permissions=["clipboard-read", "clipboard-write"])
    tab.stroke((0.1, 0.2), (0.9, 0.7))
    tab.page.fill("[name=prompt]", "a yellow heart & <b>more</b>.")
    tab.settings(seed=77, steps=2)
    tab.page.click("[data-do=link]")
    tab.wait_for("The link is copied")
    link = tab.page.evaluate("navigator.clipboard.readText()")
    saved = tab.saved(tmp_path, "save")
    assert saved["seed"] == 77
    (tmp_path / "saved.json").rename(tmp_path / "request.json")

    other = visit(query="/?" + urllib.parse.urlsplit(link).query)
    other.page.wait_for_function("() => document.querySelector('[name=prompt]').value.includes('heart')")
    third = visit()
    third.drop(tmp_path / "request.json")
    third.page.wait_for_function("() => document.querySelector('[name=prompt]').value.includes('heart')")
    for each in (other, third):
        assert each.page.locator("[name=prompt]").input_value() == "a yellow heart & <b>more</b>."
        assert each.page.locator(".settings [name=seed]").input_value() == "77"
        (path,) = each.paths(tmp_path)
        assert path[0][:2] == pytest.approx([0.1, 0.2], abs=0.01)
        assert path[-1][:2] == pytest.approx([0.9, 0.7], abs=0.01)
    assert not tab.faults + other.faults + third.faults


@pytest.mark.parametrize("request_", ["{", '{"prompt": 3}', '{"prompt": "x", "width": "<img src=x onerror=alert(1)>"}'])
def test_a_hostile_link_is_refused_in_words(visit, request_):
    tab = visit(query="/?" + urllib.parse.urlencode({"request": request_}))
    tab.wait_for("^The link: ")
    assert not tab.faults
    assert json.dumps(tab.page.locator("[name=prompt]").input_value()) != '"x"'
