"""From raw videos to training shards, on one machine or a cluster. docs/curate.md defines every score.

python -m tora_jax.data.curate --config configs/curate.py --input 'videos/**/*.mp4' --output DIR
"""
