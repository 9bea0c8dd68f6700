"""CMAE of Huang et al.: MAE, and a feature of the masked view that picks out its image among all others.

    T  one crop resized to 256 pixels; T1 its corner of 224, masked; T2 a window of 224 shifted by 0 to 31
       pixels in each direction, colored, whole
    f  the MAE encoder; target f', p': averages of encoder and projector p, on all patches, no final norm
    M  L_r + weight * L_c
       L_r = mean over hidden patches of || d(f(T1))_i - norm(x_i) ||^2 / P
       L_c = 2 tau * InfoNCE(q(p(mean_i g(f(T1))_i)), p'(mean_i f'(T2)_i)), g a decoder of two blocks

Source  Huang et al., arXiv:2207.13532; ZhichengHuang/CMAE. Where they differ the defaults are the code's:
        mask      groups of 2 x 2 patches, 0.65 of them hidden; the paper inherits 0.75 of single patches
                  (`--variant paper`). The authors name performance as the reason.
        2 tau     is in the code, after MoCo v3, and not in the paper: with tau 0.07 it makes L_c count 0.14.
        target    sees a class token (`target_cls`), which its mean leaves out.
        decay     norms, biases, tokens and positions have none; the scales of batch norms in the heads do.
Shapes  B images of this rank, G of all ranks; K visible and L hidden of N patches; E = 256 values compared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

import torch
from fastmim_kernels import split_patches, split_patches_grouped
from torch import Tensor, nn

from fastmim.group import Group
from fastmim.methods.base import About, Method, MethodConfig, Output, Reconstruction
from fastmim.methods.contrast import Keys, compare_tokens
from fastmim.methods.health import collapse, health
from fastmim.methods.losses import pixel_loss
from fastmim.methods.masking import check_patches, check_ratio, num_seen_checked
from fastmim.methods.targets import teacher_of
from fastmim.methods.variants import Variant
from fastmim.methods.work import Linear, Stack, Work, head_work
from fastmim.models.heads import Head
from fastmim.models.mae_decoder import Decoder, DecoderConfig
from fastmim.models.tokens import Tokens
from fastmim.models.vit import Encoder, ViTConfig
from fastmim.views import SIMSIAM, Batch, Crop

GROUP = 2  # patches on each side of a cell of the mask


@dataclass(frozen=True, kw_only=True)
class CMAEHuangConfig(MethodConfig):
    """CMAE (arXiv:2207.13532)."""

    name: ClassVar[str] = "cmae_huang"
    about: ClassVar[About] = About(
        paper="Huang et al., arXiv:2207.13532",
        t1="35 %",
        t2="EMA of f on a shifted, colored view",
        similarity="l2 on hidden patches and InfoNCE of pools",
    )
    couples_batch: ClassVar[bool] = True
    variants: ClassVar = {
        "paper": Variant(changes={"mask": "uniform", "mask_ratio": 0.75}, expected="not published apart"),
        "byol": Variant(changes={"loss": "byol"}, expected="below InfoNCE (arXiv:2207.13532)"),
    }
    mask: Literal["grouped", "uniform"] = "grouped"
    """What is hidden together: cells of 2 x 2 patches, or single patches"""
    mask_ratio: float = 0.65
    """Fraction of the cells, or patches, that is hidden"""
    shift: int = 31
    """Most pixels by which the target's window lies below and right of the other"""
    color: bool = True
    """Jitter, grayscale and blur on the target's view"""
    norm_pix: bool = True
    """Predict pixels normalized by the mean and deviation of their own patch"""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    feature_depth: int = 2
    """Blocks of the feature decoder, which is otherwise like the pixel decoder"""
    hidden: int = 1536
    """Width of the hidden layer of projector and predictor"""
    out: int = 256
    """Width of what is compared"""
    loss: Literal["info_nce", "byol"] = "info_nce"
    """L_c: InfoNCE, or 2 - 2 cos"""
    temperature: float = 0.07
    """Of InfoNCE"""
    loss_scale: Literal["none", "2tau"] = "2tau"
    """2tau: InfoNCE times twice its temperature"""
    contrast_weight: float = 1.0
    """Weight of L_c beside the pixel loss"""
    ema: float = 0.996
    """Momentum of the target branch"""
    target_cls: bool = True
    """Whether the target's encoder has a class token among its tokens"""

    def __post_init__(self) -> None:
        check_ratio("method.mask-ratio", self.mask_ratio)
        for name in ("shift", "feature_depth", "contrast_weight"):
            if getattr(self, name) < 0:
                flag = name.replace("_", "-")
                raise ValueError(f"method.{flag}: want 0 or more, got {getattr(self, name)}")
        if min(self.hidden, self.out) < 1 or not self.temperature > 0 or not 0 <= self.ema < 1:
            raise ValueError(
                "method.hidden, out, temperature, ema: want widths of at least 1, a temperature above 0, a "
                f"momentum in [0, 1), got {self.hidden}, {self.out}, {self.temperature} and {self.ema}"
            )

    def check_batch(self, micro_batch: int, ranks: int) -> None:
        if micro_batch * ranks < 2:
            raise ValueError("batch: cmae_huang compares images with one another, want at least 2, got 1")

    def fit(self, model: ViTConfig, decoder: DecoderConfig) -> Self:
        hidden, shift = 2 * model.width, model.size[0] // 7 - 1
        return replace(self, decoder=decoder, hidden=hidden, out=model.width, shift=shift)

    def work(self, model: ViTConfig) -> Work:
        """MAE, a second decoder and two heads; a target branch on all patches without a gradient."""
        N, P, D, d = model.num_patches, model.patch_values, model.width, self.decoder.width
        h, out, tokens = self.hidden, self.out, 1 + checked_num_seen(self, model)
        return Work(
            stacks=(
                Stack((tokens,), D, model.depth),
                Stack((1 + N,), d, self.decoder.depth + self.feature_depth),
                Stack((self.target_cls + N,), D, model.depth, trained=False),
            ),
            others=(
                Linear(N, P, D, input_gradient=False),
                Linear(N, P, D, input_gradient=False, trained=False),
                *(x for n_out in (P, D) for x in (Linear(tokens, D, d), Linear(1 + N, d, n_out))),
                *head_work(1, (D, h, out)),
                *head_work(1, (out, h, out)),
                *head_work(1, (D, h, out), trained=False),
            ),
        )

    def build(self, model: ViTConfig) -> "CMAEHuang":
        return CMAEHuang(self, model)


class CMAEHuang(Method):
    config: CMAEHuangConfig

    def __init__(self, config: CMAEHuangConfig, model: ViTConfig):
        super().__init__()
        self.config, self.model = config, model
        self.num_seen = checked_num_seen(config, model)
        height, width = model.size
        margin = config.shift + 1 if config.shift else 0  # as 256 is to 224
        self.crops = (
            Crop(size=model.size, master=(height + margin, width + margin)),
            Crop(
                size=model.size,
                master=(height + margin, width + margin),
                shift=config.shift,
                color=SIMSIAM if config.color else None,
            ),
        )
        c, D = config, model.width
        self.encoder = Encoder(model)
        self.decoder = Decoder(c.decoder, model)
        feature = DecoderConfig(width=c.decoder.width, depth=c.feature_depth, heads=c.decoder.heads)
        self.feature_decoder = Decoder(feature, model, out=D)
        self.projector = head(D, c.hidden, c.out)
        self.predictor = head(c.out, c.hidden, c.out)
        self.target_encoder = teacher_of(self.encoder)
        self.target_projector = teacher_of(self.projector)

    def averages(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        return (self.target_encoder, self.encoder), (self.target_projector, self.projector)

    def momentum(self, progress: float) -> float:
        return self.config.ema

    def group(self, name: str, parameter: nn.Parameter) -> Group:
        tokens = ("cls_token", "mask_token", "pos_embed")
        if name.endswith((".bias", *tokens)):
            return Group(decay=False)
        return Group(decay=parameter.ndim > 1 or name.startswith(("projector.", "predictor.")))

    def forward(self, batch: Batch) -> Output:
        c = self.config
        image_BHWC, target_BHWC = batch.crops
        seen_BK, hidden_BL = self.split(batch.seeds_B)
        z_BTD = self.encoder(Tokens(image_BHWC, seen_BK)).tokens_BTD
        (pred_BLP,) = self.decoder(z_BTD, (seen_BK,), hidden_BL)
        pixels = pixel_loss(pred_BLP, image_BHWC, hidden_BL, self.model, normalize=c.norm_pix).mean()

        (y_BD,) = self.feature_decoder(z_BTD, (seen_BK,), pool=True)
        q_BE = self.predictor(self.projector(y_BD))
        k_BE = self.target(target_BHWC).to(q_BE.dtype)
        contrast, metrics = compare_tokens(
            q_BE[:, None], Keys(k_BE[:, None]), self.ranks, None, distance=c.loss, negatives="batch",
            temperature=c.temperature, scale=2 * c.temperature if c.loss_scale == "2tau" else 1.0,
        )  # fmt: skip
        metrics |= {"pixels": pixels.detach(), "contrast": contrast.detach()}
        return Output(pixels + c.contrast_weight * contrast, metrics | health(q_BE[:, None], k_BE[:, None]))

    def split(self, seeds_B: Tensor) -> tuple[Tensor, Tensor]:
        """Visible and hidden patches of T1, `[B, K]` and `[B, L]`, ascending."""
        N = self.model.num_patches
        if self.config.mask == "uniform":
            return split_patches(seeds_B, N, self.num_seen)
        return split_patches_grouped(seeds_B, self.model.grid, GROUP, (N - self.num_seen) // GROUP**2)

    @torch.no_grad()
    def target(self, image_BHWC: Tensor) -> Tensor:
        """p' of the mean of all patches, as the last block leaves them. `[B, E]`."""
        cls = self.config.target_cls
        z_BTD = self.target_encoder(Tokens(image_BHWC), class_token=cls, final_norm=False).tokens_BTD
        patches_BND = z_BTD[:, 1:] if cls else z_BTD
        return self.target_projector(patches_BND.mean(1, dtype=torch.float32))

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> Reconstruction:
        image_BHWC = batch.crops[0]
        seen_BK, _ = self.split(batch.seeds_B)
        z = self.encoder(Tokens(image_BHWC, seen_BK))
        (pred_BNP,) = self.decoder(z.tokens_BTD, (seen_BK,))
        return Reconstruction(image_BHWC, seen_BK, pred_BNP, self.config.norm_pix)

    def diagnose(self, row: Mapping[str, float]) -> str | None:
        return collapse(row, "try a higher --method.ema, a lower --optim.blr or --method.loss info_nce")


def head(*widths: int) -> Head:
    """Linear, batch norm, ReLU, Linear without bias."""
    return Head(widths, activation="relu", norm="bn", last_bias=False, init="torch", fp32=True)


def checked_num_seen(config: CMAEHuangConfig, model: ViTConfig) -> int:
    """Visible patches; ValueError where none is visible or hidden, or cells do not fit the grid."""
    if config.mask == "uniform":
        return num_seen_checked("method.mask-ratio", model.num_patches, config.mask_ratio)
    check_patches(model.num_patches)
    rows, columns = model.grid
    if rows % GROUP or columns % GROUP:
        raise ValueError(
            f"method.mask: want a grid of even sides for cells of 2 x 2 patches, got {rows} x {columns}; "
            "--method.mask uniform takes any"
        )
    cells = num_seen_checked("method.mask-ratio", rows * columns // GROUP**2, config.mask_ratio)
    return cells * GROUP**2
