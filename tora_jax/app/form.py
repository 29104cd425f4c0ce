"""The form of the page: what the weights offer, and what comes from a browser, checked, as a request."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from tora_jax.backbones.assembly import Models
from tora_jax.conditioning import images, trajectory
from tora_jax.configs import sampling
from tora_jax.errors import UserError, closest
from tora_jax.sampling import request
from tora_jax.sampling.generate import video_size
from tora_jax.sampling.inputs import Inputs

LONGEST = 8  # times the model's own length
MOST_STEPS, MOST_TEXT, MOST_PATHS = 100, 2000, 32
MOST_SHARED = 200_000  # letters of a request that somebody else made
TEXTS = ("prompt", "negative_prompt", "camera_motion")
# Of numbers: least, most, step.
NUMBERS = {
    "steps": (1, MOST_STEPS, 1),
    "guidance": (1, 15, 0.5),
    "trajectory_guidance": (1, 8, 0.5),
    "trajectory_strength": (0, 2, 0.1),
    "seed": (0, 2**32 - 1, 1),
    "aesthetic_score": (0, 10, 0.5),
    "motion_score": (0, 100, 1),
}


class Form:
    """What can be asked for.

    Attributes:
      defaults: the settings of the weights.
      sizes: name -> (height, width), the weights' own first.
      lengths: the numbers of frames.
      takes_picture, needs_picture: for the first frame.
    """

    def __init__(self, models: Models):
        self._models = models
        defaults = sampling.resolve(models.sampling, {})
        height, width = video_size(models, defaults.height, defaults.width)
        self.defaults = dataclasses.replace(defaults, height=height, width=width)
        self.takes_picture, self.needs_picture = self._accepts(picture=True), not self._accepts()
        sizes = _sizes(models, height, width)
        self.sizes = {name: (h, w) for name, (h, w) in sizes.items() if self._offers(height=h, width=w)}
        longest = LONGEST * self.defaults.segment
        self.lengths = [count for count in range(1, longest + 1) if self._offers(num_frames=count)]
        self._known = {"prompt", "size", "num_frames", *(field["name"] for field in self.fields())}

    def _offers(self, **changes: Any) -> bool:
        return self._accepts(self.needs_picture, **changes)

    def _accepts(self, picture: bool = False, **changes: Any) -> bool:
        """Whether the weights make such a video."""
        settings = dataclasses.replace(self.defaults, **changes)
        size = video_size(self._models, settings.height, settings.width)
        given = {0: images.Given(np.zeros((*size, 3), np.uint8))} if picture else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said again of the request itself
            try:
                self._models.backbone.check(self._models, [Inputs("", None, given)], settings)
            except UserError:
                return False
        return True

    def fields(self) -> list[dict[str, Any]]:
        """The settings beside prompt, size and length, in the words of docs/sampling.md, for the page to show."""
        own, help = self.defaults, {field.name: field.metadata["help"] for field in dataclasses.fields(self.defaults)}
        names = ["steps", "guidance", "trajectory_guidance", "trajectory_strength", "seed", "negative_prompt"]
        names = [name for name in names if name not in NUMBERS or self._offers(**{name: self._another(name)})]
        return [
            {"name": name, "help": help[name], "value": getattr(own, name), "range": NUMBERS.get(name)}
            for name in [*names, *sampling.SCORES]
        ]

    def _another(self, name: str) -> float:
        """A value that is none of those that mean nothing."""
        return NUMBERS[name][0] + NUMBERS[name][2]

    # ------------------------------------------------------------------------------------------------ checks

    def size(self, name: Any) -> tuple[int, int]:
        """(height, width) in pixels of one of `sizes`.

        Raises:
          UserError: there is none of that name.
        """
        if not isinstance(name, str) or name not in self.sizes:
            raise UserError(f"the size {str(name)[:20]!r} is not one of {', '.join(self.sizes)}")
        return self.sizes[name]

    def frames(self, count: Any) -> int:
        """One of `lengths`.

        Raises:
          UserError: the weights do not make that many frames.
        """
        count = whole(count, "frames")
        if count not in self.lengths:
            near = min(self.lengths, key=lambda each: abs(each - count))
            most = self.lengths[-1]
            raise UserError(f"frames is {count}; it may be from {self.lengths[0]} to {most} here, such as {near}")
        return count

    def trajectories(self, drawn: Any) -> list[trajectory.Trajectory] | None:
        """Paths of the canvas, lists of [x, y, t] -> trajectories; None where nothing is drawn.

        Raises:
          UserError: it holds something else.
        """
        if not drawn:
            return None
        if not isinstance(drawn, list) or len(drawn) > MOST_PATHS:
            raise UserError(f"give at most {MOST_PATHS} paths")
        return trajectory.parse({"canvas": [1, 1], "trajectories": drawn}, name="the drawing")

    def request(self, drawn: Any, asked: Any, files: Mapping[int, str | None]) -> request.Request:
        """What is asked for.

        Args:
          drawn: of `trajectories`.
          asked: prompt, size, num_frames and settings of sampling by name; empty ones are left out.
          files: frame -> an uploaded picture or clip.

        Raises:
          UserError: for what cannot be.
        """
        if not isinstance(asked, Mapping):
            raise UserError("the form is empty; open the page again")
        form = {key: value for key, value in asked.items() if value not in (None, "") or key == "prompt"}
        for name in form.keys() - self._known:
            close = closest(str(name), self._known) or ", ".join(sorted(self._known))
            raise UserError(f"there is no setting {str(name)[:40]!r} here; did you mean {close}?")
        if not all(isinstance(form[key], str) and len(form[key]) <= MOST_TEXT for key in TEXTS if key in form):
            raise UserError(f"a prompt is a text of at most {MOST_TEXT} letters")
        height, width = self.size(form.pop("size", ""))
        form |= {"height": height, "width": width, "num_frames": self.frames(form.get("num_frames"))}
        for key in ("steps", "seed"):
            form[key] = whole(form.get(key), key)
        if form["steps"] > MOST_STEPS:
            raise UserError(f"steps is {form['steps']}; it may be {MOST_STEPS} here")
        conditions = [images.Condition(frame, path) for frame, path in files.items() if path]
        # What sampling is asked for beside the form stands in the config: sizes there would be in the way.
        section = {k: v for k, v in self._models.sampling.items() if k not in ("resolution", "height", "width")}
        section |= {"segment": self.defaults.segment}
        wanted = request.make(section, {**form, "trajectories": None, "conditions": conditions})
        return dataclasses.replace(wanted, trajectories=self.trajectories(drawn))

    def shared(self, text: Any) -> dict[str, Any]:
        """A request from a link or a file, a line of a batch file without pictures -> what the page asks with.

        Returns:
          "asked" and "drawn" as in `request`.

        Raises:
          UserError: for what `request` refuses, and for another form.
        """
        if not isinstance(text, str) or len(text) > MOST_SHARED:
            raise UserError(f"the request is over {MOST_SHARED} letters; draw its paths with fewer points")
        try:
            given = json.loads(text)
        except (ValueError, RecursionError):
            raise UserError("the request is not whole; copy the whole link") from None
        if not isinstance(given, dict) or "prompt" not in given:
            raise UserError('the request is no JSON object with a "prompt"')
        drawn = given.pop("trajectories", None)
        if isinstance(drawn, dict):
            drawn = drawn.get("trajectories") if drawn.get("canvas") == [1, 1] else "on another canvas"
        own = self.defaults
        size = f"{given.pop('width', own.width)}x{given.pop('height', own.height)}"
        usual = {name: getattr(own, name) for name in ("num_frames", "steps", "seed")}
        asked = {**usual, **given, "size": size}
        self.request(drawn, asked, {})
        return {"asked": asked, "drawn": drawn or []}


def whole(value: Any, name: str) -> int:
    """A whole number, which JavaScript may have written as a float.

    Raises:
      UserError: it is something else; the message has its `name`.
    """
    if value is None:
        raise UserError(f"{name} is empty; give a whole number")
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or value % 1:
        raise UserError(f"{name} is {str(value)[:20]!r}; give a whole number")
    return int(value)


def _sizes(models: Models, height: int, width: int) -> dict[str, tuple[int, int]]:
    """The config's own size, and landscape, portrait and square of about its area, by name."""
    cell = 2 * models.vae.space_factor
    side = (height * width) ** 0.5
    shapes = {(height, width)}
    for ratio in (9 / 16, 1, 16 / 9):
        shapes.add(tuple(max(round(side * factor / cell), 1) * cell for factor in (ratio**0.5, ratio**-0.5)))
    return {f"{w}x{h}": (h, w) for h, w in sorted(shapes, key=lambda s: (s != (height, width), s))}
