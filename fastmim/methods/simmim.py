"""SimMIM: hide large cells of the image behind mask tokens and predict their pixels with one linear layer.

    T  T1(x) hides ceil(cells * mask_ratio) cells of 32 x 32 pixels; the second branch is x itself
    f  the encoder on all tokens, with mask tokens at hidden patches; head: Linear D -> 3 s^2 at each
    M  Sum over hidden pixels |x^ - x| / (number of hidden pixels + 1e-5) / 3, x normalized by channel

Source  Xie et al., arXiv:2111.09886; microsoft/SimMIM. In the words of arXiv:2208.04164: Eq. 3 with another
        encoder and M. The ViT is BEiT's, with relative positions, LayerScale, no bias of the keys and its
        first weights, as the recipe has it in `model`; with `backbone=swin` the encoder is Swin, of timm.
Layout  The head is a 1 x 1 convolution and a pixel shuffle: its s^2 C outputs run channel, row, column, and
        not as MAE's. It keeps the framework's first weights of a convolution, which are those of nn.Linear.
Decay   none for class token and positions, and with Swin for mask token and relative positions; besides MAE's
        1-D rule.
Shapes  B images, N patches, L hidden cells or patches, s the stride of a token in pixels, C channels.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from fastmim_kernels import gather_patches, split_patches_grouped
from torch import Tensor, nn

from fastmim.group import Group
from fastmim.methods.base import About, Method, MethodConfig, Output, Reconstruction
from fastmim.methods.masking import check_ratio
from fastmim.methods.variants import Variant
from fastmim.methods.work import Linear, Stack, Work
from fastmim.models.mae_decoder import DecoderConfig
from fastmim.models.swin import STRIDE, SwinEncoder, stages_of, window_of
from fastmim.models.tokens import Tokens
from fastmim.models.vit import Encoder, ViTConfig
from fastmim.views import Batch, Crop

TINY = 1e-5


@dataclass(frozen=True, kw_only=True)
class SimMIMConfig(MethodConfig):
    """SimMIM (arXiv:2111.09886)."""

    name: ClassVar[str] = "simmim"
    about: ClassVar[About] = About(
        paper="Xie et al., arXiv:2111.09886",
        t1="40 % in cells of 32 px, mask tokens",
        t2="the pixels",
        similarity="l1 on hidden pixels; `--variant swin-base` is the paper's Swin",
    )
    encoder: ClassVar = {
        "positions": "relative", "layer_scale": 0.1, "drop_path": 0.1, "qkv_bias": "qv", "init": "beit",
    }  # fmt: skip
    variants: ClassVar = {
        "swin-base": Variant(
            changes={"backbone": "swin"},
            run={
                "model.width": 128, "model.depth": 24, "model.heads": 4, "model.patch": 4,
                "model.image_size": 192, "model.drop_path": 0.0,
                "optim.blr": 1e-4, "optim.min_lr": 4e-5, "optim.schedule": "simmim",
                "optim.milestones": (), "epochs": 100.0,
            },
            expected="84.0 % (Swin-B, 192 px, arXiv:2111.09886)",
        ),
    }  # fmt: skip
    mask_unit: int = 32
    """Side of the cells that are hidden whole, in pixels"""
    mask_ratio: float = 0.6
    """Fraction of the cells that is hidden, rounded up"""
    backbone: Literal["vit", "swin"] = "vit"
    """vit: BEiT's ViT, as --model.* has it; swin: timm's Swin of four stages"""

    def __post_init__(self) -> None:
        check_ratio("method.mask-ratio", self.mask_ratio)
        if self.mask_unit < 1:
            raise ValueError(f"method.mask-unit: want at least 1 pixel, got {self.mask_unit}")

    def small_encoder(self, model: ViTConfig) -> ViTConfig:
        if self.backbone == "vit":
            return model
        width, depth, patch = model.width // 4, max(8, model.depth), model.patch // 4
        return replace(model, width=width, depth=depth, patch=patch, drop_path=0.0)

    def for_image(self, model: ViTConfig) -> Self:
        return replace(self, mask_unit=(1 if self.backbone == "swin" else 2) * self.stride(model))

    def fit(self, model: ViTConfig, decoder: DecoderConfig) -> Self:
        return self.for_image(model)

    def stride(self, model: ViTConfig) -> int:
        """Pixels on each side of what an output token stands for."""
        return model.patch if self.backbone == "vit" else STRIDE * model.patch

    def cells(self, model: ViTConfig) -> tuple[int, int]:
        """Rows and columns of cells; ValueError where cells do not fit the image or the tokens."""
        if self.backbone == "swin":
            stages_of(model)
        unit, stride = self.mask_unit, self.stride(model)
        if unit % stride or model.size[0] % unit or model.size[1] % unit:
            raise ValueError(
                f"method.mask-unit: want a divisor of the image, {model.size[0]} x {model.size[1]} px, and a "
                f"multiple of the {stride} px of an output token, got {unit}"
            )
        return model.size[0] // unit, model.size[1] // unit

    def num_hidden_cells(self, model: ViTConfig) -> int:
        """How many cells are hidden, 30 of 49 at 224 px; ValueError if none is left."""
        rows, columns = self.cells(model)
        hidden = math.ceil(rows * columns * self.mask_ratio)
        if hidden == rows * columns:
            raise ValueError(f"method.mask-ratio: {self.mask_ratio} of {hidden} cells leaves none visible")
        return hidden

    def work(self, model: ViTConfig) -> Work:
        """All tokens go through the encoder and, as published, through the head."""
        N, P, D, C = model.num_patches, model.patch_values, model.width, model.channels
        embedding = Linear(N, P, D, input_gradient=False)
        stride = self.stride(model)
        if self.backbone == "vit":
            return Work((Stack((1 + N,), D, model.depth),), (embedding, Linear(N, D, C * stride**2)))
        stages, window = stages_of(model), window_of(model) ** 2
        stacks = [Stack((window,) * (s.rows * s.columns // window), s.width, s.depth) for s in stages]
        merges = [Linear(s.rows * s.columns, 2 * s.width, s.width) for s in stages[1:]]  # four tokens in one
        last = stages[-1]
        head = Linear(last.rows * last.columns, last.width, C * stride**2)
        return Work(tuple(stacks), (embedding, *merges, head))

    def build(self, model: ViTConfig) -> "SimMIM":
        return SimMIM(self, model)


class SimMIM(Method):
    config: SimMIMConfig
    encoder: Encoder | SwinEncoder

    def __init__(self, config: SimMIMConfig, model: ViTConfig):
        super().__init__()
        self.config, self.model = config, model
        self.num_hidden, self.stride = config.num_hidden_cells(model), config.stride(model)
        self.grid = model.size[0] // self.stride, model.size[1] // self.stride
        self.crops = (Crop(size=model.size, scale=(0.67, 1.0), interpolation="bilinear"),)
        if config.backbone == "swin":
            self.encoder = SwinEncoder(model, mask_token=True)
        else:
            self.encoder = Encoder(model, mask_token=True)
        self.head = nn.Linear(self.encoder.width, model.channels * self.stride**2)

    def group(self, name: str, parameter: nn.Parameter) -> Group:
        exempt = ("cls_token", "pos_embed")
        if self.config.backbone == "swin":
            exempt = ("mask_token", "relative_position_bias_table")
        return Group(decay=False) if name.endswith(exempt) else Group()

    def forward(self, batch: Batch) -> Output:
        (image_BHWC,) = batch.crops
        seen_BK, hidden_BL = self.split(batch.seeds_B, self.stride)
        z_BND = self.encode(image_BHWC, batch.seeds_B, seen_BK)
        index_BLD = hidden_BL[..., None].expand(-1, -1, z_BND.shape[2])
        pred_BLP = self.predicted(z_BND.gather(1, index_BLD))
        model = self.model
        target_BLP = gather_patches(image_BHWC, hidden_BL, self.stride, model.pixel_mean, model.pixel_std)
        pixels = hidden_BL.numel() * self.stride**2
        return Output((pred_BLP.float() - target_BLP).abs().sum() / (pixels + TINY) / model.channels)

    def split(self, seeds_B: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Seen and hidden squares of `side` pixels, both ascending. `[B, K]` and `[B, L]` int64."""
        grid = self.model.size[0] // side, self.model.size[1] // side
        return split_patches_grouped(seeds_B, grid, self.config.mask_unit // side, self.num_hidden)

    def encode(self, image_BHWC: Tensor, seeds_B: Tensor, seen_BK: Tensor) -> Tensor:
        """What stands at each output token of an image with hidden cells. `[B, N, D]`."""
        if isinstance(self.encoder, SwinEncoder):
            _, hidden_BL = self.split(seeds_B, self.model.patch)
            hidden_BN = torch.zeros(
                len(seeds_B), self.model.num_patches, dtype=torch.bool, device=seeds_B.device
            )
            return self.encoder(
                Tokens(image_BHWC, hidden_BN=hidden_BN.scatter_(1, hidden_BL, True))
            ).tokens_BTD
        tokens = Tokens(image_BHWC, seen_BK, mask_tokens=True)
        return self.encoder(tokens, seeds_B=seeds_B).tokens_BTD[:, 1:]

    def predicted(self, z_BLD: Tensor) -> Tensor:
        """The pixels at tokens, in row, column, channel order. `[B, L, D]` to `[B, L, s * s * C]`."""
        return self.head(z_BLD).unflatten(2, (self.model.channels, -1)).transpose(2, 3).flatten(2)

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> Reconstruction:
        (image_BHWC,) = batch.crops
        s, p, C = self.stride, self.model.patch, self.model.channels
        seen_BK, _ = self.split(batch.seeds_B, s)
        pred_BNP = self.predicted(self.encode(image_BHWC, batch.seeds_B, seen_BK))
        if s != p:  # of a token as large as many patches: the patches in it, in their places
            rows, columns = self.grid
            cells = pred_BNP.view(-1, rows, columns, s // p, p, s // p, p, C)
            pred_BNP = cells.permute(0, 1, 3, 2, 5, 4, 6, 7).reshape(len(cells), -1, p * p * C)
            seen_BK, _ = self.split(batch.seeds_B, p)
        return Reconstruction(image_BHWC, seen_BK, pred_BNP, norm_pix=False)
