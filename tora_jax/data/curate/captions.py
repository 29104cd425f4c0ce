"""Captions: from a file beside the video or its name, or from a vision-language model behind an OpenAI-like server."""

from __future__ import annotations

import base64
import functools
import io
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from apache_beam.io.filesystems import FileSystems
from jaxtyping import UInt8
from PIL import Image

from tora_jax.data.curate import files
from tora_jax.errors import UserError

QUALITY = 85  # of the JPEGs
Pictures = UInt8[np.ndarray, "t h w 3"]


def of_file(path: str) -> str:
    """The caption beside a video: in a .txt of its name there, or in `labels/` beside `videos/`; else its name."""
    video = PurePosixPath(path.replace("\\", "/"))
    places = [path[: len(path) - len(video.suffix)] + ".txt"]
    if video.parent.name == "videos":
        places.append(path[: len(path) - len(video.name) - len("videos/")] + f"labels/{video.stem}.txt")
    for place in places:
        if files.exists(place):
            with FileSystems.open(place) as file:
                return file.read().decode("utf-8", "replace").strip()
    return " ".join(re.sub(r"[_\-.]+", " ", video.stem).split())


class Captioner:
    """Asks a server for the caption of a clip.

    Any server with OpenAI's chat completions and images does, such as vLLM with a Qwen-VL model. The key, if it wants
    one, is taken from OPENAI_API_KEY.

    Args:
      server: address, such as "http://localhost:8000/v1".
      model: its name there.
      prompt: what is asked, above the frames.
      retries: of a call that fails by the server's or the network's fault; the waits grow from half a second to eight.
      timeout: seconds that a call may take.
      tokens: length of the answer, at most.
    """

    def __init__(self, server: str, model: str, prompt: str, retries: int, timeout: float, tokens: int):
        self._options: Mapping[str, Any] = {"base_url": server, "max_retries": retries, "timeout": timeout}
        self._model, self._prompt, self._tokens = model, prompt, tokens

    @functools.cached_property
    def _client(self):
        import openai  # takes a second, and runs without captions do without

        try:
            return openai.OpenAI(**self._options)
        except openai.OpenAIError:  # no key in the environment: local servers want none
            return openai.OpenAI(**self._options, api_key="none")

    def __call__(self, frames: Pictures) -> str:
        """The caption; "" if the server refuses this clip.

        Raises:
          UserError: the server is not there, or refuses everything.
        """
        import openai

        content = [{"type": "text", "text": self._prompt}]
        content += [{"type": "image_url", "image_url": {"url": _jpeg(frame)}} for frame in frames]
        server = self._options["base_url"]
        try:
            answer = self._client.chat.completions.create(
                model=self._model,
                messages=[{"role": "user", "content": content}],
                max_tokens=self._tokens,
                temperature=0.0,
            )
        except (openai.BadRequestError, openai.UnprocessableEntityError):
            return ""
        except openai.APIStatusError as error:
            raise UserError(f"captions: {server} answers {error.status_code} ({error.message})") from error
        except openai.OpenAIError as error:
            raise UserError(f"captions: {server} cannot be reached ({error}); start it and run again") from error
        text = (answer.choices[0].message.content or "") if answer.choices else ""
        return " ".join(text.split())


def _jpeg(frame: UInt8[np.ndarray, "h w 3"]) -> str:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
