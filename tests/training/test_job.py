"""A job of train.py: what of the models trains, and what a step works on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tora_jax.configs import tora

from tests.training.batches import BATCH, make_batch, on_device
from tora_jax.backbones import opensora
from tora_jax.errors import UserError
from tora_jax.training import optim
from tora_jax.training.job import Job

CONFIG = tora.get_config("stage=1").to_dict()


@pytest.fixture(scope="module")
def job(parts):
    return lambda name="tora", **changes: Job({**CONFIG, "job": name, **changes}, opensora, parts)


def test_what_trains_and_what_stays(job, params):
    trained, frozen = job().split(params)
    assert {"tora/extractor", "tora/stdit"} == {"/".join(path.split("/")[:2]) for path in trained}
    assert "tora/stdit/null_caption" in frozen
    assert "tora/stdit/null_caption" in job(train=("tora/.*",)).split(params)[1]  # a buffer never trains
    together = job().combine(trained, frozen)
    jax.tree.map(np.testing.assert_array_equal, together, params)


def test_an_adapter_trains_in_place_of_the_parameters(job, params):
    adapting = job(lora={**CONFIG["lora"], "rank": 2})
    assert adapting.adapts
    assert not job().adapts
    adapter, frozen = adapting.split(params)
    assert frozen.keys() == optim.flatten(params).keys()
    assert {path.removesuffix("/a").removesuffix("/b") for path in adapter} < frozen.keys()
    together = adapting.combine(jax.tree.map(jnp.ones_like, adapter), frozen)
    changed = {path for path, leaf in optim.flatten(together).items() if np.any(leaf != frozen[path])}
    assert changed == {path.removesuffix("/a") for path in adapter if path.endswith("/a")}


def test_parts_that_a_step_uses(job):
    assert job("motion_vae").used_parts(None) == {"motion_vae"}
    assert job().used_parts(None) == {"tora", "vae", "motion_vae", "t5"}
    assert job().used_parts({"text": "ids"}) == {"tora", "t5"}
    assert job().used_parts({"text": "embedding"}) == {"tora"}


def test_tokens_of_a_batch(job):
    assert job().count_tokens(on_device(make_batch(0))) == BATCH * 2 * 2 * 2
    video = {"video": jnp.zeros((3, 5, 32, 48, 3), jnp.uint8), "frame_mask": jnp.ones((3, 2), bool)}
    assert job("vae").count_tokens(video) == 3 * 2 * 4 * 6
    assert job().count_tokens(video) == 3 * 2 * 2 * 3


def test_there_is_no_such_job(job):
    with pytest.raises(UserError, match="job 'flow': there are vae, motion_vae, tora"):
        job("flow")
