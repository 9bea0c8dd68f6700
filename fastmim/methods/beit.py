"""BEiT: behind mask tokens, predict the code that a frozen tokenizer has for each hidden patch.

    T  T1(x) hides up to 75 of 196 patches in blocks; the second branch is the tokenizer on the same box of x
    f  the encoder, with mask tokens at hidden patches, and one linear layer to K logits
    M  cross entropy with the code of the patch, over all hidden patches of the batch

Source  Bao et al., arXiv:2106.08254; microsoft/unilm/beit. In the words of arXiv:2208.04164: Eq. 3 with a
        tokenizer for the identity. ViT with shared relative positions, LayerScale and no bias of the keys.
Masks   hide up to `mask_ratio` of the patches, and their number differs from image to image: the mean is over
        the hidden patches of the batch on all ranks, not of each image.
Decay   none for the class token.
Shapes  B images, N patches, L at most hidden, K codes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from fastmim_kernels import block_mask
from torch import Tensor, nn

from fastmim.group import Group
from fastmim.methods.base import About, Output, Reconstruction
from fastmim.methods.masking import check_ratio, first_hidden, hidden_count, taken
from fastmim.methods.tokens import TokensConfig, TokensMethod, token_loss
from fastmim.methods.work import Linear, Stack, Work
from fastmim.models.heads import beit_linear
from fastmim.models.tokens import Tokens
from fastmim.models.vit import Encoder, ViTConfig
from fastmim.streams import MASK
from fastmim.views import BEIT, Batch


@dataclass(frozen=True, kw_only=True)
class BEiTConfig(TokensConfig):
    """BEiT (arXiv:2106.08254)."""

    name: ClassVar[str] = "beit"
    about: ClassVar[About] = About(
        paper="Bao et al., arXiv:2106.08254",
        t1="up to 75 of 196 patches hidden in blocks, mask tokens",
        t2="a frozen tokenizer on the same box",
        similarity="cross entropy of hidden tokens",
        needs="`--method.tokenizer`",
    )
    encoder: ClassVar = {
        "positions": "relative", "layer_scale": 0.1, "drop_path": 0.1, "qkv_bias": "qv", "init": "beit",
    }  # fmt: skip
    mask_ratio: float = 75 / 196
    """Fraction of the patches that blocks hide, at most"""

    def __post_init__(self) -> None:
        check_ratio("method.mask-ratio", self.mask_ratio)
        if self.codes < 2:
            raise ValueError(f"method.codes: want at least 2, got {self.codes}")

    def work(self, model: ViTConfig) -> Work:
        """All tokens go through the encoder, hidden ones through the head; the tokenizer is not counted."""
        N, P, D = model.num_patches, model.patch_values, model.width
        hidden = hidden_count("method.mask-ratio", model, self.mask_ratio)
        embedding = Linear(N, P, D, input_gradient=False)
        return Work((Stack((1 + N,), D, model.depth),), (embedding, Linear(hidden, D, self.codes)))

    def build(self, model: ViTConfig) -> "BEiT":
        return BEiT(self, model)


class BEiT(TokensMethod):
    config: BEiTConfig
    encoder: Encoder

    def __init__(self, config: BEiTConfig, model: ViTConfig):
        super().__init__(config, model, color=BEIT)
        self.num_hidden = hidden_count("method.mask-ratio", model, config.mask_ratio)
        self.encoder = Encoder(model, mask_token=True)
        self.head = beit_linear(model.width, self.num_codes)

    def group(self, name: str, parameter: nn.Parameter) -> Group:
        return Group(decay=False) if name.endswith(("cls_token", "pos_embed")) else Group()

    def mask(self, seeds_B: Tensor) -> Tensor:
        """What the encoder does not see. Bool `[B, N]`."""
        return block_mask(seeds_B, self.model.grid, self.num_hidden, stream=MASK.of())

    def forward(self, batch: Batch) -> Output:
        image_BHWC, small_BHWC = batch.crops
        hidden_BN = self.mask(batch.seeds_B)
        index_BL, there_BL = first_hidden(hidden_BN, self.num_hidden)
        encoded = self.encoder(Tokens(image_BHWC, hidden_BN=hidden_BN), seeds_B=batch.seeds_B)
        logits_BLK = self.head(taken(encoded.tokens_BTD[:, 1:], index_BL))
        token_BL = self.tokens(small_BHWC).gather(1, index_BL)
        loss, metrics = token_loss(logits_BLK, token_BL, there_BL, self.ranks)
        return Output(loss, metrics | {"hidden": hidden_BN.float().mean()})

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> Reconstruction | None:
        image_BHWC, small_BHWC = batch.crops
        hidden_BN = self.mask(batch.seeds_B)
        tokens_BTD = self.encoder(Tokens(image_BHWC, hidden_BN=hidden_BN)).tokens_BTD
        guess_BN = self.head(tokens_BTD[:, 1:]).argmax(-1)
        token_BN = torch.where(hidden_BN, guess_BN, self.tokens(small_BHWC))
        fewest = self.model.num_patches - self.num_hidden  # pictures want as many seen of each
        seen_BK, _ = first_hidden(~hidden_BN, fewest)
        return self.drawn(image_BHWC, seen_BK, token_BN)

    def diagnose(self, row: Mapping[str, float]) -> str | None:
        accuracy = row.get("token_accuracy")
        if accuracy is None or accuracy < 1 - 1e-3:
            return None
        found = f"every code is guessed, token_accuracy {accuracy:.3f}: the tokenizer may know one code alone"
        return f"{found}; {self.remedies()}"
