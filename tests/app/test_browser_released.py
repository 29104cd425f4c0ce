"""The page in Chromium on weights of the released Tora's kind, at the least size that works: its own form."""

import pytest
from tora_jax.configs import model_sizes

from tests.app.conftest import served, tabs
from tora_jax import load
from tora_jax.backbones import assembly
from tora_jax.checkpoints import release

pytestmark = pytest.mark.browser


@pytest.fixture(params=[False, True], ids=["from text", "from a photo"])
def released(request, tmp_path):
    """A page on random weights whose videos are 3:2, as 720x480 is."""
    config = model_sizes.tiny_cogvideox(i2v=request.param)
    config["sampling"] |= {"height": 32, "width": 48}
    made, sections = load(config=config), assembly.sections(config)
    release.save(tmp_path / "tiny", sections, made.params, assembly.tokenizer_path(None), "Random numbers.\n")
    with served(f"--weights={tmp_path / 'tiny'}") as (address, _):
        yield address, request.param


def test_its_own_form(browser, released, tmp_path):
    address, from_photo = released
    with tabs(browser, address) as open_page:
        tab = open_page()
        page = tab.page
        box = tab.box()
        assert box["width"] / box["height"] == pytest.approx(1.5, abs=0.01)
        assert page.locator(".settings [name=trajectory_strength]").count() == 1
        assert page.locator(".settings [name=trajectory_guidance]").count() == 0
        prompts = page.locator(".examples button").evaluate_all("buttons => buttons.map((each) => each.title)")
        assert len(prompts) == 6
        assert min(len(each.split()) for each in prompts) > 30  # the long style that these weights know
        for value, told in (("0", "1 "), ("1", "9 ")):  # 8k + 1 frames
            page.evaluate("document.querySelector('.settings').open = true")
            page.locator(".settings [name=frames]").fill(value)
            assert page.locator(".length").text_content().startswith(told)
        tab.stroke((0.2, 0.3), (0.8, 0.6))
        if from_photo:  # it says so before the button is pressed
            tab.wait_for("need a first frame")
        else:
            page.wait_for_function("() => /^about [0-9]+ s$/.test(document.querySelector('.about').textContent)")
            tab.make(3, steps=2)
        assert not tab.faults
