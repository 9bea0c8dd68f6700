"""Complete runs as functions. A run is a method's recipe, scaled to the data it is for.

`METHOD_RECIPES` holds one run per method as its paper has it, on ImageNet-1k at 224 px. The other rows of the
papers' tables are the `variants` of each method's configuration. `SCALES` turns any of them into a run for
other data: `imagenet` leaves it as it is.
"""

import dataclasses
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from fastmim.engine.config import Run
from fastmim.methods import (
    BEiTConfig,
    CAEConfig,
    CMAEConfig,
    CMAEHuangConfig,
    Data2VecConfig,
    DINOConfig,
    IBOTConfig,
    MAEConfig,
    MoCoV3Config,
    RMAEConfig,
    SimMIMConfig,
    SupervisedConfig,
)
from fastmim.methods.tokenizers import DALLETraining, DVAETraining, KMeansTraining, VQTraining
from fastmim.methods.transfer import FinetuneConfig, LinearConfig
from fastmim.methods.variants import Variant
from fastmim.models import VITS, resized
from fastmim.models.mae_decoder import DecoderConfig
from fastmim.models.vit import ViTConfig
from fastmim.optim import OptimConfig

T = TypeVar("T")
NO_TOKENIZER = Path("TOKENIZER")  # where a file is wanted: a start without one names the flag


def mae() -> Run:
    """MAE ViT-B/16, 100 epochs, as Kong & Zhang train it beside theirs (arXiv:2208.04164, Table 1).

    deepspeed fastmim/train.py --method mae --data.path IMAGENET/train
    Expected: 83.1 % after fine-tuning. MAE's own runs: --batch 4096 --epochs 800 --optim.warmup-epochs 40.
    """
    return Run(
        method=MAEConfig(mask_ratio=0.75, norm_pix=True, decoder=DecoderConfig(width=512, depth=8, heads=16)),
        model=VITS["vit_base"],
        optim=OptimConfig(
            blr=1.5e-4, min_lr=0.0, warmup_epochs=20.0, betas=(0.9, 0.95), weight_decay=0.05, clip=0.0
        ),
        batch=1024,
        epochs=100.0,
    )


def rmae() -> Run:
    """R-MAE ViT-B/16, 100 epochs (arXiv:2208.04164, Table 1).

    deepspeed fastmim/train.py --method rmae --data.path IMAGENET/train
    Expected: 82.7 % after fine-tuning. About three times the arithmetic of MAE: 198 encoder tokens
    instead of 50, two decodes.
    """
    return Run(
        method=RMAEConfig(
            mask_ratio=0.75, relax_weight=1.0, decoder=DecoderConfig(width=512, depth=8, heads=16)
        ),
        model=VITS["vit_base"],
        optim=OptimConfig(
            blr=3.0e-4, min_lr=0.0, warmup_epochs=20.0, betas=(0.9, 0.95), weight_decay=0.05, clip=0.0
        ),
        batch=1024,
        epochs=100.0,
    )


def cmae() -> Run:
    """C-MAE ViT-B/16, 100 epochs (arXiv:2208.04164, Tables 2 and 3).

    deepspeed fastmim/train.py --method cmae --data.path IMAGENET/train
    Expected: 82.9 % after fine-tuning; with --epochs 400 83.1 %. About two and a half times the arithmetic of
    MAE: 197 encoder tokens with a gradient, 197 without.
    """
    return Run(
        method=CMAEConfig(mask_ratio=0.75, temperature=0.2, hidden=2048, out=768, ema=0.996),
        model=VITS["vit_base"],
        optim=OptimConfig(
            blr=1.5e-4, min_lr=0.0, warmup_epochs=20.0, betas=(0.9, 0.95), weight_decay=0.05, clip=0.0
        ),
        batch=1024,
        epochs=100.0,
    )


def cmae_huang() -> Run:
    """CMAE ViT-B/16, 300 epochs, as released (arXiv:2207.13532).

    deepspeed fastmim/train.py --method cmae_huang --data.path IMAGENET/train
    Expected: 83.8 % after fine-tuning; with --epochs 1600 84.7 %. Twice the arithmetic of MAE: 197 tokens
    of the target without a gradient, two more decoder blocks. --variant paper masks as the paper says.
    """
    return Run(
        method=CMAEHuangConfig(mask_ratio=0.65, temperature=0.07, hidden=1536, out=256, ema=0.996),
        model=VITS["vit_base"],
        optim=OptimConfig(
            blr=1.5e-4, min_lr=0.0, warmup_epochs=40.0, warmup_start=1e-4, betas=(0.9, 0.95),
            weight_decay=0.05, clip=0.0,
        ),
        batch=4096,
        epochs=300.0,
    )  # fmt: skip


def simmim() -> Run:
    """SimMIM ViT-B/16, 800 epochs (arXiv:2111.09886).

    deepspeed fastmim/train.py --method simmim --data.path IMAGENET/train
    Expected: 83.8 % after fine-tuning. About twice the arithmetic of MAE: four times its encoder tokens, and
    no decoder. --variant swin-base is Swin-B at 192 px, 100 epochs.
    """
    return Run(
        method=SimMIMConfig(mask_unit=32, mask_ratio=0.6),
        model=replace(VITS["vit_base"], **SimMIMConfig.encoder),
        optim=OptimConfig(
            blr=5e-5,  # the paper's 1e-4 is of 512 images
            schedule="multistep", milestones=(700.0,), gamma=0.1, warmup_epochs=10.0, warmup_start=5e-3,
            betas=(0.9, 0.999), weight_decay=0.05, clip=5.0,
        ),
        batch=2048,
        epochs=800.0,
    )  # fmt: skip


def beit() -> Run:
    """BEiT ViT-B/16, 800 epochs (arXiv:2106.08254); 300 for its row in Table 1 of arXiv:2208.04164.

    deepspeed fastmim/train.py --method beit --data.path IMAGENET/train --method.tokenizer RUN_DIR
    Expected: 83.2 % after fine-tuning. About 1.8 times the arithmetic of MAE, and the tokenizer's. RUN_DIR is
    of `fastmim tokenizer train`, or a file with DALL-E's encoder.
    """
    return Run(
        method=BEiTConfig(tokenizer=NO_TOKENIZER, mask_ratio=75 / 196),
        model=replace(VITS["vit_base"], **BEiTConfig.encoder),
        optim=OptimConfig(
            blr=1.875e-4,  # 1.5e-3 at 2,048 images
            min_lr=1e-5, schedule="beit", warmup_epochs=10.0, betas=(0.9, 0.999), weight_decay=0.05, clip=3.0,
        ),
        batch=2048,
        epochs=800.0,
    )  # fmt: skip


def ibot() -> Run:
    """iBOT ViT-B/16, 2 large and 10 small crops, 400 epochs, as released (arXiv:2111.07832).

    deepspeed fastmim/train.py --method ibot --data.path IMAGENET/train
    Expected: 84.0 % after fine-tuning, 77.1 % with 20 neighbors; --variant rand hides patches anywhere, for
    84.1 and 77.3 %. About eight and a half times the arithmetic of MAE.
    """
    return Run(
        method=IBOTConfig(
            local_crops=10, local_scale=(0.05, 0.32), global_scale=(0.32, 1.0), out=8192, warmup_epochs=50,
            teacher_temperature=0.07, freeze_last_layer=3, ema=0.996,
        ),
        model=replace(VITS["vit_base"], **IBOTConfig.encoder),
        optim=OptimConfig(
            blr=7.5e-4, min_lr=2e-6, schedule="beit", warmup_epochs=10.0, betas=(0.9, 0.999),
            weight_decay=0.04, weight_decay_end=0.4, clip=0.3, clip_per="tensor",
        ),
        batch=1024,
        epochs=400.0,
    )  # fmt: skip


def data2vec() -> Run:
    """data2vec ViT-B/16, 800 epochs, as released (arXiv:2202.03555).

    deepspeed fastmim/train.py --method data2vec --data.path IMAGENET/train
    Expected: 84.2 % after fine-tuning. About two and a half times the arithmetic of MAE: 197 encoder tokens
    with a gradient and 197 without. --variant eight-masks shows eight masks for one pass of the teacher.
    """
    return Run(
        method=Data2VecConfig(top_blocks=6, beta=2.0, ema=0.9998),
        model=replace(VITS["vit_base"], **Data2VecConfig.encoder),
        optim=OptimConfig(
            blr=2.5e-4,  # 2e-3 at 2,048 images
            min_lr=1e-5, schedule="beit", warmup_epochs=10.0, betas=(0.9, 0.999), weight_decay=0.05, clip=3.0,
        ),
        batch=2048,
        epochs=800.0,
    )  # fmt: skip


def mocov3() -> Run:
    """MoCo v3 ViT-B/16, 300 epochs (arXiv:2104.02057).

    deepspeed fastmim/train.py --method mocov3 --data.path IMAGENET/train
    Expected: 83.2 % after fine-tuning, 76.7 % by a linear probe. About five times the arithmetic of MAE: 394
    encoder tokens with a gradient and 394 without.
    """
    return Run(
        method=MoCoV3Config(temperature=0.2, hidden=4096, out=256, ema=0.99),
        model=replace(VITS["vit_base"], **MoCoV3Config.encoder),
        optim=OptimConfig(
            blr=1.5e-4, min_lr=0.0, warmup_epochs=40.0, betas=(0.9, 0.999), weight_decay=0.1, clip=0.0
        ),
        batch=4096,
        epochs=300.0,
    )


def dino() -> Run:
    """DINO ViT-B/16, 2 large and 8 small crops, 800 epochs, as released without extras (arXiv:2104.14294).

    deepspeed fastmim/train.py --method dino --data.path IMAGENET/train
    Expected: 82.8 % after fine-tuning (arXiv:2208.04164, Table 1). About seven times the arithmetic of MAE:
    690 encoder tokens with a gradient and 394 without.
    """
    return Run(
        method=DINOConfig(local_crops=8, out=65536, teacher_temperature=0.04, ema=0.996),
        model=replace(VITS["vit_base"], **DINOConfig.encoder),
        optim=OptimConfig(
            blr=5e-4, min_lr=1e-6, schedule="beit", warmup_epochs=10.0, betas=(0.9, 0.999), weight_decay=0.04,
            weight_decay_end=0.4, clip=3.0, clip_per="tensor",
        ),
        batch=1024,
        epochs=800.0,
    )  # fmt: skip


def cae() -> Run:
    """CAE ViT-B/16, 300 epochs (arXiv:2202.03026).

    deepspeed fastmim/train.py --method cae --data.path IMAGENET/train --method.tokenizer RUN_DIR
    Expected: 83.6 % after fine-tuning. About twice the arithmetic of MAE, and the tokenizer's. RUN_DIR is of
    `fastmim tokenizer train`, or a file with DALL-E's encoder.
    """
    return Run(
        method=CAEConfig(tokenizer=NO_TOKENIZER, mask_ratio=0.5, regressor_depth=4, decoder_depth=4),
        model=replace(VITS["vit_base"], **CAEConfig.encoder),
        optim=OptimConfig(
            blr=1.875e-4,  # 1.5e-3 at 2,048 images
            min_lr=1e-5, schedule="beit", warmup_epochs=10.0, betas=(0.9, 0.999), weight_decay=0.05, clip=3.0,
        ),
        batch=2048,
        epochs=300.0,
    )  # fmt: skip


def supervised() -> Run:
    """Labels from scratch, ViT-B/16, 100 epochs, set as fine-tuning is (arXiv:2208.04164, Table 1).

    deepspeed fastmim/train.py --method supervised --data.path IMAGENET/train
    Expected: 80.9 % of the validation images. About 1.8 times the arithmetic of MAE. --variant 300-epochs is
    MAE's own baseline from scratch, for 82.1 %.
    """
    return Run(
        method=SupervisedConfig(rand_augment=9.0, erase=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1),
        model=replace(VITS["vit_base"], **SupervisedConfig.encoder),
        optim=OptimConfig(
            blr=1e-3, min_lr=1e-6, warmup_epochs=5.0, betas=(0.9, 0.999), weight_decay=0.05,
            layer_decay=0.75, clip=0.0,
        ),
        batch=1024,
        epochs=100.0,
    )  # fmt: skip


# --- transfer: what pre-training is worth ---------------------------------------------------------------


def finetune() -> Run:
    """Fine-tuning of ViT-B/16, 100 epochs, as Kong & Zhang have it (arXiv:2208.04164; MAE's, A.2).

    fastmim finetune WEIGHTS --data.path IMAGENET/train --data.val IMAGENET/val
    Expected: 83.1 % of the validation images after 100 epochs of MAE. --variant mae-repo is set as MAE's
    released command is; --data.subset 10% trains on a tenth of each class.
    """
    method = FinetuneConfig(rand_augment=9.0, erase=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1)
    return replace(supervised(), method=method)  # blr 1e-3, layer decay 0.75 and all else are the same


def linear() -> Run:
    """Linear probe of ViT-B/16, 90 epochs (arXiv:2111.06377, A.1).

    fastmim linear WEIGHTS --data.path IMAGENET/train --data.val IMAGENET/val
    Expected: 54.5 % of the validation images after 100 epochs of MAE (arXiv:2208.04164, Table 4).
    """
    return Run(
        method=LinearConfig(norm=True),
        model=VITS["vit_base"],
        optim=OptimConfig(
            name="lars", blr=0.1, min_lr=0.0, warmup_epochs=10.0, betas=(0.9, 0.999), weight_decay=0.0
        ),
        batch=16384,
        epochs=90.0,
        zero=0,
    )


# --- tokenizers, which beit and cae predict -----------------------------------------------------------


def geometry(image_size: int, stride: int) -> ViTConfig:
    """What a tokenizer takes of a `ViTConfig`: its input, and the stride as the patch."""
    return ViTConfig(width=4, depth=1, heads=1, image_size=image_size, patch=stride)


def dvae() -> Run:
    """The small discrete VAE: 8,192 codes of 8 px on crops of 112 px, for ViTs of 224 px and patch 16.

    fastmim tokenizer train --tokenizer dvae --data.path IMAGENET/train
    Expected: not published for this schedule; watch psnr and perplexity in metrics.jsonl.
    """
    return Run(
        method=DVAETraining(codes=8192, hidden=256, code_width=512, blocks=2),
        model=geometry(112, 8),
        optim=OptimConfig(
            lr=3e-4, min_lr=1e-5, warmup_epochs=0.5, betas=(0.9, 0.999), weight_decay=1e-4, clip=1.0
        ),
        batch=512,
        epochs=20.0,
    )


def dvae_large() -> Run:
    """The discrete VAE of DALL-E (arXiv:2102.12092) at 112 px. Its own run: 3 M updates of 512 at 256 px.

    fastmim tokenizer train --tokenizer dvae_large --data.path IMAGENET/train
    Expected: not published for this length.
    """
    return Run(
        method=DALLETraining(codes=8192, hidden=256),
        model=geometry(112, 8),
        optim=OptimConfig(
            lr=1e-4, min_lr=1.25e-6, warmup_epochs=0.5, betas=(0.9, 0.999), weight_decay=1e-4, clip=1.0
        ),
        batch=512,
        epochs=50.0,
    )


def vq() -> Run:
    """Vector quantization with 8,192 unit codes of 32 values, as in BEiT v2's quantizer (arXiv:2208.06366).

    fastmim tokenizer train --tokenizer vq --data.path IMAGENET/train
    Expected: not published for pixels.
    """
    return Run(
        method=VQTraining(codes=8192, hidden=256, code_width=32, commitment=1.0, decay=0.99),
        model=geometry(112, 8),
        optim=OptimConfig(
            lr=3e-4, min_lr=1e-5, warmup_epochs=0.5, betas=(0.9, 0.99), weight_decay=1e-4, clip=1.0
        ),
        batch=512,
        epochs=20.0,
    )


def kmeans() -> Run:
    """Mini-batch k-means on normalized pixels: seconds, and no network.

    fastmim tokenizer train --tokenizer kmeans --data.path IMAGENET/train --steps 500
    Expected: not published.
    """
    return Run(
        method=KMeansTraining(codes=8192),
        model=geometry(112, 8),
        optim=OptimConfig(lr=1e-3, warmup_epochs=0.1, weight_decay=0.0),
        batch=512,
        epochs=1.0,
    )


# --- variants -----------------------------------------------------------------------------------------


def varied(run: Run, variant: Variant) -> Run:
    """The run of another row of its paper's tables."""
    run = replace(run, method=replace(run.method, **variant.changes))
    return with_fields(run, variant.run)


def with_fields(config: T, fields: Mapping[str, Any]) -> T:
    """A configuration with fields replaced by their dotted names, those of one part all at once."""
    parts: dict[str, dict[str, Any]] = {}
    own: dict[str, Any] = {}
    for name, value in fields.items():
        part, dot, rest = name.partition(".")
        if dot:
            parts.setdefault(part, {})[rest] = value
        else:
            own[part] = value
    own |= {part: with_fields(getattr(config, part), values) for part, values in parts.items()}
    return dataclasses.replace(config, **own)  # type: ignore[type-var]


# --- scales -------------------------------------------------------------------------------------------


def of_length(run: Run, epochs: float) -> OptimConfig:
    """The optimizer's settings for a run of other length, milestones in proportion."""
    milestones = tuple(milestone * epochs / run.epochs for milestone in run.optim.milestones)
    return replace(run.optim, milestones=milestones)


def imagenet(run: Run) -> Run:
    """The run as its paper has it."""
    return run


def cifar10(run: Run) -> Run:
    """32 px images: ViT-Ti with patch 4, so 64 patches, and a decoder of 4 blocks of width 128.

    deepspeed fastmim/train.py --method rmae --recipe cifar10 --data.path CIFAR10/train
    What else a method changes for small batches its configuration says: `MethodConfig.scales`.
    """
    model = run.method.small_encoder(replace(resized(run.model, "vit_tiny"), patch=4, image_size=32))
    method = run.method.fit(model, DecoderConfig(width=128, depth=4, heads=4))
    scaled = replace(
        run,
        method=method,
        model=model,
        optim=replace(of_length(run, 200.0), blr=4 * run.optim.blr, warmup_epochs=10.0),
        batch=256,
        epochs=200.0,
    )
    return with_fields(scaled, method.scales.get("cifar10", {}))


def sample(run: Run) -> Run:
    """Minutes on two CPU cores: a 6-block encoder on the embedded sample set at 64 px, patch 8.

    deepspeed fastmim/train.py --method rmae
    """
    model = replace(run.model, width=128, depth=6, heads=4, patch=8, image_size=64)
    model = run.method.small_encoder(model)
    method = run.method.fit(model, DecoderConfig(width=96, depth=2, heads=3))
    scaled = replace(
        run,
        method=method,
        model=model,
        optim=replace(of_length(run, 6.0), lr=2e-3, warmup_epochs=0.5),
        batch=64,
        epochs=6.0,
        save_every=100,
        log_every=10,
    )
    return with_fields(scaled, method.scales.get("sample", {}))


METHOD_RECIPES: dict[str, Callable[[], Run]] = {
    "mae": mae,
    "rmae": rmae,
    "cmae": cmae,
    "cmae_huang": cmae_huang,
    "simmim": simmim,
    "beit": beit,
    "ibot": ibot,
    "data2vec": data2vec,
    "mocov3": mocov3,
    "dino": dino,
    "cae": cae,
    "supervised": supervised,
}
TOKENIZER_RECIPES: dict[str, Callable[[], Run]] = {
    "dvae": dvae,
    "dvae_large": dvae_large,
    "vq": vq,
    "kmeans": kmeans,
}
TRANSFER_RECIPES: dict[str, Callable[[], Run]] = {"finetune": finetune, "linear": linear}
# iterates over methods, then transfers, then tokenizers
RECIPES = ChainMap(TOKENIZER_RECIPES, TRANSFER_RECIPES, METHOD_RECIPES)
SCALES: dict[str, Callable[[Run], Run]] = {"imagenet": imagenet, "cifar10": cifar10, "sample": sample}
