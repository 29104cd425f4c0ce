"""A job of train.py: its config, and the models that it computes with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import optax
from flax import linen as nn
from jaxtyping import Array

from tora_jax.errors import UserError
from tora_jax.training import lora, optim
from tora_jax.training.losses import Loss, tora_loss, vae_loss

NAMES = ("vae", "motion_vae", "tora")


@dataclasses.dataclass(frozen=True)
class Job:
    """What trains, and what it minimises.

    Attributes:
      config: plain nested dict, of configs/vae.py, configs/motion_vae.py or configs/tora.py.
      backbone: a module of `backbones`.
      parts: part -> module.

    Raises:
      UserError: there is no job of that name.
    """

    config: Mapping[str, Any]
    backbone: ModuleType
    parts: Mapping[str, nn.Module]

    def __post_init__(self):
        if self.name not in NAMES:
            raise UserError(f"job {self.name!r}: there are {', '.join(NAMES)}")

    @property
    def name(self) -> str:
        """Of NAMES."""
        return self.config["job"]

    @property
    def adapts(self) -> bool:
        """Whether an adapter of the parameters trains in their place (LoRA)."""
        return bool(self.config["lora"]["rank"])

    def split(self, params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What trains, and what stays as it is, for `combine`: two flat dicts, path -> leaf.

        Args:
          params: part -> parameter tree.

        Raises:
          UserError: a pattern of the config never wins, nothing trains, or the rank is too high.
        """
        if not self.adapts:
            return optim.split(params, self.config["train"], self.backbone.BUFFERS)
        settings = self.config["lora"]
        adapter = lora.init(params, settings["kernels"], settings["rank"], jax.random.key(self.config["seed"]))
        return adapter, optim.flatten(params)

    def combine(self, trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters of all parts in use."""
        return lora.merge(trained, frozen, self.config["lora"]["alpha"]) if self.adapts else optim.join(trained, frozen)

    def optimizer(self, trained: Mapping[str, Any]) -> optax.GradientTransformation:
        """As `optim.make`."""
        return optim.make(self.config["optim"], trained, self.config["steps"])

    def loss(self) -> Loss:
        """What the job minimises, of the parameters that `combine` gives."""
        if self.name == "tora":
            return tora_loss(self.backbone, self.parts, self.config["loss"])
        return vae_loss(self.parts[self.name], self.name, self.config["loss"])

    def used_parts(self, made: Mapping[str, Any] | None) -> set[str]:
        """The parts that a step computes with.

        Args:
          made: what the batches were precomputed with; None = they come from clips.
        """
        if self.name != "tora":
            return {self.name}
        vaes, t5 = made is None, made is None or made["text"] == "ids"
        return {"tora", *(("vae", self.backbone.MOTION) if vaes else ()), *(("t5",) if t5 else ())}

    def count_tokens(self, batch: Mapping[str, Array]) -> int:
        """What a step works on: the patches that the denoiser sees, or the latent cells of an autoencoder."""
        samples, frames = batch["frame_mask"].shape
        if "latent_mean" in batch:
            height, width = batch["latent_mean"].shape[2:4]
        else:
            pixels = batch["maps" if self.name == "motion_vae" else "video"]
            height, width = (side // self.parts["vae"].space_factor for side in pixels.shape[2:4])
        patch = self.parts["tora"].patch if self.name == "tora" else 1
        return samples * frames * -(-height // patch) * -(-width // patch)
