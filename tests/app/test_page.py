"""The page as Gradio has it: it is built, and its functions answer what stands on it."""

import dataclasses
import gc

import numpy as np
import pytest
from PIL import Image

from tora_jax.app import studio

pytestmark = pytest.mark.slow  # needs Gradio


@pytest.fixture
def functions(tiny_models, tiny_config, tmp_path):
    """By name."""
    from tora_jax.app import page

    models = dataclasses.replace(tiny_models, sampling=tiny_config["sampling"])
    built = page.build(studio.Studio(models, tmp_path / "results"))
    yield {each.name: each.fn for each in built.fns.values() if each.name}
    del built
    gc.collect()  # Gradio leaves event loops open; here nobody minds


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_files_and_photos(functions, tmp_path):
    import gradio as gr

    tracks = tmp_path / "tracks.npy"
    np.save(tracks, np.stack([np.linspace((10 * i, 20), (10 * i, 200), 9) for i in range(3)]))
    unsaid = ("", "", "points", "")
    with pytest.raises(gr.Error, match="--trajectory_axes=nt"):
        functions["imported"](str(tracks), None, "48x32", 5, *unsaid)
    told, left, word = functions["imported"](str(tracks), None, "48x32", 5, "", "nt", "points", "1")
    assert np.shape(told["add"]) == (1, 9, 2)
    assert left is None  # the file is done with
    assert word == "tracks.npy: 1 path of 9 points on 256x256, 5 frames; from NumPy's .npy"
    Image.new("RGB", (60, 120)).save(tmp_path / "photo.png")
    shown = functions["background"](str(tmp_path / "photo.png"), "48x32")
    np.testing.assert_allclose(shown["seen"], [0, 1 / 3, 1, 2 / 3], atol=0.01)
    assert shown["size"] == [48, 32]
    assert functions["background"](None, "48x32")["background"] is None
