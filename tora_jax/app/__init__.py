"""The web page: `python -m tora_jax.app`."""
