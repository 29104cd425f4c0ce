"""The page in Chromium, opened, used and closed 200 times: what is left of that at the server.

The functions behind the page have the like in test_studio.py.
"""

import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.app.conftest import served, tabs

pytestmark = [pytest.mark.browser, pytest.mark.slow]

WARM, VISITS = 60, 200
MOST = 40  # MB


def megabytes(process):
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * 4096 / 2**20


def is_there(link):
    try:
        with urllib.request.urlopen(link, timeout=60) as answer:
            return answer.status == 200
    except urllib.error.HTTPError:
        return False


def test_200_visits_leave_nothing_behind(browser, tiny_release):
    """Each draws a path, has a video made of it, and closes the tab; then its video is gone as well."""
    with served(f"--weights={tiny_release}") as (address, process):
        for i in range(WARM + VISITS):
            if i == WARM:
                before = megabytes(process)
            with tabs(browser, address) as open_page:
                tab = open_page()
                tab.stroke((0.2, 0.3), (0.8, 0.2 + 0.003 * i))
                tab.make(i, steps=1)
                link = address + tab.page.locator(".links a").first.get_attribute("href").removeprefix(address)
                assert is_there(link)
        for _ in range(60):  # the server hears of a closed tab after some seconds
            if not is_there(link):
                break
            time.sleep(1)
        assert not is_there(link)
        grown = megabytes(process) - before
        print(f"\n{VISITS} visits: {grown:+.1f} MB, of {before:.0f}")
        assert grown < MOST
