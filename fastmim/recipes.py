"""Complete runs as functions. A run is a method's recipe, scaled to the data it is for.

`METHOD_RECIPES` holds one run per method as its paper has it, on ImageNet-1k at 224 px. `SCALES` turns it
into a run for other data: `imagenet` leaves it as it is.
"""

from collections.abc import Callable
from dataclasses import replace

from fastmim.engine.config import Run
from fastmim.methods import MAEConfig, RMAEConfig
from fastmim.methods.base import MethodConfig
from fastmim.models import VITS
from fastmim.models.mae_decoder import DecoderConfig
from fastmim.optim import OptimConfig


def mae() -> Run:
    """MAE ViT-B/16, 100 epochs, as Kong & Zhang train it beside theirs (arXiv:2208.04164, Table 1).

    deepspeed fastmim/train.py --method mae --data.path IMAGENET/train
    Expected: 83.1 % after fine-tuning. MAE's own runs: --batch 4096 --epochs 800 --optim.warmup-epochs 40.
    """
    return Run(method=MAEConfig(), model=VITS["vit_base"], optim=OptimConfig(blr=1.5e-4, warmup_epochs=20.0))


def rmae() -> Run:
    """R-MAE ViT-B/16, 100 epochs (arXiv:2208.04164, Table 1).

    deepspeed fastmim/train.py --method rmae --data.path IMAGENET/train
    Expected: 82.7 % after fine-tuning. About three times the arithmetic of MAE: 198 encoder tokens
    instead of 50, two decodes.
    """
    return Run(method=RMAEConfig(), model=VITS["vit_base"], optim=OptimConfig(blr=3.0e-4, warmup_epochs=20.0))


def with_decoder(method: MethodConfig, decoder: DecoderConfig) -> MethodConfig:
    """The method with a pixel decoder of this size, if it has one."""
    return replace(method, decoder=decoder) if isinstance(method, MAEConfig) else method


def imagenet(run: Run) -> Run:
    """The run as its paper has it."""
    return run


def cifar10(run: Run) -> Run:
    """32 px images: ViT-Ti with patch 4, so 64 patches, and a decoder of 4 blocks of width 128.

    deepspeed fastmim/train.py --method rmae --recipe cifar10 --data.path CIFAR10/train
    """
    model = replace(VITS["vit_tiny"], patch=4, image_size=32)
    return replace(
        run,
        method=with_decoder(run.method, DecoderConfig(width=128, depth=4, heads=4)),
        model=model,
        optim=replace(run.optim, blr=4 * run.optim.blr, warmup_epochs=10.0),
        batch=256,
        epochs=200.0,
    )


def sample(run: Run) -> Run:
    """Minutes on two CPU cores: a 6-block encoder on the embedded sample set at 64 px, patch 8.

    deepspeed fastmim/train.py --method rmae
    """
    model = replace(VITS["vit_tiny"], width=128, depth=6, heads=4, patch=8, image_size=64)
    return replace(
        run,
        method=with_decoder(run.method, DecoderConfig(width=96, depth=2, heads=3)),
        model=model,
        optim=replace(run.optim, lr=2e-3, warmup_epochs=0.5),
        batch=64,
        epochs=6.0,
        save_every=100,
        log_every=10,
    )


METHOD_RECIPES: dict[str, Callable[[], Run]] = {"mae": mae, "rmae": rmae}
SCALES: dict[str, Callable[[Run], Run]] = {"imagenet": imagenet, "cifar10": cifar10, "sample": sample}
