"""What BEiT and CAE share: the tokenizer, the second size of a crop, the cross entropy of hidden tokens.

    z = tokenizer(x'),  x' the same box of the image at `grid * stride` pixels
    L_token = Sum over hidden tokens of the batch of -log p(z) / their number

Source  BEiT, arXiv:2106.08254; microsoft/unilm/beit: 224 px bicubic for the encoder, 112 px Lanczos for the
        tokenizer, from one box with one draw of colors, which come before the box there and after it here.
Codes   Without `tokenizer`, random projections of normalized pixels (arXiv:2202.01855): the same in every run
        and not what either paper predicts, so the recipes ask for a trained one.
Shapes  B images, N patches, L hidden ones, K codes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmim.methods.base import Method, MethodConfig, Reconstruction
from fastmim.methods.losses import as_prediction, mean_over_ranks
from fastmim.models.mae_decoder import DecoderConfig
from fastmim.models.tokenizers import RandomConfig, Tokenizer, load_tokenizer
from fastmim.models.vit import ViTConfig
from fastmim.ranks import AcrossRanks
from fastmim.views import Color, Crop

RANDOM_STRIDE = 8  # pixels of the second crop that a patch's code is of, or the patch if that is smaller


@dataclass(frozen=True, kw_only=True)
class TokensConfig(MethodConfig):
    """What BEiT and CAE have in common."""

    scales: ClassVar[Mapping] = {"sample": {"method.tokenizer": None, "method.codes": 64}}
    file_words: ClassVar[str] = "a run of `fastmim tokenizer train`, or a file with DALL-E's encoder"
    tokenizer: Path | None = None
    """Run directory or file of the tokenizer whose codes are predicted; none: codes of random projections"""
    codes: int = 8192
    """K without a tokenizer; a tokenizer has its own"""

    def files(self) -> Mapping[str, Path]:
        return {} if self.tokenizer is None else {"tokenizer": self.tokenizer}

    def fit(self, model: ViTConfig, decoder: DecoderConfig) -> Self:
        return replace(self, codes=min(self.codes, 512))

    def make_tokenizer(self, model: ViTConfig) -> Tokenizer:
        """The tokenizer, frozen. ValueError for a file that holds none."""
        if model.channels != 3:
            raise ValueError(f"model.channels: want 3, as the tokenizer has, got {model.channels}")
        if self.tokenizer is not None:
            try:
                return load_tokenizer(self.tokenizer)
            except ValueError as error:
                raise ValueError(f"method.{error}") from None
        return RandomConfig(codes=self.codes, stride=min(RANDOM_STRIDE, model.patch)).build().eval()

    def crops(self, model: ViTConfig, tokenizer: Tokenizer, color: Color | None) -> tuple[Crop, Crop]:
        """What the encoder and the tokenizer see of one box."""
        rows, columns = model.grid
        stride = tokenizer.config.stride
        image = Crop(size=model.size, scale=(0.08, 1.0), color=color)
        return image, replace(image, size=(rows * stride, columns * stride), interpolation="lanczos")


def token_loss(
    logits_BLK: Tensor, token_BL: Tensor, there_BL: Tensor | None, ranks: AcrossRanks
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropy over the hidden tokens of all ranks, and the share of them that is right."""
    loss_BL = F.cross_entropy(logits_BLK.flatten(0, 1).float(), token_BL.flatten(), reduction="none")
    right_BL = (logits_BLK.detach().argmax(-1) == token_BL).float().flatten()
    if there_BL is None:
        return loss_BL.mean(), {"token_accuracy": right_BL.mean()}
    weight_BL = there_BL.flatten().float()
    accuracy = (right_BL * weight_BL).sum() / weight_BL.sum().clamp(min=1)
    return mean_over_ranks(loss_BL, weight_BL, ranks), {"token_accuracy": accuracy}


class TokensMethod(Method):
    """A method that predicts the codes of a frozen tokenizer."""

    config: TokensConfig

    def __init__(self, config: TokensConfig, model: ViTConfig, *, color: Color | None):
        super().__init__()
        self.config, self.model = config, model
        tokenizer = config.make_tokenizer(model)
        self.frozen = {"tokenizer": tokenizer}
        self.num_codes, self.stride = tokenizer.config.codes, tokenizer.config.stride
        self.crops = config.crops(model, tokenizer, color)

    @property
    def tokenizer(self) -> Tokenizer:
        found = self.frozen["tokenizer"]
        assert isinstance(found, Tokenizer)
        return found

    @torch.no_grad()
    def tokens(self, image_BHWC: Tensor) -> Tensor:
        """The code of each patch. `[B, N]` int64."""
        return self.tokenizer.to(image_BHWC.device).eval().indices(image_BHWC)

    @torch.no_grad()
    def drawn(self, image_BHWC: Tensor, seen_BK: Tensor, token_BN: Tensor) -> Reconstruction | None:
        """What the codes stand for, at the size of the image; None for a tokenizer that cannot draw."""
        if not self.tokenizer.draws:
            return None
        small_BHWC = self.tokenizer.picture(token_BN, self.model.grid)
        small_BCHW = small_BHWC.permute(0, 3, 1, 2).float()  # whole levels: what is nearest stays one
        large_BCHW = F.interpolate(small_BCHW, size=self.model.size, mode="nearest")
        pred_BNP = as_prediction(large_BCHW.permute(0, 2, 3, 1).byte().contiguous(), self.model)
        return Reconstruction(image_BHWC, seen_BK, pred_BNP, norm_pix=False)

    def remedies(self) -> str:
        return "try a lower --optim.blr, or another --method.tokenizer: its metrics.jsonl has the perplexity"
