"""Captions: what cleaning and tokenizing do to text that people give."""

import importlib.resources
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tora_jax.conditioning import text
from tora_jax.errors import UserError

ASSET = importlib.resources.files("tora_jax") / "assets" / "tokenizer.model"
LENGTH = 12


@pytest.fixture(scope="module")
def tokenizer():
    return text.Tokenizer(ASSET.read_bytes(), LENGTH)


def test_scores_are_appended_in_order():
    got = text.append_scores("a boat.", aesthetic_score=6.5, motion_score=8, camera_motion="pan left")
    assert got == "a boat. aesthetic score: 6.5. motion score: 8.0. camera motion: pan left."


def test_a_score_in_the_prompt_stays():
    prompt = "a boat. motion score: 3.0."
    assert text.append_scores(prompt, motion_score=20) == prompt
    assert text.append_scores(prompt, aesthetic_score=5) == prompt + " aesthetic score: 5.0."
    assert text.append_scores(prompt) == prompt


def test_scores_survive_cleaning():
    prompt = text.append_scores("A Boat", 6.5, 8.0, "pan left")
    assert text.clean(prompt) == "a boat aesthetic score: 6.5. motion score: 8.0. camera motion: pan left."


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("A <b>RED</b>  balloon\n over the lake", "a red balloon over the lake"),
        ("see www.example.com/x for a boat", "see for a boat"),
        ("a dog — “quoted” — runs", 'a dog - "quoted" - runs'),
        ("one-two-three stays", "one-two-three stays"),
        ("one-two-three-four-five is split", "one two three four five is split"),
        ("clip ab1234 in 1920x1080", "clip in"),
        ("#12 and #1234 and #12345", "and 1234 and"),
        ('"all of it quoted"', "all of it quoted"),
        ("three,five.seven", "three, five. seven"),
        ("free download: a boat", "a boat"),
        ("photo.jpg", ""),
        (".hidden", ""),
        ("你好", ""),
    ],
)
def test_cleaning_rules(raw, cleaned):
    assert text.clean(raw) == cleaned


ODD = st.text(alphabet=st.sampled_from("aB1 .,:;-_'\"#@&%<>/!?[](){}\\n\n你é—“"), max_size=60)


@settings(deadline=None, max_examples=200)
@given(st.one_of(st.text(max_size=60), ODD))
@example("<![x")
@example("&#" + "9" * 5000 + ";")
@example("＆＃" + "9" * 5000 + "a；")
@example("half a character: \ud800 <b>")
@example("<b>" * 3000)
@example("http://only.a.link/")
def test_cleaning_takes_any_text(raw):
    cleaned = text.clean(raw)
    assert isinstance(cleaned, str)
    assert cleaned == cleaned.strip()


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="ascii"), max_size=40))
@example("../x\t[]]> it's ``so'' -- .5 % 100;")
def test_plain_captions_do_without_the_libraries(raw):
    with mock.patch.object(text, "_is_plain", return_value=False):
        want = text.clean(raw)
    assert text.clean(raw) == want


@settings(deadline=None, max_examples=100)
@given(st.lists(st.text(max_size=40), max_size=4), st.integers(1, 20))
@example(["\ud800"], 3)
@example(["</s> <pad> <unk>"], 20)
@example(["", "a " * 100], 1)
def test_rows_have_one_length_and_one_end_mark(captions, length):
    ids, mask = text.Tokenizer(ASSET.read_bytes(), length)(captions)
    assert ids.shape == mask.shape == (len(captions), length)
    assert ids.dtype == np.int32
    assert mask.dtype == bool
    valid = mask.sum(1)
    np.testing.assert_array_equal(mask, np.arange(length) < valid[:, None])
    np.testing.assert_array_equal((ids == text.EOS).sum(1), np.ones(len(captions)))
    np.testing.assert_array_equal(ids[np.arange(len(captions)), valid - 1], np.ones(len(captions)))
    assert (ids[~mask] == text.PAD).all()
    assert (ids[mask] != text.PAD).all()


def test_a_long_caption_is_cut_before_the_end_mark(tokenizer):
    caption = "a red disc moves slowly from left to right over blue waves and then stops"
    ids, mask = tokenizer([caption])
    longer, _ = text.Tokenizer(ASSET.read_bytes(), 100)([caption])
    assert mask.all()
    np.testing.assert_array_equal(ids[0, :-1], longer[0, : LENGTH - 1])
    assert ids[0, -1] == text.EOS


LONG = "a red disc moves slowly from left to right over blue waves and then stops."


def test_scores_survive_the_cut(tokenizer):
    """The text before them is cut, at the tokens that they need; but where they need all there is, they are text."""
    scored = text.append_scores(LONG, motion_score=8)
    ids, _ = text.Tokenizer(ASSET.read_bytes(), 20)([text.clean(scored)])
    want = "a red disc moves slowly from left to right over blue motion score: 8.0."
    assert tokenizer._pieces.decode(ids[0].tolist()) == want
    tight = text.Tokenizer(ASSET.read_bytes(), 8)
    np.testing.assert_array_equal(tight([text.clean(scored)])[0], tight([text.clean(LONG)])[0])


@pytest.mark.parametrize(
    ("prompt", "lost"),
    [
        ("a red star.", []),
        ("", []),
        ("红色的星星在蓝色的波浪上", [(text.EMPTY, "红色的星星在蓝色的波浪上")]),
        ("www.example.com photo.jpg", [(text.EMPTY, "www.example.com photo.jpg")]),
        ("红色 a boat 星星", [(text.UNREAD, "红色 星星")]),
        ("赤い星", [(text.UNREAD, "赤 星 い")]),
        ("красная звезда over blue waves", [(text.UNREAD, "красная звезда")]),
        (LONG, [(text.CUT, "from left to right over blue waves and then stops.")]),
    ],
)
@pytest.mark.parametrize("score", [None, 8])
def test_what_is_lost(prompt, lost, score):
    length = 6 if score is None else 6 + 8
    found = text.Tokenizer(ASSET.read_bytes(), length).losses(text.append_scores(prompt, motion_score=score))
    if lost and lost[0][0] != text.CUT:  # Cyrillic is spelt in bytes, which do not fit here
        found = [each for each in found if each.kind != text.CUT]
    assert found == lost
    assert all(repr(each.text)[1:-1][:20] in str(each) for each in found)


@settings(deadline=None, max_examples=100)
@given(st.one_of(st.text(max_size=60), ODD))
@example("half a character: \ud800 <b>")
def test_losses_of_any_text(tokenizer, raw):
    for each in tokenizer.losses(text.append_scores(raw, 6.5, 8)):
        assert each.kind in (text.EMPTY, text.UNREAD, text.CUT)
        assert each.text


def test_spaces_around_words_do_not_matter(tokenizer):
    ids, _ = tokenizer(["a red star", "  a  red   star "])
    np.testing.assert_array_equal(ids[0], ids[1])


def test_shipped_vocabulary(tokenizer):
    """The small model's: its own words are one token each, any other character falls back to bytes."""
    unknown = 2
    ids, mask = tokenizer(["a red disc moves to the left", "xyz é 你 @"])
    assert mask.sum(1)[0] == 7 + 1
    assert unknown not in ids
    assert 900 <= tokenizer.vocab_size <= 1100
    assert len(ASSET.read_bytes()) < 300_000


def test_tokenizer_mistakes(tmp_path):
    junk = tmp_path / "junk.model"
    for content in (b"", b"junk", ASSET.read_bytes()[:3000]):
        junk.write_bytes(content)
        with pytest.raises(UserError, match=r"junk\.model: no sentencepiece model"):
            text.Tokenizer(junk, LENGTH)
    with pytest.raises(UserError, match="bytes"):
        text.Tokenizer(b"junk", LENGTH)
    with pytest.raises(UserError, match=r"absent\.model"):
        text.Tokenizer(tmp_path / "absent.model", LENGTH)
    with pytest.raises(UserError, match="directory"):
        text.Tokenizer(tmp_path, LENGTH)
    with pytest.raises(UserError, match="0"):
        text.Tokenizer(ASSET.read_bytes(), 0)


def test_a_tokenizer_of_another_model(tmp_path):
    """Llama's ids: no padding, 2 for the end."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red star", "a blue disc"] * 10),
        model_prefix=str(tmp_path / "llama"),
        vocab_size=20,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(UserError, match="end mark id 2"):
        text.Tokenizer(tmp_path / "llama.model", LENGTH)
