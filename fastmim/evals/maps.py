"""What an encoder looks at, and which patches are alike to it: attention, its rollout, principal components.

    attention   softmax(q k^T / sqrt(d) + bias) of a block, from the class token to each patch, head by head
    rollout     product over the blocks, the last first, of (mean over heads + I) / 2; from the class token
    components  the three directions in which the patch features of all images together vary most

Source  maps of heads: Caron et al., arXiv:2104.14294; rollout: Abnar & Zuidema, arXiv:2005.00928; components
        as colors: Oquab et al., arXiv:2304.07193, without its step that tells background from foreground.
Shapes  B images, H heads, T = 1 + N tokens, D width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastmim.models.block import Attention
from fastmim.models.embed import relative_bias
from fastmim.models.tokens import Tokens
from fastmim.models.vit import Encoder


@torch.no_grad()
def attention_of(encoder: Encoder, image_BHWC: Tensor, blocks: Sequence[int]) -> dict[int, Tensor]:
    """The attention probabilities of blocks, 0 the first, fp32 `[B, H, T, T]` each, of uint8 images.

    ValueError for a block that there is not.
    """
    with probabilities(encoder, blocks) as found:
        encoder.eval()(Tokens(image_BHWC), outputs=blocks)
    return found


@contextmanager
def probabilities(encoder: Encoder, blocks: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Within this, a pass of the encoder leaves the probabilities of these blocks."""
    found: dict[int, Tensor] = {}
    every = encoder.every_block()

    def keep(number: int) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, args: tuple, out: Tensor) -> None:
            assert isinstance(module, Attention)
            found[number] = probabilities_of(module, *args)

        return every[number].attn.register_forward_hook(hook)

    hooks = [keep(number) for number in blocks if 0 <= number < len(every)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def probabilities_of(attn: Attention, x_BTD: Tensor, segments: object, bias: object, grids: tuple) -> Tensor:
    """What `attn` weighs its values by, of one segment. fp32 `[B, H, T, T]`."""
    B, T, D = x_BTD.shape
    qkv = attn.qkv(x_BTD)
    q, k, _ = qkv.view(B, T, 3, attn.heads, D // attn.heads).float().permute(2, 0, 3, 1, 4)
    if attn.q_bias is not None:
        q = q + attn.q_bias.float().view(1, attn.heads, 1, -1)
    logits_BHTT = q @ k.mT / (D // attn.heads) ** 0.5
    if attn.relative is not None and attn.relative_position_bias_table is not None:
        logits_BHTT = logits_BHTT + relative_bias(attn.relative_position_bias_table, attn.relative, grids[0])
    elif isinstance(bias, tuple) and bias[0] is not None:
        logits_BHTT = logits_BHTT + bias[0]
    return logits_BHTT.softmax(-1)


def rollout(attention: Sequence[Tensor]) -> Tensor:
    """How much of each patch is in the class token behind these blocks, the first first. `[B, N]`."""
    total_BTT: Tensor | None = None
    for block_BHTT in attention:
        mean_BTT = block_BHTT.mean(1)
        step_BTT = (mean_BTT + torch.eye(mean_BTT.shape[1], device=mean_BTT.device)) / 2
        total_BTT = step_BTT if total_BTT is None else step_BTT @ total_BTT
    if total_BTT is None:
        raise ValueError("rollout: want the attention of at least one block, got none")
    return total_BTT[:, 0, 1:]


def components(patches_BND: Tensor, count: int = 3) -> tuple[Tensor, Tensor]:
    """The patches along the directions in which all of them vary most, `[B, N, count]`, and each one's share
    of the variance, `[count]`. Signs are such that the largest entry of a direction is positive.
    """
    B, N, D = patches_BND.shape
    if count > min(D, B * N - 1):
        raise ValueError(f"pca: want at most {min(D, B * N - 1)} components of {B * N} patches, got {count}")
    x_MD = patches_BND.double().flatten(0, 1)
    x_MD = x_MD - x_MD.mean(0)
    values, vectors = torch.linalg.eigh(x_MD.T @ x_MD)
    top_DC = vectors[:, -count:].flip(1)
    top_DC = top_DC * top_DC.take_along_dim(top_DC.abs().argmax(0, keepdim=True), 0).sign()
    share_C = values[-count:].flip(0) / values.sum().clamp(min=1e-300)
    return (x_MD @ top_DC).view(B, N, count), share_C


def as_colors(x_BNC: Tensor, tail: float = 0.01) -> Tensor:
    """Components as colors from 0 to 1, each stretched over all images but for a tail at either end."""
    flat = x_BNC.flatten(0, 1)
    ends = torch.tensor([tail, 1 - tail], dtype=flat.dtype, device=flat.device)
    low, high = flat.quantile(ends, dim=0)
    return ((x_BNC - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
