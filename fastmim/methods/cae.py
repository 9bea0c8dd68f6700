"""CAE: what a regressor says of hidden patches must be what the encoder says of them, and decode to tokens.

    T   T1(x) hides 98 of 196 patches in blocks, exactly; T2(x) is those 98; a tokenizer sees the same box
    f   the encoder, on visible patches alone; z' = f(T2(x)) is its own, without a gradient
    h   regressor: 4 cross-attention blocks, queries at hidden patches look at visible ones and at themselves
    g   decoder: 4 blocks on z, what h says, and its positions, one linear layer to K logits
    M   cross entropy of g(z) with the codes + 2 mean (z - z')^2, over hidden patches

Source  Chen et al., arXiv:2202.03026; Atten4Vis/CAE. In the words of arXiv:2208.04164 both branches are f,
        and the tokenizer is a second one. The class token is encoded and looked at by nobody.
Decay   none for the class token.
Shapes  B images, N patches, V visible and L hidden ones, D width, K codes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from fastmim_kernels import block_mask, split_mask
from torch import Tensor, nn

from fastmim.group import Group
from fastmim.methods.base import About, Output, Reconstruction
from fastmim.methods.health import collapse, health
from fastmim.methods.masking import check_ratio, hidden_count
from fastmim.methods.tokens import TokensConfig, TokensMethod, token_loss
from fastmim.methods.work import Cross, Linear, Stack, Work
from fastmim.models.block import NORM_EPS, AddNorm, Block, CrossBlock, drop_path_keeps
from fastmim.models.init import init_linear, truncated_normal
from fastmim.models.tokens import Tokens
from fastmim.models.vit import Encoder, ViTConfig
from fastmim.streams import MASK
from fastmim.views import Batch

REGRESSOR, DECODER = 1, 2  # networks that drop paths, beside the encoder


@dataclass(frozen=True, kw_only=True)
class CAEConfig(TokensConfig):
    """CAE (arXiv:2202.03026)."""

    name: ClassVar[str] = "cae"
    about: ClassVar[About] = About(
        paper="Chen et al., arXiv:2202.03026",
        t1="50 %",
        t2="f itself on the other 50 %, a frozen tokenizer",
        similarity="cross entropy and l2",
        needs="`--method.tokenizer`",
    )
    encoder: ClassVar = {"layer_scale": 0.1, "drop_path": 0.1, "qkv_bias": "qv", "init": "cae"}
    mask_ratio: float = 0.5
    """Fraction of the patches that blocks hide, exactly"""
    regressor_depth: int = 4
    """Cross-attention blocks from visible to hidden patches"""
    decoder_depth: int = 4
    """Blocks between the regressor and the logits"""
    align_weight: float = 2.0
    """Weight of the squared distance to the encoder's own output"""

    def __post_init__(self) -> None:
        check_ratio("method.mask-ratio", self.mask_ratio)
        if min(self.regressor_depth, self.decoder_depth) < 1 or self.align_weight < 0 or self.codes < 2:
            raise ValueError(
                "method.regressor-depth, method.decoder-depth, method.align-weight, method.codes: want at "
                "least 1 twice, 0 or more, and at least 2, got "
                f"{self.regressor_depth}, {self.decoder_depth}, {self.align_weight}, {self.codes}"
            )

    def work(self, model: ViTConfig) -> Work:
        """The encoder on both halves, once without a gradient; the tokenizer is not counted."""
        N, P, D = model.num_patches, model.patch_values, model.width
        L = hidden_count("method.mask-ratio", model, self.mask_ratio)
        return Work(
            stacks=(
                Stack((1 + N - L,), D, model.depth),
                Stack((1 + L,), D, model.depth, trained=False),
                Cross(L, N, D, self.regressor_depth),
                Stack((L,), D, self.decoder_depth),
            ),
            others=(
                Linear(N, P, D, input_gradient=False),
                Linear(N, P, D, trained=False),
                Linear(L, D, self.codes),
            ),
        )

    def build(self, model: ViTConfig) -> "CAE":
        return CAE(self, model)


class Regressor(nn.Module):
    """Queries at hidden patches, each the same token at first, look at visible tokens and at themselves."""

    def __init__(self, model: ViTConfig, depth: int):
        super().__init__()
        self.drop_path, D = model.drop_path, model.width
        self.query_token = nn.Parameter(torch.empty(1, 1, D))
        self.blocks = nn.ModuleList(
            CrossBlock(D, model.heads, model.attention, layer_scale=model.layer_scale) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(D, eps=NORM_EPS)
        self.apply(init_linear)
        truncated_normal(self.query_token)

    def forward(
        self, visible_BVD: Tensor, pos_BVD: Tensor, pos_BLD: Tensor, seeds_B: Tensor | None
    ) -> Tensor:
        """`[B, V, D]` tokens and the positions of visible and hidden patches to `[B, L, D]`."""
        pos_BND, (B, L, _) = torch.cat([pos_BVD, pos_BLD], dim=1), pos_BLD.shape
        q_BLD = self.query_token.expand(B, L, -1)
        p = self.drop_path if self.training else 0.0
        keeps = drop_path_keeps(seeds_B, p, len(self.blocks), (L,), network=REGRESSOR)
        for block, keep_2BL in zip(self.blocks, keeps, strict=True):
            q_BLD = block(q_BLD, torch.cat([visible_BVD, q_BLD], dim=1), pos_BLD, pos_BND, keep_2BL)
        return self.norm(q_BLD)


class TokenDecoder(nn.Module):
    """Self-attention among hidden patches, then logits of their codes."""

    def __init__(self, model: ViTConfig, depth: int, codes: int):
        super().__init__()
        self.drop_path, D = model.drop_path, model.width
        self.blocks = nn.ModuleList(
            Block(D, model.heads, model.attention, qkv_bias=model.qkv_bias, layer_scale=model.layer_scale)
            for _ in range(depth)
        )
        self.norm = AddNorm(D)
        self.head = nn.Linear(D, codes)
        self.apply(init_linear)

    def forward(self, x_BLD: Tensor, seeds_B: Tensor | None) -> Tensor:
        """`[B, L, D]` to `[B, L, K]`."""
        p, branch = self.drop_path if self.training else 0.0, None
        keeps = drop_path_keeps(seeds_B, p, len(self.blocks), (x_BLD.shape[1],), network=DECODER)
        for block, keep_2BL in zip(self.blocks, keeps, strict=True):
            x_BLD, branch = block(x_BLD, branch, keep_2BT=keep_2BL)
        return self.head(self.norm(x_BLD, branch)[0])


class CAE(TokensMethod):
    config: CAEConfig
    encoder: Encoder

    def __init__(self, config: CAEConfig, model: ViTConfig):
        super().__init__(config, model, color=None)
        if model.positions not in ("sincos", "learned"):
            raise ValueError(f"model.positions: want sincos or learned for queries, got {model.positions}")
        self.num_hidden = hidden_count("method.mask-ratio", model, config.mask_ratio)
        self.encoder = Encoder(model)
        self.regressor = Regressor(model, config.regressor_depth)
        self.token_decoder = TokenDecoder(model, config.decoder_depth, self.num_codes)

    def group(self, name: str, parameter: nn.Parameter) -> Group:
        return Group(decay=False) if name.endswith(("cls_token", "pos_embed")) else Group()

    def split(self, seeds_B: Tensor) -> tuple[Tensor, Tensor]:
        """Visible and hidden patches, ascending. `[B, V]` and `[B, L]` int64."""
        hidden_BN = block_mask(seeds_B, self.model.grid, self.num_hidden, exact=True, stream=MASK.of())
        return split_mask(hidden_BN, self.num_hidden)

    def forward(self, batch: Batch) -> Output:
        image_BHWC, small_BHWC = batch.crops
        seeds_B, (seen_BV, hidden_BL) = batch.seeds_B, self.split(batch.seeds_B)
        with torch.no_grad():
            target_BLD = self.encoder(Tokens(image_BHWC, hidden_BL), seeds_B=seeds_B).tokens_BTD[:, 1:]
        visible_BVD = self.encoder(Tokens(image_BHWC, seen_BV), seeds_B=seeds_B).tokens_BTD[:, 1:]
        z_BLD = self.regress(visible_BVD, seen_BV, hidden_BL, seeds_B)
        logits_BLK = self.decode(z_BLD, hidden_BL, seeds_B)
        token_BL = self.tokens(small_BHWC).gather(1, hidden_BL)
        token, metrics = token_loss(logits_BLK, token_BL, None, self.ranks)
        align = (z_BLD.float() - target_BLD.float()).square().mean()
        metrics |= {"token_loss": token.detach(), "align_loss": align.detach()}
        healthy = health(z_BLD.detach(), target_BLD)
        return Output(token + self.config.align_weight * align, metrics | healthy)

    def positions(self, index_BK: Tensor) -> Tensor:
        """The positions of these patches. `[B, K, D]`."""
        pos_TD = self.encoder.positions(self.model.grid)
        assert pos_TD is not None
        return pos_TD[1:][index_BK]

    def regress(
        self, visible_BVD: Tensor, seen_BV: Tensor, hidden_BL: Tensor, seeds_B: Tensor | None = None
    ) -> Tensor:
        """What is foreseen of the encoder's output at hidden patches. `[B, L, D]`."""
        return self.regressor(visible_BVD, self.positions(seen_BV), self.positions(hidden_BL), seeds_B)

    def decode(self, z_BLD: Tensor, hidden_BL: Tensor, seeds_B: Tensor | None = None) -> Tensor:
        """Logits of the codes at hidden patches. `[B, L, K]`."""
        return self.token_decoder(z_BLD + self.positions(hidden_BL), seeds_B)

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> Reconstruction | None:
        image_BHWC, small_BHWC = batch.crops
        seen_BV, hidden_BL = self.split(batch.seeds_B)
        visible_BVD = self.encoder(Tokens(image_BHWC, seen_BV)).tokens_BTD[:, 1:]
        guess_BL = self.decode(self.regress(visible_BVD, seen_BV, hidden_BL), hidden_BL).argmax(-1)
        token_BN = self.tokens(small_BHWC).scatter(1, hidden_BL, guess_BL)
        return self.drawn(image_BHWC, seen_BV, token_BN)

    def diagnose(self, row: Mapping[str, float]) -> str | None:
        return collapse(row, self.remedies())
