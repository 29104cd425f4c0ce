"""Captions: from a file beside the video, from its name, or from a vision-language model behind a server."""

from __future__ import annotations

import base64
import functools
import io
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

import apache_beam as beam
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from tora_jax.conditioning import text
from tora_jax.data.curate import appearance, work
from tora_jax.data.curate.filters import ClipFacts
from tora_jax.data.curate.work import WorkFiles
from tora_jax.errors import UserError
from tora_jax.io import chat_server, files
from tora_jax.io.files import decode_text

QUALITY = 85  # of the JPEGs
Pictures = UInt8[np.ndarray, "t h w 3"]


def of_file(path: str) -> str:
    """The caption beside a video: in a .txt of its name there, or in `labels/` beside `videos/`; else its name.

    Raises:
      UserError: it is in another encoding than UTF-8.
    """
    video = PurePosixPath(path.replace("\\", "/"))
    places = [path[: len(path) - len(video.suffix)] + ".txt"]
    if video.parent.name == "videos":
        places.append(path[: len(path) - len(video.name) - len("videos/")] + f"labels/{video.stem}.txt")
    for place in (place[: -len(ending)] + ending for place in places for ending in (".txt", ".TXT")):
        if work.exists(place):
            return decode_text(files.path(place).read_bytes(), place).strip()
    return " ".join(re.sub(r"[_\-.]+", " ", video.stem).split())


class Captioner:
    """Asks a server for the caption of a clip.

    Any server with OpenAI's chat completions and images does, such as vLLM with a Qwen-VL model.

    Args:
      server, timeout, retries: see `chat_server.connect`.
      model: its name there.
      prompt: the question, above the frames.
      tokens: length of the answer, at most.
    """

    def __init__(self, server: str, model: str, prompt: str, retries: int, timeout: float, tokens: int):
        self._server, self._retries, self._timeout = server, retries, timeout
        self._model, self._prompt, self._tokens = model, prompt, tokens

    @functools.cached_property
    def _client(self):
        return chat_server.connect(self._server, self._timeout, self._retries)

    def __call__(self, frames: Pictures) -> str:
        """The caption; "" if the server refuses this clip.

        Raises:
          UserError: the server is not there, or refuses everything.
        """
        import openai

        content = [{"type": "text", "text": self._prompt}]
        content += [{"type": "image_url", "image_url": {"url": _jpeg(frame)}} for frame in frames]
        try:
            return chat_server.ask(self._client, self._model, [{"role": "user", "content": content}], self._tokens)
        except (openai.BadRequestError, openai.UnprocessableEntityError):
            return ""
        except openai.APIStatusError as error:
            raise UserError(f"captions: {self._server} answers {error.status_code} ({error.message})") from error
        except openai.OpenAIError as error:
            raise UserError(f"captions: {self._server} cannot be reached ({error}); start it and run again") from error


def _jpeg(frame: UInt8[np.ndarray, "h w 3"]) -> str:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


class AddCaptions(beam.DoFn):
    """Clips -> the same with `caption`, or with a reason."""

    def __init__(self, files: WorkFiles):
        self._files, self._options = files, files.options["captions"]

    def setup(self) -> None:
        names = ("server", "model", "prompt", "retries", "timeout", "tokens")
        self._ask = Captioner(**{name: self._options[name] for name in names})

    def process(self, clips: Sequence[ClipFacts]) -> Iterator[ClipFacts]:
        with ThreadPoolExecutor(max(len(clips), 1)) as pool:
            for clip, caption in zip(clips, pool.map(self._caption, clips), strict=True):
                if not caption:
                    yield {**clip, "reason": "no caption" if caption is not None else "caption in another encoding"}
                    continue
                if self._options["scores"]:
                    caption = text.append_scores(caption, clip["aesthetic"], clip["flow"], clip["camera"])
                yield {**clip, "caption": caption}

    def _caption(self, clip: ClipFacts) -> str | None:
        """None where the caption's file is in another encoding."""
        if not self._options["server"]:
            try:
                return of_file(clip["path"])
            except UserError:
                return None
        video = work.read_clip(self._files, clip["key"], clip["index"])
        path = self._files.path("captions", work.digest(video))
        if work.exists(path):
            return work.read_json(path)
        frames, _ = appearance.read_frames(video, appearance.spread, self._options["short"])
        caption = self._ask(frames)
        work.write_json(path, caption)
        return caption
