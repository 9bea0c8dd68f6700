"""Images for the tests of the data: small ones made here, and the ImageNet sample where it is."""

import tarfile
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmim.data import DataConfig, Images, Loader, SampleOrder
from fastmim.data.config import CacheName
from fastmim.views import Batch, Crop
from tests.conftest import SHARED_DATA


def encode(
    seed: int, size: tuple[int, int] = (48, 40), fmt: str = "JPEG", mode: str = "RGB", **save
) -> bytes:
    """A smooth random picture of (width, height) `size`; `save` goes to Pillow."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode).save(file, fmt, **save)
    return file.getvalue()


@pytest.fixture(params=["dali", "pillow"])
def decoder(request) -> str:
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return request.param


@pytest.fixture
def folder(tmp_path) -> Path:
    """24 JPEGs of different sizes in two classes."""
    for i in range(24):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(i, size=(40 + 3 * i, 64 - i)))
    return tmp_path / "images"


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory) -> Path:
    archive = SHARED_DATA / "imagenet-sample-100.tar"
    if not archive.exists():
        pytest.skip(f"needs {archive.name} in shared/data")
    root = tmp_path_factory.mktemp("imagenet")
    with tarfile.open(archive) as tar:
        tar.extractall(root, filter="data")
    return root


@pytest.fixture
def open_loader(tmp_path) -> Iterator[Callable[..., Loader]]:
    """A loader of small crops; bad files are named in tmp_path / "bad_samples.jsonl"."""
    opened = []

    def start(
        images: Images,
        decoder: str,
        *,
        batch: int = 8,
        crops: Sequence[Crop] = (Crop(size=(16, 16)),),
        channels: int = 3,
        start_step: int = 0,
        max_bad_fraction: float = 0.01,
        cache: CacheName = "none",
        epoch_images: int | None = None,
        device: str = "cpu",
        hw_decoder_load: float = 0.65,
        **order: int,
    ) -> Loader:
        config = DataConfig(
            decoder=decoder,
            threads=2,
            max_bad_fraction=max_bad_fraction,
            cache=cache,
            epoch_images=epoch_images,
            hw_decoder_load=hw_decoder_load,
        )
        loader = Loader(
            images,
            crops,
            SampleOrder(epoch_images or len(images), batch, seed=3, **order),
            config=config,
            channels=channels,
            seed=3,
            device=torch.device(device),
            bad_samples=tmp_path / "bad_samples.jsonl",
            start_step=start_step,
        )
        opened.append(loader)
        return loader

    start.opened = opened
    yield start
    for loader in opened:
        loader.close()


def take(loader: Loader, count: int) -> list[Batch]:
    return [next(loader) for _ in range(count)]


def assert_same(one: Sequence[Batch], other: Sequence[Batch]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.epoch == b.epoch
        assert torch.equal(a.ids_B, b.ids_B)
        assert torch.equal(a.seeds_B, b.seeds_B)
        assert all(torch.equal(x, y) for x, y in zip(a.crops, b.crops, strict=True))
