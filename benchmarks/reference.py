"""A public denoiser in PyTorch: one pass for each line on stdin, its seconds as a line on stdout.

Open-Sora v1.2's STDiT3, or CogVideoX of diffusers. Started by benchmarks/step.py; nothing of ours is imported. What
STDiT3 imports and a pass on one device can do without is stood in for: timm's MLP and xformers' attention by the same
arithmetic in plain PyTorch, mmengine's registry and colossalai's checkpoints by nothing.
"""

import json
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn


def stand_in(name: str, **attributes) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], child, module)
    return module


class Mlp(nn.Module):
    def __init__(self, in_features, hidden_features, out_features=None, act_layer=nn.GELU, drop=0):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, out_features or in_features)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class BlockDiagonalMask:
    @staticmethod
    def from_seqlens(queries, keys):
        return list(zip(queries, keys, strict=True))


def memory_efficient_attention(q, k, v, p=0.0, attn_bias=None):
    """[1, length, heads, width]; `attn_bias` has the lengths of the blocks."""
    outs, at_q, at_k = [], 0, 0
    for queries, keys in attn_bias or [(q.shape[1], k.shape[1])]:
        cut = (q[:, at_q : at_q + queries], k[:, at_k : at_k + keys], v[:, at_k : at_k + keys])
        out = nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in cut))
        outs.append(out.transpose(1, 2))
        at_q, at_k = at_q + queries, at_k + keys
    return torch.cat(outs, 1)


class Registry:
    def register_module(self, *_):
        return lambda thing: thing


def load(folder: Path):
    """The module opensora.models.stdit.stdit3 of a checkout."""
    for name in ("opensora", "opensora.models", "opensora.models.stdit", "opensora.models.layers"):
        stand_in(name).__path__ = [str(folder.joinpath(*name.split(".")))]
    stand_in("opensora.acceleration").__path__ = [str(folder / "opensora/acceleration")]
    stand_in("opensora.utils")
    stand_in("opensora.utils.ckpt_utils", load_checkpoint=None)
    stand_in("opensora.registry", MODELS=Registry())
    stand_in("timm")
    stand_in("timm.models")
    stand_in("timm.models.layers", DropPath=nn.Identity)
    stand_in("timm.models.vision_transformer", Mlp=Mlp)
    fmha = types.SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask)
    stand_in("xformers")
    stand_in("xformers.ops", memory_efficient_attention=memory_efficient_attention, fmha=fmha)
    import opensora.models.stdit.stdit3 as stdit3

    return stdit3


def open_sora(folder: str, sizes: dict) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    """A fresh STDiT3 and a pass of it."""
    stdit3 = load(Path(folder))
    shape, _ = sizes["variant"].split("/")
    depth, width, heads = map(int, {"XL": "28x1152x16", "3B": "28x1872x26"}.get(shape, shape).split("x"))
    length = sizes["text"][1]
    config = stdit3.STDiT3Config(depth=depth, hidden_size=width, num_heads=heads, model_max_length=length)
    model = stdit3.STDiT3(config).to(getattr(torch, sizes["dtype"])).eval()
    batch, frames, height, width, channels = sizes["latents"]
    x = torch.randn(batch, channels, frames, height, width)
    text, mask = torch.randn(batch, 1, length, 4096), torch.ones(batch, length, dtype=torch.long)
    ones = torch.ones(batch)
    told = {"fps": 24 * ones, "height": sizes["height"] * ones, "width": sizes["width"] * ones}
    return model, lambda: model(x, 500 * ones, text, mask, **told)


def diffusers(_, sizes: dict) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    """A fresh CogVideoX of diffusers and a pass of it; rotary tables are made once, as its pipelines do."""
    from diffusers import CogVideoXTransformer3DModel
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    batch, frames, height, width, _ = sizes["latents"]
    (_, length, text_width), dtype = sizes["text"], getattr(torch, sizes["dtype"])
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(
            num_attention_heads=sizes["heads"],
            attention_head_dim=sizes["head_width"],
            num_layers=sizes["depth"],
            in_channels=sizes["channels"],
            text_embed_dim=text_width,
            max_text_seq_length=length,
            use_rotary_positional_embeddings=True,
        )
    model = model.to(dtype).to_empty(device="cpu").eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.02)
    rows, columns = height // 2, width // 2
    rotary = get_3d_rotary_pos_embed(sizes["head_width"], ((0, 0), (rows, columns)), (rows, columns), frames)
    x = torch.randn(batch, frames, sizes["channels"], height, width, dtype=dtype)
    text, time = torch.randn(batch, length, text_width, dtype=dtype), torch.full((batch,), 500)
    return model, lambda: model(x, text, time, image_rotary_emb=rotary, return_dict=False)[0]


def main(which: str, sizes: dict) -> None:
    """`which`: "diffusers", or a checkout of Open-Sora."""
    model, run = (diffusers if which == "diffusers" else open_sora)(which, sizes)
    for _ in sys.stdin:
        start = time.perf_counter()
        with torch.set_grad_enabled(sizes["gradients"]):
            out = run()
            if sizes["gradients"]:
                model.zero_grad()
                out.square().mean().backward()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
