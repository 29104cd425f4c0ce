"""Curation: captions from files and from a server."""

import base64
import http.server
import io
import json
import threading

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("apache_beam")
pytest.importorskip("openai")

from tora_jax.data.curate import captions
from tora_jax.errors import UserError


def test_captions_of_files(tmp_path):
    video = tmp_path / "videos" / "a_red-star.2.mp4"
    assert captions.of_file(str(video)) == "a red star 2"
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a_red-star.2.txt").write_text("From labels.\n")
    assert captions.of_file(str(video)) == "From labels."
    video.parent.mkdir()
    video.with_suffix(".txt").write_bytes(b"Beside \xff it.\n")
    with pytest.raises(UserError, match=r"2\.txt: is no UTF-8 text"):
        captions.of_file(str(video))
    video.with_suffix(".txt").write_text("Beside it.\n")
    assert captions.of_file(str(video)) == "Beside it."
    video.with_suffix(".txt").rename(video.with_suffix(".TXT"))
    assert captions.of_file(str(video)) == "Beside it."


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
