"""A server of the page, and Chromium: for the tests marked `browser`."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
WAIT = 1000 * int(os.environ.get("TORA_BROWSER_SECONDS", "300"))  # milliseconds, for a generation that compiles
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextlib.contextmanager
def served(*options):
    """The address of a page, and the number of its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tora_jax.app", f"--port={port}", *options]
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
        yield address, server.pid
        assert server.poll() is None  # whatever was done to it, it lives
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def address(tiny_release):
    """Of a page whose videos are noise, and made in a moment."""
    with served(f"--weights={tiny_release}") as (address, _):
        yield address


@pytest.fixture(scope="module")
def shipped():
    """Of a page on the weights that ship."""
    with served() as (address, _):
        yield address


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


class Tab:
    """The page in a browser of its own, as a person has it."""

    def __init__(self, browser, address, width, height, query, **options):
        size = {"width": width, "height": height}
        self.context = browser.new_context(viewport=size, accept_downloads=True, **options)
        self.page, self.faults = self.context.new_page(), []
        self.page.set_default_timeout(WAIT)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.goto(address + query)
        self.page.wait_for_selector(".frame canvas")
        self.page.wait_for_function("() => document.querySelector('.count').textContent")

    def box(self):
        return self.page.locator(".frame canvas").bounding_box()

    def stroke(self, *points):
        """Draws through points in 0..1 of the canvas."""
        box = self.box()
        places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
        self.page.mouse.move(*places[0])
        self.page.mouse.down()
        for place in places[1:]:
            self.page.mouse.move(*place, steps=5)
        self.page.mouse.up()

    def clear(self):
        """Takes the example away that the page begins with."""
        self.page.click("[data-do=clear]")

    def saved(self, tmp_path, button="export"):
        """What "Save paths" or another button saves."""
        with self.page.expect_download() as download:
            self.page.click(f"[data-do={button}]")
        download.value.save_as(tmp_path / "saved.json")
        return json.loads((tmp_path / "saved.json").read_text())

    def paths(self, tmp_path):
        return self.saved(tmp_path)["trajectories"]

    def settings(self, **values):
        self.page.evaluate("document.querySelector('.settings').open = true")
        for name, value in values.items():
            self.page.locator(f".settings [name={name}]").fill(str(value))

    def status(self):
        return self.page.locator(".status").text_content()

    def wait_for(self, pattern, place=".status"):
        """Until the status says so."""
        self.page.wait_for_function(
            "([pattern, place]) => new RegExp(pattern).test(document.querySelector(place).textContent)",
            arg=[pattern, place],
        )

    def make(self, seed, **values):
        """Makes a video."""
        self.settings(seed=seed, **values)
        self.page.click(".run")
        self.wait_for(f"seed {seed}")

    def pixels(self):
        """Of the canvas, small: a list of numbers."""
        return self.page.evaluate(
            """() => { const small = document.createElement('canvas'); small.width = small.height = 16;
            const on = small.getContext('2d'); on.drawImage(document.querySelector('.frame canvas'), 0, 0, 16, 16);
            return [...on.getImageData(0, 0, 16, 16).data]; }"""
        )

    def drop(self, *paths, paste=False):
        """Drops files on the canvas."""
        files = [[Path(path).name, list(Path(path).read_bytes())] for path in paths]
        self.page.evaluate(
            """([files, kind]) => { const data = new DataTransfer();
            for (const [name, bytes] of files) data.items.add(new File([new Uint8Array(bytes)], name));
            const options = { bubbles: true, cancelable: true, dataTransfer: data, clipboardData: data };
            const event = kind === 'paste' ? new ClipboardEvent(kind, options) : new DragEvent(kind, options);
            document.querySelector('.frame canvas').dispatchEvent(event); }""",
            [files, "paste" if paste else "drop"],
        )

    def keep(self, name, full_page=False):
        """With TORA_SCREENSHOTS=FOLDER: keeps a picture there, as WebP of at most 150 KB."""
        if folder := os.environ.get("TORA_SCREENSHOTS"):
            import io

            from PIL import Image

            picture = Image.open(io.BytesIO(self.page.screenshot(full_page=full_page))).convert("RGB")
            path = Path(folder) / f"{name}.webp"
            for quality in (90, 80, 70, 55, 40):
                picture.save(path, "WEBP", quality=quality, method=6)
                if path.stat().st_size <= 150_000:
                    return
            raise AssertionError(f"{path} is over 150 KB")


@pytest.fixture
def visit(browser, address):
    """Opens the page whose videos are noise."""
    with tabs(browser, address) as open_page:
        yield open_page


@pytest.fixture
def visit_shipped(browser, shipped):
    """Opens the page on the weights that ship."""
    with tabs(browser, shipped) as open_page:
        yield open_page


@contextlib.contextmanager
def tabs(browser, address):
    tabs = []

    def open_page(width=1280, height=800, query="", **options):
        tabs.append(Tab(browser, address, width, height, query, **options))
        return tabs[-1]

    try:
        yield open_page
    finally:
        for tab in tabs:
            tab.context.close()
