"""The released Tora on CogVideoX, from each form that people have, into one release folder and back."""

import argparse
import json
import os
import re
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file

from convert_weights.checkpoint_types import CHECKPOINT_TYPES
from convert_weights.mapping import flatten, from_state_dict
from convert_weights.plan import plan_part
from convert_weights.tables import cogvideox_vae
from convert_weights.tables.tora_cogvideox import SAT_PREFIX, SPLIT
from convert_weights.views import Source
from tests import hub_server
from tests.converting import contents, main, refused, shard
from tests.parity import cogvideox, golden
from tora_jax.checkpoints import release
from tora_jax.io.video import read_video
from tora_jax.sampling import __main__ as sample
from tora_jax.training import lora

PLAIN = {"format": "pt"}


def denoiser(name: str = "cogvideox_transformer_motion") -> dict[str, np.ndarray]:
    """A small denoiser's state, with room for the features of the small text encoder, without `add_counters`."""
    weights = cogvideox.weights(golden.load(name))
    state = {key: value for key, value in weights.items() if not key.endswith("num_batches_tracked")}
    key = next(key for key in state if key.endswith("text_proj.weight"))
    width = golden.load("t5_encoder").config["d_model"]
    return state | {key: np.random.default_rng(0).standard_normal((len(state[key]), width), np.float32)}


def add_counters(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What PyTorch's batch norm saves beside its statistics."""
    names = {key.replace("running_mean", "num_batches_tracked") for key in state if key.endswith("running_mean")}
    return state | {name: np.array(7, np.int64) for name in names}


def write_pipeline(folder: Path, state: dict, name: str = "cogvideox_transformer_motion") -> Path:
    """As diffusers saves a pipeline: a folder for each part, the large ones in shards."""
    options = golden.load(name).config["transformer"]
    shard(folder / "transformer", state)
    options = {"patch_size": 2, "use_rotary_positional_embeddings": True, **options}
    (folder / "transformer" / "config.json").write_text(json.dumps(options))
    (folder / "vae").mkdir()
    data = golden.load("cogvideox_vae")
    save_file(cogvideox.weights(data), folder / "vae" / "diffusion_pytorch_model.safetensors", PLAIN)
    (folder / "vae" / "config.json").write_text(json.dumps(data.config["vae"]))
    write_text_encoder(folder / "text_encoder", folder / "tokenizer")
    return folder


def write_text_encoder(weights: Path, tokenizer: Path) -> None:
    shard(weights, golden.load("t5_encoder").params)
    tokenizer.mkdir(exist_ok=True)
    shutil.copyfile(golden.GOLDEN_DIR / "tokenizer.model", tokenizer / "spiece.model")


def write_sat(folder: Path, variant: str, state: dict) -> Path:
    """As the authors keep theirs: pickles of DeepSpeed, the VAE with the nets of its loss, T5 with its tokenizer."""
    import torch

    place = folder / "tora" / variant / "mp_rank_00_model_states.pt"
    place.parent.mkdir(parents=True)
    tensors = {SAT_PREFIX + key: torch.from_numpy(value) for key, value in state.items()}
    others = {"conditioner.embedders.0.x.weight": torch.zeros(2, 3), "first_stage_model.y.bias": torch.zeros(3)}
    torch.save({"module": tensors | others, "global_steps": 3}, place)
    if not (folder / "vae").is_dir():
        (folder / "vae").mkdir()
        vae = {
            key: torch.from_numpy(value) for key, value in cogvideox.weights(golden.load("cogvideox_vae_sat")).items()
        }
        torch.save({"state_dict": vae | {"loss.logvar": torch.zeros(1)}}, folder / "vae" / "3d-vae.pt")
        write_text_encoder(folder / "t5-v1_1-xxl", folder / "t5-v1_1-xxl")
    return folder


def convert(src: Path | str, dst: Path, *flags: str) -> dict:
    assert main(["tora_cogvideox", str(src), str(dst), *flags]) == 0
    return release.read_config(dst)


def params(folder: Path, part: str) -> dict[str, np.ndarray]:
    return load_file(folder / f"{part}.safetensors")


def same(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        np.testing.assert_array_equal(got[key], value, strict=True)


def model_of(name: str, width: int):
    """The model of a golden file, with a text encoder of another width."""
    data = golden.load(name)
    model = cogvideox.tora_of(data.config, data["in/text"].shape[1])
    return model.clone(cogvideox={**model.cogvideox, "caption_channels": width})


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The T2V release in diffusers' form, its denoiser's state, and what it is converted to."""
    folder = tmp_path_factory.mktemp("diffusers")
    state = add_counters(denoiser())
    source = write_pipeline(folder / "source", state)
    convert(source, folder / "ours")
    return source, state, folder / "ours"


# ----------------------------------------------------------------------------------------------------------
# Diffusers' pipelines
# ----------------------------------------------------------------------------------------------------------


def test_pipeline(pipeline):
    _, state, ours = pipeline
    names = {"config.json", "source.json", "README.md", "tokenizer.model"}
    assert contents(ours) == names | {f"{part}.safetensors" for part in ("tora", "vae", "t5")}
    config = release.read_config(ours)
    assert config["backbone"] == "cogvideox"
    fields = config["tora"]["cogvideox"]
    assert (fields["variant"], fields["in_channels"], fields["base_grid"]) == ("3x128x2/2", 16, (3, 4))
    assert (
        fields["caption_length"]
        == golden.load("cogvideox_transformer_motion").config["transformer"]["max_text_seq_length"]
    )
    assert config["vae"]["channels"] == (32, 64, 64, 96)
    assert config["sampling"]["num_frames"] == 49
    model = model_of("cogvideox_transformer_motion", fields["caption_channels"])
    same(params(ours, "tora"), flatten(cogvideox.load_params(model, state)))


def test_a_converted_folder_makes_a_video(pipeline, tmp_path):
    """`sample.py --weights DIR` at the folder's own settings, smaller; the front end is the one of the files."""
    *_, ours = pipeline
    assert release.read_config(ours)["tora"]["front_end"] == "diffusers"
    flags = ["--weights", str(ours), "--out", str(tmp_path / "video.mp4"), "--quiet", "--steps=1", "--num_frames=9"]
    sample.sample(["sample.py", *flags, "--height=32", "--width=48", "--trajectory=wave", "--prompt=a"])
    report = json.loads((tmp_path / "video.json").read_text())
    assert (report["settings"]["solver"], report["settings"]["guidance"]) == ("dpm2m_sde", 6.0)
    frames, fps = read_video(tmp_path / "video.mp4")
    assert (frames.shape, fps) == ((9, 32, 48, 3), 8)
    assert frames.std() > 1


def test_pipeline_comes_back_to_the_byte(pipeline, tmp_path):
    source, state, ours = pipeline
    save_file(state, tmp_path / "want.safetensors", PLAIN)
    for kind, want in (
        ("tora_cogvideox", tmp_path / "want.safetensors"),
        ("cogvideox_vae", source / "vae" / "diffusion_pytorch_model.safetensors"),
    ):
        back = tmp_path / f"{kind}.safetensors"
        assert main([kind, str(ours), str(back), "--reverse"]) == 0
        assert back.read_bytes() == want.read_bytes()
    assert main(["t5", str(ours), str(tmp_path / "t5.safetensors"), "--reverse"]) == 0
    same(load_file(tmp_path / "t5.safetensors"), golden.load("t5_encoder").params)


def test_licence(pipeline, tmp_path, capsys):
    """Told once, and kept with the weights."""
    source, _, _ = pipeline
    convert(source, tmp_path / "ours")
    assert capsys.readouterr().err.count("CogVideoX License") == 1
    assert "CogVideoX License" in (tmp_path / "ours" / "README.md").read_text()


def test_parts_from_elsewhere(pipeline, tmp_path, capsys):
    """The denoiser's own folder as SRC: VAE and text encoder are asked for."""
    source, _, ours = pipeline
    argv = ["tora_cogvideox", str(source / "transformer"), str(tmp_path / "ours")]
    refused(capsys, argv, "holds no vae and no t5", "--vae SRC and --t5 SRC")
    argv += ["--vae", str(source / "vae"), "--t5", str(source / "text_encoder")]
    refused(capsys, argv, "--tokenizer FILE")
    argv += ["--variant", '{"tora": {"front_end": "sat"}}']
    assert main([*argv, "--tokenizer", str(source / "tokenizer" / "spiece.model")]) == 0
    config = release.read_config(tmp_path / "ours")
    assert (config["tora"]["front_end"], config["tora"]["cogvideox"]["final_eps"]) == ("sat", 1e-6)
    assert config["vae"]["encoder_chunk"] == 0
    assert params(tmp_path / "ours", "tora").keys() == params(ours, "tora").keys()


# The released lists of keys: type, variant, and what is dropped.
RELEASED = {
    "tora_cogvideox_diffusers": ("tora_cogvideox", "t2v", 0),
    "tora_cogvideox_i2v_diffusers": ("tora_cogvideox", "i2v", 0),
    "tora_cogvideox_sat": ("tora_cogvideox", "t2v", 3),
    "tora_cogvideox_i2v_sat": ("tora_cogvideox", "i2v", 3),
    "cogvideox_vae": ("cogvideox_vae", "5B", 0),
    "cogvideox_vae_sat": ("cogvideox_vae", "5B", 0),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_keys(name):
    """Known by shapes alone; each key has its place, is a counter, or is dropped for a reason; others are refused."""
    kind, variant, dropped = RELEASED[name]
    keys = golden.checkpoint_keys(name)
    dtypes = {key: np.dtype(np.int64 if key.endswith("num_batches_tracked") else np.float32) for key in keys}

    def planned(more: dict):
        shapes = {key: tuple(shape) for key, shape in (keys | more).items()}
        source = Source(name, (), shapes, dtypes | dict.fromkeys(more, np.dtype(np.float32)), None, {}, None)
        return plan_part(CHECKPOINT_TYPES[kind], source, None, None)

    part = planned({})
    assert (part.variant, part.problems) == (variant, [])
    assert len([key for key in part.ignored if not key.endswith("num_batches_tracked")]) == dropped
    (problem,) = planned({"fuser.42.extra.weight": (3,)}).problems
    assert "fuser.42.extra.weight" in problem


@pytest.fixture
def damaged(pipeline, tmp_path, capsys):
    """Damages a copy of the pipeline, and demands one line that says so."""
    folder = shutil.copytree(pipeline[0], tmp_path / "damaged")

    def try_it(file: str, damage, *words: str) -> None:
        path = folder / file
        damage(path)
        refused(capsys, ["tora_cogvideox", str(folder), str(tmp_path / "ours")], *words)
        shutil.copyfile(pipeline[0] / file, path)

    return try_it


def test_damage(damaged):
    """In whichever part of the folder."""
    shard = "transformer/model-00002-of-00002.safetensors"
    damaged(shard, lambda path: os.truncate(path, 1000), "truncated")
    damaged(shard, Path.unlink, "shard missing", Path(shard).name)
    damaged(shard, lambda path: path.write_bytes(b"GGUF" + bytes(100)), "not a safetensors file")
    index = "text_encoder/model.safetensors.index.json"
    damaged(index, lambda path: path.write_text("{}"), "broken index")
    damaged("transformer/config.json", lambda path: path.write_text("{"), "transformer/config.json: not valid JSON")
    damaged("tokenizer/spiece.model", Path.unlink, "--tokenizer FILE")

    def not_a_number(path: Path) -> None:
        state = load_file(path)
        save_file(state | {key: value * np.nan for key, value in state.items()}, path, PLAIN)

    damaged("vae/diffusion_pytorch_model.safetensors", not_a_number, "holds NaN or Inf", "--allow_nonfinite")


def test_a_text_encoder_of_another_width(pipeline, tmp_path, capsys):
    folder = shutil.copytree(pipeline[0], tmp_path / "other")
    shutil.rmtree(folder / "transformer")
    shard(folder / "transformer", add_counters(cogvideox.weights(golden.load("cogvideox_transformer_motion"))))
    argv = ["tora_cogvideox", str(folder), str(tmp_path / "ours")]
    refused(capsys, argv, "gives features of width", "the denoiser wants")


# ----------------------------------------------------------------------------------------------------------
# The authors' own files
# ----------------------------------------------------------------------------------------------------------


def write_sat_parts(folder: Path) -> list[str]:
    """The same without PyTorch: the flags that name the VAE and the text encoder."""
    save_file(cogvideox.weights(golden.load("cogvideox_vae_sat")), folder / "3d-vae.safetensors", PLAIN)
    write_text_encoder(folder / "t5", folder / "t5")
    variant = json.dumps({"vae": {"norm_groups": 32, "scaling": 0.7}})
    return ["--vae", str(folder / "3d-vae.safetensors"), "--t5", str(folder / "t5"), "--variant", variant]


def test_sat(tmp_path):
    """I2V, which was never released in another form; back under diffusers' names."""
    state = denoiser("cogvideox_transformer_sat_i2v")
    save_file({SAT_PREFIX + key: value for key, value in state.items()}, tmp_path / "sat.safetensors")
    config = convert(tmp_path / "sat.safetensors", tmp_path / "ours", *write_sat_parts(tmp_path))
    fields = config["tora"]["cogvideox"]
    assert (fields["in_channels"], fields["learned_positions"]) == (32, 7 + 3 * 3 * 4)
    assert (config["tora"]["front_end"], fields["final_eps"]) == ("sat", 1e-6)
    assert config["vae"]["encoder_chunk"] == 0
    model = model_of("cogvideox_transformer_sat_i2v", fields["caption_channels"])
    same(params(tmp_path / "ours", "tora"), flatten(cogvideox.load_params(model, state)))
    want = cogvideox.weights(golden.load("cogvideox_vae_sat"))
    target = jax.eval_shape(lambda key: cogvideox_vae.init(key, config["vae"]), jax.random.key(0))
    same(params(tmp_path / "ours", "vae"), flatten(from_state_dict(cogvideox_vae.SAT_TABLE, want, target)))

    assert main(["tora_cogvideox", str(tmp_path / "ours"), str(tmp_path / "back"), "--reverse"]) == 0
    back = load_file(tmp_path / "back")
    assert "patch_embed.pos_embedding" in back
    assert not any("mixins" in key for key in back)
    source = write_pipeline(tmp_path / "diffusers", back, "cogvideox_transformer_i2v")
    convert(source, tmp_path / "again")
    same(params(tmp_path / "again", "tora"), params(tmp_path / "ours", "tora"))


@pytest.mark.slow  # needs PyTorch
def test_sat_folder(tmp_path, capsys):
    """The pickles as they lie in the authors' folder; what else is in them is left out, there and back."""
    state = denoiser("cogvideox_transformer_sat")
    source, ours = write_sat(tmp_path / "source" / "ckpts", "t2v", state), tmp_path / "ours"
    argv = ["tora_cogvideox", str(source), str(ours)]
    refused(capsys, argv, "mp_rank_00_model_states.pt: a pickle", f"{source} {ours} --allow_pickle")
    variant = json.dumps({"vae": {"norm_groups": 32, "scaling": 0.7}})
    config = convert(source, ours, "--allow_pickle", "--variant", variant)
    model = model_of("cogvideox_transformer_sat", config["tora"]["cogvideox"]["caption_channels"])
    same(params(ours, "tora"), flatten(cogvideox.load_params(model, state)))
    assert main(["tora_cogvideox", str(ours), str(tmp_path / "back"), "--reverse"]) == 0
    assert not any(key.startswith(("conditioner", "first_stage", "mixins")) for key in load_file(tmp_path / "back"))
    assert main(["cogvideox_vae", str(ours), str(tmp_path / "vae"), "--reverse"]) == 0
    assert len(load_file(tmp_path / "vae")) == len(cogvideox.weights(golden.load("cogvideox_vae_sat")))


@pytest.mark.slow  # needs PyTorch
def test_sat_with_both_variants(tmp_path, capsys):
    source = write_sat(tmp_path / "ckpts", "t2v", denoiser("cogvideox_transformer_sat"))
    write_sat(source, "i2v", denoiser("cogvideox_transformer_sat_i2v"))
    argv = ["tora_cogvideox", str(source), str(tmp_path / "ours"), "--allow_pickle"]
    refused(capsys, argv, "holds 2 denoisers", "tora/i2v/mp_rank_00_model_states.pt", "--variant t2v or --variant i2v")
    # The choice is understood; these weights are of another size than the released ones.
    refused(capsys, [*argv, "--variant", "i2v"], "tora/i2v/mp_rank_00_model_states.pt: wrong variant", "5B")


@pytest.mark.slow  # needs PyTorch
def test_pickle_with_more_than_tensors(tmp_path, capsys):
    """What DeepSpeed may keep beside the weights: refused by name, never read in an unsafe way."""
    import torch

    path = tmp_path / "source" / "mp_rank_00_model_states.pt"
    path.parent.mkdir()
    torch.save({"module": {"a": torch.zeros(1)}, "args": argparse.Namespace(lr=1.0)}, path)
    argv = ["tora_cogvideox", str(path.parent), str(tmp_path / "ours"), "--allow_pickle"]
    refused(capsys, [*argv, "--vae", "x", "--t5", "y"], "weights_only=True", "argparse.Namespace", "may be code")


# ----------------------------------------------------------------------------------------------------------
# Split files
# ----------------------------------------------------------------------------------------------------------


def write_split(folder: Path, state: dict, mark: str = "") -> Path:
    """As ComfyUI's users have them: fusers and extractor apart, without their prefixes."""
    for name, prefix in SPLIT.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        save_file(part, folder / name / f"{name}{mark}.safetensors", PLAIN)
    return folder


def plain(state: dict) -> dict:
    return {key: value for key, value in state.items() if not key.startswith(tuple(SPLIT.values()))}


@pytest.mark.parametrize("name", ["cogvideox_transformer_motion", "cogvideox_transformer_i2v"])
def test_split_files(name, tmp_path):
    """On a plain base they give what the whole checkpoint gives, and they come back as they were."""
    state, other = add_counters(denoiser(name)), "i2v" in name
    base = write_pipeline(tmp_path / "base", plain(state), name)
    motion = write_split(tmp_path / "motion", state, "_I2V" if other else "")
    write_split(motion, denoiser("cogvideox_transformer_motion"), "" if other else "_I2V")
    config = convert(base, tmp_path / "ours", "--motion", str(motion))
    assert config["tora"]["cogvideox"]["in_channels"] == (32 if other else 16)
    model = model_of(name, config["tora"]["cogvideox"]["caption_channels"])
    same(params(tmp_path / "ours", "tora"), flatten(cogvideox.load_params(model, state)))

    assert main(["tora_cogvideox", str(tmp_path / "ours"), str(tmp_path / "back"), "--reverse", "--split"]) == 0
    mark = "_I2V" if other else ""
    for name in SPLIT:
        want = motion / name / f"{name}{mark}.safetensors"
        assert contents(tmp_path / "back" / name) == {want.name}
        assert (tmp_path / "back" / name / want.name).read_bytes() == want.read_bytes()


def test_an_adapter(pipeline, tmp_path, capsys):
    """What LoRA learned here, in PyTorch's form: the product of its two matrices is the change of the weight."""
    ours, path, rng = params(pipeline[2], "tora"), "cogvideox/blocks/attn/q/kernel", np.random.default_rng(0)
    depth, width, out = ours[path].shape
    a, b = (rng.standard_normal(shape, np.float32) for shape in ((depth, width, 4), (depth, 4, out)))
    adapter = {f"tora/{path}/a": jnp.asarray(a), f"tora/{path}/b": jnp.asarray(b)}
    lora.save(tmp_path / "adapter.safetensors", adapter, alpha=8.0)
    argv = ["tora_cogvideox", str(tmp_path / "adapter.safetensors"), str(tmp_path / "lora.safetensors"), "--reverse"]
    assert main(argv) == 0
    merged = lora.merge(adapter, {f"tora/{path}": jnp.zeros_like(ours[path])}, 8.0)
    got, want = load_file(tmp_path / "lora.safetensors"), flatten(merged)[f"tora/{path}"]
    assert len(got) == 2 * depth
    for layer in range(depth):
        name = f"transformer.transformer_blocks.{layer}.attn1.to_q"
        change = got[f"{name}.lora_B.weight"] @ got[f"{name}.lora_A.weight"]
        np.testing.assert_allclose(change, want[layer].T, rtol=1e-4, atol=1e-4)
    refused(capsys, ["t5", *argv[1:2], str(tmp_path / "no"), "--reverse"], "t5 has no form for adapters")


def test_split_files_of_the_other_base(pipeline, tmp_path, capsys):
    source, state, _ = pipeline
    motion = write_split(tmp_path / "motion", state, "_I2V")
    argv = ["tora_cogvideox", str(source), str(tmp_path / "ours"), "--motion", str(motion)]
    refused(capsys, argv, "fuser/fuser_I2V.safetensors is made for an I2V base")
    (motion / "traj_extractor" / "traj_extractor_I2V.safetensors").unlink()
    shutil.move(motion / "fuser" / "fuser_I2V.safetensors", motion / "fuser.safetensors")
    refused(capsys, argv, "wants one file traj_extractor*.safetensors", "there are none")
    write_split(motion, state)
    (motion / "fuser.safetensors").unlink()
    refused(capsys, argv, "fuser.", "stands in two files")  # this base has them already


def test_plain_base(tmp_path):
    """Without split files, fusers and extractor are new and change nothing: what a training starts from."""
    state = denoiser()
    base = write_pipeline(tmp_path / "base", plain(state))
    convert(base, tmp_path / "ours", "--report", str(tmp_path / "report.json"))
    report = json.loads((tmp_path / "report.json").read_text())
    got = params(tmp_path / "ours", "tora")
    new = {path.removeprefix("tora/") for path in report["new"]}
    assert new == got.keys() - set(report["parts"]["tora"]["converted"])
    assert all(path.startswith(("extractor/", "cogvideox/blocks/motion_fuser/")) for path in new)
    assert not any(got[path].any() for path in new if "_temporal/" in path)
    assert "untrained" in (tmp_path / "ours" / "README.md").read_text()
    assert main(["tora_cogvideox", str(tmp_path / "ours"), str(tmp_path / "back"), "--reverse"]) == 0
    back = load_file(tmp_path / "back")
    assert back.keys() == state.keys()
    same(plain(back), plain(state))


# ----------------------------------------------------------------------------------------------------------
# What is refused
# ----------------------------------------------------------------------------------------------------------


def test_other_models(pipeline, tmp_path, capsys):
    """Those of the same family have the same names, and would make noise."""
    source, state, ours = pipeline
    refused(capsys, ["tora_cogvideox", str(ours), str(tmp_path / "ours")], "converted already", "--reverse")
    folder = shutil.copytree(source, tmp_path / "other")
    argv = ["tora_cogvideox", str(folder), str(tmp_path / "ours")]
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(
        json.dumps({**config, "use_rotary_positional_embeddings": False})
    )
    refused(capsys, argv, "CogVideoX-2b, whose positions are not rotary")
    shutil.rmtree(folder / "transformer")
    shard(folder / "transformer", state | {"patch_embed.proj.weight": np.zeros((128, 128), "f4")})
    refused(capsys, argv, "CogVideoX 1.5, whose patches span frames")
    (folder / "transformer").rename(folder / "unet")
    refused(capsys, argv, "no denoiser inside", "transformer/", "mp_rank_00_model_states.pt")
    refused(capsys, ["tora_cogvideox", str(tmp_path), "x", "--split"], "--split means nothing without --reverse")


def test_keys_that_fit_nothing(pipeline, tmp_path, capsys):
    source, state, _ = pipeline
    folder = shutil.copytree(source, tmp_path / "odd")
    shutil.rmtree(folder / "transformer")
    changes = {"fuser.0.flow_gamma_spatial.bias": None, "traj_extractor.extra.weight": np.zeros(2, "f4")}
    shard(folder / "transformer", {key: v for key, v in (state | changes).items() if v is not None})
    words = "does not fit tora_cogvideox: 2 mismatches", "+ traj_extractor.extra.weight [2]", "wants layers 0 to 2"
    refused(capsys, ["tora_cogvideox", str(folder), str(tmp_path / "ours")], *words, lines=3)


def test_folders_of_the_other_backbone(pipeline, tmp_path, capsys):
    """A release on CogVideoX holds no Open-Sora, whatever the parts are called."""
    for kind in ("stdit3", "vae"):
        assert main([kind, str(pipeline[2]), str(tmp_path / "back"), "--reverse"]) == 2
        assert capsys.readouterr().err.startswith("convert_weights: error: ")


def test_the_tables_of_the_vae_are_in_one_order():
    pairs = zip(cogvideox_vae.SAT_TABLE, cogvideox_vae.TABLE, strict=True)
    assert all((sat.target, sat.layout) == (ours.target, ours.layout) for sat, ours in pairs)


# ----------------------------------------------------------------------------------------------------------
# The hub
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(pipeline, tmp_path, monkeypatch):
    """The pipeline behind a hub id, beside files that nobody needs."""
    folder = shutil.copytree(pipeline[0], tmp_path / "served")
    for name in ("README.md", "transformer/diffusion_pytorch_model.fp16.safetensors", "text_encoder/pytorch_model.bin"):
        (folder / name).write_bytes(b"not needed")
    with hub_server.serve("someone/tora", folder) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


def test_hub(hub, pipeline, tmp_path, monkeypatch, capsys):
    """The files needed alone are fetched, and once; later runs need no network."""
    convert("someone/tora", tmp_path / "ours")
    assert contents(tmp_path / "ours") == contents(pipeline[2])
    for part in ("tora", "vae", "t5"):
        name = f"{part}.safetensors"
        assert (tmp_path / "ours" / name).read_bytes() == (pipeline[2] / name).read_bytes()
    needed = {"tokenizer/spiece.model", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"}
    shards = ("model.safetensors.index.json", *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2)))
    needed |= {f"{folder}/{name}" for folder in ("transformer", "text_encoder") for name in shards}
    assert hub.fetched() == needed | {"transformer/config.json"}
    hub.asked.clear()
    convert("someone/tora", tmp_path / "again")
    assert hub.fetched() == set()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing answers there
    convert("someone/tora", tmp_path / "without_network")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(capsys, ["t5", "someone/else", str(tmp_path / "no")], "install the extra hub", "hf download someone/else")


def test_hub_resumes(hub, tmp_path, capsys, monkeypatch):
    """A file goes on where another run has left it, but for the last piece that was under way."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
    file = "transformer/model-00002-of-00002.safetensors"
    hub.cut = file
    refused(capsys, ["tora_cogvideox", "someone/tora", str(tmp_path / "ours")], "what was fetched is kept")
    hub.cut = None
    hub.asked.clear()
    convert("someone/tora", tmp_path / "ours")
    (start,) = [asked for method, path, asked in hub.asked if (method, path) == ("GET", file)]
    half = (hub.folder / file).stat().st_size // 2
    assert half - (1 << 16) <= int(re.fullmatch(r"bytes=(\d+)-", start)[1]) <= half
    assert "transformer/model-00001-of-00002.safetensors" not in hub.fetched()


def test_hub_refuses_pickles_before_it_fetches_them(hub, tmp_path, capsys):
    folder = hub.folder / "sat"
    folder.mkdir()
    (folder / "3d-vae.pt").write_bytes(b"PK\x03\x04")
    argv = ["cogvideox_vae", "someone/tora/sat", str(tmp_path / "ours")]
    refused(capsys, argv, "someone/tora/sat: 3d-vae.pt: a pickle", "--allow_pickle")
    assert hub.fetched() == set()


def test_hub_without_such_a_model(hub, tmp_path, capsys):
    refused(capsys, ["t5", "someone/else", str(tmp_path / "ours")], "the hub has no someone/else")
    refused(capsys, ["t5", "someone/tora/nope", str(tmp_path / "ours")], "someone/tora has no nope")
