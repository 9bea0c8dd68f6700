"""What several papers say of masks in the same words: ratios, counts, what they hide, and checks of them."""

import torch
from fastmim_kernels import num_seen
from fastmim_kernels.split_patches import MAX_N as MAX_PATCHES
from torch import Tensor

from fastmim.models.vit import ViTConfig


def check_ratio(name: str, ratio: float) -> None:
    """ValueError, naming the flag, unless the ratio lies between 0 and 1."""
    if not 0 < ratio < 1:
        raise ValueError(f"{name}: want a ratio between 0 and 1, got {ratio}")


def num_seen_checked(name: str, num_patches: int, ratio: float) -> int:
    """Patches left visible when `ratio` of them is hidden; a ValueError if none is seen or none hidden.

    Also for more patches than a mask is drawn of.
    """
    check_patches(num_patches)
    try:
        seen = num_seen(num_patches, ratio)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if seen == num_patches:
        raise ValueError(f"{name}: {ratio} of {num_patches} patches hides none")
    return seen


def check_patches(num_patches: int) -> None:
    """ValueError where a mask cannot be drawn: one program of the kernel holds a whole image's."""
    if num_patches > MAX_PATCHES:
        raise ValueError(
            f"model.image-size, model.patch: masks are drawn of at most {MAX_PATCHES} patches, got "
            f"{num_patches}"
        )


# --- masks that hide another number of patches of each image ------------------------------------------


def first_hidden(hidden_BN: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The first `most` hidden patches of each image, ascending, and whether there are so many.

    `[B, most]` int64 and bool. Where an image hides fewer, visible patches fill the rest: all sizes are
    fixed, and nothing waits for the device to count.
    """
    order_BN = hidden_BN.byte().argsort(dim=1, descending=True, stable=True)
    return order_BN[:, :most], torch.arange(most, device=hidden_BN.device) < hidden_BN.sum(1, keepdim=True)


def taken(x_BND: Tensor, index_BL: Tensor) -> Tensor:
    """The tokens at these patches. `[B, L, D]`."""
    return x_BND.gather(1, index_BL[..., None].expand(-1, -1, x_BND.shape[2]))


def hidden_count(name: str, model: ViTConfig, ratio: float) -> int:
    """Patches that masks of blocks hide of each image at most: 75 of 196 for BEiT, 120 for data2vec.

    ValueError, naming the flag, where that is none or all, or where no block fits.
    """
    check_patches(model.num_patches)
    hidden = round(model.num_patches * ratio)
    if min(model.grid) < 2 or not 0 < hidden < model.num_patches:
        rows, columns = model.grid
        raise ValueError(
            f"{name}: want some hidden and some visible of a grid of 2 x 2 patches or more, got {ratio} of "
            f"{rows} x {columns}"
        )
    return hidden
