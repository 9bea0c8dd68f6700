"""Frozen features of an encoder: one vector per image, from all of its patches, or one for each patch.

cls      the class token after the final norm, or behind a block
mean     the mean of the patch tokens there            patches   each of them, `[N, D]`

Swin has no class token: of it there is the mean alone.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from fastmim.models.swin import SwinEncoder
from fastmim.models.tokens import Tokens
from fastmim.models.vit import Encoder

Feature = Literal["cls", "mean"]
Kind = Literal["cls", "mean", "patches"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@torch.no_grad()
def features_in_batches(
    encoder: Encoder | SwinEncoder,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    kinds: Sequence[Kind],
    block: int | None = None,
) -> Iterator[tuple[Tensor, dict[Kind, Tensor]]]:
    """(ids, features by kind, fp32 on `device`) of each batch of uint8 images `[B, H, W, C]` and ids.

    `block` is the number of a block from 1, behind which they are taken; None: behind the final norm.
    ValueError for a kind or a block that the encoder does not have.
    """
    swin = isinstance(encoder, SwinEncoder)
    if swin and (block is not None or list(kinds) != ["mean"]):
        raise ValueError("want the mean behind the final norm of Swin, which has no class token, got others")
    if block is not None and not 1 <= block <= encoder.config.depth:
        raise ValueError(f"want a block from 1 to {encoder.config.depth}, got {block}")
    encoder = encoder.to(device).eval()
    for image_BHWC, ids_B in batches:
        tokens = Tokens(image_BHWC.to(device))
        if block is None:
            z_BTD = encoder(tokens).tokens_BTD.float()
        else:
            z_BTD = encoder(tokens, outputs=[block - 1]).blocks[block - 1].float()
        patches_BND = z_BTD if swin else z_BTD[:, 1:]
        found: dict[Kind, Tensor] = {}
        for kind in kinds:
            found[kind] = {"cls": z_BTD[:, 0], "mean": patches_BND.mean(1), "patches": patches_BND}[kind]
        yield ids_B, found


def features_of(
    encoder: Encoder | SwinEncoder, batches: Iterable[Tensor], device: torch.device
) -> dict[Feature, Tensor]:
    """Class token and mean, fp32 `[N, D]` on `device`, of uint8 images `[B, H, W, C]` in batches."""
    kinds: tuple[Feature, ...] = ("mean",) if isinstance(encoder, SwinEncoder) else ("cls", "mean")
    found: dict[Feature, list[Tensor]] = {kind: [] for kind in kinds}
    pairs = ((pixels, pixels) for pixels in batches)  # ids are of no use here
    for _, features in features_in_batches(encoder, pairs, device, kinds):
        for kind in kinds:
            found[kind].append(features[kind])
    return {kind: torch.cat(parts) for kind, parts in found.items()}


def check_labeled(x_ND: Tensor, labels_N: Tensor, what: str) -> None:
    """ValueError unless there is a label for each row, and a row."""
    if x_ND.ndim != 2 or labels_N.shape != x_ND.shape[:1] or len(x_ND) == 0:
        shapes = f"{tuple(x_ND.shape)} and {tuple(labels_N.shape)}"
        raise ValueError(f"{what}: want features [N, D] and N labels, N >= 1, got {shapes}")
