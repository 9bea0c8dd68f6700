"""Complete runs as functions. A run is a method's recipe, scaled to the data it is for.

`METHOD_RECIPES` holds one run per method as its paper has it, on ImageNet-1k at 224 px. `VARIANTS` are the
other rows of its tables, and `SCALES` turns any of them into a run for other data: `imagenet` leaves it as
it is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastmim.engine.config import Run
from fastmim.methods import CMAEConfig, CMAEHuangConfig, MAEConfig, RMAEConfig
from fastmim.methods.base import MethodConfig
from fastmim.models import VITS
from fastmim.models.mae_decoder import DecoderConfig
from fastmim.models.vit import ViTConfig
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


def cmae() -> Run:
    """C-MAE ViT-B/16, 100 epochs (arXiv:2208.04164, Tables 2 and 3).

    deepspeed fastmim/train.py --method cmae --data.path IMAGENET/train
    Expected: 82.9 % after fine-tuning; with --epochs 400 83.1 %. About two and a half times the arithmetic of
    MAE: 197 encoder tokens with a gradient, 197 without.
    """
    return Run(method=CMAEConfig(), model=VITS["vit_base"], optim=OptimConfig(blr=1.5e-4, warmup_epochs=20.0))


def cmae_huang() -> Run:
    """CMAE ViT-B/16, 300 epochs, as released (arXiv:2207.13532).

    deepspeed fastmim/train.py --method cmae_huang --data.path IMAGENET/train
    Expected: 83.8 % after fine-tuning; with --epochs 1600 84.7 %. Twice the arithmetic of MAE: 197 tokens
    of the target without a gradient, two more decoder blocks. --variant paper masks as the paper says.
    """
    return Run(
        method=CMAEHuangConfig(),
        model=VITS["vit_base"],
        optim=OptimConfig(blr=1.5e-4, warmup_epochs=40.0, warmup_start=1e-4),
        batch=4096,
        epochs=300.0,
    )


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A row of a table of the paper: the fields of the method that it changes, and what to expect."""

    changes: Mapping[str, Any]
    expected: str

    def of(self, run: Run) -> Run:
        return replace(run, method=replace(run.method, **self.changes))


def with_parts(method: MethodConfig, decoder: DecoderConfig, model: ViTConfig) -> MethodConfig:
    """The method with a pixel decoder of this size, and heads for this encoder, if it has them."""
    if isinstance(method, MAEConfig):
        return replace(method, decoder=decoder)
    if isinstance(method, CMAEConfig):
        return replace(method, hidden=4 * model.width, out=model.width)
    if isinstance(method, CMAEHuangConfig):
        return replace(
            method, decoder=decoder, hidden=2 * model.width, out=model.width, shift=model.size[0] // 7 - 1
        )
    return method


def imagenet(run: Run) -> Run:
    """The run as its paper has it."""
    return run


def cifar10(run: Run) -> Run:
    """32 px images: ViT-Ti with patch 4, so 64 patches, and a decoder of 4 blocks of width 128.

    deepspeed fastmim/train.py --method rmae --recipe cifar10 --data.path CIFAR10/train
    C-MAE has the batch norm and the momentum of MoCo v3. Without any norm, as the paper has its heads, 1,000
    steps of 32 kept to three or four dimensions, and read worse than first weights: batches here are small.
    """
    model = replace(VITS["vit_tiny"], patch=4, image_size=32)
    method = with_parts(run.method, DecoderConfig(width=128, depth=4, heads=4), model)
    if isinstance(method, CMAEConfig):
        method = replace(method, head_norm="bn", ema=0.99)
    return replace(
        run,
        method=method,
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
        method=with_parts(run.method, DecoderConfig(width=96, depth=2, heads=3), model),
        model=model,
        optim=replace(run.optim, lr=2e-3, warmup_epochs=0.5),
        batch=64,
        epochs=6.0,
        save_every=100,
        log_every=10,
    )


METHOD_RECIPES: dict[str, Callable[[], Run]] = {
    "mae": mae,
    "rmae": rmae,
    "cmae": cmae,
    "cmae_huang": cmae_huang,
}
SCALES: dict[str, Callable[[Run], Run]] = {"imagenet": imagenet, "cifar10": cifar10, "sample": sample}


# --- variants: `--method cmae --variant byol` ---------------------------------------------------------


def columns_of_table_5(
    color: Mapping[str, Any],
    no_color: Mapping[str, Any],
    no_mask: Mapping[str, Any],
    accuracy: Mapping[str, float],
) -> dict[str, Variant]:
    """The crop alone (`plain`), and what is done to it besides, on its own and together.

    deepspeed fastmim/train.py --method cmae --variant mask+cutmix --model vit_small --data.path IMAGENET-100
    The accuracy is that of ViT-S on ImageNet-100 after 100 epochs of each; the order of the columns is
    reconstructed, as the published table marks them by colors.
    """
    return {
        name: Variant(
            changes={
                **(color if "color" in name else no_color),
                **({} if "mask" in name else no_mask),
                "cutmix": "cutmix" in name,
            },
            expected=f"{percent} % (ViT-S, ImageNet-100)",
        )
        for name, percent in accuracy.items()
    }


# arXiv:2208.04164: accuracy of ViT-B on ImageNet-1k after fine-tuning, 100 epochs of each
MAE_VARIANTS = {
    "color-whole": Variant(changes={"color": "whole"}, expected="83.1 % (Table 4)"),
    "color-visible": Variant(changes={"color": "visible"}, expected="83.0 % (Table 4)"),
    **columns_of_table_5(
        color={"color": "visible"},
        no_color={"color": "none"},
        no_mask={"mask_ratio": 0.0},
        accuracy={
            "plain": 71.9, "mask": 87.1, "cutmix": 83.3, "color": 81.6, "mask+cutmix": 86.1,
            "mask+color": 85.5, "cutmix+color": 83.8, "mask+cutmix+color": 86.4,
        },
    ),
}  # fmt: skip
NO_MASK_TOKEN = {"mask_token": False, "t2": "full"}
CMAE_VARIANTS = {
    "cls": Variant(changes={"compare": "cls"}, expected="82.5 % (Table 3)"),
    "avg": Variant(changes={"compare": "avg"}, expected="82.6 % (Table 3)"),
    "patch": Variant(changes={"compare": "patch"}, expected="82.9 % (Table 3): as without --variant"),
    "patch+cls": Variant(changes={"compare": "patch+cls"}, expected="82.9 % (Table 3)"),
    "byol": Variant(changes={"loss": "byol"}, expected="82.8 % (Table 4), less stable"),
    "no-mask-token": Variant(changes=NO_MASK_TOKEN, expected="82.6 %, linear 56.2 % (Table 4)"),
    "no-mask-token-byol": Variant(
        changes={**NO_MASK_TOKEN, "loss": "byol"}, expected="82.5 %, linear 55.2 % (Table 4)"
    ),
    # the paper does not say what it compares without mask tokens: two other readings
    "no-mask-token-independent": Variant(
        changes={"mask_token": False, "t2": "independent"}, expected="not published"
    ),
    "no-mask-token-avg": Variant(changes={"mask_token": False, "compare": "avg"}, expected="not published"),
    **columns_of_table_5(
        color={"color": True},
        no_color={"color": False},
        no_mask={"mask_ratio": 0.0, "t2": "full"},
        accuracy={
            "plain": 80.0, "mask": 86.5, "cutmix": 83.5, "color": 82.8, "mask+cutmix": 86.9,
            "mask+color": 86.8, "cutmix+color": 83.1, "mask+cutmix+color": 87.1,
        },
    ),
}  # fmt: skip
CMAE_HUANG_VARIANTS = {
    "paper": Variant(changes={"mask": "uniform", "mask_ratio": 0.75}, expected="not published apart"),
    "byol": Variant(changes={"loss": "byol"}, expected="below InfoNCE (arXiv:2207.13532)"),
}
VARIANTS: dict[str, dict[str, Variant]] = {
    "mae": MAE_VARIANTS,
    "cmae": CMAE_VARIANTS,
    "cmae_huang": CMAE_HUANG_VARIANTS,
}
