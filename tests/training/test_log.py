"""What a training writes down as it goes on."""

import json
import math

import numpy as np
import pytest

from tests import training_runs
from tora_jax.training.log import Log, read_lines


def test_log_forgets_what_came_after_the_checkpoint(tmp_path):
    lines = [json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in (1, 2, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 2, "lo')
    with Log(tmp_path, start=2, total=9, quiet=True, first=True) as log:
        log.add(3, {"loss": 0.1}, tokens=7)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:3]) + '{"step": 3, "loss": 0.1}\n'


def test_skipped_steps_are_counted_over_restarts(tmp_path):
    """In a row, whatever the flushes and starts; zeros are not written."""
    steps = [0, 1, 1, 0, 1, 1, 1, 0, 1]

    def go_on(start: int, end: int) -> int:
        with Log(tmp_path, start, 9, True, True) as log:
            for step in range(start + 1, end + 1):
                log.add(step, {"loss": math.nan if steps[step - 1] else 0.5, "skipped": np.bool_(steps[step - 1])}, 7)
                if step % 3 == 0:
                    log.flush()
        return log.skipped

    assert [go_on(0, 6), go_on(6, 9)] == [2, 3]
    assert go_on(7, 8) == 0  # what was before the start is not held against it
    go_on(8, 9)
    lines = training_runs.metrics(tmp_path)
    assert [line.get("skipped", 0) for line in lines] == steps
    progress = read_lines(tmp_path / "progress.jsonl")
    assert [(line["step"], line["of"]) for line in progress if "of" in line] == [(0, 9), (6, 9), (7, 9), (8, 9)]
    speeds = [line for line in progress if "of" not in line]
    assert [line["step"] for line in speeds] == [3, 6, 9, 8, 9]
    assert all(line["tokens_per_second"] == pytest.approx(7 * line["steps_per_second"]) for line in speeds)
