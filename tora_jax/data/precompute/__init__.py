"""Caches what frozen models make of clips, so that they need not sit beside the trainer.

  python -m tora_jax.data.precompute --source DIR --weights RELEASE --out DIR --motion sparse --variants 4

The cache holds the posterior of each clip's latents, the posteriors of the latents of several independently drawn
motion maps, and the caption or its embedding. It is a TFDS folder in ArrayRecord, which `sources` of a training config
takes like any other; `precompute.json` in it says what it was made with.

The work is done in shards, in a folder beside the result. A run that was interrupted goes on where it stopped, and the
result appears when it is whole.
"""
