"""What the MAE models of transformers and of facebookresearch/mae have in common: masks, tokens, loss.

    mask      1 for the N - K patches of largest noise, restore: where each patch went in the order of noise
    visible   tokens + positions of the K patches of least noise, class token in front        gather_tokens
    restored  visible tokens in their places, mask tokens elsewhere, plus positions           restore_tokens
    loss      mean over hidden patches of the squared distance to the (normalized) pixels  norm_pix_loss_image

Source  He et al., arXiv:2111.06377; the order of draws and the eps of both models, so that one seed gives one
        mask. Dtypes as theirs: the tokens come in the widest dtype of what is added or joined.
"""

import torch
from torch import Tensor

from fastmim_kernels.apply.swap import demand_float
from fastmim_kernels.gather_tokens import gather_tokens
from fastmim_kernels.norm_pix_loss_image import norm_pix_loss_image
from fastmim_kernels.restore_tokens import restore_tokens


def widest(*tensors: Tensor) -> torch.dtype:
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def masked(
    tokens_BND: Tensor, pos: Tensor, cls_token: Tensor, noise_BN: Tensor, mask_ratio: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Visible tokens `[B, 1 + K, D]`, mask `[B, N]` and restore `[B, N]`; pos is `[1, 1 + N, D]`."""
    num_kept = int(noise_BN.shape[1] * (1 - mask_ratio))
    shuffle_BN = noise_BN.argsort(dim=1)
    restore_BN = shuffle_BN.argsort(dim=1)
    tokens = tokens_BND.to(widest(tokens_BND, pos, cls_token))
    demand_float(tokens)
    cls_D = (cls_token + pos[:, :1]).flatten()
    visible = gather_tokens(tokens.contiguous(), shuffle_BN[:, :num_kept], pos[0, 1:], cls_D)
    return visible, torch.where(restore_BN < num_kept, 0.0, 1.0), restore_BN


def restored(visible_BTD: Tensor, restore_BN: Tensor, mask_token: Tensor, pos: Tensor) -> Tensor:
    """The decoder's input `[B, 1 + N, D]` of `[B, 1 + K, D]`; pos is `[1, 1 + N, D]`."""
    B, T, _ = visible_BTD.shape
    visible = visible_BTD.to(widest(visible_BTD, mask_token, pos))
    demand_float(visible)
    start_B1 = torch.arange(B, device=restore_BN.device)[:, None] * T
    source_BN = torch.where(restore_BN < T - 1, start_B1 + 1 + restore_BN, -1)
    source = torch.cat([start_B1, source_BN], dim=1)
    return restore_tokens(visible.flatten(0, 1), source, mask_token.flatten(), pos[0])


def pixel_loss(pixels_BCHW: Tensor, pred_BNP: Tensor, mask_BN: Tensor, patch: int, normalize: bool) -> Tensor:
    """Mean of the loss of the hidden patches. The target is read from the image, never written."""
    demand_float(pixels_BCHW)
    demand_float(pred_BNP)
    B, C = pixels_BCHW.shape[:2]
    index_BN = torch.arange(pred_BNP.shape[1], device=pred_BNP.device).expand(B, -1)
    image_BHWC, as_it_is = pixels_BCHW.permute(0, 2, 3, 1), ((0.0,) * C, (1.0,) * C)
    loss_BN = norm_pix_loss_image(pred_BNP, image_BHWC, index_BN, patch, *as_it_is, normalize=normalize)
    return (loss_BN * mask_BN).sum() / mask_BN.sum()
