"""What a person asks for, and what `generation` takes: settings over a config's own, trajectories, visual conditions.

The command line, batches, the web page and `tora_jax.generate` all ask through here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from tora_jax.backbones.assembly import Models
from tora_jax.conditioning import images, resolutions, text, trajectory
from tora_jax.configs import common
from tora_jax.errors import UserError, closest
from tora_jax.io.files import tuples
from tora_jax.sampling import generate as generation

SCORES = ("aesthetic_score", "motion_score", "camera_motion")  # at the end of the prompt, see `text.append_scores`
INPUTS = ("trajectories", "conditions")
MAX_TEXT = 10_000  # letters: cleaning takes time by their square, and the model reads some hundred tokens
SAVINGS = generation.Savings._fields
# What the arguments of `generation.generate_pieces` are called in the settings, too.
ARGUMENTS = (
    *("height", "width", "num_frames", "fps", "steps", "guidance", "trajectory_guidance", "negative_prompt"),
    *("segment", "overlap"),
)


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
    conditions: Sequence[images.Condition] = ()

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
        return [*map(trajectory.find, self.settings["trajectory"]), *map(Path, named)]

    def read(self) -> dict[int, images.Given]:
        """The conditions by frame, not yet of the video's size.

        Raises:
          UserError: for a file that cannot be read, or does not fit into the video.
        """
        return images.read(self.conditions, self.settings["num_frames"], self.settings["fps"])


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
        close = closest(name, known) or ", ".join(sorted(known))
        raise UserError(f"there is no setting {name!r}; did you mean {close}?")
    options = {name: value for name, value in given.items() if name not in INPUTS}
    resolved = settings(section, options)
    sources = given.get("trajectories", resolved["trajectory"])
    trajectories = trajectory.read(sources)
    resolved["trajectory"] = trajectory.names(sources) if trajectories else ()
    conditions = given.get("conditions") or ()
    if not isinstance(conditions, Sequence) or isinstance(conditions, str):
        raise UserError('conditions should be a list, such as ["0=first.png", "-1=last.png"]')
    conditions = [c if isinstance(c, images.Condition) else images.parse(c) for c in conditions]
    images.check(conditions, resolved["num_frames"])
    return Request(resolved, trajectories, conditions)


def generate(
    models: Models,
    requests: Sequence[Request],
    given: Sequence[Mapping[int, images.Given]] | None = None,
    *,
    mesh: Mesh | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[list[generation.Result]]:
    """`generation.generate_pieces` for requests of one shape.

    Args:
      given: of `Request.read`; None reads them.
    """
    first = requests[0]
    size = generation.video_size(models, first.settings["height"], first.settings["width"])
    given = [each.read() for each in requests] if given is None else given
    return generation.generate_pieces(
        models,
        [each.prompts for each in requests],
        None if first.trajectories is None else [each.tracks for each in requests],
        [images.fit(each, size) for each in given],
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
        found["height"], found["width"] = resolutions.image_size(found["resolution"], found["aspect_ratio"])
    del found["resolution"], found["aspect_ratio"]
    found["num_frames"] = resolutions.frame_count(str(found["num_frames"]))
    found["segment"] = found["segment"] or resolutions.frame_count(str(defaults["num_frames"]))
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
