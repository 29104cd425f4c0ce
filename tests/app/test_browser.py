"""The page in Chromium, on the small model's weights.

  pip install -e '.[browser]' and Chromium (Debian: apt install chromium); then pytest -m browser

With TORA_SCREENSHOTS=FOLDER, its pictures at a desktop's and a phone's width are kept there.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parent.parent.parent
WAIT = 1000 * int(os.environ.get("TORA_BROWSER_SECONDS", "300"))  # milliseconds, for a generation that compiles


@pytest.fixture(scope="module")
def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tora_jax.app", f"--port={port}"]
    server = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(address, timeout=10).read()
                break
            except OSError:
                assert server.poll() is None
                time.sleep(1)
        yield address
        assert server.poll() is None  # whatever was done to it, it lives
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, address):
    """Opens the page in a browser of its own."""
    contexts = []

    def open_page(width=1280, height=900):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True))
        page = contexts[-1].new_page()
        page.set_default_timeout(WAIT)
        page.faults = []
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#canvas canvas")
        page.wait_for_selector("#preview img")
        return page

    yield open_page
    for context in contexts:
        context.close()


def stroke(page, *points):
    """Draws through points in 0..1 of the canvas."""
    box = page.locator("#canvas canvas").bounding_box()
    places = [(box["x"] + 1 + x * (box["width"] - 2), box["y"] + 1 + y * (box["height"] - 2)) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=5)
    page.mouse.up()


def drawn(page, tmp_path):
    """What Export saves."""
    with page.expect_download() as download:
        page.click("[data-do=export]")
    path = tmp_path / "exported.json"
    download.value.save_as(path)
    return json.loads(path.read_text())["trajectories"]


def settings(page, **values):
    for label, value in values.items():
        field = page.get_by_label(label, exact=False).locator("visible=true").first
        field.fill(str(value))
        field.press("Tab")


def status(page):
    return page.locator("#status textarea").input_value()


def wait_for_status(page, pattern):
    page.wait_for_function(
        "pattern => new RegExp(pattern).test(document.querySelector('#status textarea').value)", arg=pattern
    )


def distance_to(points, x, y):
    """From (x, y) to the nearest point of a list, in shares of the canvas."""
    return min(((px - x) ** 2 + (py - y) ** 2) ** 0.5 for px, py, *_ in points)


def keep(page, name):
    if folder := os.environ.get("TORA_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def test_draw_move_generate(visit, tmp_path):
    page = visit()
    stroke(page, (0.1, 0.2), (0.5, 0.35), (0.9, 0.2))
    page.click("[data-tool=line]")
    stroke(page, (0.2, 0.9), (0.7, 0.6))
    page.click("[data-tool=move]")
    stroke(page, (0.45, 0.75), (0.55, 0.8))  # takes the line along by (0.1, 0.05)
    page.click("[data-tool=pause]")
    stroke(page, (0.5, 0.35))
    page.fill("#prompt textarea", "a red star and a yellow heart over blue waves.")
    page.get_by_label("number input for Steps").fill("10")
    page.get_by_label("number input for Steps").press("Tab")
    page.click("#run")
    wait_for_status(page, "TrajError [0-9.]+ px")
    keep(page, "app_desktop")

    # It plays.
    page.wait_for_function("() => { const v = document.querySelector('#video video'); return v && v.readyState >= 2; }")
    page.wait_for_function("() => document.querySelector('#video video').currentTime > 0.2")

    # The server got what was drawn.
    link = page.locator("a[href*='trajectories.json']").first.get_attribute("href")
    got = json.loads(page.request.get(link).text())["trajectories"]
    pixel = 1 / page.locator("#canvas canvas").bounding_box()["width"]
    assert len(got) == 2
    for x, y in ((0.1, 0.2), (0.5, 0.35), (0.9, 0.2)):
        assert distance_to(got[0], x, y) <= 1.5**0.5 * pixel
    for point, (x, y) in zip((got[1][0], got[1][-1]), ((0.3, 0.95), (0.8, 0.65)), strict=True):
        assert abs(point[0] - x) <= pixel
        assert abs(point[1] - y) <= pixel
    rests = [b[2] - a[2] for a, b in zip(got[0], got[0][1:], strict=False) if a[:2] == b[:2]]
    assert rests == [pytest.approx(0.15, abs=1e-3)]
    exported = drawn(page, tmp_path)
    assert len(exported) == 2

    page.click("[data-do=undo]")  # the pause
    assert not [1 for a, b in zip(*(lambda p: (p, p[1:]))(drawn(page, tmp_path)[0]), strict=False) if a[:2] == b[:2]]
    page.click("[data-do=clear]")
    assert drawn(page, tmp_path) == []
    page.set_input_files("#import input[type=file]", tmp_path / "exported.json")
    page.wait_for_function("() => document.querySelector('.hint').textContent.startsWith('0') === false")
    assert not page.faults


def test_on_a_phone(visit):
    page = visit(390, 844)
    stroke(page, (0.2, 0.3), (0.8, 0.6))
    page.select_option("[data-speed]", "both")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    box = page.locator("#canvas canvas").bounding_box()
    assert box["width"] > 300
    keep(page, "app_phone")
    assert not page.faults


def test_two_people_and_cancel(visit):
    """The first asks for much and gives up; the second, who waited, gets a video of its own."""
    first, second = visit(), visit()
    for page, steps, seed in ((first, 100, 11), (second, 2, 22)):
        stroke(page, (0.2, 0.3), (0.8, 0.6))
        page.get_by_label("number input for Steps").fill(str(steps))
        page.get_by_label("number input for Steps").press("Tab")
        page.get_by_label("Seed").fill(str(seed))
        page.get_by_label("Seed").press("Tab")
        page.click("#run")
        time.sleep(1)
    first.wait_for_function("() => /[1-9][0-9]*\\/100/.test(document.body.innerText)")
    first.click("#stop")
    wait_for_status(second, "seed 22")
    assert "seed 11" not in status(first)
    first.get_by_label("number input for Steps").fill("2")
    first.get_by_label("number input for Steps").press("Tab")
    first.click("#run")
    wait_for_status(first, "seed 11")
    assert not first.faults + second.faults


def test_a_prompt_is_text(visit):
    page = visit()
    page.fill("#prompt textarea", "<img src=x onerror='window.broken=1'><script>window.broken=1</script> a red star")
    page.get_by_label("number input for Steps").fill("1")
    page.get_by_label("number input for Steps").press("Tab")
    page.click("#run")
    wait_for_status(page, "a red star")
    assert "<script>" in status(page)
    assert page.evaluate("window.broken") is None


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
    page = visit()
    page.set_input_files("#first input[type=file]", path)
    page.wait_for_selector(".toast-body")
    assert re.search("photo.png.*not an image", page.locator(".toast-body").inner_text(), re.DOTALL)
    assert page.evaluate("window.broken") is None
