"""The tiny models, as the tests of the training step, its losses and the jobs take them."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util


@pytest.fixture(scope="module")
def parts(tiny_models):
    return tiny_models.parts


@pytest.fixture(scope="module")
def params(tiny_models):
    """The tiny models, with random numbers where they start from zeros (fusers, output)."""
    flat = traverse_util.flatten_dict(dict(tiny_models.params), sep="/")
    rng = np.random.default_rng(0)
    for path, leaf in flat.items():
        if not leaf.any():
            flat[path] = jnp.asarray(0.1 * rng.standard_normal(leaf.shape), leaf.dtype)
    return traverse_util.unflatten_dict(flat, sep="/")
