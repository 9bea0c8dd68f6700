"""MAE from the formulas, for the tests: plain functions of a state dict, in any precision.

Nothing of fastmim is used. The image is normalized whole, embedded by a convolution at every patch, and
attention is a softmax of a matrix. Names of weights are those of an MAE checkpoint.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalized(image_BHWC: Tensor, dtype: torch.dtype) -> Tensor:
    x = image_BHWC.permute(0, 3, 1, 2).to(dtype) / 255
    mean, std = (torch.tensor(v, dtype=dtype).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (x - mean) / std


def patch_targets(image_BHWC: Tensor, p: int, dtype: torch.dtype, *, norm_pix: bool = True) -> Tensor:
    """`[B, N, P]`: each patch row, column, channel; by its own mean and unbiased variance if `norm_pix`."""
    x = normalized(image_BHWC, dtype)
    B, C, H, W = x.shape
    patches = [
        x[:, :, i : i + p, j : j + p].permute(0, 2, 3, 1).reshape(B, p * p * C)
        for i in range(0, H, p)
        for j in range(0, W, p)
    ]
    y = torch.stack(patches, dim=1)
    if not norm_pix:
        return y
    mean = y.mean(-1, keepdim=True)
    var = (y - mean).square().sum(-1, keepdim=True) / (y.shape[-1] - 1)
    return (y - mean) / (var + 1e-6).sqrt()


def layer_norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    unit = centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return unit * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def block(x: Tensor, w: dict[str, Tensor], name: str, heads: int) -> Tensor:
    B, T, D = x.shape
    d = D // heads
    qkv = linear(layer_norm(x, w, f"{name}.norm1"), w, f"{name}.attn.qkv")
    q, k, v = (part.reshape(B, T, heads, d).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    seen = ((q @ k.transpose(2, 3)) / d**0.5).softmax(-1) @ v
    x = x + linear(seen.transpose(1, 2).reshape(B, T, D), w, f"{name}.attn.proj")
    h = linear(layer_norm(x, w, f"{name}.norm2"), w, f"{name}.mlp.fc1")
    h = 0.5 * h * (1 + torch.erf(h / 2**0.5))
    return x + linear(h, w, f"{name}.mlp.fc2")


def count(w: dict[str, Tensor], prefix: str) -> int:
    return 1 + max((int(name.split(".")[1]) for name in w if name.startswith(prefix + ".")), default=-1)


def encode(
    image_BHWC: Tensor,
    visible_BN: Tensor,
    w: dict[str, Tensor],
    p: int,
    heads: int,
    *,
    cls_token: bool = True,
    final_norm: bool = True,
) -> Tensor:
    """The visible patches of each image, in the order of their numbers, behind a class token."""
    dtype = w["cls_token"].dtype
    x = F.conv2d(normalized(image_BHWC, dtype), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], p)
    x = x.flatten(2).transpose(1, 2) + w["pos_embed"][:, 1:]
    B, _, D = x.shape
    cls = (w["cls_token"] + w["pos_embed"][:, :1]).expand(B, 1, D)
    x = x[visible_BN].reshape(B, -1, D)
    z = torch.cat([cls, x], dim=1) if cls_token else x
    for i in range(count(w, "blocks")):
        z = block(z, w, f"blocks.{i}", heads)
    return layer_norm(z, w, "norm") if final_norm else z


def encode_with_mask_tokens(
    image_BHWC: Tensor, visible_BN: Tensor, w: dict[str, Tensor], p: int, heads: int
) -> Tensor:
    """Every patch, its embedding replaced by the mask token where it is not visible; a class token first."""
    dtype = w["cls_token"].dtype
    x = F.conv2d(normalized(image_BHWC, dtype), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], p)
    x = torch.where(visible_BN[..., None], x.flatten(2).transpose(1, 2), w["mask_token"])
    z = torch.cat([w["cls_token"].expand(len(x), 1, -1), x], dim=1) + w["pos_embed"]
    for i in range(count(w, "blocks")):
        z = block(z, w, f"blocks.{i}", heads)
    return layer_norm(z, w, "norm")


def decode(z: Tensor, visible_BN: Tensor, w: dict[str, Tensor], heads: int) -> Tensor:
    """Predicted values of every patch, `[B, N, P]`."""
    y = linear(z, w, "decoder_embed")
    rows = []
    for b in range(len(visible_BN)):  # put every visible row at its place, the mask token elsewhere
        seen = iter(y[b, 1:])
        rows.append(torch.stack([next(seen) if v else w["mask_token"][0, 0] for v in visible_BN[b].tolist()]))
    y = torch.cat([y[:, :1], torch.stack(rows)], dim=1) + w["decoder_pos_embed"]
    for i in range(count(w, "decoder_blocks")):
        y = block(y, w, f"decoder_blocks.{i}", heads)
    return linear(layer_norm(y, w, "decoder_norm"), w, "decoder_pred")[:, 1:]


def visible_mask(seen_BK: Tensor, num_patches: int) -> Tensor:
    """`[B, N]` bool, True where a patch is seen."""
    mask = torch.zeros(len(seen_BK), num_patches, dtype=torch.bool)
    for row, seen in zip(mask, seen_BK, strict=True):
        row[seen] = True
    return mask
