"""Guidance: how the passes with and without caption and trajectory become one prediction."""

from __future__ import annotations

from jaxtyping import Array, Float


def guide(
    predictions: Float[Array, "passes b t h w c"],
    guidance: float | Array,
    trajectory_guidance: float | Array = 1.0,
) -> Float[Array, "b t h w c"]:
    """Combines up to three passes: v(c, tau); v(0, tau), without the caption; v(c, 0), without the trajectory.

    v = v(0, tau) + g [v(c, tau) - v(0, tau)] + (w - 1) [v(c, tau) - v(c, 0)]

    Args:
      predictions: the passes in that order; one pass is returned as it is, two leave out the last term.
      guidance: g, 1 = no guidance.
      trajectory_guidance: w, 1 = no extra weight on the trajectory.
    """
    full = predictions[0]
    if len(predictions) == 1:
        return full
    no_text = predictions[1]
    v = no_text + guidance * (full - no_text)
    if len(predictions) == 3:
        v = v + (trajectory_guidance - 1) * (full - predictions[2])
    return v
