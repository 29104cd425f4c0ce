"""The list of settings: what is made from it, how a config and a person's wishes come together, ranges."""

import dataclasses
import json

import pytest
from tora_jax.configs import sampling
from tora_jax.configs.sampling import Settings, resolve

from tora_jax.checkpoints import release
from tora_jax.errors import UserError
from tora_jax.sampling import __main__ as command
from tora_jax.sampling import request

NAMES = [field.name for field in dataclasses.fields(Settings)]
OPTIONAL = {field.name for field in dataclasses.fields(Settings) if field.default is None}
SIZE = {"height": 32, "width": 32, "num_frames": 5}


def test_flags_api_and_config_have_every_setting(capsys):
    with pytest.raises(SystemExit):
        command.sample(["sample.py", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Settings):
        assert f"--{field.name}:" in shown or f"--[no]{field.name}:" in shown
        assert field.metadata["help"].split(";")[0] in shown
    for name in set(NAMES) - {"trajectory", "resolution", "aspect_ratio", "height", "width"}:
        value = getattr(resolve(SIZE, {}), name)
        assert getattr(request.make(SIZE, {name: value}).settings, name) == value
    assert list(sampling.section()) == [name for name in NAMES if name not in OPTIONAL]


def test_the_section_of_configs_is_that_of_older_releases():
    """It goes into config.json; a release that was written before a setting takes its default."""
    old = release.read_config(release.DEMO)["sampling"]
    assert old.keys() <= sampling.section().keys()
    assert resolve({name: value for name, value in old.items() if name != "solver"}, {}) == resolve(old, {})


def test_a_wish_wins_over_the_config_and_that_over_the_defaults():
    found = resolve({**SIZE, "steps": 7, "guidance": 2.0}, {"steps": 3})
    assert (found.steps, found.guidance, found.fps) == (3, 2.0, 24.0)
    assert (found.num_frames, found.segment) == (5, 5)
    assert resolve(SIZE, {"num_frames": "4s"}).num_frames == 102
    assert resolve(SIZE, {"num_frames": "4s"}).segment == 5  # the config's own length at once


def test_sizes_by_name():
    found = resolve(SIZE, {"resolution": "480p", "aspect_ratio": "16:9"})
    assert (found.height, found.width) == (480, 854)
    assert (resolve({"resolution": "240p"}, {}).height, resolve({"resolution": "240p"}, {}).width) == (240, 426)
    assert resolve({"resolution": "240p"}, SIZE).height == 32
    assert found.report().keys() == set(NAMES) - {"resolution", "aspect_ratio", *OPTIONAL}
    assert json.loads(json.dumps(found.report()))["trajectory"] == ["arc"]


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        ({"stepz": 3}, SIZE, "config: sampling should hold prompt, "),
        (None, SIZE, "config: sampling should hold prompt, "),
        ({"steps": "3"}, SIZE, r"config: sampling\.steps is '3'; it should be like 30"),
        ({}, {"resolution": "480p", "height": 32, "width": 32}, "not both"),
        ({}, {"width": 32}, "belong together"),
        (SIZE, {"aspect_ratio": "1:1"}, "--aspect_ratio needs --resolution"),
        ({}, {"num_frames": 5}, "unknown resolution ''"),
        (SIZE, {"height": 16385, "width": 32}, "height is 16385; it must be at most 16384"),
        (SIZE, {"solver": "rk4"}, "solver is 'rk4'"),
        (SIZE, {"guidance_every": 0}, "guidance_every is 0"),
    ],
)
def test_mistakes(config, given, message):
    with pytest.raises(UserError, match=message):
        resolve(config, given)


def test_what_videos_share():
    one = resolve(SIZE, {"prompt": "a star.", "seed": 1, "motion_score": 5.0, "trajectory": ("circle",)})
    other = resolve(SIZE, {"prompt": ["a heart.", "waves."], "seed": 2})
    assert one != other
    assert one.shared == other.shared
    assert hash(one.shared) == hash(other.shared)
    assert one.shared != resolve(SIZE, {"steps": 3}).shared
