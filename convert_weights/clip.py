"""CLIP, as transformers names it -> `tora_jax.models.clip.CLIP`."""

from __future__ import annotations

from convert_weights.mapping import Layout, Rule, affine, norm


def _blocks(source: str, target: str) -> list[Rule]:
    return [
        *norm(source + "layer_norm1", target + "norm1"),
        *(
            rule
            for ours, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("proj", "out_proj"))
            for rule in affine(f"{source}self_attn.{theirs}", target + ours, Layout.LINEAR)
        ),
        *norm(source + "layer_norm2", target + "norm2"),
        *affine(source + "mlp.fc1", target + "fc1", Layout.LINEAR),
        *affine(source + "mlp.fc2", target + "fc2", Layout.LINEAR),
    ]


TABLE = [
    Rule("logit_scale", "logit_scale"),
    *affine("text_projection", "text_projection", Layout.LINEAR, bias=False),
    *affine("visual_projection", "image_projection", Layout.LINEAR, bias=False),
    Rule("text_model.embeddings.token_embedding.weight", "text/embed/embedding"),
    Rule("text_model.embeddings.position_embedding.weight", "text/position"),
    *_blocks("text_model.encoder.layers.{i}.", "text/blocks/"),
    *norm("text_model.final_layer_norm", "text/norm"),
    Rule("vision_model.embeddings.class_embedding", "vision/class_token"),
    Rule("vision_model.embeddings.patch_embedding.weight", "vision/patch_embed/kernel", Layout.CONV2D),
    Rule("vision_model.embeddings.position_embedding.weight", "vision/position"),
    *norm("vision_model.pre_layrnorm", "vision/pre_norm"),  # sic
    *_blocks("vision_model.encoder.layers.{i}.", "vision/blocks/"),
    *norm("vision_model.post_layernorm", "vision/norm"),
]

# 0, 1, 2 ..., which older files hold as a buffer.
IGNORED = (r"(text|vision)_model\.embeddings\.position_ids",)
