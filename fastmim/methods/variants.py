"""Rows of the papers' tables that differ from a method's own recipe in a few fields.

The columns of Table 5 of arXiv:2208.04164 are those of MAE and of C-MAE: what is done to the crop, one thing
at a time and together. Their order is reconstructed, as the published table marks them by colors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A row of a table: the fields of the method that it changes, those of the run, and what to expect."""

    changes: Mapping[str, Any]
    expected: str
    run: Mapping[str, Any] = field(default_factory=dict)  # by dotted name, as model.patch


def columns_of_table_5(
    *,
    color: Mapping[str, Any],
    no_color: Mapping[str, Any],
    no_mask: Mapping[str, Any],
    accuracy: Mapping[str, float],
) -> dict[str, Variant]:
    """The crop alone (`plain`), and what is done to it besides, on its own and together.

    deepspeed fastmim/train.py --method cmae --variant mask+cutmix --model vit_small --data.path IMAGENET-100
    The accuracy is that of ViT-S on ImageNet-100 after 100 epochs of each.
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
