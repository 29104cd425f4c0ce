"""From a prompt and drawn trajectories to an mp4: `python sample.py --help`."""

from tora_jax.cli import sample

if __name__ == "__main__":
    sample()
