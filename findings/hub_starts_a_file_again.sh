#!/usr/bin/env bash
# huggingface_hub 2.4.0.
# Guess: a download that broke off goes on from its .incomplete file when hf_hub_download is called again.
# Seen: "asked for: whole, from byte 1048576, whole". Within one call it goes on after a lost connection. Once the call
# has failed (or its process has ended), the part is removed, and the next call starts the file at its first byte: each
# download has a temporary file with a random name, so that processes never append to one another's.
# So what must survive an end of the process, such as one file of 12 GB, is fetched into a file of our own with
# `http_get(..., resume_size=...)`, and put where the cache keeps its blobs; hf_hub_download then only links it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q huggingface_hub==2.4.0
cat > "$work/try.py" <<'PY'
import hashlib
import http.server
import logging
import re
import sys
import threading
from pathlib import Path

from huggingface_hub import constants, hf_hub_download

constants.DOWNLOAD_CHUNK_SIZE = 1 << 20
logging.disable(logging.WARNING)
DATA, asked = bytes(2 << 20) + b"end", []


class Handler(http.server.BaseHTTPRequestHandler):
    """One file. Its first request breaks off after a MiB, the second gets an error, and the others all of it."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(b"", len(DATA), 200)

    def do_GET(self):
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        asked.append(f"from byte {start[1]}" if start else "whole")
        if len(asked) == 2:
            return self.answer(b"", 0, 500)
        self.answer(DATA[: 1 << 20] if len(asked) == 1 else DATA, len(DATA), 200)

    def answer(self, data, length, status):
        self.send_response(status)
        etag = hashlib.sha256(DATA).hexdigest()
        for name, value in {"ETag": f'"{etag}"', "X-Repo-Commit": "0" * 40, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
options = {"endpoint": f"http://127.0.0.1:{server.server_port}", "cache_dir": sys.argv[1]}
try:
    hf_hub_download("someone/model", "weights.bin", **options)
    sys.exit("changed: the first download should fail")
except OSError:
    pass
left = [path.name for path in Path(sys.argv[1]).rglob("*.incomplete")]
assert Path(hf_hub_download("someone/model", "weights.bin", **options)).read_bytes() == DATA
print("asked for:", ", ".join(asked))
assert not left, f"changed: {left} is kept"
assert asked == ["whole", "from byte 1048576", "whole"], "changed: a failed download goes on"
PY
NO_PROXY=127.0.0.1 HF_HUB_DISABLE_PROGRESS_BARS=1 "$work/venv/bin/python" "$work/try.py" "$work/cache"
