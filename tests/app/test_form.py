"""The form: what weights offer, and requests that others share."""

import dataclasses
import json

import numpy as np
import pytest
from tora_jax.configs import model_sizes

from tora_jax.app import examples, form
from tora_jax.app.pace import Pace
from tora_jax.backbones import assembly
from tora_jax.checkpoints import release
from tora_jax.errors import UserError
from tora_jax.sampling import request

SHARED = {
    "prompt": "a red star.",
    "width": 48,
    "height": 32,
    "seed": 7,
    "trajectories": {"canvas": [1, 1], "trajectories": [[[0.1, 0.2, 0.0], [0.9, 0.2, 1.0]]]},
}


@pytest.fixture
def tiny(tiny_models, tiny_config):
    return form.Form(dataclasses.replace(tiny_models, sampling=tiny_config["sampling"]))


def cogvideox(**options):
    """The released Tora's kind of weights, without numbers: the form asks the modules alone."""
    config = model_sizes.trained_cogvideox(small=False, runlocal=True, **options)
    parts, kind = assembly.modules(config), assembly.backbone(config)
    sampling = {**config["sampling"], "height": 480, "width": 720, "num_frames": 49}
    return form.Form(assembly.Models(kind, parts, {}, None, "not loaded", sampling))


def test_what_the_small_kind_offers(tiny):
    assert list(tiny.sizes) == ["48x32", "32x32", "32x48"]
    assert tiny.lengths == list(range(1, 41))
    names = [field["name"] for field in tiny.fields()]
    assert "trajectory_guidance" in names
    assert "trajectory_strength" not in names
    assert tiny.takes_picture
    assert not tiny.needs_picture


def test_what_the_released_kind_offers():
    text, image = cogvideox(), cogvideox(i2v=True)
    for each in (text, image):
        assert next(iter(each.sizes)) == "720x480"
        assert all(side % 16 == 0 for size in each.sizes.values() for side in size)
        names = [field["name"] for field in each.fields()]
        assert "trajectory_strength" in names
        assert "trajectory_guidance" not in names
    assert text.lengths == [1, 9, 17, 25, 33, 41, 49]
    assert not text.takes_picture
    assert image.needs_picture
    with pytest.raises(UserError, match="give a whole number"):
        text.frames(17.5)
    with pytest.raises(UserError, match="such as 49"):
        text.frames(50)


def test_minutes_are_said_of_the_released_kind(tiny_models, tiny_config):
    """In proportion to steps, passes and latents; compilation on top for a new shape."""
    models = dataclasses.replace(tiny_models, sampling=tiny_config["sampling"])
    own, pace = form.Form(models), Pace(models)
    asked = {"prompt": "a red star.", "size": "48x32", "num_frames": 5, "steps": 2, "seed": 0}
    first = own.request(None, asked, {})
    assert pace.seconds(first) is None
    seconds = {"sample": {"run": 40.0, "compile": 30.0}, "decode": {"run": 6.0, "compile": 4.0}}
    pace.learn(first, seconds)
    assert pace.seconds(first) == pytest.approx(46)
    assert pace.seconds(first, done=1) == pytest.approx(26)
    assert pace.seconds(own.request(None, {**asked, "steps": 20}, {})) == pytest.approx(406)
    assert pace.seconds(own.request(None, {**asked, "guidance": 1}, {})) == pytest.approx(20 + 6 + 34)
    assert pace.seconds(own.request(None, {**asked, "num_frames": 40}, {})) > 8 * 46


def test_a_shared_request_comes_back(tiny):
    found = tiny.shared(json.dumps(SHARED))
    assert found["drawn"] == SHARED["trajectories"]["trajectories"]
    assert found["asked"] == {"prompt": "a red star.", "size": "48x32", "num_frames": 5, "steps": 3, "seed": 7}
    wanted = tiny.request(found["drawn"], found["asked"], {})
    assert wanted.settings.seed == 7
    assert tiny.shared(json.dumps({"prompt": ""}))["drawn"] == []


def test_a_shared_request_is_a_line_of_a_batch(tiny_config):
    wanted = request.make(tiny_config["sampling"], SHARED)
    np.testing.assert_allclose(wanted.trajectories[0], SHARED["trajectories"]["trajectories"][0])


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": 3},
        {"prompt": "x" * 3000},
        {"width": 9999},
        {"width": "48; rm"},
        {"width": {}},
        {"num_frames": 10**9},
        {"steps": 10**6},
        {"seed": -1},
        {"guidance": "high"},
        {"conditions": ["0=/etc/passwd"]},
        {"trajectory": "/etc/passwd"},
        {"trajectories": "/etc/passwd"},
        {"trajectories": ["/etc/passwd"]},
        {"trajectories": {"canvas": [1, 1], "trajectories": [["/etc/passwd"]]}},
        {"trajectories": {"canvas": [256, 256], "trajectories": [[[0, 0], [1, 1]]]}},
        {"trajectories": [[[0, 0], [1, 1]]] * 100},
        {"resolution": "480p"},
        {"segment": 10**6},
        {"fps": 1000},
        {"<script>": 1},
    ],
)
def test_a_hostile_link_is_refused(tiny, changes):
    with pytest.raises(UserError) as error:
        tiny.shared(json.dumps({**SHARED, **changes}))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '"prompt"', '{"seed": 1}', "[" * 100_000, " " * 10**6, 3, None, '{"prompt": NaN}']
)
def test_what_is_no_request(tiny, text):
    with pytest.raises(UserError):
        tiny.shared(text)


def test_examples_fit_their_weights():
    small, natural = examples.read(str(release.DEMO)), examples.read("elsewhere")
    for each in (*small, *natural):
        assert len(each["trajectories"]) >= 1
        assert all(0 <= v <= 1 for path in each["trajectories"] for point in path for v in point)
    assert all(each["video"] for each in small)
    assert min(len(each["prompt"].split()) for each in natural) > 30  # the style that those weights were trained on
