"""The tables of the VAEs: diffusers' AutoencoderKL, Open-Sora's VAE_Temporal, and the pipeline of both
(hpcai-tech/OpenSora-VAE-v1.2)."""

from convert_weights.mapping import Layout, Rule, affine, norm

# Two generations of diffusers' names; a file has one of them.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
OLD_ATTENTION = ("query", "key", "value", "proj_attn")

CONV2D, CONV3D, LINEAR = Layout.CONV2D, Layout.CONV3D, Layout.LINEAR


def _block_2d(source: str, target: str) -> list[Rule]:
    return [
        *norm(f"{source}.norm1", f"{target}/norm1"),
        *affine(f"{source}.conv1", f"{target}/conv1", CONV2D),
        *norm(f"{source}.norm2", f"{target}/norm2"),
        *affine(f"{source}.conv2", f"{target}/conv2", CONV2D),
        *affine(f"{source}.conv_shortcut", f"{target}/shortcut", CONV2D),
    ]


def _half_2d(half: str, direction: str) -> list[Rule]:
    """Rules of the encoder (`down_blocks`, `downsamplers`) or of the decoder (`up_blocks`, `upsamplers`)."""
    attention = f"{half}.mid_block.attentions.0"
    levels = f"{half}.{direction}_blocks.{{i}}"
    return [
        *affine(f"{half}.conv_in", f"{half}/conv_in", CONV2D),
        *_block_2d(f"{levels}.resnets.{{j}}", f"{half}/{direction}_{{i}}_block_{{j}}"),
        *affine(f"{levels}.{direction}samplers.0.conv", f"{half}/{direction}_{{i}}_conv", CONV2D),
        *_block_2d(f"{half}.mid_block.resnets.{{j}}", f"{half}/middle/block_{{j}}"),
        *norm(f"{attention}.group_norm", f"{half}/middle/attention/norm"),
        *(
            rule
            for names in (ATTENTION, OLD_ATTENTION)
            for theirs, ours in zip(names, ("q", "k", "v", "proj"), strict=True)
            for rule in affine(f"{attention}.{theirs}", f"{half}/middle/attention/{ours}", LINEAR)
        ),
        *norm(f"{half}.conv_norm_out", f"{half}/norm_out"),
        *affine(f"{half}.conv_out", f"{half}/conv_out", CONV2D),
    ]


def _conv_3d(source: str, target: str, bias: bool = True) -> list[Rule]:
    return affine(f"{source}.conv", f"{target}/conv", CONV3D, bias)


def _block_3d(source: str, target: str) -> list[Rule]:
    return [
        *norm(f"{source}.norm1", f"{target}/norm1"),
        *_conv_3d(f"{source}.conv1", f"{target}/conv1", bias=False),
        *norm(f"{source}.norm2", f"{target}/norm2"),
        *_conv_3d(f"{source}.conv2", f"{target}/conv2", bias=False),
        *_conv_3d(f"{source}.conv3", f"{target}/shortcut", bias=False),
    ]


AUTOENCODER_KL = [
    *_half_2d("encoder", "down"),
    *_half_2d("decoder", "up"),
    *affine("quant_conv", "quant_conv", CONV2D),
    *affine("post_quant_conv", "post_quant_conv", CONV2D),
]

CAUSAL_VAE = [
    *_conv_3d("encoder.conv_in", "encoder/conv_in", bias=False),
    *_block_3d("encoder.block_res_blocks.{i}.{j}", "encoder/level_{i}_block_{j}"),
    *_conv_3d("encoder.conv_blocks.{i}", "encoder/stride_{i}"),
    *_block_3d("encoder.res_blocks.{j}", "encoder/last_block_{j}"),
    *norm("encoder.norm1", "encoder/norm_out"),
    *_conv_3d("encoder.conv2", "encoder/conv_out"),
    *_conv_3d("decoder.conv1", "decoder/conv_in"),
    *_block_3d("decoder.res_blocks.{j}", "decoder/first_block_{j}"),
    *_block_3d("decoder.block_res_blocks.{i}.{j}", "decoder/level_{i}_block_{j}"),
    *_conv_3d("decoder.conv_blocks.{i}", "decoder/stride_{i}"),
    *norm("decoder.norm1", "decoder/norm_out"),
    *_conv_3d("decoder.conv_out", "decoder/conv_out"),
    *_conv_3d("quant_conv", "quant_conv"),
    *_conv_3d("post_quant_conv", "post_quant_conv"),
]

VIDEO_VAE = [
    *(rule.prefixed("spatial_vae.module.", "spatial_vae/") for rule in AUTOENCODER_KL),
    *(rule.prefixed("temporal_vae.", "temporal_vae/") for rule in CAUSAL_VAE),
    Rule("shift", "shift", Layout.FLAT),
    Rule("scale", "scale", Layout.FLAT),
]
