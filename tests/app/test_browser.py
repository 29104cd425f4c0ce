"""The page in Chromium: what a person does, and what nobody may.

pip install -e '.[browser]' and Chromium (Debian: apt install chromium); then pytest -m browser tests/app
"""

import itertools
import re
import time
import urllib.error
import urllib.request

import pytest

from tests.app.conftest import ROOT

pytestmark = pytest.mark.browser


def distance_to(points, x, y):
    """From (x, y) to the nearest point of a list, in shares of the canvas."""
    return min(((px - x) ** 2 + (py - y) ** 2) ** 0.5 for px, py, *_ in points)


def rests(points):
    return [b[2] - a[2] for a, b in itertools.pairwise(points) if a[:2] == b[:2]]


def test_draw_move_generate(visit, tmp_path):
    tab = visit()
    page = tab.page
    tab.stroke((0.1, 0.2), (0.5, 0.35), (0.9, 0.2))  # in place of the example
    page.click("[data-tool=line]")
    tab.stroke((0.2, 0.9), (0.7, 0.6))
    page.click("[data-tool=move]")
    tab.stroke((0.45, 0.75), (0.55, 0.8))  # takes the line along by (0.1, 0.05)
    page.click("[data-tool=pause]")
    tab.stroke((0.5, 0.35))
    page.fill("[name=prompt]", "a red star and a yellow heart over blue waves.")
    tab.make(5, steps=4)
    assert re.search(r"TrajError [0-9.]+ px", tab.status())

    # The server got what was drawn.
    link = page.locator("a[download='trajectories.json']").get_attribute("href")
    got = page.request.get(link).json()["trajectories"]
    pixel = 1 / tab.box()["width"]
    assert len(got) == 2
    for x, y in ((0.1, 0.2), (0.5, 0.35), (0.9, 0.2)):
        assert distance_to(got[0], x, y) <= 1.5**0.5 * pixel
    for point, (x, y) in zip((got[1][0], got[1][-1]), ((0.3, 0.95), (0.8, 0.65)), strict=True):
        assert abs(point[0] - x) <= pixel
        assert abs(point[1] - y) <= pixel
    assert rests(got[0]) == [pytest.approx(0.15, abs=1e-3)]

    # Undo and redo; paths of a file.
    assert len(tab.paths(tmp_path)) == 2
    page.click("[data-do=undo]")  # the pause
    assert not rests(tab.paths(tmp_path)[0])
    page.click("[data-do=redo]")
    kept = tab.saved(tmp_path)["trajectories"]
    assert rests(kept[0])
    (tmp_path / "saved.json").rename(tmp_path / "kept.json")
    page.click("[data-do=clear]")
    assert tab.paths(tmp_path) == []
    page.set_input_files(".picker", tmp_path / "kept.json")
    tab.wait_for("kept.json: 2 paths")
    assert len(tab.paths(tmp_path)) == 2
    assert not tab.faults


def test_on_a_phone(visit, tmp_path):
    tab = visit(390, 844, has_touch=True, is_mobile=True)
    tab.stroke((0.2, 0.3), (0.8, 0.6))
    tab.page.select_option("[data-speed]", "both")
    assert len(tab.paths(tmp_path)) == 1
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert tab.box()["width"] > 300
    box = tab.box()
    tab.page.click("[data-tool=spline]")
    for x in (0.2, 0.5, 0.8, 0.8):  # a tap on the last one ends it
        tab.page.touchscreen.tap(box["x"] + x * box["width"], tab.box()["y"] + 0.8 * box["height"])
    assert len(tab.paths(tmp_path)) == 2
    assert not tab.faults


def test_two_people_and_cancel(visit):
    """The first asks for much and gives up; the second, who waited, gets a video of its own."""
    first, second = visit(), visit()
    for tab, steps, frames, seed in ((first, 100, 39, 11), (second, 2, 4, 22)):
        tab.stroke((0.2, 0.3), (0.8, 0.6))
        tab.settings(steps=steps, seed=seed, frames=frames)
        tab.page.click(".run")
        time.sleep(0.5)
    second.page.wait_for_function("() => /before you/.test(document.querySelector('.left').textContent)")
    first.page.wait_for_function(
        "() => /step [1-9][0-9]* of [0-9]{4}/.test(document.querySelector('.left').textContent)"
    )
    first.page.click(".stop")
    first.wait_for("cancelled")
    second.wait_for("seed 22")
    first.make(33, steps=2, frames=4)
    assert not first.faults + second.faults


def test_a_prompt_is_text(visit):
    tab = visit()
    bad = "<img src=x onerror='window.broken=1'><script>window.broken=1</script> a red star"
    tab.page.fill("[name=prompt]", bad)
    tab.make(6, steps=1)
    assert tab.page.locator(".visit button").get_attribute("title") == bad
    assert tab.page.evaluate("window.broken") is None


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", str(ROOT / "pyproject.toml"), "pyproject.toml"],
)
def test_nothing_else_is_served(address, path):
    for route in ("gradio_api/file=", "file=", "static/", ""):
        try:
            with urllib.request.urlopen(f"{address}/{route}{path}", timeout=60) as answer:
                content = answer.read()
        except urllib.error.HTTPError as error:
            content = error.read()
        assert b"root:" not in content
        assert b"[build-system]" not in content


def test_a_large_upload_is_refused(address):
    body = b"--x\r\nContent-Disposition: form-data; name=files; filename=a.png\r\n\r\n" + bytes(200 * 2**20)
    request = urllib.request.Request(f"{address}/gradio_api/upload", body + b"\r\n--x--\r\n")
    request.add_header("Content-Type", "multipart/form-data; boundary=x")
    try:
        urllib.request.urlopen(request, timeout=300)
        code = 200
    except urllib.error.HTTPError as error:
        code = error.code
    except OSError:  # it hung up
        code = 413
    assert code == 413


def test_an_svg_named_png_is_refused(visit, tmp_path):
    path = tmp_path / "photo.png"
    path.write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>window.broken=1</script></svg>")
    tab = visit()
    tab.drop(path)
    tab.wait_for("photo.png.*not an image")
    assert tab.page.evaluate("window.broken") is None
