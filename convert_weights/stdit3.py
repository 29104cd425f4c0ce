"""The table of STDiT3 checkpoints (hpcai-tech/OpenSora-STDiT-v3)."""

from convert_weights.mapping import Layout, Rule, affine

LINEAR = Layout.LINEAR


def _block(kind: str) -> list[Rule]:
    source, target = f"{kind}_blocks.{{i}}", f"blocks/{kind}"
    return [
        Rule(f"{source}.scale_shift_table", f"{target}/scale_shift_table"),
        *affine(f"{source}.attn.qkv", f"{target}/attn/qkv", LINEAR),
        Rule(f"{source}.attn.q_norm.weight", f"{target}/attn/q_norm/scale"),
        Rule(f"{source}.attn.k_norm.weight", f"{target}/attn/k_norm/scale"),
        *affine(f"{source}.attn.proj", f"{target}/attn/proj", LINEAR),
        *affine(f"{source}.cross_attn.q_linear", f"{target}/cross_attn/q", LINEAR),
        *affine(f"{source}.cross_attn.kv_linear", f"{target}/cross_attn/kv", LINEAR),
        *affine(f"{source}.cross_attn.proj", f"{target}/cross_attn/proj", LINEAR),
        *affine(f"{source}.mlp.fc1", f"{target}/mlp/fc1", LINEAR),
        *affine(f"{source}.mlp.fc2", f"{target}/mlp/fc2", LINEAR),
    ]


TABLE = [
    *affine("x_embedder.proj", "patch_embedder", Layout.PATCH),
    *affine("t_embedder.mlp.0", "t_embedder/fc1", LINEAR),
    *affine("t_embedder.mlp.2", "t_embedder/fc2", LINEAR),
    *affine("fps_embedder.mlp.0", "fps_embedder/fc1", LINEAR),
    *affine("fps_embedder.mlp.2", "fps_embedder/fc2", LINEAR),
    *affine("t_block.1", "t_block", LINEAR),
    Rule("y_embedder.y_embedding", "null_caption"),
    *affine("y_embedder.y_proj.fc1", "text_embedder/fc1", LINEAR),
    *affine("y_embedder.y_proj.fc2", "text_embedder/fc2", LINEAR),
    *_block("spatial"),
    *_block("temporal"),
    Rule("final_layer.scale_shift_table", "final_layer/scale_shift_table"),
    *affine("final_layer.linear", "final_layer/linear", LINEAR),
]

# The rotary frequencies are a constant, computed in models/layers.py.
IGNORED = [r"rope\.freqs"]
