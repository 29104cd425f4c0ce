"""A hub on loopback: what `huggingface_hub` asks of the real one, for the files of a folder."""

import contextlib
import hashlib
import http.server
import json
import re
import threading
from pathlib import Path

SHA = "0" * 39 + "1"  # of the only commit


class Hub:
    """What was asked, and what to refuse.

    Attributes:
      address: for HF_ENDPOINT.
      asked: (method, path, Range header or None) of each request for a file.
      cut: path of a file whose first request breaks off in the middle, and whose next one fails; None = none.
    """

    def __init__(self, repository: str, folder: Path):
        self.repository, self.folder = repository, folder
        self.asked: list[tuple[str, str, str | None]] = []
        self.cut: str | None = None
        self.address = ""

    def fetched(self) -> set[str]:
        """Paths of the files whose contents were asked for."""
        return {path for method, path, _ in self.asked if method == "GET"}


@contextlib.contextmanager
def serve(repository: str, folder: Path):
    """Yields a `Hub` that serves a folder as a model's repository."""
    hub = Hub(repository, folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer("HEAD")

    def do_GET(self):
        self._answer("GET")

    def _answer(self, method: str) -> None:
        repository, folder = self.hub.repository, self.hub.folder
        if self.path.split("?")[0] == f"/api/models/{repository}":
            names = [{"rfilename": path.relative_to(folder).as_posix()} for path in folder.rglob("*") if path.is_file()]
            return self._send(json.dumps({"id": repository, "sha": SHA, "siblings": names}).encode(), {})
        found = re.fullmatch(rf"/{repository}/resolve/[^/]+/([^?]+)", self.path)
        if found is None or not (folder / found[1]).is_file():
            error = "EntryNotFound" if found else "RepoNotFound"
            return self._send(b"", {"X-Error-Code": error, "X-Repo-Commit": SHA}, 404)
        asked, data = self.headers.get("Range"), (folder / found[1]).read_bytes()
        again = any(one[:2] == (method, found[1]) for one in self.hub.asked)
        self.hub.asked.append((method, found[1], asked))
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        cut = method == "GET" and self.hub.cut == found[1]
        if cut and again:
            return self._send(b"", headers, 500)
        start = int(re.match(r"bytes=(\d+)-", asked)[1]) if asked else 0
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(data[start:], headers, 206 if asked else 200, method, whole=not cut)

    def _send(self, data: bytes, headers: dict, status: int = 200, method: str = "GET", whole: bool = True) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if method == "GET":
            self.wfile.write(data if whole else data[: len(data) // 2])
