"""The tables of the released Tora on CogVideoX: every key of the real checkpoints, both ways."""

import numpy as np
import pytest

from convert_weights import mapping
from convert_weights.tables import tora_cogvideox
from convert_weights.tables.tora_cogvideox import TABLE, from_sat, is_sat
from convert_weights.views import Piece
from tests.parity import cogvideox, golden
from tests.parity.cogvideox import UNUSED
from tora_jax.models.cogvideox_tora import CogVideoXTora

LISTS = ["tora_cogvideox_diffusers", "tora_cogvideox_i2v_diffusers", "tora_cogvideox_sat", "tora_cogvideox_i2v_sat"]
IMAGE = {"in_channels": 32, "learned_positions": 226 + 13 * 30 * 45}
BASE = {"in_channels": 16, "out_channels": 16, "caption_channels": 4096}


def released(name: str) -> CogVideoXTora:
    return CogVideoXTora(BASE | IMAGE if "i2v" in name else BASE)


def target_of(model: CogVideoXTora) -> dict:
    return {path: leaf.shape for path, leaf in mapping.flatten(cogvideox.param_shapes(model)).items()}


def pieces_of(keys: dict) -> dict[str, Piece]:
    return from_sat(keys) if is_sat(keys) else {key: Piece(key) for key in keys}


@pytest.mark.parametrize("name", LISTS)
def test_real_key_list(name):
    """Every key of the released checkpoint has its place or a reason, and every parameter its key."""
    keys = golden.checkpoint_keys(name)
    assert is_sat(keys) == name.endswith("sat")
    pieces = pieces_of(keys)
    assert {piece.key for piece in pieces.values()} == keys.keys()
    shapes = {ours: piece.shape(keys[piece.key]) for ours, piece in pieces.items()}
    target = target_of(released(name))
    moves = mapping.plan(TABLE, shapes, target, UNUSED)
    assert {move.target for move in moves} == target.keys()

    used = {source for move in moves for source in move.sources}
    dropped = {pieces[ours].key.removeprefix(tora_cogvideox.SAT_PREFIX) for ours in shapes if ours not in used}
    counters = {key for key in dropped if key.endswith(".num_batches_tracked")}
    constants = {"mixins.pos_embed.freqs_sin", "mixins.pos_embed.freqs_cos", "transformer.position_embeddings.weight"}
    assert len(counters) == 168
    assert dropped - counters == (constants if is_sat(keys) else set())


@pytest.mark.parametrize("name", LISTS[2:])
def test_no_row_of_the_authors_tensors_is_lost(name):
    rows: dict[str, list[int]] = {}
    pieces = from_sat(golden.checkpoint_keys(name)).values()
    for piece in pieces:
        rows.setdefault(piece.key, []).extend(piece.rows)
    assert all(sorted(rows[piece.key]) == list(range(piece.parts)) for piece in pieces)


def test_the_rest_of_a_whole_checkpoint_is_left_out():
    keys = golden.checkpoint_keys("tora_cogvideox_sat")
    whole = keys | {"first_stage_model.encoder.conv_in.weight": (1,), "conditioner.embedders.0.transformer.x": (1,)}
    target = target_of(released("tora_cogvideox_sat"))

    def match(keys: dict) -> list[str]:
        pieces = from_sat(keys)
        shapes = {ours: piece.shape(keys[piece.key]) for ours, piece in pieces.items()}
        return mapping.match(TABLE, shapes, target, UNUSED)[1]

    assert match(whole) == []
    for key in ("model.diffusion_model.ofs_embed.0.weight", "time_embed.0.weight"):
        (problem,) = match(whole | {key: (512, 3072)})
        assert key.removeprefix(tora_cogvideox.SAT_PREFIX) in problem


@pytest.mark.parametrize(
    "name", ["cogvideox_transformer_i2v", "cogvideox_transformer_motion", "cogvideox_transformer_sat_i2v"]
)
def test_round_trip(name):
    """Converting and reverting gives back every byte, under diffusers' names."""
    data = golden.load(name)
    state = cogvideox.weights(data)
    shapes = {key: value.shape for key, value in state.items()}
    pieces = pieces_of(shapes)

    def read(name: str) -> np.ndarray:
        return pieces[name].cut(state[pieces[name].key])

    model = cogvideox.tora_of(data.config, data["in/text"].shape[1])
    moves = mapping.plan(TABLE, {ours: read(ours).shape for ours in pieces}, target_of(model), UNUSED)
    back = mapping.revert(moves, mapping.convert(moves, read))
    assert ("patch_embed.pos_embedding" in back) == ("i2v" in name)
    for ours, value in back.items():
        np.testing.assert_array_equal(value, read(ours), strict=True)
