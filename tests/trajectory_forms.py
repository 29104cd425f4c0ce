"""Writers of the trajectory files of other tools, for the tests and for `benchmarks.trajectory_files`.

Paths are float64 [n, t, 2], (x, y) in 0..1 of the frame; a size is (width, height) in pixels; `seen` is bool [n, t].
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Kind(NamedTuple):
    """A kind of file.

    Attributes:
      write: (folder, paths in pixels, size, seen) -> the file.
      said: size -> what a person has to say, as `trajectory_hints.hints` takes it.
      several: more than one path is in it.
      hidden: it says which points are hidden.
      steps: the number of points that a path has; None = any.
    """

    write: Callable[[Path, np.ndarray, tuple[int, int], np.ndarray], Path]
    said: Callable[[tuple[int, int]], dict[str, str]]
    several: bool = True
    hidden: bool = False
    steps: int | None = None


def canvas(size: tuple[int, int], **more: str) -> dict[str, str]:
    return {"canvas": f"{size[0]}x{size[1]}", **more}


def dicts(points: np.ndarray) -> list[dict[str, float]]:
    return [{"x": float(x), "y": float(y)} for x, y in points]


def lines(rows: list, mark: str = ",", head: str = "") -> str:
    return head + "".join(mark.join(map(str, row)) + "\n" for row in rows)


def save(path: Path, content: Any) -> Path:
    """Text, bytes, an array (.npy) or arrays by name (.npz)."""
    if isinstance(content, np.ndarray):
        path = path.with_suffix(".npy")
        np.save(path, content, allow_pickle=True)
    elif isinstance(content, dict):
        path = path.with_suffix(".npz")
        np.savez(path, **content)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def filled(pixels: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """What trackers write for hidden points: zeros."""
    return np.where(seen[..., None], pixels, 0)


def one(content: Callable[[np.ndarray], Any], name: str = "path.txt", **more: str) -> Kind:
    """A kind of one path, whose pixels `content` takes."""
    return Kind(
        lambda folder, pixels, size, seen: save(folder / name, content(pixels[0])),
        lambda size: canvas(size, **more),
        several=False,
    )


def many(content: Callable[[np.ndarray], Any], name: str = "paths.json", **more: str) -> Kind:
    return Kind(
        lambda folder, pixels, size, seen: save(folder / name, content(pixels)), lambda size: canvas(size, **more)
    )


def seen_by(content: Callable[[np.ndarray, np.ndarray], Any], name: str = "tracks.csv", **more: str) -> Kind:
    """A kind that says which points are hidden."""
    return Kind(
        lambda folder, pixels, size, seen: save(folder / name, content(pixels, seen)),
        lambda size: canvas(size, **more),
        hidden=True,
    )


def fractions(content: Callable[[np.ndarray, np.ndarray], Any], name: str) -> Kind:
    """A kind that has its own canvas: fractions of the frame."""
    return Kind(
        lambda folder, pixels, size, seen: save(folder / name, content(pixels / size, seen)),
        lambda size: {},
        hidden=True,
    )


def wan_move(folder: Path, pixels: np.ndarray, size: tuple[int, int], seen: np.ndarray) -> Path:
    save(folder / "wan_visibility.npy", seen.T[None])
    return save(folder / "wan_tracks.npy", pixels.swapaxes(0, 1)[None].astype(np.float32))


def tap_vid_3d(folder: Path, pixels: np.ndarray, size: tuple[int, int], seen: np.ndarray) -> Path:
    depth = 2 + seen.cumsum(1)[..., None].astype(np.float64)  # metres
    focal, middle = np.array([300.0, 310.0]), np.array(size) / 2
    points = np.concatenate([(pixels - middle) / focal * depth, depth], -1).swapaxes(0, 1)
    return save(
        folder / "tapvid3d.npz",
        {"tracks_XYZ": points, "visibility": seen.T, "fx_fy_cx_cy": np.concatenate([focal, middle])},
    )


def torch_save(data: Any) -> bytes:
    """What torch.save writes of plain Python."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(data, 2))
        archive.writestr("archive/byteorder", b"little")
    return file.getvalue()


def ati(pixels: np.ndarray, seen: np.ndarray) -> bytes:
    points = np.concatenate([filled(pixels, seen), seen[..., None]], -1)[:, :, None]
    file = io.BytesIO()
    np.savez(file, array=(8 * points).astype(np.float32))
    return torch_save(file.getvalue())


def after_effects(folder: Path, pixels: np.ndarray, size: tuple[int, int], seen: np.ndarray) -> Path:
    head = f"Adobe After Effects 8.0 Keyframe Data\n\n\tUnits Per Second\t24\n\tSource Width\t{size[0]}\n"
    head += f"\tSource Height\t{size[1]}\n\tSource Pixel Aspect Ratio\t1\n\n"
    columns = "\tFrame\tX pixels\tY pixels\tZ pixels\n"
    text = head + f"Transform\tAnchor Point\n{columns}" + lines([["", 0, 1, 2, 0]], "\t")
    for points in pixels:
        text += f"\nTransform\tPosition\n{columns}" + lines([["", i, *xy, 0] for i, xy in enumerate(points)], "\t")
    return save(folder / "keyframes.txt", text + "\n\nEnd of Keyframe Data\n")


def mot(pixels: np.ndarray, seen: np.ndarray) -> str:
    n, t = seen.shape
    rows = [[i, k] for i in range(t) for k in range(n) if seen[k, i]]
    return lines([[i + 1, k + 1, *(pixels[k, i] - (15, 30)), 30, 60, 1, 1, 1] for i, k in rows])


def supervision(pixels: np.ndarray, seen: np.ndarray) -> str:
    head = "x_min,y_min,x_max,y_max,class_id,confidence,tracker_id,frame\n"
    n, t = seen.shape
    rows = [[k, i] for i in range(t) for k in range(n) if seen[k, i]]
    return lines([[*(pixels[k, i] - 9), *(pixels[k, i] + 9), 0, 0.9, k + 1, i] for k, i in rows], head=head)


def cotracker_nuke(pixels: np.ndarray, seen: np.ndarray) -> str:
    head = "frame,point_id,x,y,visible,confidence,is_reference_frame\n"
    n, t = seen.shape
    rows = [[i, k, *pixels[k, i], bool(seen[k, i]), 0.9, i == 0] for i in range(t) for k in range(n)]
    return lines(rows, head=head)


def deep_lab_cut(pixels: np.ndarray, seen: np.ndarray) -> str:
    n, t = seen.shape
    names = [name for k in range(n) for name in [f"part{k}"] * 3]
    rows = [["scorer", *["net"] * 3 * n], ["bodyparts", *names], ["coords", *["x", "y", "likelihood"] * n]]
    sure = np.where(seen, 0.99, 0.1)
    rows += [[i, *np.column_stack([pixels[:, i], sure[:, i]]).ravel()] for i in range(t)]
    return lines(rows)


def element(kind: str, frame: int, outside: int = 0, **more: Any) -> str:
    """A shape of CVAT's."""
    words = {"frame": frame, "keyframe": 1, "outside": outside, "occluded": 0, **more}
    return f"<{kind} " + " ".join(f'{key}="{value}"' for key, value in words.items()) + f"></{kind}>"


def box(frame: int, x: float, y: float, **more: Any) -> str:
    return element("box", frame, xtl=x - 20, ytl=y - 30, xbr=x + 20, ybr=y + 30, **more)


def cvat_text(tracks: list[list[str]], size: tuple[int, int], last: int) -> str:
    found = "".join(f'<track id="{i}" label="a">{"".join(each)}</track>' for i, each in enumerate(tracks))
    original = f"<original_size><width>{size[0]}</width><height>{size[1]}</height></original_size>"
    meta = f"<meta><task><start_frame>0</start_frame><stop_frame>{last}</stop_frame>{original}</task></meta>"
    return f'<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version>{meta}{found}</annotations>'


def cvat(folder: Path, pixels: np.ndarray, size: tuple[int, int], seen: np.ndarray) -> Path:
    """Boxes and points in turns."""
    tracks = []
    for k, (points, shown) in enumerate(zip(pixels, seen, strict=True)):
        there = [
            element("points", i, 1 - shown[i], points=f"{x},{y}") if k % 2 else box(i, x, y, outside=1 - shown[i])
            for i, (x, y) in enumerate(points)
        ]
        tracks.append(there)
    return save(folder / "annotations.xml", cvat_text(tracks, size, len(seen[0]) - 1))


def own(folder: Path, pixels: np.ndarray, size: tuple[int, int], seen: np.ndarray) -> Path:
    return save(folder / "own.json", json.dumps({"canvas": size, "trajectories": pixels.tolist()}))


def blender(folder: Path, pixels: np.ndarray, size: tuple[int, int], seen: np.ndarray) -> Path:
    rows = [[i + 1, x, size[1] - y] for i, (x, y) in enumerate(pixels[0])]
    return save(folder / "track.csv", lines(rows, ";", "frame;x;y\n"))


def tap_vid(parts: np.ndarray, seen: np.ndarray) -> bytes:
    clip = {"video": np.zeros((parts.shape[1], 2, 2, 3), np.uint8), "points": parts.astype(np.float32)}
    return pickle.dumps({"boat": {**clip, "occluded": ~seen}})


def objects(pixels: np.ndarray, seen: np.ndarray) -> np.ndarray:
    return np.array({"tracks": pixels.swapaxes(0, 1)[None], "visibility": seen.T[None]}, dtype=object)


KINDS = {
    "text (Tora, MotionCtrl)": one(lambda p: lines(p.tolist())),
    "text with spaces": one(lambda p: lines(p.tolist(), " ")),
    "text with decimal commas": one(lambda p: lines(p.tolist(), ";").replace(".", ",")),
    "table x,y": one(lambda p: lines(p.tolist(), head="x,y\n"), "path.csv"),
    "table frame,x,y": one(
        lambda p: lines([[1001 + i, *xy] for i, xy in enumerate(p.tolist())], "\t", "Frame\tX\tY\n"), "path.tsv"
    ),
    "KJNodes, one spline": one(lambda p: json.dumps(dicts(p)), "spline.json"),
    "KJNodes, a text in a text": one(lambda p: json.dumps(json.dumps(dicts(p))), "spline.json"),
    "KJNodes, single quotes": one(lambda p: str(dicts(p)), "spline.json"),
    "CogVideoXWrapper, list of texts": many(lambda p: json.dumps([json.dumps(dicts(each)) for each in p])),
    "KJNodes, LTX-Video, splines": many(lambda p: json.dumps([dicts(each) for each in p])),
    "DragNUWA": many(lambda p: json.dumps(p.tolist())),
    "DragAnything": many(
        lambda p: json.dumps(
            {str(i): {"comment": "", "mask_name": "m.jpg", "trajectory": each.tolist()} for i, each in enumerate(p)}
        )
    ),
    "our own JSON": Kind(own, lambda size: {}),
    "Wan-Move, two files": Kind(wan_move, canvas, hidden=True),
    "CoTracker .npz [1, t, n, 2]": seen_by(
        lambda p, seen: {"tracks": filled(p, seen).swapaxes(0, 1)[None], "visibility": seen.T[None]}, "tracks.npz"
    ),
    "pickled objects in .npy": seen_by(objects, "tracks.npy"),
    "Diffusion as Shader": seen_by(
        lambda p, seen: objects(np.concatenate([p, 3 + 0 * p[..., :1]], -1), seen), "tracks.npy", axes="tnxyz"
    ),
    "CoTracker [t, n, 2]": many(lambda p: p.swapaxes(0, 1), "tracks.npy", axes="tn"),
    "NaN where hidden [t, n, 2]": seen_by(
        lambda p, seen: np.where(seen[..., None], p, np.nan).swapaxes(0, 1), "tracks.npy", axes="tn"
    ),
    "TAPIR [n, t, 2]": many(lambda p: p, "tracks.npy", axes="nt"),
    "TAPNext [t, n, 2], y before x": many(lambda p: p.swapaxes(0, 1)[..., ::-1], "tracks.npy", axes="tnyx"),
    "SpaTracker [t, n, 3]": many(
        lambda p: np.concatenate([p, 0.5 + 0 * p[..., :1]], -1).swapaxes(0, 1), "tracks.npy", axes="tnxyz"
    ),
    "TAP-Vid, pickle": fractions(tap_vid, "tapvid.pkl"),
    "TAP-Vid Kinetics, CSV": fractions(
        lambda p, seen: lines(
            [["clip", 10, 20, *np.column_stack([q, ~s]).ravel().tolist()] for q, s in zip(p, seen, strict=True)]
        ),
        "tapvid.csv",
    ),
    "TAPVid-3D .npz": Kind(tap_vid_3d, canvas, hidden=True),
    "PointOdyssey .npz": seen_by(
        lambda p, seen: {"trajs_2d": p.swapaxes(0, 1), "visibilities": np.where(seen, 1, 2).T}, "annotations.npz"
    ),
    "Kubric .npz": seen_by(lambda p, seen: {"target_points": p, "occluded": ~seen}, "tracks.npz"),
    "ATI .pth": seen_by(ati, "tracks.pth")._replace(steps=121),
    "After Effects": Kind(after_effects, lambda size: {}),
    "MOT challenge": seen_by(mot, "gt.txt"),
    "CVAT for video 1.1": Kind(cvat, lambda size: {}, hidden=True),
    "DeepLabCut": seen_by(deep_lab_cut),
    "CoTracker-Nuke": seen_by(cotracker_nuke),
    "supervision": seen_by(supervision),
    "Blender's exporter": Kind(blender, lambda size: canvas(size, axes="up"), several=False),
}


def hide(rng: np.random.Generator, n: int, t: int) -> np.ndarray:
    """Random points are hidden; two of each path are seen, and both ends of the first: the length of the clip."""
    seen = rng.random((n, t)) < 0.7
    for row in seen:
        row[rng.permutation(t)[:2]] = True
    seen[0, [0, -1]] = True
    return seen
