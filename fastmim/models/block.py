"""Transformer blocks: attention, MLP, and the residual stream that they add to.

    x += keep gamma1 MHA(LN x);  x += keep gamma2 MLP(LN x)          MLP: Linear, exact GELU, Linear, ratio 4

gamma is LayerScale (absent, or a vector per branch), keep the drop path of a sample: 0 with the probability
of its block, else 1 / (1 - probability). The sums are made where they are normalized: a block takes the
stream and the branch that the block before it left to be added, and leaves its own.

Source  Dosovitskiy et al., arXiv:2010.11929; LayerScale: arXiv:2103.17239; q, k and v biases and the relative
        position bias: BEiT, arXiv:2106.08254; the cross block: CAE, arXiv:2202.03026.
Keys    timm's VisionTransformer's; with LayerScale, without a bias of the keys or with relative positions,
        those of timm's Beit: gamma_1, gamma_2, attn.q_bias, attn.v_bias, attn.relative_position_bias_table.
Shapes  B images, T tokens of D values, H heads.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from fastmim_kernels import add_layer_norm, bias_gelu, draw_uniform
from fastmim_kernels.attention import Backend, attention
from torch import Tensor, nn

from fastmim.models.embed import Grid, num_offsets, relative_bias
from fastmim.streams import DROP_PATH

NORM_EPS = 1e-6
QKVBias = Literal["qkv", "qv", "none"]
Bias = Tensor | tuple[Tensor | None, ...] | None  # of the attention logits: of one segment, or of each


class LinearGELU(nn.Linear):
    """`gelu(x W + b)`, exact: the bias enters with the GELU, and the backward keeps the product alone."""

    def forward(self, x: Tensor) -> Tensor:
        return bias_gelu(F.linear(x, self.weight), self.bias)


class LinearFP32(nn.Linear):
    """`x W + b` in fp32, whatever the dtype of its weights: for rows of which differences are taken."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.weight.float(), bias)


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1 = LinearGELU(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))


class Attention(nn.Module):
    """Multi-head self-attention with one fused linear map to queries, keys and values."""

    def __init__(
        self,
        width: int,
        heads: int,
        backend: Backend = "auto",
        *,
        qkv_bias: QKVBias = "qkv",
        relative: Grid | None = None,
    ):
        super().__init__()
        self.heads, self.backend, self.relative = heads, backend, relative
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias == "qkv")
        self.proj = nn.Linear(width, width)
        self.q_bias = self.v_bias = self.relative_position_bias_table = None
        if qkv_bias == "qv":  # a bias of the keys changes no softmax
            self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        if relative is not None:
            self.relative_position_bias_table = nn.Parameter(torch.zeros(num_offsets(relative), heads))

    def forward(
        self,
        x_BTD: Tensor,
        segments: tuple[int, ...] | None = None,
        bias: Bias = None,
        grids: tuple[Grid, ...] = (),
    ) -> Tensor:
        """`bias` is added to the logits; relative positions of its own want the grid of each segment."""
        B, T, D = x_BTD.shape
        if self.relative is not None and self.relative_position_bias_table is not None:
            table = self.relative_position_bias_table
            bias = tuple(relative_bias(table, self.relative, grid) for grid in grids)
        if self.q_bias is None:
            qkv = self.qkv(x_BTD)
        else:
            assert self.v_bias is not None
            biases = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
            qkv = F.linear(x_BTD, self.qkv.weight, biases)
        q, k, v = qkv.view(B, T, 3, self.heads, D // self.heads).unbind(2)
        out = attention(q, k, v, segments=segments, bias=bias, backend=self.backend)
        return self.proj(out.reshape(B, T, D))


class Branch(NamedTuple):  # a tuple, for ZeRO 3 looks for the tensors in what a module gives
    """What a block leaves to be added to the stream: `keep * scale * value`."""

    value_BTD: Tensor
    scale_D: Tensor | None = None  # LayerScale's gamma
    keep_BT: Tensor | None = None  # fp32, a factor for each token, the same within a segment; drop path's

    def added_to(self, x_BTD: Tensor) -> Tensor:
        """The stream with the branch in it, where no norm follows."""
        value = self.value_BTD if self.scale_D is None else self.value_BTD * self.scale_D
        return x_BTD + (value if self.keep_BT is None else (value * self.keep_BT[..., None]).to(value.dtype))


class AddNorm(nn.LayerNorm):
    """LayerNorm of a residual stream to which a branch is added first; gives both. Eps as in MAE."""

    def __init__(self, width: int):
        super().__init__(width, eps=NORM_EPS)

    def forward(self, x: Tensor, branch: Branch | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """`[B, T, D]` and the branch of the same shape, if one is to be added, to normed and sum."""
        if branch is None:
            return super().forward(x), x
        value, keep = branch.value_BTD, branch.keep_BT
        if keep is None:
            return add_layer_norm(value, x, self.weight, self.bias, eps=self.eps, scale=branch.scale_D)
        normed, total = add_layer_norm(  # row by row: the op has one factor for each of its samples
            value.flatten(0, 1), x.flatten(0, 1), self.weight, self.bias,
            eps=self.eps, scale=branch.scale_D, keep=keep.flatten(),
        )  # fmt: skip
        return normed.view_as(x), total.view_as(x)


class Block(nn.Module):
    """Self-attention and an MLP on `[B, T, D]`."""

    def __init__(
        self,
        width: int,
        heads: int,
        backend: Backend = "auto",
        *,
        qkv_bias: QKVBias = "qkv",
        layer_scale: float = 0.0,
        relative: Grid | None = None,
    ):
        super().__init__()
        self.norm1 = AddNorm(width)
        self.attn = Attention(width, heads, backend, qkv_bias=qkv_bias, relative=relative)
        self.norm2 = AddNorm(width)
        self.mlp = MLP(width)
        self.gamma_1 = self.gamma_2 = None
        if layer_scale:
            self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((width,), layer_scale)) for _ in range(2))

    def forward(
        self,
        x_BTD: Tensor,
        branch: Branch | None = None,
        segments: tuple[int, ...] | None = None,
        *,
        bias: Bias = None,
        grids: tuple[Grid, ...] = (),
        keep_2BT: Tensor | None = None,
    ) -> tuple[Tensor, Branch]:
        """The stream without the last branch, and that branch. `keep_2BT` has drop path's two factors."""
        keep1, keep2 = (None, None) if keep_2BT is None else keep_2BT.unbind(0)
        normed_BTD, x_BTD = self.norm1(x_BTD, branch)
        branch = Branch(self.attn(normed_BTD, segments, bias, grids), self.gamma_1, keep1)
        normed_BTD, x_BTD = self.norm2(x_BTD, branch)
        gamma_2 = None if self.gamma_2 is None else self.gamma_2.clone()  # ZeRO 3 empties it as we leave
        return x_BTD, Branch(self.mlp(normed_BTD), gamma_2, keep2)


def drop_path_keeps(
    seeds_B: Tensor | None, drop_path: float, depth: int, lengths: tuple[int, ...], *, network: int = 0
) -> list[Tensor | None]:
    """What each of `depth` blocks keeps of its branches: factors of each token, `[2, B, T]` fp32, or None.

    Each sample has a draw of its own in each segment of these lengths and in each network of a method.
    Probabilities rise in equal steps from 0 at the first block to `drop_path` at the last. ValueError without
    seeds to draw from.
    """
    if drop_path == 0:
        return [None] * depth
    if seeds_B is None:
        raise ValueError("want the seeds of the samples in training, to draw drop path from, got none")
    S = len(lengths)
    uniform = draw_uniform(seeds_B, 2 * depth * S, DROP_PATH.of(network)).view(-1, depth, 2, S)
    keeps: list[Tensor | None] = []
    for i, drawn_2BS in enumerate(uniform.permute(1, 2, 0, 3)):
        p = drop_path * i / max(depth - 1, 1)
        kept_2BS = (drawn_2BS >= p).float() / (1 - p)
        runs = [one.expand(-1, -1, n) for one, n in zip(kept_2BS.split(1, 2), lengths, strict=True)]
        keeps.append(torch.cat(runs, dim=2) if p else None)
    return keeps


class CrossAttention(nn.Module):
    """Multi-head attention of T queries to S tokens; no bias of the keys, which would change no softmax."""

    def __init__(self, width: int, heads: int, backend: Backend = "auto"):
        super().__init__()
        self.heads, self.backend = heads, backend
        self.q, self.v = nn.Linear(width, width), nn.Linear(width, width)
        self.k = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, query_BTD: Tensor, key_BSD: Tensor, value_BSD: Tensor) -> Tensor:
        shape = self.heads, query_BTD.shape[2] // self.heads
        q, k, v = self.q(query_BTD), self.k(key_BSD), self.v(value_BSD)
        q, k, v = (x.unflatten(2, shape) for x in (q, k, v))
        segments, key_segments = (q.shape[1],), (k.shape[1],)
        out = attention(q, k, v, segments=segments, key_segments=key_segments, backend=self.backend)
        return self.proj(out.flatten(2))


class CrossBlock(nn.Module):
    """CAE's regressor block: queries of one length look at tokens of another.

    x = q + keep gamma1 CA(LN(q + pos_q), LN(s + pos_s), LN s);  x = LN x;  x = x + keep gamma2 MLP(x)

    The norm before the MLP is not within the residual: the stream goes on normalized.
    """

    def __init__(self, width: int, heads: int, backend: Backend = "auto", *, layer_scale: float = 0.0):
        super().__init__()
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(width, eps=NORM_EPS) for _ in range(3))
        self.attn = CrossAttention(width, heads, backend)
        self.norm = AddNorm(width)
        self.mlp = MLP(width)
        self.gamma_1 = self.gamma_2 = None
        if layer_scale:
            self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((width,), layer_scale)) for _ in range(2))

    def forward(
        self,
        q_BTD: Tensor,
        tokens_BSD: Tensor,
        pos_BTD: Tensor,
        pos_BSD: Tensor,
        keep_2BT: Tensor | None = None,
    ) -> Tensor:
        """`[B, T, D]` queries and `[B, S, D]` tokens with their positions to `[B, T, D]`."""
        keep1, keep2 = (None, None) if keep_2BT is None else keep_2BT.unbind(0)
        looked = self.attn(
            self.norm_q(q_BTD + pos_BTD), self.norm_k(tokens_BSD + pos_BSD), self.norm_v(tokens_BSD)
        )
        x_BTD, _ = self.norm(q_BTD, Branch(looked, self.gamma_1, keep1))
        return Branch(self.mlp(x_BTD), self.gamma_2, keep2).added_to(x_BTD)
