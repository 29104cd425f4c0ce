"""Sprites: clips of moving shapes with exact tracks, flow, masks and captions, drawn from a seed.

  python -m tora_jax.data.sprites --out DIR           writes the TFDS set (ArrayRecord, no TensorFlow)

A clip has 1 to 3 objects (shapes and digits, plain or textured) that slide over a still, textured background,
along smooth or sharp paths, at changing speed, with pauses, in front of each other. They neither turn nor grow,
so tracks, labels and flow are exact. `make_clip` needs no file: clip `index` of a split is the same everywhere.
"""
