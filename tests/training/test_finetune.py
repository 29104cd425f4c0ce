"""docs/finetune.md: every command of it, in small, from a folder of clips to a video."""

import re
import runpy
import shlex
from importlib import resources
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
from tora_jax.configs import model_sizes

from tests import training_runs
from tora_jax import command_line
from tora_jax.backbones import assembly
from tora_jax.checkpoints import release
from tora_jax.data.precompute import __main__ as precompute
from tora_jax.io.video import read_video
from tora_jax.sampling import __main__ as sampling
from tora_jax.training import status

COMMANDS = [
    shlex.split(line)[1:]
    for block in re.findall(r"```sh\n(.*?)```", (training_runs.ROOT / "docs/finetune.md").read_text(), re.DOTALL)
    for line in block.splitlines()
]
MODULES = {"tora_jax.data.precompute": precompute.main, "tora_jax.training.status": status.main}
SMALLER = {"51": "5", "480": "32", "854": "32"}


def shrunk(argument: str) -> str:
    config = re.sub(r"^(configs/\w+\.py)(:?)(.*)", rf"{training_runs.ROOT}/\1:runlocal,\3", argument)
    return SMALLER.get(argument, config)


def run(words: list[str]) -> None:
    """A command, inside this process."""
    words = [shrunk(word) for word in words]
    if words[0] == "-m":
        command_line.run(MODULES[words[1]], [words[1], *words[2:]])
    else:
        script, *rest = words
        command_line.run(
            {"train.py": training_runs.train.main, "sample.py": sampling._sample}[script], [script, *rest, "--quiet"]
        )


def values(words: list[str], *flags: str) -> list[str]:
    return [words[i + 1] for i, word in enumerate(words) if word in flags]


def test_commands_follow_from_each_other():
    """Configs take their arguments and flags, and what a command reads was made before: what `slow` runs in full."""
    convert, *rest = COMMANDS
    made = {convert[-1], "clips"}
    for words in rest:
        sources = [quoted for word in words for quoted in re.findall(r"sources=\('(.*)',\)", word)]
        for path in (*values(words, "--weights", "--source"), *sources):
            assert path.removesuffix("/release") in made, words
        made.update(values(words, "--workdir", "--out"))
        for config in values(words, "--config"):
            file, _, argument = config.partition(":")
            fields = runpy.run_path(str(training_runs.ROOT / file))["get_config"](argument).lock()
            for name in (word.split("=")[0] for word in words if word.startswith("--config.")):
                attrgetter(name.removeprefix("--config."))(fields)


@pytest.mark.slow  # ten trainings, most of their time in compilations
def test_every_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training_runs.write_folder(Path("clips"), train=20, validation=4)
    config = model_sizes.tiny()
    tokenizer = resources.files("tora_jax").joinpath("assets/tokenizer.model")
    release.save(
        "weights/tora", config, assembly.load(config).params, tokenizer, "In the place of converted weights.\n"
    )

    convert, *rest = COMMANDS
    assert convert[:3] == ["-m", "convert_weights", "tora"]
    video_vae = [words for words in rest if any("configs/vae.py" in word for word in words)]
    assert len(video_vae) == 4
    for words in video_vae:
        run(words)
    Path("weights/tora").rename("weights/random")
    Path("weights/tora").symlink_to(tmp_path / "runs/vae/release")
    for words in rest:
        if words not in video_vae:
            run(words)

    video, fps = read_video("outputs/boat.mp4")
    assert video.shape == (5, 32, 32, 3)
    assert fps == 8
    # Each part of the last release comes from the run that trained it.
    parts = {name: release.load(f"runs/{name}/release").params for name in ("vae", "motion_vae", "dense", "sparse")}
    for part, origin in (("vae", "vae"), ("motion_vae", "motion_vae")):
        same = assembly.traverse_util.flatten_dict(parts[origin][part])
        for path, leaf in assembly.traverse_util.flatten_dict(parts["sparse"][part]).items():
            np.testing.assert_array_equal(leaf, same[path])
    for name in ("dense", "sparse"):
        found = training_runs.metrics(Path("runs") / name)
        assert [line["step"] for line in found] == [1, 2, 3, 4, 4]
        assert np.isfinite([value for line in found for value in line.values()]).all()
        assert found[-1]["traj_error"] > 0
        assert len(list(Path(f"runs/{name}/samples").glob("000004_*.mp4"))) == 4
