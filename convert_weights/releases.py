"""The whole releases that can be made of checkpoints: what goes in, and what the config says of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from tora_jax.configs import model_sizes
from tora_jax.configs import tora as tora_config

from convert_weights.plan import Part
from convert_weights.tables import tora_cogvideox
from tora_jax.backbones import opensora
from tora_jax.errors import UserError
from tora_jax.models.tora import Tora

Config = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReleaseType:
    """A whole release folder.

    Attributes:
      name: on the command line.
      checkpoints: name of a checkpoint -> its type.
      denoiser: the checkpoint whose parameters go into the part "tora".
      prefix: of their paths in there.
      whole: checkpoints -> the parts of the folder.
      config: checkpoints -> the folder's config.
      init: (key, config) -> the parameters of the part "tora".
      lacks: of checkpoints: do they lack some of these? They are new then.
      notes: checkpoints -> what the report says beside.
    """

    name: str
    checkpoints: Mapping[str, str]
    denoiser: str
    prefix: str = ""
    whole: Callable[[Mapping[str, Part]], dict[str, Part]] = dict
    config: Callable[[Mapping[str, Part]], Config]
    init: Callable[[jax.Array, Config], Any]
    lacks: Callable[[Mapping[str, Part]], bool] = lambda parts: True
    notes: Callable[[Mapping[str, Part]], Config] = lambda parts: {}

    def make_config(self, parts: Mapping[str, Part]) -> Config:
        """The config of the folder.

        Raises:
          UserError: the text encoder and the denoiser do not belong together.
        """
        config = self.config(parts)
        inner = next(fields for fields in config["tora"].values() if isinstance(fields, dict))
        if config["t5"]["width"] != inner["caption_channels"]:
            raise UserError(
                f"{parts['t5'].source.name}: gives features of width {config['t5']['width']}, the denoiser wants "
                f"{inner['caption_channels']}; take the text encoder that it was trained with"
            )
        return config


# ----------------------------------------------------------------------------------------------------------
# On Open-Sora
# ----------------------------------------------------------------------------------------------------------


def _opensora_whole(parts: Mapping[str, Part]) -> dict[str, Part]:
    """The motion VAE starts as the video VAE, unless it has a checkpoint of its own."""
    motion = parts.get("motion_vae", parts["vae"])
    return {"tora": parts["stdit"], "vae": parts["vae"], "motion_vae": motion, "t5": parts["t5"]}


def _opensora_config(parts: Mapping[str, Part]) -> Config:
    """That of configs/tora.py with the sizes of the checkpoints."""
    config, whole = tora_config.get_config().to_dict(), _opensora_whole(parts)
    config["tora"]["stdit"] |= parts["stdit"].section()
    config |= {part: whole[part].section() for part in ("vae", "motion_vae")}
    config["t5"] |= parts["t5"].section()
    return config


def _opensora_init(key: jax.Array, config: Config) -> Any:
    model = Tora(**config["tora"])
    args, options = opensora.dummies({"tora": model})["tora"]
    return model.init(key, *args, **options)["params"]


OPENSORA = ReleaseType(
    name="tora",
    checkpoints={"stdit": "stdit3", "vae": "vae", "motion_vae": "vae", "t5": "t5"},
    denoiser="stdit",
    prefix="stdit/",
    whole=_opensora_whole,
    config=_opensora_config,
    init=_opensora_init,
    notes=lambda parts: {"motion_vae": "converted" if "motion_vae" in parts else "started from the video VAE"},
)


# ----------------------------------------------------------------------------------------------------------
# On CogVideoX
# ----------------------------------------------------------------------------------------------------------


def _cogvideox_config(parts: Mapping[str, Part]) -> Config:
    """That of configs/tora_cogvideox.py with the sizes of the checkpoints.

    The front end is the one that the files are of. Files for image to video are of the authors' own, whatever their
    form: it alone ever had them.
    """
    sections = {name: part.section() for name, part in parts.items()}
    inner = sections["tora"]["cogvideox"]
    i2v = inner["in_channels"] > inner["out_channels"]
    front_end = "sat" if i2v else sections["tora"].get("front_end", "diffusers")
    config = model_sizes.cogvideox(i2v=i2v, front_end=front_end)
    config["tora"] |= sections["tora"] | {"cogvideox": config["tora"]["cogvideox"] | inner}
    return config | {part: config[part] | sections[part] for part in ("vae", "t5")}


COGVIDEOX = ReleaseType(
    name="tora_cogvideox",
    checkpoints={"tora": "tora_cogvideox", "vae": "cogvideox_vae", "t5": "t5"},
    denoiser="tora",
    config=_cogvideox_config,
    init=lambda key, config: tora_cogvideox.init(key, config["tora"]),
    lacks=lambda parts: len(parts["tora"].kind.shapes(parts["tora"].fields)) > len(parts["tora"].moves),
)
