"""The checkpoints that can be converted, by their name on the command line."""

from __future__ import annotations

from convert_weights.tables import (
    aesthetic,
    autoencoder_kl,
    clip,
    cogvideox_vae,
    i3d,
    raft,
    stdit3,
    t5,
    tora_cogvideox,
    vae,
)

CHECKPOINT_TYPES = {
    one.name: one
    for one in (
        stdit3.CHECKPOINT_TYPE,
        vae.CHECKPOINT_TYPE,
        autoencoder_kl.CHECKPOINT_TYPE,
        t5.CHECKPOINT_TYPE,
        raft.CHECKPOINT_TYPE,
        i3d.CHECKPOINT_TYPE,
        clip.CHECKPOINT_TYPE,
        aesthetic.CHECKPOINT_TYPE,
        tora_cogvideox.CHECKPOINT_TYPE,
        cogvideox_vae.CHECKPOINT_TYPE,
    )
}
