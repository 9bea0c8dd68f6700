"""Training of tokenizers, by the engine that trains all else: relaxed codes, vector quantization, k-means.

    dvae, dvae_large  y = softmax((l + g) / tau), g Gumbel noise, l the logits;  L = L_rec(x^(y), x) + w KL
                      KL = mean over squares of Sum_k q_k (log q_k + log K),  q = softmax(l)
                      tau falls from 1 to 1/16 along half a cosine, w rises from 0 along another
    vq                L = |x^ - x|^2 + beta (1 - cos(z, sg e)),  codes move towards the vectors that took them
    kmeans            centroids are the running means of the squares that took them;  L = |p - gain c|^2

Source    Ramesh et al., arXiv:2102.12092; lucidrains/DALLE-pytorch; BEiT v2, arXiv:2208.06366; mini-batch
          k-means: Sculley, 2010. The weight w is of a KL that is a mean; DALL-E's 6.6 over the whole joint is
          6.6 / (3 stride^2) of it.
Kept      the average of the weights over steps (0.999), with which tokens are made; `tokenizer.safetensors`.
Size      `model.patch` is the stride, `model.image_size` the tokenizer's input; nothing else of it serves.
Health    perplexity and share of the codes that occur, PSNR of images from hard codes, mean entropy of q.
Shapes    B images, K codes, h * w squares, R = B h w vectors of E values.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from fastmim_kernels import draw_uniform
from torch import Tensor, nn

from fastmim.methods.base import Method, MethodConfig, Output, Reconstruction
from fastmim.methods.losses import as_prediction
from fastmim.methods.targets import teacher_of
from fastmim.models.fp32_buffers import FP32Buffers
from fastmim.models.mae_decoder import DecoderConfig
from fastmim.models.tokenizers.base import Tokenizer, TokenizerConfig, code_statistics, psnr
from fastmim.models.tokenizers.dalle import STRIDE, DALLEConfig
from fastmim.models.tokenizers.dvae import CodedVAE, ConvConfig, DVAEConfig
from fastmim.models.tokenizers.files import NAME, metadata_of
from fastmim.models.tokenizers.patches import KMeans, KMeansConfig, nearest, normalized_squares
from fastmim.models.tokenizers.vq import VQ, VQConfig
from fastmim.models.vit import ViTConfig
from fastmim.ranks import AcrossRanks
from fastmim.streams import GUMBEL
from fastmim.views import Batch, Crop

FEW = 4  # images whose hard reconstruction is measured at each step
LEAST_UNIFORM = 1e-10  # below which a uniform number has no logarithm worth taking
POOR = 0.05  # share of the codes in use, below which a codebook has collapsed


@dataclass(frozen=True, kw_only=True)
class TokenizerTraining(MethodConfig):
    """What the training of every tokenizer has in common."""

    codes: int = 8192
    """K, number of codes"""
    ema: float = 0.999
    """Momentum of the average of the weights, with which tokens are made"""

    def __post_init__(self) -> None:
        if self.codes < 2 or not 0 <= self.ema < 1:
            raise ValueError(
                "method.codes, method.ema: want at least 2, and 0 or more and below 1, got "
                f"{self.codes} and {self.ema}"
            )

    def tokenizer(self, stride: int) -> TokenizerConfig:
        """The tokenizer to train."""
        raise NotImplementedError

    def fit(self, model: ViTConfig, decoder: DecoderConfig) -> Self:
        sizes = {"codes": 512, "hidden": 64, "code_width": 64}
        here = {name: min(size, getattr(self, name)) for name, size in sizes.items() if hasattr(self, name)}
        return replace(self, **here)

    def words(self, model: ViTConfig) -> str:
        rows, columns = model.grid
        return f"tokenizer of {self.codes} codes, {rows} x {columns} of {model.patch} px"


@dataclass(frozen=True, kw_only=True)
class RelaxedTraining(TokenizerTraining):
    """What the discrete VAEs have in common."""

    temperature_end: float = 1 / 16
    """tau at the end of its fall from 1"""
    temperature_share: float = 0.5
    """Share of the training in which tau falls"""
    kl_weight: float = 5e-4
    """w, behind its rise; of a KL that is a mean over squares"""
    kl_share: float = 0.05
    """Share of the training in which w rises from 0"""
    straight_through: bool = False
    """Decode hard codes, with the gradient of the relaxed ones"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.temperature_end <= 1 or self.kl_weight < 0:
            raise ValueError(
                "method.temperature-end, method.kl-weight: want a number in (0, 1], and 0 or more, got "
                f"{self.temperature_end} and {self.kl_weight}"
            )
        if not (0 < self.temperature_share <= 1 and 0 < self.kl_share <= 1):
            raise ValueError(
                "method.temperature-share, method.kl-share: want shares of the training in (0, 1], got "
                f"{self.temperature_share} and {self.kl_share}"
            )

    def build(self, model: ViTConfig) -> "Relaxed":
        return Relaxed(self, model)


@dataclass(frozen=True, kw_only=True)
class ConvTraining(TokenizerTraining):
    """What tokenizers of strided convolutions have in common."""

    sizes: ClassVar[type[ConvConfig]]
    hidden: int = 256
    """Channels inside"""
    code_width: int = 512
    """Values of a code"""
    blocks: int = 2
    """Residual blocks on each side of the codes"""

    def tokenizer(self, stride: int) -> TokenizerConfig:
        return self.sizes(
            codes=self.codes,
            stride=stride,
            hidden=self.hidden,
            code_width=self.code_width,
            blocks=self.blocks,
        )


@dataclass(frozen=True, kw_only=True)
class DVAETraining(RelaxedTraining, ConvTraining):
    """The small discrete VAE."""

    name: ClassVar[str] = "dvae"
    sizes: ClassVar = DVAEConfig


@dataclass(frozen=True, kw_only=True)
class DALLETraining(RelaxedTraining):
    """The discrete VAE of DALL-E (arXiv:2102.12092)."""

    name: ClassVar[str] = "dvae_large"
    hidden: int = 256
    """Channels of the first group; the others have 2, 4 and 8 times as many"""
    kl_weight: float = 6.6 / (3 * STRIDE**2)
    """w, behind its rise; of a KL that is a mean over squares"""

    def tokenizer(self, stride: int) -> TokenizerConfig:
        return DALLEConfig(codes=self.codes, stride=stride, hidden=self.hidden)


@dataclass(frozen=True, kw_only=True)
class VQTraining(ConvTraining):
    """Vector quantization with unit codes."""

    name: ClassVar[str] = "vq"
    sizes: ClassVar = VQConfig
    code_width: int = 32
    """Values of a code"""
    commitment: float = 1.0
    """beta, weight of what draws vectors to their codes"""
    decay: float = 0.99
    """Momentum of the codes"""

    def build(self, model: ViTConfig) -> "VectorQuantized":
        return VectorQuantized(self, model)


@dataclass(frozen=True, kw_only=True)
class KMeansTraining(TokenizerTraining):
    """Mini-batch k-means on normalized pixels."""

    name: ClassVar[str] = "kmeans"

    def tokenizer(self, stride: int) -> TokenizerConfig:
        return KMeansConfig(codes=self.codes, stride=stride)

    def build(self, model: ViTConfig) -> "Clustered":
        return Clustered(self, model)


TRAININGS: dict[str, type[TokenizerTraining]] = {
    "dvae": DVAETraining,
    "dvae_large": DALLETraining,
    "vq": VQTraining,
    "kmeans": KMeansTraining,
}


# --- what all of them are -----------------------------------------------------------------------------


class Progress(FP32Buffers):
    """The fraction of training done, in the checkpoint and on the device: schedules need no host."""

    done: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("done", torch.zeros(()))

    def half_cosine(self, start: float, end: float, share: float) -> Tensor:
        """From `start` to `end` over the first `share` of the training, and `end` from then on."""
        return end + (start - end) * 0.5 * (1 + torch.cos(math.pi * (self.done / share).clamp(max=1)))


class TokenizerMethod(Method):
    """A tokenizer in training and the average of it, which is what is kept."""

    config: TokenizerTraining

    def __init__(self, config: TokenizerTraining, model: ViTConfig):
        super().__init__()
        if model.channels != 3:
            raise ValueError(f"model.channels: want 3 for a tokenizer, got {model.channels}")
        self.config, self.model = config, model
        self.crops = (Crop(size=model.size, scale=(0.2, 1.0)),)
        self.tokenizer = config.tokenizer(model.patch).build()
        self.average: Tokenizer = teacher_of(self.tokenizer)

    def averages(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        return ((self.average, self.tokenizer),)

    def momentum(self, progress: float) -> float:
        return self.config.ema

    def exports(self) -> Mapping[str, tuple[dict[str, Tensor], dict[str, str]]]:
        tensors = {name: tensor.contiguous() for name, tensor in self.average.state_dict().items()}
        return {NAME: (tensors, metadata_of(self.average.config))}

    @torch.no_grad()
    def measured(self, image_BHWC: Tensor, index_BN: Tensor) -> dict[str, Tensor]:
        """How many codes this batch has, and what hard codes leave of a few images of it."""
        few_BHWC = image_BHWC[:FEW]
        drawn_BHWC = self.tokenizer.picture(index_BN[:FEW], self.model.grid)
        return code_statistics(index_BN, self.config.codes) | {"psnr": psnr(few_BHWC, drawn_BHWC)}

    def diagnose(self, row: Mapping[str, float]) -> str | None:
        used = row.get("perplexity")
        if used is None or used >= max(2.0, POOR * min(self.config.codes, 1000)):
            return None
        return f"few codes say all: perplexity {used:.1f} of {self.config.codes} codes; {self.remedies}"

    remedies = "try a lower --optim.blr or more images"

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> Reconstruction:
        (image_BHWC,) = batch.crops
        index_BN = self.average.indices(image_BHWC)
        drawn_BHWC = self.average.picture(index_BN, self.model.grid)
        nothing_B0 = index_BN[:, :0]
        pred_BNP = as_prediction(drawn_BHWC, self.model)
        return Reconstruction(image_BHWC, nothing_B0, pred_BNP, norm_pix=False)


# --- relaxed codes --------------------------------------------------------------------------------------


class Relaxed(TokenizerMethod):
    config: RelaxedTraining
    tokenizer: CodedVAE
    remedies = "try a lower --method.kl-weight, a higher --method.temperature-end or a lower --optim.blr"

    def __init__(self, config: RelaxedTraining, model: ViTConfig):
        super().__init__(config, model)
        self.progress = Progress()

    def forward(self, batch: Batch) -> Output:
        c, (image_BHWC,) = self.config, batch.crops
        x_B3HW = self.tokenizer.scaled(image_BHWC)
        logits_BhwK = self.tokenizer.logits(x_B3HW)
        tau = self.progress.half_cosine(1.0, c.temperature_end, c.temperature_share)
        mixed_BhwK = ((logits_BhwK + gumbel(batch.seeds_B, logits_BhwK.shape)) / tau).softmax(-1)
        if c.straight_through:
            hard = F.one_hot(mixed_BhwK.argmax(-1), c.codes).float()
            mixed_BhwK = hard + mixed_BhwK - mixed_BhwK.detach()
        reconstruction = self.tokenizer.loss(self.tokenizer.decode(mixed_BhwK), x_B3HW)
        kl, entropy = divergence(logits_BhwK)
        weight = self.progress.half_cosine(0.0, c.kl_weight, c.kl_share)
        index_BN = logits_BhwK.detach().argmax(-1).flatten(1)
        metrics = {
            "reconstruction": reconstruction.detach(), "kl": kl.detach(), "entropy": entropy.detach(),
            "temperature": tau, "kl_weight": weight,
        }  # fmt: skip
        return Output(reconstruction + weight * kl, metrics | self.measured(image_BHWC, index_BN))

    def after_step(self, progress: float) -> None:
        self.progress.done.fill_(progress)


def gumbel(seeds_B: Tensor, shape: torch.Size) -> Tensor:
    """Gumbel noise of each sample's own stream. `[B, h, w, K]` fp32."""
    u = draw_uniform(seeds_B, math.prod(shape[1:]), GUMBEL.of()).view(shape)
    return -(-u.clamp(min=LEAST_UNIFORM).log()).log().float()


def divergence(logits_BhwK: Tensor) -> tuple[Tensor, Tensor]:
    """Mean KL of the codes' distribution from the uniform one, and its mean entropy: they sum to log K."""
    log_q = logits_BhwK.log_softmax(-1)
    entropy = -(log_q.exp() * log_q).sum(-1).mean()
    return math.log(logits_BhwK.shape[-1]) - entropy, entropy


# --- codes that move ------------------------------------------------------------------------------------


class Moved(FP32Buffers):
    """Codes that move towards the means of the vectors that took them, on all ranks at once.

    With `decay` a running average of unit vectors; without, the mean of all vectors ever taken. All codes at
    the first step, and one that nobody took for `PATIENCE` steps, are put where vectors of the batch are.
    """

    PATIENCE = 20
    sum_KE: Tensor
    count_K: Tensor
    fresh_KE: Tensor
    total_K: Tensor
    idle_K: Tensor
    steps: Tensor

    def __init__(self, codes: int, width: int, decay: float | None):
        super().__init__()
        self.decay = decay
        for name, shape in (("sum_KE", (codes, width)), ("fresh_KE", (codes, width)), ("count_K", (codes,))):
            self.register_buffer(name, torch.zeros(shape), persistent=False)
        self.register_buffer("total_K", torch.zeros(codes))  # vectors that each code was taken by
        self.register_buffer("idle_K", torch.zeros(codes))  # steps since then
        self.register_buffer("steps", torch.zeros(()))

    @torch.no_grad()
    def add(self, x_RE: Tensor, index_R: Tensor, ranks: AcrossRanks) -> None:
        """Take note of vectors and the codes that they took."""
        x_RE, R = x_RE.float(), len(x_RE)
        self.sum_KE.index_add_(0, index_R, x_RE)
        self.count_K.index_add_(0, index_R, torch.ones_like(index_R, dtype=torch.float32))
        row_K = torch.arange(len(self.count_K), device=x_RE.device) % (R * ranks.world)  # of all ranks
        mine_K1 = (row_K // R == ranks.rank)[:, None]
        self.fresh_KE.copy_(torch.where(mine_K1, x_RE[row_K % R], 0.0))

    @torch.no_grad()
    def move(self, code_KE: Tensor, ranks: AcrossRanks) -> None:
        """Move the codes, in place, by what all ranks noted since the last step."""
        count_K, sum_KE, fresh_KE = (
            ranks.mean(x) * ranks.world for x in (self.count_K, self.sum_KE, self.fresh_KE)
        )
        self.total_K.add_(count_K)
        mean_KE = sum_KE / count_K.clamp(min=1)[:, None]
        if self.decay is None:
            moved_KE = code_KE + (mean_KE - code_KE) * (count_K / self.total_K.clamp(min=1))[:, None]
        else:
            unit_KE = F.normalize(mean_KE, dim=1)
            moved_KE = F.normalize(self.decay * code_KE + (1 - self.decay) * unit_KE, dim=1)
        self.idle_K.add_(1).mul_(count_K == 0)
        put_K = (self.idle_K > self.PATIENCE) | (self.steps == 0)
        moved_KE = torch.where((count_K > 0)[:, None], moved_KE, code_KE)
        code_KE.copy_(torch.where(put_K[:, None], fresh_KE, moved_KE))
        for counter_K in (self.idle_K, self.total_K):
            counter_K.mul_(~put_K)
        self.steps.add_(1)
        self.sum_KE.zero_()
        self.count_K.zero_()


class VectorQuantized(TokenizerMethod):
    config: VQTraining
    tokenizer: VQ
    average: VQ

    def __init__(self, config: VQTraining, model: ViTConfig):
        super().__init__(config, model)
        self.moved = Moved(config.codes, config.code_width, config.decay)

    def forward(self, batch: Batch) -> Output:
        (image_BHWC,), t = batch.crops, self.tokenizer
        x_B3HW = t.scaled(image_BHWC)
        z_BhwE = t.vectors(x_B3HW)
        z_RE = z_BhwE.flatten(0, 2)
        index_R = t.nearest(z_RE.detach())
        e_BhwE = t.code_KE[index_R].view_as(z_BhwE)
        reconstruction = F.mse_loss(t.decode(z_BhwE + (e_BhwE - z_BhwE).detach()).float(), x_B3HW)
        apart = (1 - (z_BhwE * e_BhwE).sum(-1)).mean()
        if self.training:
            self.moved.add(z_RE.detach(), index_R, self.ranks)
        metrics = {"reconstruction": reconstruction.detach(), "commitment": apart.detach()}
        index_BN = index_R.view(len(image_BHWC), -1)
        return Output(
            reconstruction + self.config.commitment * apart, metrics | self.measured(image_BHWC, index_BN)
        )

    def after_step(self, progress: float) -> None:
        self.moved.move(self.tokenizer.code_KE, self.ranks)
        self.average.code_KE.copy_(self.tokenizer.code_KE)  # an average already


class Clustered(TokenizerMethod):
    config: KMeansTraining
    tokenizer: KMeans
    average: KMeans

    def __init__(self, config: KMeansTraining, model: ViTConfig):
        super().__init__(config, model)
        self.moved = Moved(config.codes, model.patch**2 * 3, None)
        self.gain = nn.Parameter(torch.ones(1))  # 1 at the optimum: DeepSpeed wants something to train

    def forward(self, batch: Batch) -> Output:
        (image_BHWC,), t = batch.crops, self.tokenizer
        x_RP = normalized_squares(image_BHWC, self.model.patch).flatten(0, 1)
        index_R = nearest(x_RP, t.centroid_KP)
        loss = (x_RP - self.gain.float() * t.centroid_KP[index_R]).square().mean()
        if self.training:
            self.moved.add(x_RP, index_R, self.ranks)
        index_BN = index_R.view(len(image_BHWC), -1)
        return Output(loss, code_statistics(index_BN, self.config.codes))  # it draws no colors

    def after_step(self, progress: float) -> None:
        self.moved.move(self.tokenizer.centroid_KP, self.ranks)
        self.average.centroid_KP.copy_(self.tokenizer.centroid_KP)
