"""Where a run stands, by what lies in its folder."""

import json

import pytest

from tests.training.test_record import CONFIG, hold
from tora_jax import command_line
from tora_jax.training import status
from tora_jax.training.log import Log

BEGUN = 1_800_000_000


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut o')


@pytest.fixture
def workdir(tmp_path):
    hold(tmp_path, None, job="tora")
    return tmp_path


def test_a_run_on_its_way(workdir):
    """Restarted once at step 20, its first flush after that slow; 3 steps skipped."""
    losses = [{"step": step, "loss": 1 / step} for step in range(1, 51)]
    for step in (5, 6, 30):
        losses[step - 1] |= {"loss": float("nan"), "skipped": 1.0}
    judged = [{"step": step, "objective": value, "traj_error": 12.5} for step, value in ((20, 0.25), (40, 0.5))]
    write(workdir / "metrics.jsonl", [*losses[:20], judged[0], *losses[20:40], judged[1], *losses[40:]])
    flush = {"steps_per_second": 2.0, "tokens_per_second": 64.0}
    slow = {"steps_per_second": 0.1, "tokens_per_second": 3.2}
    progress = [
        {"time": BEGUN, "step": 0, "of": 40},
        {"time": BEGUN + 9, "step": 30, **flush},
        {"time": BEGUN + 600, "step": 20, "of": 90},
        {"time": BEGUN + 700, "step": 30, **slow},
        {"time": BEGUN + 705, "step": 40, **flush},
        {"time": BEGUN + 710, "step": 50, **flush},
    ]
    write(workdir / "progress.jsonl", progress)
    for name in ("20", "40", "30.broken", "50.orbax-checkpoint-tmp"):
        (workdir / "checkpoints" / name).mkdir(parents=True)
    run, position, since, speed, end, loss, skipped, held_out, checkpoints, broken = status.describe(
        workdir, BEGUN + 722
    )
    assert run.startswith("tora, seed 0, on one device, tora_jax ")
    assert position == "step 50 of 90 (55.6 %)"
    assert since.endswith(", started 2 times, last heard of 0:00:12 ago")
    assert since.startswith(f"begun {status._moment(BEGUN)},")
    assert speed == "2 steps/s, 64 tokens/s"
    assert end == f"ends {status._moment(BEGUN + 730)} if it goes on so, 0:00:20 from its last word"
    mean = sum(1 / step for step in range(1, 51) if step not in (5, 6, 30)) / 47
    assert loss == f"loss 0.02 at step 50, {mean:.4g} on average over the last 47"
    assert skipped.startswith("skipped 3 of 50 steps, step 30 last")
    assert held_out == "held out, at step 40: objective 0.5, traj_error 12.5"
    assert checkpoints == "checkpoints of steps: 20 (best), 40"
    assert broken == "broken and passed over: 30.broken"


def test_a_run_before_its_first_step_and_after_its_last(workdir, capsys):
    assert status.describe(workdir, BEGUN)[1:] == ["no step yet", "checkpoints of steps: none yet"]
    with Log(workdir, 0, CONFIG["steps"], True, True) as log:
        for step in range(CONFIG["steps"]):
            log.add(step + 1, {"loss": 0.5}, tokens=7)
    (workdir / "release").mkdir()
    command_line.run(status.main, ["status", str(workdir)])
    told = capsys.readouterr().out
    assert "step 4 of 4 (100.0 %), finished\n" in told
    assert "\nloss 0.5 at step 4, 0.5 on average over the last 4\n" in told
    assert "ends " not in told


@pytest.mark.parametrize(("lines", "said"), [(None, "no run is here"), ("{]\n", "cannot be read")])
def test_no_run(tmp_path, capsys, lines, said):
    if lines:
        hold(tmp_path, None, job="tora")
        (tmp_path / "metrics.jsonl").write_text(lines)
    with pytest.raises(SystemExit, match="2"):
        command_line.run(status.main, ["status", str(tmp_path)])
    assert said in capsys.readouterr().err
