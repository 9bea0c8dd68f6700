"""What loader.py races: the DataLoader of other code, DALI's own graph, and ours."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from benchmarks.provenance import DEVICE, import_torchvision

if TYPE_CHECKING:
    from PIL.Image import Image

SIZE = 224
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Turn:
    """What one process does."""

    folder: Path
    batch: int
    threads: int
    hw_decoder_load: float


# --- the baselines and a reference ------------------------------------------------------------------


def random_box(height: int, width: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) by RandomResizedCrop's law, from torch's generator."""
    for _ in range(10):
        area = height * width * torch.empty(1).uniform_(*SCALE).item()
        aspect = math.exp(torch.empty(1).uniform_(math.log(RATIO[0]), math.log(RATIO[1])).item())
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(height - h + 1, (1,)))
            left = int(torch.randint(width - w + 1, (1,)))
            return left, top, left + w, top + h
    aspect = width / height
    w = round(height * RATIO[1]) if aspect > RATIO[1] else width
    h = round(width / RATIO[0]) if aspect < RATIO[0] else height
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def to_uint8(image: "Image") -> Tensor:
    """Crop, resize and flip, as torchvision's transforms do on a PIL image: uint8 `[H, W, 3]`."""
    from PIL import Image

    image = image.crop(random_box(image.height, image.width))
    image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    if torch.rand(1) < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image))


def maes_transforms() -> Callable[["Image"], Tensor]:
    """Those of main_pretrain.py: fp32 `[3, H, W]`, normalized."""
    import_torchvision()
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(
                SIZE, scale=SCALE, interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


class WholeImages(Dataset[Tensor]):
    """Files decoded whole, one at a time."""

    def __init__(self, paths: Sequence[Path], transform: Callable[["Image"], Tensor]):
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        from PIL import Image

        with Image.open(self.paths[i]) as opened:
            return self.transform(opened.convert("RGB"))


def dataloader(turn: Turn, transform: Callable[["Image"], Tensor]) -> Iterator[Tensor]:
    from fastmim.data import find_images

    images: Any = find_images(turn.folder)  # of a folder, whose images are files
    paths = [images.path(i) for i in range(len(images))]
    loader = DataLoader(
        WholeImages(paths, transform),
        batch_size=turn.batch,
        sampler=RandomSampler(paths, replacement=True, num_samples=2**31),
        num_workers=turn.threads,
        pin_memory=DEVICE == "cuda",
    )
    for crops in loader:
        yield crops.to(DEVICE, non_blocking=True)


def dali_plain(turn: Turn) -> Iterator[Tensor]:
    """DALI by its own documentation: reader, fused decode and random crop, resize, mirror."""
    from nvidia.dali import Pipeline, types
    from nvidia.dali import fn as dali_fn

    from fastmim.data import find_images

    images: Any = find_images(turn.folder)
    cuda = DEVICE == "cuda"
    pipe = Pipeline(
        batch_size=turn.batch, num_threads=turn.threads, exec_dynamic=True, seed=0,
        device_id=torch.cuda.current_device() if cuda else None,
    )  # fmt: skip
    fn: Any = dali_fn  # whose stubs know no keyword of the GPU
    load: dict[str, Any] = {"hw_decoder_load": turn.hw_decoder_load} if cuda else {}
    with pipe:
        files = [str(images.path(i)) for i in range(len(images))]
        encoded, _ = fn.readers.file(files=files, random_shuffle=True, initial_fill=4096)
        decoded = fn.decoders.image_random_crop(
            encoded, device="mixed" if cuda else "cpu", output_type=types.DALIImageType.RGB,
            random_area=SCALE, random_aspect_ratio=RATIO, adjust_orientation=False, **load,
        )  # fmt: skip
        resized = fn.resize(decoded, size=(SIZE, SIZE), interp_type=types.DALIInterpType.INTERP_CUBIC)
        pipe.set_outputs(fn.flip(resized, horizontal=fn.random.coin_flip()))
    pipe.build()
    while True:
        (crops,) = pipe.run()
        yield torch.from_dlpack(crops.as_tensor())


# --- ours -------------------------------------------------------------------------------------------


def ours(turn: Turn, decoder: Any) -> Iterator[Tensor]:
    from fastmim.data import DataConfig

    config = DataConfig(
        path=turn.folder, decoder=decoder, threads=turn.threads, hw_decoder_load=turn.hw_decoder_load
    )
    yield from crops_of(config, turn.batch, SIZE)


def crops_of(config: Any, batch: int, size: int) -> Iterator[Tensor]:
    """What our loader makes of the images at `config.path`: uint8 `[batch, size, size, 3]`, for ever."""
    from fastmim.data import find_images, open_loader
    from fastmim.views import Crop

    with open_loader(find_images(config.path), (Crop(size=(size, size)),), batch, config=config) as loader:
        for found in loader:
            yield found.crops[0]


PROVIDERS: dict[str, Callable[[Turn], Iterator[Tensor]]] = {  # the first that runs is the baseline
    "dataloader": lambda turn: dataloader(turn, maes_transforms()),
    "dataloader_uint8": lambda turn: dataloader(turn, to_uint8),
    "pillow": lambda turn: ours(turn, "pillow"),
    "dali_plain": dali_plain,
    "dali": lambda turn: ours(turn, "dali"),
    "pillow_packed": lambda turn: ours(turn, "pillow"),
    "dali_packed": lambda turn: ours(turn, "dali"),
}
NEEDS = {
    "dataloader": "torchvision", "dataloader_uint8": "PIL", "pillow": "PIL", "pillow_packed": "PIL",
    "dali_plain": "nvidia.dali", "dali": "nvidia.dali", "dali_packed": "nvidia.dali",
}  # fmt: skip
