"""Prompts rewritten by a server that speaks OpenAI's language."""

import contextlib
import http.server
import json
import threading

import pytest

from tora_jax.conditioning import prompt_rewriting
from tora_jax.errors import UserError


@contextlib.contextmanager
def server(answer: str, status: int = 200):
    """Yields its address and the requests that it got."""
    got = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def reply(self, content: dict) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.reply({"object": "list", "data": [{"id": "small", "object": "model", "created": 0, "owned_by": "me"}]})

        def do_POST(self):
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer}}
            self.reply({"id": "1", "object": "chat.completion", "created": 0, "model": "small", "choices": [choice]})

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}/v1", got
        running.shutdown()


def test_each_prompt_is_rewritten():
    with server("A red star\n drifts.") as (address, got):
        assert prompt_rewriting.rewrite(["a star.", "a heart."], address) == ["A red star drifts."] * 2
        assert prompt_rewriting.rewrite(["a star."], address, "large") == ["A red star drifts."]
    assert [call["model"] for call in got] == ["small", "small", "large"]
    assert [call["messages"][-1]["content"] for call in got] == ["a star.", "a heart.", "a star."]
    assert "score suffixes" in got[0]["messages"][0]["content"]


@pytest.mark.parametrize(("answer", "status"), [("", 200), ("a star", 400)])
def test_a_server_without_an_answer(answer, status):
    with server(answer, status) as (address, _), pytest.raises(UserError, match="gives no prompt"):
        prompt_rewriting.rewrite(["a star."], address)


def test_no_server(monkeypatch):
    with pytest.raises(UserError, match="gives no prompt"):
        prompt_rewriting.rewrite(["a star."], "http://127.0.0.1:1/v1")
