"""Open-Sora v1.2's data set and PyTorch's loader: clips per second, one number for each repeat, as JSON on stdout.

Started by benchmarks/loader.py; nothing of ours is imported. What it takes of torchvision is stood in for by the same
arithmetic on PyAV and PyTorch, since newer releases have its reader of videos no more; mmengine's registry by nothing.
"""

import itertools
import json
import sys
import time
from pathlib import Path

import torch
from reference import Registry, stand_in


def read_from_stream(container, start, end, unit, stream, which):
    """All frames, in the order in which they are shown."""
    return sorted(container.decode(stream), key=lambda frame: frame.pts)


class Compose:
    def __init__(self, transforms):
        self.transforms = transforms

    def __call__(self, video):
        for transform in self.transforms:
            video = transform(video)
        return video


class Normalize:
    def __init__(self, mean, std, inplace):
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))

    def __call__(self, video):
        return video.sub_(self.mean).div_(self.std)


def data_set(folder: Path):
    """The class VideoTextDataset of a checkout."""
    for name in ("opensora", "opensora.datasets"):
        stand_in(name).__path__ = [str(folder.joinpath(*name.split(".")))]
    stand_in("opensora.registry", DATASETS=Registry())
    stand_in("requests")
    stand_in("torchvision", get_video_backend=lambda: "pyav")
    stand_in("torchvision.datasets")
    stand_in("torchvision.datasets.folder", IMG_EXTENSIONS=(), pil_loader=None)
    stand_in("torchvision.io", write_video=None)
    stand_in(
        "torchvision.io.video",
        _align_audio_frames=None,
        _check_av_available=lambda: None,
        _log_api_usage_once=lambda _: None,
        _read_from_stream=read_from_stream,
        _video_opt=stand_in("torchvision.io._video_opt", default_timebase=0),
    )
    nothing = {"Lambda": lambda _: None, "ToTensor": lambda: None}  # what pictures go through, and videos do not
    stand_in("torchvision.transforms", Compose=Compose, Normalize=Normalize, **nothing)
    stand_in("torchvision.utils", save_image=None)
    from opensora.datasets.datasets import VideoTextDataset

    return VideoTextDataset


def main() -> None:
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    kept = {"num_frames": options["frames"], "image_size": (options["height"], options["width"])}
    clips = data_set(folder)(options["table"], transform_name="resize_crop", **kept)
    workers, batch = options["workers"], options["batch"]
    loader = torch.utils.data.DataLoader(
        clips, batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for _ in range(2 * max(workers, 1) + 2):  # what is made ahead
        next(batches)
    rates = []
    for _ in range(options["repeats"]):
        start = time.perf_counter()
        for _ in range(options["batches"]):
            next(batches)
        rates.append(options["batches"] * batch / (time.perf_counter() - start))
    print(json.dumps(rates))


if __name__ == "__main__":
    main()
