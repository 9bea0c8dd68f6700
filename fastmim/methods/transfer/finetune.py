"""Fine-tuning: the whole encoder of a checkpoint, and a fresh classifier on the mean of its patches.

    T, f, M  those of supervised training from scratch, methods/supervised.py; the encoder is not fresh

The norm behind the last block is left out and a fresh one stands before the classifier: this is what
facebookresearch/mae does with `global_pool`, and what arXiv:2208.04164 calls to reset the parameters of the
final normalization layer. Positions, fixed or not in pre-training, are trained from what they were.

Source  arXiv:2111.06377, A.2; facebookresearch/mae, main_finetune.py. arXiv:2208.04164 has a blr of 1e-3 and
        says "as MAE" of all else: with it the layer decay of the paper, 0.75 (`kz`). The released command has
        5e-4 and 0.65 (`mae-repo`).
"""

from dataclasses import dataclass
from typing import ClassVar

from fastmim.methods.base import About
from fastmim.methods.supervised import SupervisedConfig
from fastmim.methods.variants import Variant


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(SupervisedConfig):
    """Fine-tuning of --init-from (arXiv:2111.06377, A.2)."""

    name: ClassVar[str] = "finetune"
    about: ClassVar[About] = About(
        paper="fine-tuning, arXiv:2111.06377, A.2",
        t1="a crop after RandAugment, erasing, Mixup or CutMix",
        t2="the label",
        similarity="cross entropy",
        needs="labels, and weights",
    )
    transfers: ClassVar[bool] = True
    variants: ClassVar = {
        "kz": Variant(
            changes={},
            run={"optim.blr": 1e-3, "optim.layer_decay": 0.75},
            expected="83.1 % (ViT-B after 100 epochs of MAE, arXiv:2208.04164, Table 1)",
        ),
        "mae-repo": Variant(
            changes={},
            run={"optim.blr": 5e-4, "optim.layer_decay": 0.65},
            expected="83.6 % (ViT-B after 1,600 epochs of MAE, its repository)",
        ),
    }
