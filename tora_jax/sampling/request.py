"""What a person asks for, and what `generation` takes: settings over a config's own, trajectories, visual conditions.

The command line, batches, the web page and `tora_jax.generate` all ask through here.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from tora_jax.backbones.assembly import Models
from tora_jax.conditioning import text, trajectory
from tora_jax.configs import common
from tora_jax.data import buckets
from tora_jax.errors import UserError
from tora_jax.io.files import tuples
from tora_jax.io.video import probe, read_image, read_video, resize_crop
from tora_jax.sampling import generate as generation

SCORES = ("aesthetic_score", "motion_score", "camera_motion")  # at the end of the prompt, see `text.append_scores`
INPUTS = ("trajectories", "conditions")
STILLS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
MAX_TEXT = 10_000  # letters: cleaning takes time by their square, and the model reads some hundred tokens
MAX_CLIP_PIXELS = 10**9  # of all frames of a clip that are decoded, 3 GB; a small file can hold any number
SAVINGS = generation.Savings._fields
# What the arguments of `generation.generate_pieces` are called in the settings, too.
ARGUMENTS = (
    *("height", "width", "num_frames", "fps", "steps", "guidance", "trajectory_guidance", "negative_prompt"),
    *("segment", "overlap"),
)


class Condition(NamedTuple):
    """What is to be seen at a frame.

    Attributes:
      frame: of the video; a negative one counts from the end, and there a clip ends.
      source: a file, or uint8 pixels [h, w, 3] or [n, h, w, 3].
      edit: 0 = keep it, up to 1 = make it anew; see `generation.Given`.
    """

    frame: int
    source: str | os.PathLike | np.ndarray
    edit: float = 0.0


@dataclasses.dataclass(frozen=True)
class Request:
    """One video.

    Attributes:
      settings: the sampling section of a config with what was asked for, sizes in pixels and frames.
      trajectories: None = plain Open-Sora, without the fusers.
      conditions: not read yet.
    """

    settings: Mapping[str, Any]
    trajectories: Sequence[trajectory.Trajectory] | None = None
    conditions: Sequence[Condition] = ()

    @property
    def prompts(self) -> tuple[str, ...]:
        """One for each part of the video, with their scores."""
        given = self.settings["prompt"]
        scores = {name: self.settings.get(name) for name in SCORES}
        return tuple(text.append_scores(each, **scores) for each in ([given] if isinstance(given, str) else given))

    @property
    def tracks(self) -> generation.Tracks | None:
        if self.trajectories is None:
            return None
        return trajectory.tracks(self.trajectories, self.settings["num_frames"])

    @property
    def shape(self) -> tuple:
        """Equal for requests that one call can make together, and one compilation serves."""
        return (
            *(self.settings[name] for name in (*ARGUMENTS, *SAVINGS)),
            self.trajectories is None,
            bool(self.conditions),
        )

    @property
    def files(self) -> list[Path]:
        """That were named for trajectories and conditions."""
        named = [each.source for each in self.conditions if not isinstance(each.source, np.ndarray)]
        return [*map(trajectory_path, self.settings["trajectory"]), *map(Path, named)]

    def read(self) -> dict[int, generation.Given]:
        """The conditions by frame, not yet of the video's size.

        Raises:
          UserError: for a file that cannot be read, or does not fit into the video.
        """
        return read_conditions(self.conditions, self.settings["num_frames"], self.settings["fps"])


def make(section: Any, given: Mapping[str, Any]) -> Request:
    """Reads what was asked for.

    Args:
      section: the sampling section of a config.
      given: settings by name, which win over the section's; those of SCORES; "trajectories": file, preset, points, or
        a list of them ([] or None: none; left out: those of the section); "conditions": a list of `Condition` or of
        texts "frame=file[:edit]".

    Raises:
      UserError: for the first thing that is wrong.
    """
    known = {*common.sampling(), *SCORES, *INPUTS} - {"trajectory"}
    for name in given.keys() - known:
        close = difflib.get_close_matches(name, known, 1) or sorted(known)
        raise UserError(f"there is no setting {name!r}; did you mean {', '.join(close)}?")
    options = {name: value for name, value in given.items() if name not in INPUTS}
    resolved = settings(section, options)
    sources = given.get("trajectories", resolved["trajectory"])
    trajectories = read_trajectories(sources)
    resolved["trajectory"] = _names(sources) if trajectories else ()
    conditions = given.get("conditions") or ()
    if not isinstance(conditions, Sequence) or isinstance(conditions, str):
        raise UserError('conditions should be a list, such as ["0=first.png", "-1=last.png"]')
    conditions = [c if isinstance(c, Condition) else parse_condition(c) for c in conditions]
    check_conditions(conditions, resolved["num_frames"])
    return Request(resolved, trajectories, conditions)


def generate(
    models: Models,
    requests: Sequence[Request],
    images: Sequence[Mapping[int, generation.Given]] | None = None,
    *,
    mesh: Mesh | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[list[generation.Result]]:
    """`generation.generate_pieces` for requests of one shape.

    Args:
      images: of `Request.read`; None reads them.
    """
    first = requests[0]
    size = generation.video_size(models, first.settings["height"], first.settings["width"])
    images = [each.read() for each in requests] if images is None else images
    return generation.generate_pieces(
        models,
        [each.prompts for each in requests],
        None if first.trajectories is None else [each.tracks for each in requests],
        [fit(each, size) for each in images],
        seeds=[each.settings["seed"] for each in requests],
        mesh=mesh,
        progress=progress,
        savings=generation.Savings(*(first.settings[name] for name in SAVINGS)),
        **{name: first.settings[name] for name in ARGUMENTS},
    )


def steps(models: Models, wanted: Request) -> int:
    """How many steps of the sampler a request takes, in all segments."""
    plan = generation.segments(models, *(wanted.settings[name] for name in ("num_frames", "segment", "overlap")))
    return len(plan.starts) * wanted.settings["steps"]


# ----------------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------------


def settings(section: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling section of a config under what was given, sizes resolved to pixels and frames.

    Raises:
      UserError: for a value of a wrong kind or out of its range.
    """
    known = common.sampling()
    if not isinstance(section, Mapping) or section.keys() - known.keys():
        raise UserError(f"config: sampling should hold {', '.join(known)}")
    defaults = {**known, **section}
    found = {**defaults, **given}
    for name, value in known.items():
        kinds = {"num_frames": (int, str), "prompt": (str, tuple, list)}
        kind = kinds.get(name, (int, float) if isinstance(value, float) else type(value))
        if not isinstance(tuples(found[name]), kind) or isinstance(found[name], bool):
            where = "" if name in given else "config: sampling."
            raise UserError(f"{where}{name} is {found[name]!r}; it should be like {value!r}")
    _check_texts(found)
    by_name, by_pixels = {"resolution", "aspect_ratio"} & given.keys(), {"height", "width"} & given.keys()
    if by_name and by_pixels:
        raise UserError("give --resolution with --aspect_ratio, or --height with --width, not both")
    if len(by_pixels) == 1:
        raise UserError("--height and --width belong together; give both")
    if by_name and not found["resolution"]:
        raise UserError("--aspect_ratio needs --resolution, such as 240p")
    if by_name or not (found["height"] and found["width"]):
        found["height"], found["width"] = buckets.image_size(found["resolution"], found["aspect_ratio"])
    del found["resolution"], found["aspect_ratio"]
    found["num_frames"] = buckets.frame_count(str(found["num_frames"]))
    found["segment"] = found["segment"] or buckets.frame_count(str(defaults["num_frames"]))
    generation.check_settings(**{name: found[name] for name in generation.CHECKED})
    generation.Savings(*(found[name] for name in SAVINGS)).check()
    return found


def _check_texts(found: Mapping[str, Any]) -> None:
    prompts = [found["prompt"]] if isinstance(found["prompt"], str) else found["prompt"]
    if not prompts or not all(isinstance(each, str) for each in prompts):
        raise UserError(f"prompt is {found['prompt']!r}; give a text, or several for the parts of a long video")
    for name in SCORES[:2]:
        value = found.get(name)
        if value is not None and not (isinstance(value, int | float) and abs(value) <= 1e6):  # NaN is not
            raise UserError(f"{name} is {value!r}; give a number, such as 6.5")
    if not isinstance(found.get("camera_motion") or "", str):
        raise UserError(f'camera_motion is {found["camera_motion"]!r}; give a text, such as "pan left"')
    longest = max(len(each or "") for each in (*prompts, found["negative_prompt"], found.get("camera_motion")))
    if longest > MAX_TEXT:
        raise UserError(f"a prompt has {longest} letters; give at most {MAX_TEXT}")


# ----------------------------------------------------------------------------------------------------------
# Trajectories
# ----------------------------------------------------------------------------------------------------------


def presets() -> dict[str, Path]:
    """The trajectories that ship, by name."""
    folder = Path(str(resources.files("tora_jax").joinpath("assets/trajectories")))
    return {path.stem: path for path in sorted(folder.iterdir())}


def trajectory_path(source: str | os.PathLike) -> Path:
    """The file that a name means: a file of that name, else the preset."""
    return Path(source) if os.path.lexists(source) else presets().get(str(source), Path(source))


def read_trajectories(sources: Any) -> list[trajectory.Trajectory] | None:
    """Files, presets or points (`trajectory.parse`) -> trajectories; None where there are none.

    Raises:
      UserError: for what cannot be read.
    """
    if sources is None or (isinstance(sources, Sequence) and not sources):
        return None
    if names := _names(sources):
        return [points for name in names for points in trajectory.load(trajectory_path(name))]
    return trajectory.parse(sources)


def _names(sources: Any) -> tuple[str, ...]:
    """The files and presets among sources of trajectories; none where they are points."""
    sources = [sources] if isinstance(sources, str | os.PathLike) else sources
    named = isinstance(sources, Sequence) and all(isinstance(each, str | os.PathLike) for each in sources)
    return tuple(map(str, sources)) if named else ()


# ----------------------------------------------------------------------------------------------------------
# Conditions
# ----------------------------------------------------------------------------------------------------------


def parse_condition(given: Any) -> Condition:
    """ "frame=file" or "frame=file:edit" -> the condition.

    Raises:
      UserError: it has another form.
    """
    form = f"--condition {given}: write frame=image_or_video, or frame=image_or_video:edit_ratio, such as 0=photo.png"
    if not isinstance(given, str):
        raise UserError(form)
    frame, _, source = given.partition("=")
    try:
        number = int(frame)
    except ValueError:
        raise UserError(form) from None
    file, _, edit = source.rpartition(":")
    if file and not os.path.lexists(source):
        try:
            source, ratio = file, float(edit)
        except ValueError:
            ratio = 0.0  # a colon in a name
    else:
        ratio = 0.0
    if not source:
        raise UserError(form)
    if not 0 <= ratio <= 1:
        raise UserError(f"--condition {given}: the edit ratio is {ratio:g}; give 0 (keep) to 1 (make it anew)")
    return Condition(number, source, ratio)


def check_conditions(conditions: Sequence[Condition], num_frames: int) -> None:
    """Before anything is read.

    Raises:
      UserError: for a frame that the video does not have, or that has two conditions.
    """
    taken = set()
    for frame, source, _ in conditions:
        at = frame + num_frames if frame < 0 else frame
        name = "pixels" if isinstance(source, np.ndarray) else source
        if not 0 <= at < num_frames:
            raise UserError(f"{name}: is given for frame {frame}; the video has frames 0 to {num_frames - 1}")
        if at in taken:
            raise UserError(f"{name}: frame {at} has a picture already; give one of them")
        taken.add(at)


def read_conditions(conditions: Sequence[Condition], num_frames: int, fps: float) -> dict[int, generation.Given]:
    """Pixels by the frame at which they start; a clip is taken at the video's own frames per second.

    Raises:
      UserError: for a file that cannot be read, or a clip that is longer than the room for it.
    """
    check_conditions(conditions, num_frames)
    found = {}
    for frame, source, edit in conditions:
        at = frame + num_frames if frame < 0 else frame
        room = at + 1 if frame < 0 else num_frames - at
        pixels = source if isinstance(source, np.ndarray) else _read(Path(source), room, fps)
        if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or pixels.shape[-1] != 3 or 0 in pixels.shape:
            raise UserError(f"a condition is {pixels.dtype} {pixels.shape}; give uint8 [h, w, 3] or [n, h, w, 3]")
        count = len(pixels) if pixels.ndim == 4 else 1
        if count > room:
            raise UserError(
                f"the clip for frame {frame} is longer than the {room} frames there are for it; "
                "cut it, or make a longer video (--num_frames)"
            )
        start = at - count + 1 if frame < 0 else at
        if start in found:
            raise UserError(f"frame {start} has a picture already; give one of them")
        found[start] = generation.Given(pixels, edit)
    return found


def _read(path: Path, room: int, fps: float) -> np.ndarray:
    if path.suffix.lower() in STILLS or not path.is_file():
        return read_image(path)
    count, height, width, rate = probe(path)
    wanted, most = math.ceil((room + 1) * rate / fps), MAX_CLIP_PIXELS // (height * width)
    if (needed := min(count, wanted)) > most:
        raise UserError(f"{path}: {needed} frames of {width}x{height} are too much; cut it to {most}, or shrink it")
    frames, _ = read_video(path, max_frames=min(wanted, most))  # it may have more than it says
    index = np.round(np.arange(math.ceil(len(frames) * fps / rate)) * rate / fps).astype(int)
    return frames[index[index < len(frames)]]


def fit(images: Mapping[int, generation.Given], size: tuple[int, int]) -> dict[int, generation.Given]:
    """Scales and cuts what is given to the video's (height, width)."""
    return {frame: generation.Given(resize_crop(pixels, *size), edit) for frame, (pixels, edit) in images.items()}
