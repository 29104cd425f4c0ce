"""Captions: score suffixes, cleaning, tokens.

The order is `append_scores` -> `clean` -> `Tokenizer`. All three repeat the training of the released weights
(Open-Sora v1.2, opensora/models/text_encoder/t5.py and utils/inference_utils.py), quirks included: the model has
never seen a caption that was cleaned differently.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import re
import urllib.parse
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
from jaxtyping import Bool, Int

from tora_jax.errors import UserError
from tora_jax.io import files

PAD, EOS = 0, 1  # T5's ids

# ----------------------------------------------------------------------------------------------------------
# Score suffixes
# ----------------------------------------------------------------------------------------------------------


def append_scores(
    prompt: str,
    aesthetic_score: float | None = None,
    motion_score: float | None = None,
    camera_motion: str | None = None,
) -> str:
    """Appends the scores that Open-Sora v1.2 was trained to see at the end of a caption.

    None adds nothing, and a score that the prompt already names stays as it is.

    Args:
      prompt: the caption, not cleaned yet (cleaning comes later, as in the reference).
      aesthetic_score: about 4 to 7; 6.5 is a good-looking video.
      motion_score: mean flow magnitude; 5 is calm, 20 is fast.
      camera_motion: "pan left", "zoom in", "static" ...

    Returns:
      For example "a boat. aesthetic score: 6.5. motion score: 8.0. camera motion: pan left."
    """
    if aesthetic_score is not None and "aesthetic score:" not in prompt:
        prompt += f" aesthetic score: {aesthetic_score:.1f}."
    if motion_score is not None and "motion score:" not in prompt:
        prompt += f" motion score: {motion_score:.1f}."
    if camera_motion is not None and "camera motion:" not in prompt:
        prompt += f" camera motion: {camera_motion}."
    return prompt


_SCORES = re.compile(r"(?:\s*(?:(?:aesthetic|motion) score: ?-?\d+(?:\. ?\d+)?\.?|camera motion: [^.:]*\.?))+\s*$")


def split_scores(prompt: str) -> tuple[str, str]:
    """What `append_scores` was given, and the scores at the end; cleaned or not."""
    found = _SCORES.search(prompt)
    return (prompt[: found.start()], found[0].strip()) if found else (prompt, "")


# ----------------------------------------------------------------------------------------------------------
# Cleaning
# ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Rule:
    """A substitution: its purpose, its pattern, its replacement.

    `at_least` leaves a text alone in which the pattern occurs less often.
    """

    what: str
    pattern: str
    replacement: str = ""
    at_least: int = 1

    def __call__(self, text: str) -> str:
        if self.at_least > 1 and len(re.findall(self.pattern, text)) < self.at_least:
            return text
        return re.sub(self.pattern, self.replacement, text)


def _decode_and_lower(text: str) -> str:
    return urllib.parse.unquote_plus(text).strip().lower()


def _is_plain(text: str) -> bool:
    """Whether there is nothing to strip or to mend; most captions do without the libraries, a third of a second."""
    return text.isascii() and text.isprintable() and not {"<", "&"} & set(text)


def _strip_html(text: str) -> str:
    if _is_plain(text):
        return text
    from bs4 import BeautifulSoup
    from bs4.builder import ParserRejectedMarkup

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bs4 warns of captions that look like paths
        try:
            return BeautifulSoup(text, features="html.parser").text
        except (ParserRejectedMarkup, ValueError):  # broken markup, lone surrogates: kept as text
            return text


def _mend_encoding(text: str) -> str:
    if _is_plain(text):
        return text.strip()
    import ftfy

    text = ftfy.fix_text(text)
    with contextlib.suppress(ValueError):  # a numeric entity of more digits than Python reads
        text = html.unescape(html.unescape(text))
    return text.strip()


_SITE = r"[a-z0-9.-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_EXTENSION = r"(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
_CJK = r"[\u31c0-\u9fff]+"
_DASHES = (
    r"\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    r"\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d-"
)

# The order matters: many rules see what the rules above left behind.
_STEPS: tuple[Callable[[str], str], ...] = (
    # -- the page that the caption came from
    _decode_and_lower,
    _Rule("the tag <person>, a placeholder of stock captions", r"<person>", "person"),
    _Rule("addresses: the protocol or a whole site", rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|{_SITE})"),
    _Rule("the same again with www", rf"\b(?:www:(?:/{{1,3}}|[a-z0-9%])|{_SITE})"),
    _strip_html,
    _Rule("@nicknames", r"@\w+"),
    # -- characters
    _Rule("CJK, from strokes to the unified ideographs", _CJK),
    _Rule("all kinds of dash -> one", rf"[{_DASHES}]+", "-"),
    _Rule("all kinds of double quote -> one", r"[`´«»“”¨]", '"'),
    _Rule("all kinds of single quote -> one", r"[‘’]", "'"),
    _Rule("left-over quote entities", r"&quot;?"),
    _Rule("left-over ampersand entities", r"&amp"),
    # -- numbers and names that describe a file, not a scene
    _Rule("IP addresses", r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),
    _Rule("a time stamp at the end", r"\d:\d\d\s+$"),
    _Rule("line breaks written as a backslash and an n", r"\\n", " "),
    _Rule("#123 and #12345, but not #1234", r"#(?:\d{1,3}|\d{5,})\b"),
    _Rule("numbers of six digits and more", r"\b\d{6,}\b"),
    _Rule("file names", rf"\S+\.{_EXTENSION}"),
    # -- punctuation
    _Rule("runs of quotes -> one", r"[\"']{2,}", '"'),
    _Rule("runs of full stops", r"\.{2,}", " "),
    _Rule("signs that stand in no sentence", r"[][#®•©™&@·º½¾¿¡§~(){}|\\/*]+", " "),
    _Rule("a full stop on its own", r"\s+\.\s+", " "),
    _Rule("names-written-like-this, from four joints on", r"[-_]", " ", at_least=4),
    _mend_encoding,
    # -- article numbers and advertising
    _Rule("ab1234, ab12cd, 12ab34", r"\b(?:[a-zA-Z]{1,3}\d{3,15}|[a-zA-Z]+\d+[a-zA-Z]+|\d+[a-zA-Z]+\d+)\b"),
    _Rule("(worldwide) (free) shipping", r"(?:worldwide\s+)?(?:free\s+)?shipping"),
    _Rule("(free) download (free)", r"(?:free\s)?download(?:\sfree)?"),
    _Rule("click for ..., click on ...", r"\bclick\b\s(?:for|on)\s\w+"),
    _Rule("names of file formats", rf"\b{_EXTENSION}(?:\simages?)?"),
    _Rule("page 12", r"\bpage\s+\d+\b"),
    _Rule("longer mixtures, a1b2c3", r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    _Rule("sizes such as 1920x1080, with three letters x", r"\b\d+\.?\d*[xх×]\d+\.?\d*\b"),
    # -- spaces
    _Rule("a space before a colon", r"\b\s+:\s+", ": "),
    _Rule("a missing space after a comma or full stop", r"(\D[,./])\b", r"\1 "),
    _Rule("runs of spaces -> one", r"\s+", " "),
    # -- the two ends; spaces there are still standing, as in the reference
    _Rule("quotes around the whole", r"^[\"']([\w\W]+)[\"']$", r"\1"),
    _Rule("a sign in front", r"^['_,\-:;]"),
    _Rule("a sign at the end", r"['_,\-:+]$"),
    _Rule("a single word that starts with a full stop", r"^\.\S+$"),
    str.strip,
)


def clean(caption: str) -> str:
    """Cleans a caption as the training captions of the released weights were cleaned.

    Lower-cases the caption and removes all that describes no scene: addresses, HTML, CJK, numbers of articles, file
    names, advertising, stray punctuation. The steps run twice, as in the reference (`text_preprocessing`): the second
    round sees what the first uncovered.

    Args:
      caption: any text; score suffixes already appended (`append_scores`).

    Returns:
      The cleaned caption, possibly empty. Never raises: unreadable markup stays as text.
    """
    for _ in range(2):
        for step in _STEPS:
            caption = step(caption)
    return caption


# ----------------------------------------------------------------------------------------------------------
# Tokens
# ----------------------------------------------------------------------------------------------------------


EMPTY, UNREAD, CUT = "empty after cleaning", "with letters that are not read", "cut"
SHOWN = 80  # letters of a lost text in messages


class Loss(NamedTuple):
    """What the text encoder does not get of a caption: the kind (EMPTY, UNREAD or CUT) and the lost text."""

    kind: str
    text: str

    def __str__(self) -> str:
        lost = repr(self.text if len(self.text) <= SHOWN else f"{self.text[: SHOWN - 20]} ... {self.text[-15:]}")
        return {
            EMPTY: f"is empty after cleaning: {lost} is lost; the weights learned English captions, so write one",
            UNREAD: f"loses {lost}, which the text encoder does not read; write it in English",
            CUT: f"is too long for the text encoder: {lost} is lost; shorten it",
        }[self.kind]


class Tokenizer:
    """T5's sentencepiece tokenizer, padded to one length.

    Args:
      model: the sentencepiece model, a file (`tokenizer.model`, `spiece.model`) or its bytes.
      max_length: tokens per caption, the end mark included; 300 for Open-Sora's weights.
      clean: what a caption should go through before it comes here.
      see_padding: the mask is True for padding as well, for models that attend to it.

    Raises:
      UserError: the file is missing, is no sentencepiece model, or has other ids than T5's (pad 0, eos 1).
    """

    def __init__(
        self,
        model: str | Path | bytes,
        max_length: int,
        clean: Callable[[str], str] = clean,
        see_padding: bool = False,
    ):
        if max_length < 1:
            raise UserError(f"text length {max_length}: give at least 1 token, 300 for Open-Sora's weights")
        name = "the tokenizer given as bytes" if isinstance(model, bytes) else str(model)
        self.max_length, self.clean, self._see_padding = max_length, clean, see_padding
        self._pieces = _load(_read(model), name)

    @property
    def vocab_size(self) -> int:
        """The number of pieces. T5's own model has 32000, its embedding 32128 rows."""
        return self._pieces.vocab_size()

    def __call__(self, captions: Sequence[str]) -> tuple[Int[np.ndarray, "b n"], Bool[np.ndarray, "b n"]]:
        """Cleaned captions -> token ids and a mask: True for tokens, the end mark included, and for seen padding.

        Each row holds the caption's pieces, cut so that the end mark fits, the end mark, and padding. Scores at the end
        of a caption stay: the text before them is cut. (The reference cuts the scores.)
        """
        ids = np.full((len(captions), self.max_length), PAD, np.int32)
        mask = np.zeros(ids.shape, bool)
        for i, caption in enumerate(captions):
            row = [*self._fit(caption)[0], EOS]
            ids[i, : len(row)], mask[i, : len(row)] = row, True
        return ids, mask | self._see_padding

    def losses(self, caption: str) -> list[Loss]:
        """What is lost of a caption on its way through `clean` and `__call__`.

        Args:
          caption: not cleaned yet, its scores appended.
        """
        (given, _), cleaned = split_scores(caption), self.clean(caption)
        kept, _ = split_scores(cleaned)
        if given.strip() and not kept.strip():
            return [Loss(EMPTY, given.strip())]
        gone = [run for run in re.findall(_CJK, urllib.parse.unquote_plus(given)) if run not in kept]
        gone += [word for word in re.findall(r"[^\W\d_]+", kept) if not word.isascii() and not self._reads(word)]
        found = [Loss(UNREAD, " ".join(dict.fromkeys(gone)))] if gone else []
        _, cut = self._fit(cleaned)
        return [*found, Loss(CUT, cut)] if cut else found

    def _fit(self, caption: str) -> tuple[list[int], str]:
        """The pieces of a cleaned caption that there is room for, and the text of the others."""
        room, caption = self.max_length - 1, _valid(caption)
        pieces, end = self._pieces.encode(caption), []
        if len(pieces) > room:
            body, scores = split_scores(caption)
            end = self._pieces.encode(scores)
            if len(end) < room:
                pieces = self._pieces.encode(body)
            else:  # no room for anything else
                end = []
        kept = room - len(end)
        return [*pieces[:kept], *end], self._pieces.decode(pieces[kept:]).strip()

    def _reads(self, word: str) -> bool:
        """Whether a word has pieces of its own: other letters are unknown, or spelt in bytes."""
        pieces = self._pieces.encode(_valid(word))
        return not any(self._pieces.is_unknown(piece) or self._pieces.is_byte(piece) for piece in pieces)


def _valid(text: str) -> str:
    """sentencepiece takes valid UTF-8 only, and a broken JSON escape leaves half a character."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _read(model: str | Path | bytes) -> bytes:
    if isinstance(model, bytes):
        return model
    try:
        return files.path(model).read_bytes()
    except OSError as e:
        raise UserError(
            f"{model}: cannot read the tokenizer ({e.strerror}); a release folder holds it as tokenizer.model"
        ) from e


def _load(proto: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    problem = f"{name}: no sentencepiece model; give T5's tokenizer.model (also called spiece.model)"
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(proto)
    except RuntimeError as e:
        raise UserError(problem) from e
    if (pieces.pad_id(), pieces.eos_id()) != (PAD, EOS):
        raise UserError(
            f"{name}: padding is id {pieces.pad_id()} and the end mark id {pieces.eos_id()}, "
            f"T5 has {PAD} and {EOS}; give the tokenizer that belongs to the text encoder"
        )
    return pieces
