"""A decoded frame -> its pixels as players show them: upright, square pixels, the colours of BT.709 and sRGB."""

from __future__ import annotations

import dataclasses
import functools

import av
import numpy as np
from jaxtyping import Float32, UInt8, UInt16

from tora_jax.io.clip_files import ClipError

BT601_HEIGHT, BT601_WIDTH = 576, 1279  # the largest frames without a matrix that players take for BT.601's
WIDEST = 10.0  # of a pixel, in its heights
EXACT = 0x20 | 0x2000 | 0x40000  # FFmpeg's AREA, FULL_CHR_H_INT, ACCURATE_RND: scaling takes 3 of 255 off without them
# FFmpeg's numbers of matrices, primaries and transfer characteristics; these of matrices are RGB, BT.709, unknown, FCC,
# BT.470BG, SMPTE 170M, SMPTE 240M, BT.2020.
MATRICES, BT709, UNKNOWN = (0, 1, 2, 4, 5, 6, 7, 9), 1, 2
BT2020, DISPLAY_P3 = 9, 12
PQ, HLG = 16, 18
LINEAR, LOG, LOG_SQRT, SMPTE428 = 8, 9, 10, 17
# SDR's white in HDR (ITU-R BT.2408): nits of PQ, and the light at HLG's level of 0.75, where the most is 1.
PQ_WHITE, HLG_WHITE = 203.0, 0.26496
KNEE, PEAK = 0.75, 1000 / PQ_WHITE  # of SDR's white: from where on HDR is made darker, so that light up to PEAK fits in
# Linear RGB -> that of BT.709 (from ITU-R BT.2087, and from the primaries of SMPTE EG 432-1)
TO_BT709 = {
    BT2020: ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187)),
    DISPLAY_P3: ((1.2249, -0.2247, 0), (-0.0420, 1.0419, 0), (-0.0197, -0.0786, 1.0979)),
}


@dataclasses.dataclass(frozen=True)
class Display:
    """How the frames of a stream are shown; see `of`.

    Attributes:
      square: width of a pixel, in its heights.
      transposed, down, right: the rows become columns; then the steps, 1 or -1, in which rows and columns are taken.
      matrix: the stream's one from luma and chroma to RGB, where its frames do not name it; None = as they say.
      transfer, primaries: FFmpeg's numbers, where colours are converted; 0 = those of BT.709.
    """

    square: float
    transposed: bool
    down: int
    right: int
    matrix: int | None
    transfer: int
    primaries: int

    @classmethod
    def of(cls, stream: av.VideoStream, frame: av.VideoFrame, name: str) -> Display:
        """How the frames are shown of the stream that begins with this one.

        Raises:
          ClipError: "rotated" by other than quarters, "colours" that cannot be converted, or pixels far from square.
        """
        codec = stream.codec_context
        large = frame.height > BT601_HEIGHT or frame.width > BT601_WIDTH
        if frame.colorspace not in MATRICES or codec.color_trc in (LINEAR, LOG, LOG_SQRT, SMPTE428):
            problem = f"{name}: has colours of a rare kind (ICtCp, linear light ...); export it in BT.709"
            raise ClipError(problem, "colours")
        wide = codec.color_primaries == BT2020 or codec.color_trc in (PQ, HLG)
        matrix = BT2020 if wide else BT709 if large else None
        square = float(stream.sample_aspect_ratio or 1)
        if not 1 / WIDEST <= square <= WIDEST:
            raise ClipError(f"{name}: has pixels {square:g} times as wide as high; make them square", "not square")
        return cls(
            square,
            *_orientation(frame, name),
            matrix=matrix if frame.colorspace == UNKNOWN else None,
            transfer=codec.color_trc if codec.color_trc in (PQ, HLG) else 0,
            primaries=codec.color_primaries if codec.color_primaries in TO_BT709 else 0,
        )

    @property
    def turned(self) -> bool:
        """Whether frames are not stored upright."""
        return self.transposed or (self.down, self.right) != (1, 1)

    def size(self, frame: av.VideoFrame) -> tuple[int, int]:
        """Height and width of a frame as it is shown."""
        sides = frame.height, round(frame.width * self.square)
        return sides[::-1] if self.transposed else sides

    def __call__(self, frame: av.VideoFrame, short: int = 0) -> UInt8[np.ndarray, "h w 3"]:
        """RGB of a frame as it is shown.

        Args:
          short: pixels of the shorter side, at most, made smaller by the mean; 0 = all.
        """
        height, width = frame.height, round(frame.width * self.square)
        if short:
            height, width = fit(height, width, short)
        converted = self.transfer or self.primaries
        exact = {"interpolation": EXACT} if self.square != 1 else {}
        pixels = "rgb48le" if converted else "rgb24"
        picture = reformat(frame, pixels, width, height, src_colorspace=self.matrix, **exact).to_ndarray()
        if converted:
            picture = to_bt709(picture, self.transfer, self.primaries)
        return (picture.swapaxes(0, 1) if self.transposed else picture)[:: self.down, :: self.right]


def reformat(frame: av.VideoFrame, pixels: str, width: int | None = None, height: int | None = None, **options):
    """A frame with other pixels."""
    # With several threads, FFmpeg's scaler gives other pixels from one run to the next.
    return frame.reformat(width, height, pixels, **{"interpolation": "AREA", "threads": 1, **options})


def fit(height: int, width: int, short: int) -> tuple[int, int]:
    """Height and width made small enough for a shorter side of `short` pixels; never enlarged."""
    scale = min(short / min(height, width), 1)
    return max(round(height * scale), 1), max(round(width * scale), 1)


def _orientation(frame: av.VideoFrame, name: str) -> tuple[bool, int, int]:
    """Whether rows become columns, and then the steps in which rows and columns are taken."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return False, 1, 1
    # Column x and row y are shown at (a x + c y, b x + d y).
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
    if max(abs(b), abs(c)) * 100 < min(abs(a), abs(d)):
        return False, -1 if d < 0 else 1, -1 if a < 0 else 1
    if max(abs(a), abs(d)) * 100 < min(abs(b), abs(c)):
        return True, -1 if b < 0 else 1, -1 if c < 0 else 1
    raise ClipError(f"{name}: is to be shown turned by {-frame.rotation} degrees; turn it by quarters", "rotated")


# ----------------------------------------------------------------------------------------------------------
# Colours
# ----------------------------------------------------------------------------------------------------------


def to_bt709(pixels: UInt16[np.ndarray, "h w 3"], transfer: int, primaries: int) -> UInt8[np.ndarray, "h w 3"]:
    """HDR (PQ, HLG) or a wide gamut -> SDR in BT.709's.

    Up to KNEE of SDR's white, light stays as it is; what is brighter is made darker, all of a pixel alike, until PEAK
    fits in. HLG's light is that of the scene, as in SDR. Colours outside of the gamut are clipped.

    Args:
      pixels: full range.
      transfer: of HDR, FFmpeg's number; 0 = SDR.
      primaries: FFmpeg's number; 0 = BT.709.
    """
    light = _light(transfer)[pixels]
    if primaries:
        light = light @ np.float32(TO_BT709[primaries]).T
    light = light.clip(0, None)
    if transfer:
        brightest = light.max(-1, keepdims=True)
        over, most = (brightest - KNEE).clip(0, None) / (1 - KNEE), (PEAK - KNEE) / (1 - KNEE)
        darker = KNEE + (1 - KNEE) * over * (1 + over / most**2) / (1 + over)
        light *= np.where(brightest > KNEE, darker / np.maximum(brightest, KNEE), 1)
    return _levels()[(light.clip(0, 1) * 65535 + 0.5).astype(np.uint16)]


@functools.cache
def _light(transfer: int) -> Float32[np.ndarray, "65536"]:
    """Light of each level, 1 = SDR's white."""
    level = np.linspace(0, 1, 65536)
    if transfer == PQ:
        root = level ** (32 / 2523)
        light = ((root - 0.8359375).clip(0, None) / (18.8515625 - 18.6875 * root)) ** (8192 / 1305) * 10000 / PQ_WHITE
    elif transfer == HLG:
        high = (np.exp((level - 0.55991073) / 0.17883277) + 0.28466892) / 12
        light = np.where(level <= 0.5, level**2 / 3, high) / HLG_WHITE
    else:
        light = np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
    return light.astype(np.float32)


@functools.cache
def _levels() -> UInt8[np.ndarray, "65536"]:
    """sRGB's level of each light."""
    light = np.linspace(0, 1, 65536)
    level = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.round(255 * level).astype(np.uint8)
