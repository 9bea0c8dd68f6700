"""What several papers say of masks in the same words: ratios, counts, and the checks of them."""

from fastmim_kernels import num_seen


def check_ratio(name: str, ratio: float) -> None:
    """ValueError, naming the flag, unless the ratio lies between 0 and 1."""
    if not 0 < ratio < 1:
        raise ValueError(f"{name}: want a ratio between 0 and 1, got {ratio}")


def num_seen_checked(name: str, num_patches: int, ratio: float) -> int:
    """Patches left visible when `ratio` of them is hidden; a ValueError if none is seen or none hidden."""
    try:
        seen = num_seen(num_patches, ratio)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if seen == num_patches:
        raise ValueError(f"{name}: {ratio} of {num_patches} patches hides none")
    return seen
