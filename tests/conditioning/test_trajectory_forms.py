"""What is written in the form of each tool is read back, or its reading is asked for; never another reading."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import trajectory_forms as forms
from tora_jax.conditioning import trajectory
from tora_jax.conditioning.trajectory_hints import hints
from tora_jax.errors import UserError

QUICK = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TOLERANCE = 1e-4  # of the frame


def drawn(kind, n, t, size, seed):
    """Random paths in pixels of the size, and which of their points are seen."""
    rng = np.random.default_rng(seed)
    n, t = n if kind.several else 1, kind.steps or t
    pixels = rng.uniform(0.02, 0.98, (n, t, 2)) * size
    return pixels, forms.hide(rng, n, t) if kind.hidden else np.ones((n, t), bool)


@pytest.mark.parametrize("name", forms.KINDS)
@QUICK
@given(
    st.integers(2, 5),
    st.integers(3, 14),
    st.tuples(st.integers(100, 2000), st.integers(100, 2000)),
    st.integers(0, 10**6),
)
def test_every_form_is_read_back(tmp_path, name, n, t, size, seed):
    kind = forms.KINDS[name]
    pixels, seen = drawn(kind, n, t, size, seed)
    found = trajectory.load(kind.write(tmp_path, pixels, size, seen), hints(**kind.said(size)))
    assert len(found) == len(pixels)
    times = np.linspace(0, 1, pixels.shape[1])
    for points, path, shown in zip(found, pixels / size, seen, strict=True):
        np.testing.assert_allclose(points[:, :2], path[shown], atol=TOLERANCE)
        when = points[:, 2] if points.shape[1] == 3 else np.linspace(0, 1, len(points))
        np.testing.assert_allclose(when, times[shown], atol=TOLERANCE)


@pytest.mark.parametrize("name", ["MOT challenge", "supervision", "DeepLabCut"])
def test_pixels_of_a_video_need_its_size(tmp_path, name):
    """Small numbers, which fit into 256x256 too."""
    kind = forms.KINDS[name]
    pixels, seen = drawn(kind, 2, 5, (200, 100), 0)
    with pytest.raises(UserError, match=r"in pixels of a video of unknown size; name it: --trajectory_canvas=WxH"):
        trajectory.load(kind.write(tmp_path, pixels, (200, 100), seen))


ASKED = [name for name, kind in forms.KINDS.items() if "axes" in kind.said((9, 9))]


@pytest.mark.parametrize("name", ASKED)
@QUICK
@given(st.integers(2, 5), st.integers(2, 14), st.integers(0, 10**6))
def test_what_has_two_readings_is_asked_for(tmp_path, name, n, t, seed):
    kind = forms.KINDS[name]
    pixels, seen = drawn(kind, n, t, (640, 480), seed)
    with pytest.raises(UserError, match="--trajectory_axes"):
        trajectory.load(kind.write(tmp_path, pixels, (640, 480), seen), hints(canvas="640x480"))
