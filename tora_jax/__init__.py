"""Tora, a trajectory-controlled video diffusion transformer, in JAX and Flax."""
