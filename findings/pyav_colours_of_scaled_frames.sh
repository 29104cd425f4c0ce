#!/usr/bin/env bash
# PyAV 18.1.0 (FFmpeg 8.1).
# Guess: a flat colour stays what it is, within 1 of 255, when reformat() makes RGB of yuv420p and scales it.
# Seen: (220, 40, 40) becomes (217, 38, 38) with any of AREA, BILINEAR and BICUBIC, and (219, 38, 39) without scaling.
# ACCURATE_RND alone changes nothing; with FULL_CHR_H_INT it is (220, 40, 40). So clips whose pixels are not square are
# scaled with that flag.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q av==18.1.0 numpy
cat > "$work/try.py" <<'PY'
import av
import numpy as np

AREA, BILINEAR, BICUBIC, FULL, ACCURATE = 0x20, 0x2, 0x4, 0x2000, 0x40000
flat = np.full((144, 180, 3), (220, 40, 40), np.uint8)
exact = FULL | ACCURATE | AREA
frame = av.VideoFrame.from_ndarray(flat, format="rgb24")
stored = frame.reformat(format="yuv420p", dst_colorspace=1, interpolation=exact)


def seen(width, flags):
    return stored.reformat(width, 144, "rgb24", interpolation=flags).to_ndarray()[72, 72].tolist()


print("scaled:", {name: seen(256, flags) for name, flags in (("area", AREA), ("accurate", AREA | ACCURATE), ("full", exact))})
print("as it is:", seen(180, AREA))
for flags in (AREA, BILINEAR, BICUBIC, AREA | ACCURATE):
    assert max(abs(np.subtract(seen(256, flags), (220, 40, 40)))) >= 2, flags
assert max(abs(np.subtract(seen(256, exact), (220, 40, 40)))) <= 1
PY
"$work/venv/bin/python" "$work/try.py"
