"""Motion maps: tracks -> displacement maps -> RGB; and dense flow -> tracks.

A displacement map is float32 [t, h, w, 2], (u, v) in pixels. The displacement from frame j - 1 to frame j stands in
frame j, at the point of frame j - 1; frame 0 is zero (Tora, section 3.2). A Gaussian of peak 1 spreads each
displacement. A motion map is its picture, by the colour wheel. In shapes, n counts trajectories.
"""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt8

Maps = Float[np.ndarray, "t h w 2"]

RELEASED_SIGMA, RELEASED_SIZE = 10.0, 99  # pixels, at the released code's 480x720


def blur_kernel(height: int, width: int) -> tuple[float, int]:
    """(sigma, radius) in pixels of the Gaussian for a frame size.

    Scales the released code's blur at 480x720 with the shorter side, so that a trajectory controls the same share of
    the picture at each resolution. The kernel has 2 * radius + 1 taps a side.
    """
    scale = min(height, width) / 480
    return RELEASED_SIGMA * scale, max(round((RELEASED_SIZE * scale - 1) / 2), 0)


def displacement_maps(
    tracks: Float[np.ndarray, "n t 2"],
    height: int,
    width: int,
    visible: Bool[np.ndarray, "n t"] | None = None,
) -> Maps:
    """Makes the blurred displacement maps of tracks; tracks that meet add up.

    A point between pixels is shared bilinearly by its four neighbours: a shift of the track shifts the map smoothly,
    and a shift by k whole pixels by exactly k pixels. At the border the blur reflects (without repeating the edge
    pixel), as in the released code.

    Args:
      tracks: (x, y) in 0..1 of the frame; pixel = x * width - 0.5. No track (n = 0) gives zero maps.
      height, width: of the maps, in pixels.
      visible: leaves out each displacement with False at either end.

    Returns:
      float32 [t, height, width, 2]; frame 0 is zero.
    """
    sigma, radius = blur_kernel(height, width)
    # The last bit of a sum depends on its order; a sorted order gives any order of tracks the same bits.
    order = np.lexsort(tracks.reshape(len(tracks), -1).T) if tracks.size else slice(None)
    pixels = tracks[order].astype(np.float64) * (width, height) - 0.5
    moves = np.diff(pixels, axis=1)
    if visible is not None:
        moves = moves * (visible[:, 1:] & visible[:, :-1])[order][..., None]
    return _place(moves, pixels[:, :-1], height, width, sigma, radius)


def released_maps(points: Int[np.ndarray, "n t 2"], height: int, width: int) -> Maps:
    """The released code's maps (sat/utils/flow_utils.py), for comparison with `displacement_maps`.

    Takes whole pixels and a 99x99 kernel of sigma 10 at every size. A later trajectory replaces an earlier one on a
    shared pixel, even if the later one stands still.

    Args:
      points: (x, y) in pixels, `trajectory.released_points` of each trajectory.
      height, width: of the maps, in pixels.

    Returns:
      float32 [t, height, width, 2]; frame 0 is zero.

    Raises:
      IndexError: a displacement starts outside the frame; the released code raises it too.
    """
    start = points[:, :-1]
    if start.size and (start.min() < 0 or (start >= (width, height)).any()):
        raise IndexError(f"a point lies outside the {width}x{height} frame")
    moves = np.diff(points, axis=1)
    same = (start[:, None] == start[None]).all(-1)  # [n, n, t - 1]
    replaced = (same & np.triu(np.ones(same.shape[:2], bool), 1)[..., None]).any(1)
    moves = np.where(replaced[..., None], 0, moves)
    return _place(moves, start, height, width, RELEASED_SIGMA, RELEASED_SIZE // 2)


def largest_norm(flow: Maps) -> float:
    """The longest displacement of a whole video, in pixels: the `max_norm` that its segments share."""
    return float(max((np.hypot(*f[_moving(f)].T).max(initial=0) for f in flow), default=0))


def flow_to_color(flow: Maps, max_norm: float | int | None = None) -> Float[np.ndarray, "t h w 3"]:
    """Paints displacements by the colour wheel, as the models take them: float32 in [-1, 1], white (1) = no motion.

    Args:
      flow: displacements in pixels.
      max_norm: the length from which on displacements have full colour; None = the longest of `flow`. A video made
        in segments passes `largest_norm` of the whole.
    """
    return _paint(flow, max_norm, lambda color: 2 * color - 1, np.float32)


def flow_to_rgb(flow: Maps, max_norm: float | int | None = None) -> UInt8[np.ndarray, "t h w 3"]:
    """`flow_to_color` as uint8 0..255, rounded down as torchvision's flow_to_image does."""
    return _paint(flow, max_norm, lambda color: np.floor(255 * color), np.uint8)


def follow(
    flow: Float[np.ndarray, "_ h w 2"], points: Float[np.ndarray, "n 2"]
) -> tuple[Float[np.ndarray, "n t 2"], Bool[np.ndarray, "n t"]]:
    """Carries points through dense flow, sampled bilinearly at their sub-pixel positions.

    Args:
      flow: (u, v) in pixels from frame j to frame j + 1; one frame fewer than the video.
      points: (x, y) in 0..1 in the first frame.

    Returns:
      tracks float32 [n, frames, 2], (x, y) in 0..1, and visible bool [n, frames]: False once the point has left the
      picture; it then rests where it crossed the edge.
    """
    height, width = flow.shape[1:3]
    size = np.array([width, height])
    at = np.asarray(points, np.float64) * size - 0.5
    seen = ((points >= 0) & (points <= 1)).all(-1)
    path, visible = [at], [seen]
    for frame in flow:
        at = np.where(seen[:, None], at + _sample(frame, at), at)
        seen = seen & ((at >= -0.5) & (at <= size - 0.5)).all(-1)
        at = np.clip(at, -0.5, size - 0.5)
        path.append(at)
        visible.append(seen)
    tracks = (np.stack(path, axis=1) + 0.5) / size
    return tracks.astype(np.float32), np.stack(visible, axis=1)


@functools.lru_cache(maxsize=8)
def _blur_matrix(size: int, sigma: float, radius: int) -> Float[np.ndarray, "size size"]:
    """Row j is the blur of a 1 at pixel j along an axis of `size` pixels; reflected at both ends."""
    matrix = np.zeros((size, size))
    pixel, period = np.arange(size), max(2 * (size - 1), 1)
    for tap in range(-radius, radius + 1):
        source = (pixel + tap) % period
        source = np.minimum(source, period - source) if size > 1 else np.zeros_like(pixel)
        matrix[source, pixel] += np.exp(-0.5 * (tap / sigma) ** 2)
    return matrix.astype(np.float32)


def _place(
    moves: Shaped[np.ndarray, "n t 2"],
    pixels: Shaped[np.ndarray, "n t 2"],
    height: int,
    width: int,
    sigma: float,
    radius: int,
) -> Float[np.ndarray, "t+1 h w 2"]:
    """Adds each move, blurred, around its pixel, behind a zero frame; touches only the kernel's window."""
    maps = np.zeros((moves.shape[1] + 1, height, width, 2), np.float32)
    for n, t in np.argwhere(moves.any(-1)):
        rows, y = _bump(pixels[n, t, 1], height, sigma, radius)
        columns, x = _bump(pixels[n, t, 0], width, sigma, radius)
        maps[t + 1, rows, columns] += (y[:, None] * x)[..., None] * moves[n, t].astype(np.float32)
    return maps


def _bump(
    position: float | np.integer, size: int, sigma: float, radius: int
) -> tuple[slice, Float[np.ndarray, " window"]]:
    """The window of a point's blur along one axis, and its values (the Gaussian is separable)."""
    matrix = _blur_matrix(size, sigma, radius)
    position = min(max(position, 0), size - 1)
    left = int(position)
    share = np.float32(position - left)
    window = slice(max(left - radius, 0), left + radius + 2)
    return window, (1 - share) * matrix[left, window] + share * matrix[min(left + 1, size - 1), window]


@functools.cache
def _color_wheel() -> Float[np.ndarray, "55 3"]:
    """The 55 colours of Baker et al. 2007, in 0..1: steps between six corners of the colour cube."""
    corners = np.array([(1, 0, 0), (1, 1, 0), (0, 1, 0), (0, 1, 1), (0, 0, 1), (1, 0, 1), (1, 0, 0)])
    steps = (15, 6, 4, 11, 13, 6)
    arcs = [
        start + (end - start) * np.floor(255 * np.arange(n) / n)[:, None] / 255
        for start, end, n in zip(corners[:-1], corners[1:], steps, strict=True)
    ]
    return np.concatenate(arcs).astype(np.float32)


def _moving(frame: Float[np.ndarray, "h w 2"]) -> Bool[np.ndarray, "h w"]:
    return (frame[..., 0] != 0) | (frame[..., 1] != 0)


def _paint(flow: Maps, max_norm: float | int | None, encode, dtype):
    """Colours frame by frame, and only where something moves: most of a sparse map is white."""
    max_norm = largest_norm(flow) if max_norm is None else max_norm
    wheel = _color_wheel()
    pictures = np.full((*flow.shape[:3], 3), encode(1), dtype)
    for picture, frame in zip(pictures, flow, strict=True):
        moving = _moving(frame)
        uv = frame[moving] / np.float32(max_norm + np.finfo(np.float32).eps)
        norm = np.minimum(np.sqrt(np.square(uv).sum(-1, keepdims=True)), 1)
        # The angle of (-u, -v), on 0..54: the wheel's last colour and its first are one step apart.
        angle = (np.arctan2(-uv[:, 1:], -uv[:, :1]) / np.float32(np.pi) + 1) / 2 * (len(wheel) - 1)
        low = np.floor(angle).astype(int)
        share = angle - low
        hue = (1 - share) * wheel[low[:, 0]] + share * wheel[(low[:, 0] + 1) % len(wheel)]
        picture[moving] = encode(1 - norm * (1 - hue))
    return pictures


def _sample(frame: Float[np.ndarray, "h w 2"], at: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
    """Bilinear values at pixel positions (x, y); the edge goes on outside."""
    last = np.array(frame.shape[1::-1]) - 1
    at = np.clip(at, 0, last)
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, last)
    (fx, fy), (x0, y0), (x1, y1) = ((at - low).T[..., None], low.T, high.T)
    top = (1 - fx) * frame[y0, x0] + fx * frame[y0, x1]
    bottom = (1 - fx) * frame[y1, x0] + fx * frame[y1, x1]
    return (1 - fy) * top + fy * bottom
