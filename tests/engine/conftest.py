"""A tiny run: 72 small JPEG files, a one-block encoder, seconds on one core."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmim.data import DataConfig
from fastmim.engine.config import Run
from fastmim.methods import METHODS
from fastmim.models.mae_decoder import DecoderConfig
from fastmim.models.vit import ViTConfig
from fastmim.optim import OptimConfig

# flags of a run as small, for the command line
TINY = [
    *("--method", "mae", "--recipe", "sample", "--data.decoder", "pillow", "--data.threads", "1"),
    *("--model.width", "16", "--model.depth", "1", "--model.heads", "2", "--model.patch", "4"),
    *("--model.image-size", "16", "--method.decoder.width", "16", "--method.decoder.depth", "1"),
    *("--method.decoder.heads", "2", "--batch", "8", "--log-every", "1"),
]

MODEL = ViTConfig(width=16, depth=1, heads=2, patch=4, image_size=16)


def write_images(folder: Path, count: int = 72) -> Path:
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"class{i % 3}" / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        blocks = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(blocks).save(path, quality=90)
    return folder


def tiny_run(images: Path, run_dir: Path, method: str = "rmae", **changes) -> Run:
    """Batches of 8 from 72 images: 9 steps an epoch, so that saves at 5 and 10 fall within one."""
    config = METHODS[method]()
    run = Run(
        method=replace(config, decoder=DecoderConfig(width=16, depth=1, heads=2)),
        model=MODEL,
        data=DataConfig(path=images, decoder="pillow", threads=1),
        optim=OptimConfig(lr=1e-3, warmup_epochs=1.0),
        batch=8,
        steps=10,
        save_every=5,
        log_every=2,
        run_dir=run_dir,
    )
    return replace(run, **changes)


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))
