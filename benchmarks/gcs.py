"""gs:// on this machine: gcp-storage-emulator, with what tensorstore needs of the service beside.

  pip install gcp-storage-emulator
  python -m benchmarks.gcs --port 9023   # prints the environment that leads programs to it, with gs://bucket

The emulator leaves out the generation where it gives a file, and conditions on generations, both of which
tensorstore counts on. Asked for the last bytes of a file, as by ArrayRecord, it would give the whole.
With `--refuse FILE`, it answers 503 for as long as FILE is there.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.storage import Storage

BUCKET = "bucket"

logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)  # each file that is looked for in vain is an error


def environment(port: int) -> dict[str, str]:
    """What leads gcsfs and google-cloud-storage, tensorstore, and ArrayRecord to the server."""
    names = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "CLOUD_STORAGE_EMULATOR_ENDPOINT")
    # Without the last, gcsfs asks for the kind of each bucket, over gRPC, which waits for a minute.
    return {**dict.fromkeys(names, f"http://127.0.0.1:{port}"), "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}


class Files(Storage):
    """In memory. The last files are at hand, for the emulator copies a whole file for each range of it."""

    def __init__(self):
        super().__init__(use_memory_fs=True)
        self._read = functools.lru_cache(4)(lambda bucket, name, _: super(Files, self).get_file(bucket, name))

    def get_file(self, bucket_name: str, file_name: str, show_error: bool = True) -> bytes:
        return self._read(bucket_name, file_name, self.get_file_obj(bucket_name, file_name)["generation"])


class Handler(server.RequestHandler):
    """A request to the emulator; one at a time, so that conditions hold until they are acted on."""

    refuse: Path | None = None

    def do(self, method: str) -> None:
        self._query = {name: values[0] for name, values in parse_qs(urlparse(self.path).query).items()}
        status = self._refused() or self._precondition()
        if status is None:
            self._count_from_the_start()
            return server.Router(self).handle(method)
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(status.value, status.phrase)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self):  # noqa: N802 (names of http.server)
        self.do("GET")

    def do_POST(self):  # noqa: N802 (as above)
        self.do("POST")

    def do_PUT(self):  # noqa: N802 (as above)
        self.do("PUT")

    def do_DELETE(self):  # noqa: N802 (as above)
        self.do("DELETE")

    def _refused(self) -> HTTPStatus | None:
        return HTTPStatus.SERVICE_UNAVAILABLE if self.refuse is not None and self.refuse.exists() else None

    def _precondition(self) -> HTTPStatus | None:
        wanted, unwanted = (self._query.get(f"ifGeneration{sign}Match") for sign in ("", "Not"))
        found = self._generation() if wanted or unwanted else ""
        if wanted is not None and wanted != found:
            return HTTPStatus.PRECONDITION_FAILED
        return HTTPStatus.NOT_MODIFIED if unwanted is not None and unwanted == found else None

    def _count_from_the_start(self) -> None:
        """Of the last bytes of a file says where they begin."""
        if (span := self.headers.get("Range", "")).startswith("bytes=-"):
            begin = max(int(self._file().get("size", 0)) - int(span.removeprefix("bytes=-")), 0)
            self.headers.replace_header("Range", f"bytes={begin}-")

    def _generation(self) -> str:
        return self._file().get("generation", "0")

    def _file(self) -> dict[str, Any]:
        """What the emulator tells of the file that is asked for; nothing of one that is not there."""
        bucket, _, name = urlparse(self.path).path.partition("/b/")[2].partition("/o")
        name = self._query.get("name") or unquote(name.removeprefix("/"))
        try:
            return self.storage.get_file_obj(bucket, name)
        except NotFound:
            return {}

    def end_headers(self) -> None:
        if self.command == "GET" and "alt" in self._query:
            self.send_header("x-goog-generation", self._generation())
        super().end_headers()


class Server(http.server.HTTPServer):
    def handle_error(self, request: object, address: object) -> None:
        """Says nothing of clients that are killed, or want no more of an answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, address)


@contextlib.contextmanager
def serve(port: int = 0, refuse: Path | None = None) -> Iterator[int]:
    """Runs the server in a thread, with an empty BUCKET in memory, and yields its port.

    Args:
      port: 0 = a free one.
      refuse: while this file is there, the server takes nothing.
    """
    storage = Files()
    buckets.create_bucket(BUCKET, storage)
    handler = type("Bound", (Handler,), {"refuse": refuse})
    with Server(("127.0.0.1", port), functools.partial(handler, storage)) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield httpd.server_address[1]
        httpd.shutdown()
        thread.join()


@contextlib.contextmanager
def serve_apart() -> Iterator[None]:
    """The same in a process of its own, for measurements; this process and those it starts are led to it."""
    command = [sys.executable, "-m", "benchmarks.gcs"]
    with subprocess.Popen(command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True) as server:
        told = [server.stdout.readline().removeprefix("export ").strip() for _ in environment(0)]
        os.environ |= dict(line.split("=", 1) for line in told)
        try:
            yield
        finally:
            server.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--refuse", type=Path)
    args = parser.parse_args()
    with serve(args.port, args.refuse) as port:
        print(*(f"export {name}={value}" for name, value in environment(port).items()), sep="\n", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
