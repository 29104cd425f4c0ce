"""The settings of sampling: the only list of their names, defaults, help and checks.

The flags of sample.py, the sampling section of a config, the lines of a batch and `**settings` of `tora_jax.generate`
are made from the fields of `Settings`. A new setting is a field here, with a line in `Settings.check` for its range.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

from tora_jax.conditioning import resolutions, trajectory, trajectory_hints
from tora_jax.conditioning.trajectory_hints import Hints
from tora_jax.diffusion import solvers
from tora_jax.diffusion.sampler import Acceleration
from tora_jax.errors import UserError
from tora_jax.io.files import tuples

LARGEST = 16384  # frames, or pixels a side: past any memory, and in the range of float32 whole numbers
MAX_TEXT = 10_000  # letters: cleaning takes time by their square, and the model reads some hundred tokens
SCORES = ("aesthetic_score", "motion_score", "camera_motion")  # at the end of the prompt, see `text.append_scores`
READING = ("trajectory_canvas", "trajectory_axes", "trajectory_times", "trajectory_tracks")  # of trajectory files


def setting(default: Any, help: str) -> Any:
    """A field of `Settings`; None as default leaves it out of the configs."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a video is made. `resolve` gives one that is checked, with its size in pixels and its length in frames."""

    prompt: str | tuple[str, ...] = setting(
        "a red star moves over blue waves.",
        "What the video shows. Repeatable: the segments of a long video are shared out among them.",
    )
    negative_prompt: str = setting("", "What it shall not show.")
    trajectory: tuple[str, ...] = setting(
        ("arc",),
        f"Trajectory file (text, table, JSON, .npy, .npz), or one of {', '.join(trajectory.presets())}. Repeatable.",
    )
    # These four are None, so that configs and keys of batches from before they were there stay as they are.
    trajectory_canvas: str | None = setting(None, "WIDTHxHEIGHT that files are drawn on; 1x1 = fractions; image ...")
    trajectory_axes: str | None = setting(None, "Of an array: nt = paths, then points; tn = frames, then paths ...")
    trajectory_times: str | None = setting(None, "points = spread over the video; frames = one point a frame.")
    trajectory_tracks: str | None = setting(
        None, 'Paths to take of a file: "0,3,7", or how many of those that move most.'
    )
    resolution: str = setting("", 'Named size, such as "480p"; with --aspect_ratio.')
    aspect_ratio: str = setting("16:9", 'width:height, such as "16:9".')
    height: int = setting(0, "Pixels; with --width.")
    width: int = setting(0, "Pixels.")
    num_frames: int | str = setting(51, 'Number of frames, or "2s", "4s", ...')
    # 0 = num_frames of the config.
    segment: int = setting(0, "Frames that are made at once; a longer video is made in segments.")
    # 0 = those of a micro-frame, or 2 where it has only one.
    overlap: int = setting(0, "Latent frames that a segment takes over; 0 = by the model.")
    fps: float = setting(24.0, "Frames per second.")
    steps: int = setting(30, "Steps of the sampler.")
    guidance: float = setting(7.0, "Weight of the prompt; 1 = none.")
    trajectory_guidance: float = setting(1.0, "Extra weight of the trajectory; 1 = none.")
    # None for the same reason as above. They are of CogVideoX's weights alone.
    trajectory_strength: float | None = setting(None, "Of the fusers; 0 = none, 1 = as they were trained.")
    trajectory_from: float | None = setting(None, "Part of the steps, 0 to 1, before which they are off.")
    trajectory_to: float | None = setting(None, "Part of the steps after which they are off.")
    solver: str = setting(
        "euler",
        "euler, or ab2 (second order, for fewer steps); CogVideoX: dpm2m_sde, or ddim (without noise at each step).",
    )
    guidance_from: float = setting(0.0, "Part of the steps, 0 to 1, before which there is no guidance.")
    guidance_to: float = setting(1.0, "Part of the steps after which there is none.")
    guidance_every: int = setting(1, "Steps for which what guidance adds is kept.")
    cache_every: int = setting(1, "Steps for which what the blocks add is kept.")
    seed: int = setting(0, "Seed of the noise.")
    aesthetic_score: float | None = setting(None, "Appended to the prompt; 6.5 looks good.")
    motion_score: float | None = setting(None, "Appended to the prompt; 5 is calm, 20 fast.")
    camera_motion: str | None = setting(None, 'Appended to the prompt: "static", "pan left", "zoom in" ...')

    @property
    def acceleration(self) -> Acceleration:
        """What is left out to be faster."""
        return Acceleration(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Acceleration)})

    @property
    def shared(self) -> Settings:
        """These settings without what each video has for itself: equal where videos can be made together."""
        own = dict.fromkeys((*SCORES, *READING))
        return dataclasses.replace(self, prompt="", trajectory=(), seed=0, **own)

    @property
    def hints(self) -> Hints:
        """What settles trajectory files with two readings.

        Raises:
          UserError: for a text of another form.
        """
        return trajectory_hints.hints(*(getattr(self, name) for name in READING), num_frames=self.num_frames)

    def report(self) -> dict[str, Any]:
        """name -> value of what is set, sizes in pixels alone."""
        left_out = ("resolution", "aspect_ratio")
        return {name: value for name, value in vars(self).items() if value is not None and name not in left_out}

    def check(self) -> None:
        """Checks ranges; the size is in pixels and the length in frames by now.

        Raises:
          UserError: for the first value out of its range.
        """
        for name in ("num_frames", "steps", "height", "width"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        for name in ("num_frames", "height", "width"):
            if (value := getattr(self, name)) > LARGEST:
                raise UserError(f"{name} is {value}; it must be at most {LARGEST}")
        if self.steps > 10**6:
            raise UserError(f"steps is {self.steps}; it must be at most a million (30 are usual)")
        for name in ("guidance", "trajectory_guidance"):
            if not abs(value := getattr(self, name)) <= 1e4:  # NaN too
                raise UserError(f"{name} is {value}; give a number up to 10000 (1 = off)")
        if self.trajectory_strength is not None and not abs(self.trajectory_strength) <= 10:
            raise UserError(f"trajectory_strength is {self.trajectory_strength}; give a number up to 10 (1 = usual)")
        span = self.trajectory_from, self.trajectory_to
        if not 0 <= (span[0] or 0.0) <= (1.0 if span[1] is None else span[1]) <= 1:
            raise UserError("trajectory_from and trajectory_to should be two numbers that rise within 0 to 1")
        if self.trajectory_strength is None and span != (None, None):
            raise UserError("trajectory_from and trajectory_to go with trajectory_strength; give it as well")
        if not 0.01 <= self.fps <= 1000:  # NaN too
            raise UserError(f"fps is {self.fps}; give a number from 0.01 to 1000")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}; give a whole number from 0 to 4294967295")
        solvers.find(self.solver)
        self.acceleration.check()


def kinds() -> dict[str, tuple[type, ...]]:
    """The types that each setting may have, None aside."""
    found = {}
    for name, hint in typing.get_type_hints(Settings).items():
        hints = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        found[name] = tuple(typing.get_origin(each) or each for each in hints if each is not types.NoneType)
    return found


def section() -> dict[str, Any]:
    """The sampling section of a config: the settings that have a default."""
    return {field.name: field.default for field in dataclasses.fields(Settings) if field.default is not None}


def resolve(config: Any, given: Mapping[str, Any]) -> Settings:
    """The settings of a config under those that were given, checked, the size in pixels and the length in frames.

    Args:
      config: its sampling section; what it leaves out has the defaults.
      given: settings by name.

    Raises:
      UserError: for a value of a wrong kind or out of its range.
    """
    known = section()
    if not isinstance(config, Mapping) or config.keys() - known.keys():
        raise UserError(f"config: sampling should hold {', '.join(known)}")
    defaults = {**known, **config}
    found = {**defaults, **given}
    for name, kind in kinds().items():
        if name not in known:
            continue
        kind = (*kind, int) if float in kind else kind
        if not isinstance(tuples(found[name]), kind) or isinstance(found[name], bool):
            where = "" if name in given else "config: sampling."
            raise UserError(f"{where}{name} is {found[name]!r}; it should be like {known[name]!r}")
    for name in READING:
        found[name] = _reading(name, found.get(name))
    _check_texts(found)
    _check_size(given.keys(), found)
    if {"resolution", "aspect_ratio"} & given.keys() or not (found["height"] and found["width"]):
        found["height"], found["width"] = resolutions.image_size(found["resolution"], found["aspect_ratio"])
    found["resolution"] = found["aspect_ratio"] = ""
    found["num_frames"] = resolutions.frame_count(str(found["num_frames"]))
    found["segment"] = found["segment"] or resolutions.frame_count(str(defaults["num_frames"]))
    settings = Settings(**tuples(found))
    settings.check()
    return settings


def _reading(name: str, value: Any) -> str | None:
    """As a flag has it: Python and batches may say [720, 480], [0, 3, 7] and 5."""
    if isinstance(value, list | tuple):
        ends = {"trajectory_canvas": ("x", ""), "trajectory_tracks": (",", ",")}
        mark, end = ends.get(name, (",", ""))
        return mark.join(map(str, value)) + end
    if value is None or isinstance(value, str):
        return value
    if name == "trajectory_tracks" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise UserError(f"{name} is {value!r}; give a text")


def _check_texts(found: Mapping[str, Any]) -> None:
    prompts = [found["prompt"]] if isinstance(found["prompt"], str) else found["prompt"]
    if not prompts or not all(isinstance(each, str) for each in prompts):
        raise UserError(f"prompt is {found['prompt']!r}; give a text, or several for the parts of a long video")
    for name in ("aesthetic_score", "motion_score"):
        value = found.get(name)
        if value is not None and not (isinstance(value, int | float) and abs(value) <= 1e6):  # NaN is not
            raise UserError(f"{name} is {value!r}; give a number, such as 6.5")
    if not isinstance(found.get("camera_motion") or "", str):
        raise UserError(f'camera_motion is {found["camera_motion"]!r}; give a text, such as "pan left"')
    longest = max(len(each or "") for each in (*prompts, found["negative_prompt"], found.get("camera_motion")))
    if longest > MAX_TEXT:
        raise UserError(f"a prompt has {longest} letters; give at most {MAX_TEXT}")


def _check_size(given: Collection[str], found: Mapping[str, Any]) -> None:
    by_name, by_pixels = {"resolution", "aspect_ratio"}.intersection(given), {"height", "width"}.intersection(given)
    if by_name and by_pixels:
        raise UserError("give --resolution with --aspect_ratio, or --height with --width, not both")
    if len(by_pixels) == 1:
        raise UserError("--height and --width belong together; give both")
    if by_name and not found["resolution"]:
        raise UserError("--aspect_ratio needs --resolution, such as 240p")
