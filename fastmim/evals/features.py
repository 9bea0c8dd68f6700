"""Frozen features of an encoder: one vector per image, from all of its patches.

cls    the class token after the final norm         mean   the mean of the patch tokens after it

Swin has no class token: of it there is the mean alone.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from fastmim.models.swin import SwinEncoder
from fastmim.models.tokens import Tokens
from fastmim.models.vit import Encoder

Feature = Literal["cls", "mean"]


@torch.no_grad()
def features_of(
    encoder: Encoder | SwinEncoder, batches: Iterable[Tensor], device: torch.device
) -> dict[Feature, Tensor]:
    """Both features, fp32 `[N, D]` on `device`, of uint8 images `[B, H, W, C]` in batches on any device."""
    encoder = encoder.to(device).eval()
    found: dict[Feature, list[Tensor]] = (
        {"mean": []} if isinstance(encoder, SwinEncoder) else {"cls": [], "mean": []}
    )
    for image_BHWC in batches:
        z_BTD = encoder(Tokens(image_BHWC.to(device))).tokens_BTD.float()
        if "cls" in found:
            found["cls"].append(z_BTD[:, 0])
            z_BTD = z_BTD[:, 1:]
        found["mean"].append(z_BTD.mean(1))
    return {name: torch.cat(parts) for name, parts in found.items()}


def check_labeled(x_ND: Tensor, labels_N: Tensor, what: str) -> None:
    """ValueError unless there is a label for each row, and a row."""
    if x_ND.ndim != 2 or labels_N.shape != x_ND.shape[:1] or len(x_ND) == 0:
        shapes = f"{tuple(x_ND.shape)} and {tuple(labels_N.shape)}"
        raise ValueError(f"{what}: want features [N, D] and N labels, N >= 1, got {shapes}")
