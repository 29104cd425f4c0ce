"""What a training writes down as it goes on."""

import json
import math

import pytest

from tests import training_runs
from tora_jax.errors import UserError
from tora_jax.training.log import Log


def test_log_forgets_what_came_after_the_checkpoint(tmp_path):
    lines = [json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in (1, 2, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 2, "lo')
    with Log(tmp_path, start=2, total=9, quiet=True, first=True) as log:
        log.add(3, {"loss": 0.1}, tokens=7)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:3]) + '{"step": 3, "loss": 0.1}\n'


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, value):
    with Log(tmp_path, 0, 9, True, True) as log:
        log.add(1, {"loss": 0.5}, 1)
        log.add(2, {"loss": value}, 1)
        with pytest.raises(UserError, match="the loss of step 2 is"):
            log.flush()
    assert [line["step"] for line in training_runs.metrics(tmp_path)] == [1, 2]
