"""C-MAE: two colored, complementary views of one crop, compared token by token in feature space.

    T  T1(x) = color1(x) * M keeps 25 % of the patches, T2(x) = color2(x) * (1 - M) the others    (Eq. 6, 11)
    f  the encoder with mask tokens at the hidden patches, all N + 1 tokens; projector p, predictor q
    M  mean over positions i of InfoNCE(q(p(f(T1)))_i, p'(f'(T2))_i); f', p' are averages of f, p  (Eq. 9, 10)

Source  Kong & Zhang, arXiv:2208.04164; no official code exists. Theirs: heads of two layers with GELU, 2048
        wide within and 768 without, temperature 0.2, averages at 0.996. Not CMAE of arXiv:2207.13532.
Left open by the paper, and why it is as it is here:
        negatives        those of the same position in other images, as in MoCo v3, to which the paper sends
                         the reader. Other positions of the same image can be told apart by the positions that
                         both branches add, without looking at the image.
        positions        all: Eq. 9 has no mask, and mask tokens give hidden patches an output to compare.
        symmetric        no: Eq. 11 has one direction, and T1 and T2 differ.
        t2               complement, as Eq. 6 couples them.
        mask_token       without it the complement shares no position with T1, and nothing is said of what is
                         compared: T2 must then be `full` or `independent`, or whole images be compared.
        head_norm        none is mentioned. Heads follow the encoder's last norm and start as MAE's layers.
                         Batch norm, as in MoCo v3, keeps more dimensions in short runs: see recipe cifar10.
        ema_schedule     a single value is given: constant. After the optimizer's step.
        color            "follows SimSiam", whose blur is not named: jitter and grayscale; one crop for both.
        loss_scale       the 2 tau of MoCo v3 is not in Eq. 9.
        loss=byol        2 - 2 cos, mean over tokens, heads and averages as they are.
        cutmix           T1 sees mixed images and T2 clean ones; the positive of a patch is the key of the
                         image that it came from, the candidates are what they are without. A box has whole
                         patches.
        freeze_patch_embed   MoCo v3 freezes it; not said here.
Shapes  B images of this rank, T compared tokens: N patches, 1 + N with the class token, 1 for whole images.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from fastmim_kernels import split_patches
from fastmim_kernels.info_nce import MAX_D
from torch import Tensor, nn

from fastmim.methods.base import About, Method, MethodConfig, Output
from fastmim.methods.contrast import Distance, Keys, Negatives, compare_tokens
from fastmim.methods.health import collapse, health
from fastmim.methods.masking import check_ratio, num_seen_checked
from fastmim.methods.targets import cosine_momentum, teacher_of
from fastmim.methods.variants import Variant, columns_of_table_5
from fastmim.methods.work import Linear, Stack, Work, head_work
from fastmim.models.cutmix import cutmix_mask, mix_patches
from fastmim.models.heads import Head, Norm
from fastmim.models.mae_decoder import DecoderConfig
from fastmim.models.tokens import Tokens
from fastmim.models.vit import Encoder, ViTConfig
from fastmim.streams import MASK, SECOND_MASK
from fastmim.views import C_MAE, Batch, Crop

NO_MASK_TOKEN = {"mask_token": False, "t2": "full"}


@dataclass(frozen=True, kw_only=True)
class CMAEConfig(MethodConfig):
    """C-MAE of Kong & Zhang (arXiv:2208.04164)."""

    name: ClassVar[str] = "cmae"
    about: ClassVar[About] = About(
        paper="Kong & Zhang, arXiv:2208.04164",
        t1="25 %, mask tokens",
        t2="EMA of f on the other 75 %, other colors",
        similarity="InfoNCE per token, or BYOL's; `--variant` names the rows of the paper's tables",
    )
    # arXiv:2208.04164: accuracy of ViT-B on ImageNet-1k after fine-tuning, 100 epochs of each
    variants: ClassVar = {
        "cls": Variant(changes={"compare": "cls"}, expected="82.5 % (Table 3)"),
        "avg": Variant(changes={"compare": "avg"}, expected="82.6 % (Table 3)"),
        "patch": Variant(changes={"compare": "patch"}, expected="82.9 % (Table 3): as without --variant"),
        "patch+cls": Variant(changes={"compare": "patch+cls"}, expected="82.9 % (Table 3)"),
        "byol": Variant(changes={"loss": "byol"}, expected="82.8 % (Table 4), less stable"),
        "no-mask-token": Variant(changes=NO_MASK_TOKEN, expected="82.6 %, linear 56.2 % (Table 4)"),
        "no-mask-token-byol": Variant(
            changes={**NO_MASK_TOKEN, "loss": "byol"}, expected="82.5 %, linear 55.2 % (Table 4)"
        ),
        # the paper does not say what it compares without mask tokens: two other readings
        "no-mask-token-independent": Variant(
            changes={"mask_token": False, "t2": "independent"}, expected="not published"
        ),
        "no-mask-token-avg": Variant(
            changes={"mask_token": False, "compare": "avg"}, expected="not published"
        ),
        **columns_of_table_5(
            color={"color": True},
            no_color={"color": False},
            no_mask={"mask_ratio": 0.0, "t2": "full"},
            accuracy={
                "plain": 80.0, "mask": 86.5, "cutmix": 83.5, "color": 82.8, "mask+cutmix": 86.9,
                "mask+color": 86.8, "cutmix+color": 83.1, "mask+cutmix+color": 87.1,
            },
        ),
    }  # fmt: skip
    # without any norm, as the paper has its heads, 1,000 steps of 32 kept to three or four dimensions, and
    # read worse than first weights: batches are small there
    scales: ClassVar = {"cifar10": {"method.head_norm": "bn", "method.ema": 0.99}}
    mask_ratio: float = 0.75
    """Fraction of the patches that T1 hides; 0 hides none, and wants t2=full"""
    t2: Literal["complement", "independent", "full"] = "complement"
    """What T2 shows: what T1 hides, a draw of its own, or everything"""
    t2_ratio: float = 0.25
    """Fraction hidden from T2; read by t2=independent only"""
    mask_token: bool = True
    """Tokens at the hidden patches; without, the encoder drops these, and common positions are compared"""
    compare: Literal["patch", "cls", "avg", "patch+cls"] = "patch"
    """What is compared: each patch, the class token, the mean of the patches, or patches and class token"""
    positions: Literal["all", "masked", "visible"] = "all"
    """Which patches are compared, by what the online branch sees"""
    loss: Distance = "info_nce"
    """info_nce, 2 - 2 cos, or -cos"""
    negatives: Negatives = "batch"
    """Same position of all images, all positions of the image, or both; read by loss=info_nce only"""
    temperature: float = 0.2
    """Of InfoNCE"""
    loss_scale: Literal["none", "2tau"] = "none"
    """2tau: InfoNCE times twice its temperature, as in MoCo v3"""
    symmetric: bool = False
    """Compare in both directions, and average"""
    hidden: int = 2048
    """Width of the hidden layer of projector and predictor"""
    out: int = 768
    """Width of what is compared"""
    head_norm: Norm = "none"
    """Norm within the heads; bn is that of all ranks"""
    ema: float = 0.996
    """Momentum of the target branch"""
    ema_schedule: Literal["constant", "cosine"] = "constant"
    """cosine: from ema to 1 at the end of training"""
    color: bool = True
    """Jitter and grayscale, a draw for each branch; otherwise both see the same pixels"""
    blur_p: float = 0.0
    """Probability of a Gaussian blur among the colors; SimSiam has 0.5"""
    cutmix: bool = False
    """Show the online branch a rectangle of another image in each"""
    freeze_patch_embed: bool = False
    """Leave the patch embedding as it is initialized"""

    @property
    def couples_batch(self) -> bool:  # type: ignore[override]
        return (self.loss == "info_nce" and self.negatives != "image") or self.head_norm == "bn"

    @property
    def instances(self) -> bool:
        """Whether whole images are compared."""
        return self.compare in ("cls", "avg")

    def __post_init__(self) -> None:
        if self.mask_ratio != 0:
            check_ratio("method.mask-ratio", self.mask_ratio)
        check_ratio("method.t2-ratio", self.t2_ratio)
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"method.temperature: want more than 0, got {self.temperature}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"method.ema: want 0 or more and less than 1, got {self.ema}")
        if self.hidden < 1 or not 1 <= self.out <= MAX_D:
            raise ValueError(
                f"method.hidden, method.out: want at least 1, and at most {MAX_D} out, "
                f"got {self.hidden} and {self.out}"
            )
        if not 0 <= self.blur_p <= 1:
            raise ValueError(f"method.blur-p: want a probability, got {self.blur_p}")
        for wrong, message in self.contradictions():
            if wrong:
                raise ValueError(f"method.{message}")

    def contradictions(self) -> list[tuple[bool, str]]:
        """What cannot be had together: whether it was asked for, and what to say."""
        tokens, hides = not self.instances, self.mask_ratio > 0
        return [
            (
                not hides and self.t2 == "complement",
                "t2: want full or independent with mask-ratio 0, got complement, which would show nothing",
            ),
            (
                not self.mask_token and tokens and self.t2 == "complement",
                "t2: want full or independent without mask tokens, or compare avg or cls: complementary "
                "views share no position, got complement",
            ),
            (
                not self.mask_token and self.positions == "masked",
                "positions: want all or visible without mask tokens, whose encoder drops what is masked",
            ),
            (
                self.instances and self.positions != "all",
                f"positions: want all where whole images are compared, got {self.positions} and "
                f"compare {self.compare}",
            ),
            (
                self.positions == "masked" and not (hides and (self.t2 != "full" or not self.symmetric)),
                "positions: want all or visible where nothing is hidden from the online branch, got masked",
            ),
            (
                self.instances and self.loss == "info_nce" and self.negatives == "image",
                f"negatives: want batch or all with compare {self.compare}: an image has one such token, "
                "got image",
            ),
            (
                self.loss_scale == "2tau" and self.loss != "info_nce",
                f"loss-scale: 2tau is of loss info_nce, got loss {self.loss}",
            ),
            (self.blur_p > 0 and not self.color, "blur-p: blur is one of the colors, got no-color"),
            (
                self.cutmix and self.compare != "patch",
                f"cutmix: want compare patch, as a mixed image has no single positive, got {self.compare}",
            ),
        ]

    def check_batch(self, micro_batch: int, ranks: int) -> None:
        if self.cutmix and micro_batch % 2:
            raise ValueError(
                f"method.cutmix: want an even number of images per micro-batch, got {micro_batch}"
            )
        if self.loss == "info_nce" and self.negatives != "image":
            check_others(micro_batch * ranks)

    def fit(self, model: ViTConfig, decoder: DecoderConfig) -> Self:
        return replace(self, hidden=4 * model.width, out=model.width)

    def work(self, model: ViTConfig) -> Work:
        """An online branch with two heads, a target branch with one and without a gradient."""
        N, P, D, h, out = model.num_patches, model.patch_values, model.width, self.hidden, self.out
        first = int(N * (1 - self.mask_ratio))
        second = {"complement": N - first, "full": N, "independent": int(N * (1 - self.t2_ratio))}[self.t2]
        stacks: list[Stack] = []
        others: list[Linear] = []
        for online, target in ((first, second), (second, first))[: 1 + self.symmetric]:
            for seen, trained in ((online, True), (target, False)):
                patches = N if self.mask_token else seen
                rows = 1 if self.instances else patches + (self.compare == "patch+cls")
                stacks.append(Stack((1 + patches,), D, model.depth, trained))
                embedding = trained and not self.freeze_patch_embed
                others.append(Linear(N, P, D, input_gradient=False, trained=embedding))
                others += head_work(rows, (D, h, out), trained=trained)
                others += head_work(rows, (out, h, out)) if trained else ()
        return Work(tuple(stacks), tuple(others))

    def build(self, model: ViTConfig) -> "CMAE":
        return CMAE(self, model)


def check_others(num_images: int) -> None:
    if num_images < 2:
        raise ValueError(
            "method.negatives: InfoNCE wants two or more images in a micro-batch of all ranks, got "
            f"{num_images}; take a larger --batch, a smaller --accumulate, or --method.loss byol"
        )


class CMAE(Method):
    config: CMAEConfig

    def __init__(self, config: CMAEConfig, model: ViTConfig):
        super().__init__()
        self.config, self.model = config, model
        N = model.num_patches
        self.num_seen = N
        if config.mask_ratio:
            self.num_seen = num_seen_checked("method.mask-ratio", N, config.mask_ratio)
        self.num_seen2 = {"complement": N - self.num_seen, "full": N}.get(config.t2, 0)
        if config.t2 == "independent":
            self.num_seen2 = num_seen_checked("method.t2-ratio", N, config.t2_ratio)
        self.check_positions()
        view = Crop(size=model.size)
        color = replace(C_MAE, blur=config.blur_p)
        self.crops = (view,)
        if config.color:
            self.crops = (replace(view, color=color, draw=0), replace(view, color=color, draw=1))
        self.encoder = Encoder(model, mask_token=config.mask_token)
        self.encoder.patch_embed.requires_grad_(not config.freeze_patch_embed)
        out, hidden = config.out, config.hidden
        self.projector = Head((model.width, hidden, out), norm=config.head_norm)
        self.predictor = Head((out, hidden, out), norm=config.head_norm)
        self.target_encoder = teacher_of(self.encoder)
        self.target_projector = teacher_of(self.projector)

    def check_positions(self) -> None:
        """ValueError where a draw leaves next to nothing to compare, or one candidate."""
        N, c = self.model.num_patches, self.config
        if not c.mask_token and not c.instances and self.num_seen * self.num_seen2 < N:
            raise ValueError(
                f"method.t2-ratio: T1 shows {self.num_seen} and T2 {self.num_seen2} of {N} patches, which "
                "share less than one on average: want a lower ratio"
            )
        if c.loss == "info_nce" and c.negatives == "image" and N + (c.compare == "patch+cls") < 2:
            raise ValueError("method.negatives: want two or more positions for image, got one")

    def averages(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        return (self.target_encoder, self.encoder), (self.target_projector, self.projector)

    def momentum(self, progress: float) -> float:
        if self.config.ema_schedule == "constant":
            return self.config.ema
        return cosine_momentum(self.config.ema, progress)

    def forward(self, batch: Batch) -> Output:
        one, two = batch.crops[0], batch.crops[-1]
        seen1_BK, seen2_BK = self.transform(batch.seeds_B)
        loss, metrics = self.direction(batch.seeds_B, one, seen1_BK, two, seen2_BK)
        if self.config.symmetric:
            other, _ = self.direction(batch.seeds_B, two, seen2_BK, one, seen1_BK)
            loss = (loss + other) / 2
        return Output(loss, metrics)

    def transform(self, seeds_B: Tensor) -> tuple[Tensor, Tensor]:
        """The patches that T1 and T2 show. `[B, K1]` and `[B, K2]` int64, ascending."""
        N, t2 = self.model.num_patches, self.config.t2
        seen1_BK, hidden1_BL = split_patches(seeds_B, N, self.num_seen)
        if t2 == "complement":
            return seen1_BK, hidden1_BL
        stream = SECOND_MASK.of() if t2 == "independent" else MASK.of()
        return seen1_BK, split_patches(seeds_B, N, self.num_seen2, stream=stream)[0]

    def direction(
        self, seeds_B: Tensor, online_BHWC: Tensor, online_BK: Tensor, target_BHWC: Tensor, target_BK: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one image in each branch, and the patches that each may see."""
        foreign_BN = None
        if self.config.cutmix:
            foreign_BN = cutmix_mask(seeds_B, self.model.grid)
            online_BHWC = mix_patches(online_BHWC, foreign_BN, self.model.patch)
        x_BLD = self.compared(self.encoder(self.shown_to(online_BHWC, online_BK)).tokens_BTD)
        q_BTD = self.placed(self.predictor(self.projector(x_BLD)), online_BK)
        with torch.no_grad():
            x_BLD = self.compared(self.target_encoder(self.shown_to(target_BHWC, target_BK)).tokens_BTD)
            k_BTD = self.placed(self.target_projector(x_BLD), target_BK).to(q_BTD.dtype)
            present_BT = None if self.has_every_token(target_BK) else self.shown(target_BK)
            keys = Keys(k_BTD, present_BT, foreign_BN)
            weight_BT = self.weight(online_BK, keys.positive_present_BT())
        c = self.config
        if c.loss == "info_nce" and c.negatives != "image":
            check_others(len(seeds_B) * self.ranks.world)
        loss, metrics = compare_tokens(
            q_BTD, keys, self.ranks, weight_BT, distance=c.loss, negatives=c.negatives,
            temperature=c.temperature, scale=2 * c.temperature if c.loss_scale == "2tau" else 1.0,
        )  # fmt: skip
        if foreign_BN is not None:  # the numbers are of tokens and keys of one image
            weight_BT = ~foreign_BN if weight_BT is None else weight_BT * ~foreign_BN
        return loss, metrics | health(q_BTD, k_BTD, weight_BT)

    def shown_to(self, image_BHWC: Tensor, seen_BK: Tensor) -> Tokens:
        """An image of which these patches are visible, with mask tokens elsewhere or nothing."""
        return Tokens(image_BHWC, seen_BK, mask_tokens=self.config.mask_token)

    def compared(self, z_BSD: Tensor) -> Tensor:
        """What of an encoding goes to the heads. `[B, S, D]` to `[B, L, D]`."""
        if self.config.compare == "cls":
            return z_BSD[:, :1]
        if self.config.compare == "avg":
            return z_BSD[:, 1:].mean(1, keepdim=True)
        return z_BSD[:, 1:] if self.config.compare == "patch" else z_BSD

    def has_every_token(self, seen_BK: Tensor) -> bool:
        every = self.config.mask_token or seen_BK.shape[1] == self.model.num_patches
        return every or self.config.instances

    def placed(self, x_BLD: Tensor, seen_BK: Tensor) -> Tensor:
        """Tokens of the visible patches at their positions, zeros elsewhere. `[B, L, D]` to `[B, T, D]`."""
        if self.has_every_token(seen_BK):
            return x_BLD
        at_BL, T = seen_BK, self.model.num_patches
        if self.config.compare == "patch+cls":
            at_BL, T = F.pad(seen_BK + 1, (1, 0)), T + 1
        out_BTD = x_BLD.new_zeros(len(x_BLD), T, x_BLD.shape[2])
        return out_BTD.scatter(1, at_BL[..., None].expand_as(x_BLD), x_BLD)

    def shown(self, seen_BK: Tensor, *, hidden: bool = False) -> Tensor:
        """1 at the visible patches, or at the hidden ones, and at the class token. `[B, T]` fp32."""
        B, N = len(seen_BK), self.model.num_patches
        shown_BN = torch.full((B, N), float(hidden), device=seen_BK.device)
        shown_BN = shown_BN.scatter_(1, seen_BK, float(not hidden))
        return F.pad(shown_BN, (1, 0), value=1.0) if self.config.compare == "patch+cls" else shown_BN

    def weight(self, online_BK: Tensor, present_BT: Tensor | None) -> Tensor | None:
        """1 where a token is scored, 0 where not. `[B, T]`; None if all are."""
        if self.config.instances:
            return None
        if self.config.mask_token:
            positions = self.config.positions
            return None if positions == "all" else self.shown(online_BK, hidden=positions == "masked")
        both_BT = self.shown(online_BK)
        return both_BT if present_BT is None else both_BT * present_BT

    def diagnose(self, row: Mapping[str, float]) -> str | None:
        remedies = "--method.color, --method.head-norm bn, --method.freeze-patch-embed or a lower --optim.blr"
        if self.config.loss != "info_nce":
            remedies = "--method.loss info_nce, --method.head-norm bn or a higher --method.ema"
        return collapse(row, f"try {remedies}")
