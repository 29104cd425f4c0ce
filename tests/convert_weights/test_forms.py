"""One text encoder in the forms that people have it in: fp8 with and without scales, bundles, prefixes, wrappers."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.converting import main, refused
from tests.parity import golden

FP8 = jnp.dtype(jnp.float8_e4m3fn)


@pytest.fixture(scope="module")
def plain():
    return {key: value.astype(np.float16) for key, value in golden.load("t5_encoder").params.items()}


def convert(state, tmp_path, name="source", metadata=None, flags=()) -> dict[str, np.ndarray]:
    save_file(state, tmp_path / f"{name}.safetensors", metadata)
    assert main(["t5", str(tmp_path / f"{name}.safetensors"), str(tmp_path / name), *flags]) == 0
    return load_file(tmp_path / name / "t5.safetensors")


def scaled(state, scale_name: str, rows: bool = False) -> dict[str, np.ndarray]:
    """The matrices inside the blocks in fp8, over their whole range, and their scales."""
    out = dict(state)
    for key, value in state.items():
        if ("SelfAttention." in key and "bias" not in key) or "DenseReluDense." in key:
            largest = np.abs(value.astype("f4")).max(axis=1 if rows else None, keepdims=rows)
            scale = np.asarray(largest / 448, np.float32)
            out[key] = (value / scale).astype(FP8)
            out[key.replace("weight", scale_name)] = scale
    return out


def close(got, want, tolerance: float) -> None:
    """Of each number that is not tiny."""
    assert got.keys() == want.keys()
    for key, value in want.items():
        large = np.abs(value) > np.abs(value).max() / 50
        np.testing.assert_allclose(got[key].astype("f4")[large], value.astype("f4")[large], tolerance)


def test_fp8(plain, tmp_path, capsys):
    """A plain cast: bfloat16 holds each of its numbers."""
    cast = {key: value.astype(FP8) for key, value in plain.items()}
    got = convert(cast, tmp_path, "cast")
    assert f"{len(plain)} tensors in fp8 become bfloat16" in capsys.readouterr().err
    assert {value.dtype.name for value in got.values()} == {"bfloat16"}
    want = convert({key: value.astype(np.float32) for key, value in cast.items()}, tmp_path, "want")
    for key, value in want.items():
        np.testing.assert_array_equal(got[key].astype(np.float32), value, strict=True)


@pytest.mark.parametrize("form", ["old", "new", "rows"])
def test_scaled_fp8(form, plain, tmp_path):
    state, metadata = scaled(plain, "scale_weight" if form == "old" else "weight_scale", form == "rows"), None
    layers = {key.removesuffix(".weight_scale"): {"format": "float8_e4m3fn"} for key in state if "weight_scale" in key}
    if form == "old":
        state["scaled_fp8"] = np.zeros(2, FP8)
        state["encoder.block.0.layer.0.SelfAttention.q.scale_input"] = np.ones((), np.float32)
    elif form == "new":
        metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
        state["encoder.block.0.layer.0.SelfAttention.q.input_scale"] = np.ones((), np.float32)
    else:
        text = np.frombuffer(json.dumps({"format": "float8_e4m3fn"}).encode(), np.uint8)
        state |= {f"{layer}.comfy_quant": text for layer in layers}
    close(convert(state, tmp_path, "scaled", metadata), convert(plain, tmp_path), 0.07)


def test_other_quantised_weights(plain, tmp_path, capsys):
    """Refused by name: their bits are no numbers by themselves."""
    path = tmp_path / "source.safetensors"
    layer = "encoder.block.0.layer.0.SelfAttention.q"

    def says(words: str, changes: dict, metadata=None) -> None:
        save_file(plain | changes, path, metadata)
        refused(capsys, ["t5", str(path), str(tmp_path / "ours")], words)

    packed = {f"{layer}.weight": np.zeros((32, 16), np.uint8)}
    says("'nvfp4'", packed, {"_quantization_metadata": json.dumps({"layers": {layer: {"format": "nvfp4"}}})})
    text = np.frombuffer(b'{"format": "int8_tensorwise", "convrot": true}', np.uint8)
    says("'int8_tensorwise'", {f"{layer}.comfy_quant": text})
    says("broken description", {}, {"_quantization_metadata": "["})
    blocks = {f"{layer}.weight": np.zeros((32, 32), FP8), f"{layer}.weight_scale": np.ones((4, 4), np.float32)}
    says("has the shape [4, 4]", blocks)
    alone = {f"{layer}.weight": plain[f"{layer}.weight"].astype(FP8)}
    says("its scale is not there", alone | {"scaled_fp8": np.zeros(2, FP8)})
    layers = {"layers": {layer: {"format": "float8_e4m3fn"}}}
    says("its scale is not there", alone, {"_quantization_metadata": json.dumps(layers)})


def test_bundle_and_prefixes(plain, tmp_path, capsys):
    want = convert(plain, tmp_path, "want", flags=["--report", str(tmp_path / "report.json")])
    bundle = {f"text_encoders.t5xxl.transformer.{key}": value for key, value in plain.items()}
    bundle["text_encoders.clip_l.transformer.text_model.final_layer_norm.bias"] = np.zeros(3, np.float16)
    forms = {"bundle": (bundle, "1 tensors of other models are left")}
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        forms[prefix] = ({prefix + key: value for key, value in plain.items()}, f"without '{prefix}'")
    for name, (state, note) in forms.items():
        capsys.readouterr()
        got = convert(state, tmp_path, name)
        assert note in capsys.readouterr().err
        assert got.keys() == want.keys()
        assert all(value.tobytes() == want[key].tobytes() for key, value in got.items())


@pytest.mark.slow  # needs PyTorch
def test_wrapped_pickles(plain, tmp_path, capsys):
    import torch

    want = convert(plain, tmp_path, "want")
    state = {key: torch.from_numpy(value) for key, value in plain.items()}
    torch.save({"state_dict": state, "step": 100}, tmp_path / "wrapped.pt")
    assert main(["t5", str(tmp_path / "wrapped.pt"), str(tmp_path / "ours"), "--allow_pickle"]) == 0
    assert "under 'state_dict' are taken" in capsys.readouterr().err
    got = load_file(tmp_path / "ours" / "t5.safetensors")
    assert all(value.tobytes() == want[key].tobytes() for key, value in got.items())
    torch.save({"model": state, "ema": {key: 2 * value for key, value in state.items()}}, tmp_path / "both.pt")
    for take, times in (("ema", 2), ("model", 1)):
        argv = ["t5", str(tmp_path / "both.pt"), str(tmp_path / take), "--allow_pickle", f"--take={take}"]
        assert main(argv) == 0
        assert f"the state dict under {take!r} is taken" in capsys.readouterr().err
        got = load_file(tmp_path / take / "t5.safetensors")
        np.testing.assert_array_equal(got["norm/scale"], want["norm/scale"] * times)
    torch.save({"weights": state, "step": 100}, tmp_path / "odd.pt")
    argv = ["t5", str(tmp_path / "odd.pt"), str(tmp_path / "odd"), "--allow_pickle"]
    refused(capsys, argv, "not a state dict", "weights, step")


def test_training_with_a_moving_average(plain, tmp_path, capsys):
    """Which of the two is taken is said, and the other is named."""
    folder = tmp_path / "epoch0-global_step200"
    (folder / "model").mkdir(parents=True)
    save_file({key: value * 2 for key, value in plain.items()}, folder / "ema.safetensors")
    save_file(plain, folder / "model" / "model.safetensors")
    assert main(["t5", str(folder), str(tmp_path / "ema")]) == 0
    assert f"{folder}: ema.safetensors is taken, the moving average; for the model as it was trained: --take model" in (
        capsys.readouterr().err
    )
    assert main(["t5", str(folder), str(tmp_path / "model"), "--take=model"]) == 0
    assert "model is taken, the model as it was trained; for its moving average: --take ema" in capsys.readouterr().err
    refused(capsys, ["t5", f"{folder}/model", str(tmp_path / "none"), "--take=ema"], "--take ema", "one model alone")
    ema, model = (load_file(tmp_path / name / "t5.safetensors") for name in ("ema", "model"))
    np.testing.assert_array_equal(ema["norm/scale"], model["norm/scale"] * 2)
    shutil.rmtree(folder)
