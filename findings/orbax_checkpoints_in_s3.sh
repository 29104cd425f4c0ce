#!/usr/bin/env bash
# orbax-checkpoint 0.12.8, tensorstore 0.1.86, etils 1.15.0, s3fs 2026.9.0, moto 5.2.5, jax 0.10.2, on a CPU.
# Guess: Orbax saves to s3:// as it does to gs://, since etils has a path for it, and tensorstore a driver.
# Seen: "etils: hello; Orbax: Checkpoint path should be absolute. Got s3:/bucket/run/state.orbax-checkpoint-tmp": etils
# writes a file there, and Orbax, given the same path, loses one of its two slashes.
# So a training that saves by Orbax needs gs://, or an S3 bucket that is mounted as a folder.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q orbax-checkpoint==0.12.8 tensorstore==0.1.86 'etils[epath,epy]==1.15.0' s3fs==2026.9.0 \
  'moto[server]==5.2.5' jax==0.10.2 jaxlib==0.10.2
cat > "$work/run.py" <<'PY'
import sys

import numpy as np
import orbax.checkpoint as ocp
import s3fs
from etils import epath
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer(ip_address="127.0.0.1", port=int(sys.argv[1]))
server.start()
s3fs.S3FileSystem().mkdir("bucket")
folder = epath.Path("s3://bucket/run")
(folder / "note.txt").write_text("hello")
print("etils:", (folder / "note.txt").read_text(), end="; ")
try:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", {"a": np.arange(4.0)})
    print("Orbax: saved")
except ValueError as error:
    print("Orbax:", error)
server.stop()
PY
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export JAX_PLATFORMS=cpu AWS_ENDPOINT_URL=http://127.0.0.1:$port
export AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test AWS_DEFAULT_REGION=us-east-1
seen=$("$work/venv/bin/python" "$work/run.py" "$port" 2> "$work/log" | tail -n 1) || { cat "$work/log"; exit 1; }
echo "$seen"
[[ $seen == "etils: hello; Orbax: Checkpoint path should be absolute. Got s3:/bucket/"* ]] || { echo "changed"; exit 1; }
