"""Linear CKA between features of whole images and of the same images with patches hidden, block by block.

    K = X X^T, L = Y Y^T of n images;   CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))

    unbiased   HSIC_1 = [tr(K~ L~) + (1^T K~ 1)(1^T L~ 1) / ((n-1)(n-2)) - 2 / (n-2) 1^T K~ L~ 1] / (n(n-3)),
               K~ and L~ without their diagonals; may be a little below 0
    biased     HSIC_0 = tr(K H L H) / (n-1)^2,  H = I - 1/n: near 1 even for independent features where n is
               small beside their width (0.96 for 32 Gaussians of 768 values, unbiased 0.02)

Each HSIC is averaged over batches before the quotient is taken, so the memory does not grow with the images.

Source  Kornblith et al., arXiv:1905.00414; minibatches and HSIC_1: Nguyen et al., arXiv:2010.15327,
        Eq. 3, and Song et al. 2012. Under occlusion: Kong & Zhang, arXiv:2208.04164, Figures 1 to 3, which do
        not say which tokens enter, how hidden patches are shown to the encoder, or the estimator. Here, if
        nothing else is said, patches are dropped, and it is the mean of the others and the unbiased form.
Shapes  L layers (each block's output, and the final norm's), B images of a batch, D width, N patches.
Dtypes  features as the encoder gives them, sums in fp64.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch
from fastmim_kernels import num_seen, split_patches
from fastmim_kernels.philox import sample_seeds
from torch import Tensor

from fastmim.models.tokens import Tokens
from fastmim.models.vit import Encoder

Pooled = Literal["mean", "cls", "tokens"]
Hide = Literal["drop", "mask_token", "zero_pixels"]
Estimator = Literal["unbiased", "biased"]
LEAST = {"unbiased": 4, "biased": 2}  # images of a batch


def hsic_unbiased(k_LBB: Tensor, l_LBB: Tensor) -> Tensor:
    """HSIC_1 of Gram matrices `[..., n, n]`, fp64 `[...]`. ValueError for fewer than four rows."""
    n = k_LBB.shape[-1]
    if n < LEAST["unbiased"]:
        raise ValueError(f"cka: want at least 4 images in a batch for the unbiased estimator, got {n}")
    off = 1 - torch.eye(n, dtype=torch.float64, device=k_LBB.device)
    k_LBB, l_LBB = k_LBB.double() * off, l_LBB.double() * off
    of_k, of_l = k_LBB.sum(-1), l_LBB.sum(-1)
    product = (k_LBB * l_LBB).sum((-1, -2))
    means = of_k.sum(-1) * of_l.sum(-1) / ((n - 1) * (n - 2))
    return (product + means - 2 / (n - 2) * (of_k * of_l).sum(-1)) / (n * (n - 3))


def hsic_biased(k_LBB: Tensor, l_LBB: Tensor) -> Tensor:
    """HSIC_0 of Gram matrices `[..., n, n]`, fp64 `[...]`. ValueError for fewer than two rows."""
    n = k_LBB.shape[-1]
    if n < LEAST["biased"]:
        raise ValueError(f"cka: want at least 2 images in a batch, got {n}")
    return (centered(k_LBB.double()) * centered(l_LBB.double())).sum((-1, -2)) / (n - 1) ** 2


def centered(k_LBB: Tensor) -> Tensor:
    """H K H: without the means of rows and columns."""
    return (
        k_LBB
        - k_LBB.mean(-1, keepdim=True)
        - k_LBB.mean(-2, keepdim=True)
        + k_LBB.mean((-1, -2), keepdim=True)
    )


HSIC: dict[Estimator, Callable[[Tensor, Tensor], Tensor]] = {"unbiased": hsic_unbiased, "biased": hsic_biased}


class MinibatchCKA:
    """CKA of L pairs of features, batch by batch. What it keeps are three numbers of each pair."""

    def __init__(self, estimator: Estimator = "unbiased"):
        self.hsic = HSIC[estimator]
        self.batches = 0
        self.sums: Tensor | None = None  # [3, L]: of K with L, K with K, L with L

    def add(self, x_LBD: Tensor, y_LBE: Tensor) -> None:
        """Features of the same B images: X and Y may differ in width, not in L and B."""
        if x_LBD.shape[:-1] != y_LBE.shape[:-1] or x_LBD.ndim < 2:
            got = f"{tuple(x_LBD.shape)} and {tuple(y_LBE.shape)}"
            raise ValueError(f"cka: want features [..., B, D] and [..., B, E] of the same images, got {got}")
        of_x, of_y = (x.double() @ x.double().mT for x in (x_LBD, y_LBE))
        found = torch.stack([self.hsic(of_x, of_y), self.hsic(of_x, of_x), self.hsic(of_y, of_y)])
        self.sums = found if self.sums is None else self.sums + found
        self.batches += 1

    def value(self) -> Tensor:
        """CKA of each pair, fp64 `[L]`; NaN where features do not vary. ValueError before the first batch."""
        if self.sums is None:
            raise ValueError("cka: want at least one batch, got none")
        both, of_x, of_y = self.sums / self.batches
        return both / (of_x * of_y).sqrt()


@torch.no_grad()
def layers(
    encoder: Encoder, image_BHWC: Tensor, seen_BK: Tensor | None, pooled: Pooled, hide: Hide, keep_K: Tensor
) -> Tensor:
    """Features of every block, and of the norm behind the last. `[L, B, D]`, or `[L, B, K * D]` for tokens.

    `seen_BK` are the patches that are shown, None for all of them; `keep_K` those whose tokens are compared.
    """
    tokens, dropped = shown(encoder, image_BHWC, seen_BK, hide), hide == "drop" and seen_BK is not None
    found = encoder(tokens, outputs=range(encoder.config.depth))
    streams = [found.blocks[i] for i in range(encoder.config.depth)]
    streams += [found.tokens_BTD] if encoder.norm is not None else []
    x_LBTD = torch.stack(streams)
    if pooled == "cls":
        return x_LBTD[:, :, 0]
    if pooled == "mean":
        return x_LBTD[:, :, 1:].mean(2)
    return (x_LBTD[:, :, 1:] if dropped else x_LBTD[:, :, 1 + keep_K]).flatten(2)


def shown(encoder: Encoder, image_BHWC: Tensor, seen_BK: Tensor | None, hide: Hide) -> Tokens:
    """What the encoder gets of images of which these patches are to be seen."""
    if seen_BK is None:
        return Tokens(image_BHWC)
    if hide == "drop":
        return Tokens(image_BHWC, seen_BK)
    if hide == "mask_token":
        return Tokens(image_BHWC, seen_BK, mask_tokens=True)
    c = encoder.config
    seen_BN = torch.zeros(len(image_BHWC), c.num_patches, dtype=torch.bool, device=image_BHWC.device)
    seen_BN.scatter_(1, seen_BK, True)
    seen_BHW = seen_BN.view(-1, *c.grid).repeat_interleave(c.patch, 1).repeat_interleave(c.patch, 2)
    zero_C = torch.tensor([round(255 * m) for m in c.pixel_mean], dtype=torch.uint8, device=image_BHWC.device)
    return Tokens(torch.where(seen_BHW[..., None], image_BHWC, zero_C))


def check_can_hide(encoder: Encoder, hide: Hide) -> None:
    """ValueError for an encoder that cannot be shown images like that."""
    if hide == "mask_token" and encoder.mask_token is None:
        raise ValueError(
            "cka: --hide mask_token wants an encoder with a mask token, which these weights lack"
        )
    if hide == "drop" and encoder.config.positions.startswith("relative"):
        raise ValueError("cka: relative positions want every patch: --hide zero_pixels, or mask_token")


def cka_under_occlusion(
    encoder: Encoder,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    *,
    ratios: Sequence[float],
    pooled: Pooled = "mean",
    hide: Hide = "drop",
    estimator: Estimator = "unbiased",
    seed: int = 0,
) -> Iterator[tuple[float, Tensor]]:
    """(ratio, CKA of each layer `[L]`) for each share of hidden patches.

    `batches` are uint8 images `[B, H, W, C]` and their ids: which patches of an image are hidden is drawn
    from `seed` and its id, and what is hidden at one ratio is hidden at every larger one. With `tokens` one
    draw serves a whole batch. ValueError for a ratio that leaves no patch.
    """
    check_can_hide(encoder, hide)
    N = encoder.config.num_patches
    if bad := [ratio for ratio in ratios if not 0 < ratio < 1 or N * (1 - ratio) < 1]:
        raise ValueError(f"cka: want ratios between 0 and 1 that leave one of {N} patches, got {bad}")
    counts = {ratio: num_seen(N, ratio) for ratio in ratios}
    encoder = encoder.to(device).eval()
    found = {ratio: MinibatchCKA(estimator) for ratio in ratios}
    for image_BHWC, ids_B in batches:
        image_BHWC, seeds_B = image_BHWC.to(device), sample_seeds(seed, 0, ids_B).to(device)
        if pooled == "tokens":
            seeds_B = seeds_B[:1].expand(len(seeds_B)).contiguous()
        whole_LBTD = None
        for ratio in ratios:
            seen_BK, _ = split_patches(seeds_B, N, counts[ratio])
            hidden_LBD = layers(encoder, image_BHWC, seen_BK, pooled, hide, seen_BK[0])
            if pooled == "tokens" or whole_LBTD is None:
                whole_LBTD = layers(encoder, image_BHWC, None, pooled, hide, seen_BK[0])
            found[ratio].add(whole_LBTD, hidden_LBD)
    for ratio, one in found.items():
        yield ratio, one.value()
