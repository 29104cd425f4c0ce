"""Curation: rules on scores, the lot of strong motion, copies, captions from files and from a server."""

import base64
import collections
import http.server
import io
import json
import threading

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("apache_beam")
pytest.importorskip("openai")

from tora_jax.configs import curate

from tora_jax.data.curate import captions, files, looks, rules
from tora_jax.errors import UserError

LIMITS = curate.get_config()["rules"].to_dict()
GOOD = {
    "name": "a",
    "height": 480,
    "width": 854,
    "seconds": 4.0,
    "black": 0.0,
    "frozen": 0.0,
    "flow": 5.0,
    "foreground": 0.1,
    "camera": "static",
    "aesthetic": None,
}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"height": 100}, "small"),
        ({"black": 0.2}, "black"),
        ({"frozen": 1.5}, "frozen"),
        ({"foreground": 0.001}, "still"),
        ({"flow": 0.05}, "still"),
        ({"camera": "pan left"}, ""),
        ({"camera": "pan left", "foreground": 0.001}, "camera motion"),
        ({"camera": "zoom in", "foreground": 0.0}, "camera motion"),
        ({"camera": "shake", "foreground": 0.0}, "camera motion"),
        ({"flow": 101.0}, "strong motion"),
        ({"aesthetic": 3.9}, "not aesthetic"),
        ({"aesthetic": 4.1}, ""),
        ({"black": 0.5, "foreground": 0.0}, "black"),  # the first reason counts
    ],
)
def test_reasons(changes, reason):
    assert rules.reason({**GOOD, **changes}, LIMITS) == reason
    assert reason in ("", *rules.REASONS)


def test_cameras_that_are_kept():
    row = {**GOOD, "camera": "zoom in"}
    assert rules.reason(row, LIMITS) == ""
    assert rules.reason(row, {**LIMITS, "cameras": ("pan left",)}) == "camera motion"
    assert rules.reason(GOOD, {**LIMITS, "cameras": ()}) == ""  # a static camera always


def test_strong_motion_is_thinned_out_alike_in_each_run():
    rows = [{**GOOD, "name": f"clip {i}", "flow": 40.0} for i in range(2000)]
    fates = [rules.reason(row, LIMITS) for row in rows]
    assert collections.Counter(fates)[""] / 2000 == pytest.approx(0.6, abs=0.04)  # 1 - 40 / 100
    assert fates == [rules.reason(row, LIMITS) for row in rows]
    assert not any(rules.reason({**row, "flow": 20.0}, LIMITS) for row in rows)
    # Whoever stays with more motion stays with less.
    assert all(
        not rules.reason({**row, "flow": 30.0}, LIMITS) for row, fate in zip(rows, fates, strict=True) if not fate
    )
    assert files.chance("a") == files.chance("a") != files.chance("b")


def clip(name, code, height=480, seconds=4.0):
    return {"name": name, "hash": code.tobytes().hex(), "height": height, "width": 640, "seconds": seconds}


def flipped(code, count, seed=0):
    bits = np.unpackbits(code)
    bits[np.random.default_rng(seed).choice(len(bits), count, replace=False)] ^= 1
    return np.packbits(bits)


def test_copies_of_better_clips():
    rng = np.random.default_rng(0)
    code, other = rng.integers(0, 256, (2, looks.BITS // 8), dtype=np.uint8)
    rows = [
        clip("small", code, height=240),
        clip("large", flipped(code, 16)),
        clip("short", flipped(code, 3), seconds=2.0),
        clip("other", other),
    ]
    want = {"small": "large", "short": "large"}
    assert dict(rules.copies(rows, 19)) == want
    assert dict(rules.copies(rows[::-1], 19)) == want
    assert dict(rules.copies(rows[:2], 15)) == {}
    assert dict(rules.copies([clip("b", code), clip("a", code)], 0)) == {"b": "a"}
    assert dict(rules.copies(rows[:1], 16)) == dict(rules.copies([], 16)) == {}


@pytest.mark.parametrize("count", [0, 1, 7, 16])
def test_clips_that_are_near_meet_in_a_band(count):
    """Pigeons: 17 parts, at most 16 bits that differ."""
    rng = np.random.default_rng(count)
    for seed in range(50):
        code = rng.integers(0, 256, looks.BITS // 8, dtype=np.uint8)
        parts = set(rules.bands(code.tobytes(), 16))
        assert len(parts) == 17
        assert parts & set(rules.bands(flipped(code, count, seed).tobytes(), 16))


# ---------------------------------------------------------------- captions


def test_captions_of_files(tmp_path):
    video = tmp_path / "videos" / "a_red-star.2.mp4"
    assert captions.of_file(str(video)) == "a red star 2"
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a_red-star.2.txt").write_text("From labels.\n")
    assert captions.of_file(str(video)) == "From labels."
    video.parent.mkdir()
    video.with_suffix(".txt").write_bytes(b"Beside \xff it.\n")
    assert captions.of_file(str(video)) == "Beside \ufffd it."


class Server:
    """A local server in OpenAI's form, which answers as it is told."""

    def __init__(self, answers):
        self.asked, self.answers = [], list(answers)
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                server.asked.append((self.path, body))
                status, text = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
                message = {"role": "assistant", "content": text}
                choice = {"index": 0, "finish_reason": "stop", "message": message}
                answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
                content = json.dumps(answer if status == 200 else {"error": {"message": text}}).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.send_header("retry-after-ms", "10")
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._http.shutdown()
        self._http.server_close()


def captioner(address, retries=3):
    return captions.Captioner(address, "some-vl", "Describe it.", retries, timeout=10.0, tokens=50)


FRAMES = np.random.default_rng(0).integers(0, 256, (2, 24, 32, 3), dtype=np.uint8)


def test_a_caption_from_a_server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with Server([(200, " A red star.\n It moves. ")]) as server:
        assert captioner(server.address)(FRAMES) == "A red star. It moves."
    ((path, body),) = server.asked
    assert (path, body["model"], body["max_tokens"]) == ("/v1/chat/completions", "some-vl", 50)
    text, *images = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "Describe it."}
    assert len(images) == 2
    for image, frame in zip(images, FRAMES, strict=True):
        head, _, data = image["image_url"]["url"].partition(",")
        assert head == "data:image/jpeg;base64"
        got = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        assert got.shape == frame.shape


def test_calls_are_repeated_where_the_server_is_at_fault():
    with Server([(500, "oh"), (429, "busy"), (200, "Good.")]) as server:
        assert captioner(server.address)(FRAMES) == "Good."
    assert len(server.asked) == 3


@pytest.mark.parametrize(("status", "caption"), [(400, ""), (422, "")])
def test_a_clip_that_the_server_refuses(status, caption):
    with Server([(status, "too large")]) as server:
        assert captioner(server.address)(FRAMES) == caption
    assert len(server.asked) == 1


def test_servers_that_do_not_work():
    with Server([(401, "no key")]) as server, pytest.raises(UserError, match=r"captions: http.* answers 401 .*no key"):
        captioner(server.address)(FRAMES)
    with Server([(500, "oh")]) as server, pytest.raises(UserError, match="answers 500"):
        captioner(server.address, retries=1)(FRAMES)
    assert len(server.asked) == 2
    with pytest.raises(UserError, match=r"cannot be reached .*start it and run again"):
        captioner(server.address, retries=0)(FRAMES)


# ---------------------------------------------------------------- files


def test_files_appear_whole(tmp_path):
    work = files.Work(str(tmp_path), {"probe": {"a": 1}})
    path = work.path("probe", "key")

    def fail(aside):
        aside.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write(path, fail)
    assert not files.exists(path)
    files.write_json(path, {"b": (1, 2)})
    assert files.read_json(path) == {"b": [1, 2]}
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["key.json"]
    with pytest.raises(UserError, match="cannot be written"):
        files.write_json(path + "/y.json", 1)


def test_options_name_the_folders():
    """Other options of a stage: other files of it and of those after it, the same of those before."""
    options = {name: {"a": 1} for name in ("probe", "motion", "looks", "captions")}
    before = files.Work("out", options)
    after = files.Work("out", {**options, "motion": {"a": 2}})
    other = files.Work("out", {**options, "probe": {"a": 2}})
    for stage in ("probe", "clips", "motion", "looks", "captions"):
        assert (before.path(stage, "k") == after.path(stage, "k")) == (stage != "motion")
        assert before.path(stage, "k") != other.path(stage, "k")
    assert before.path("content", "k") == other.path("content", "k")


def test_zip_files_are_the_same_for_the_same_content(tmp_path):
    for name in "ab":
        files.write_zip(str(tmp_path / name), iter([("x", b"1"), ("y", b"2")]), lambda: {"n": 2})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with files.open_zip(str(tmp_path / "a")) as archive:
        assert archive.namelist() == ["x", "y", files.META]
        assert json.loads(archive.read(files.META)) == {"n": 2}
