"""A classifier from weights: an encoder and the head that was trained on it, by fine-tuning or supervised.

fc_norm and head    head(fc_norm(mean of the patches)): ours, MAE's fine-tuned, timm's with a mean
head alone          head(class token behind the final norm): timm's, transformers', DeiT's
"""

import torch
from torch import Tensor, nn

from fastmim.interop.encoders import Pretrained
from fastmim.models.tokens import Tokens
from fastmim.models.vit import Encoder

NORM_EPS = 1e-6


class Classifier(nn.Module):
    """Logits of uint8 images."""

    def __init__(self, found: Pretrained):
        """ValueError for weights without a head."""
        super().__init__()
        state = {
            name: t.float() for name, t in found.beside.items() if name.startswith(("fc_norm.", "head."))
        }
        weight = state.get("head.weight")
        encoder = found.encoder
        if (
            weight is None
            or weight.ndim != 2
            or weight.shape[1] != encoder.width
            or not isinstance(encoder, Encoder)
        ):
            raise ValueError(
                f"want the weights of a classifier, as fine-tuning leaves them, got no head in {found.origin}"
            )
        self.encoder, self.num_classes = encoder, weight.shape[0]
        self.mean = "fc_norm.weight" in state
        self.fc_norm = nn.LayerNorm(encoder.width, eps=NORM_EPS) if self.mean else nn.Identity()
        self.head = nn.Linear(encoder.width, self.num_classes, bias="head.bias" in state)
        missing, over = self.load_state_dict(
            {f"encoder.{name}": t for name, t in encoder.state_dict().items()} | state, strict=False
        )
        if missing or over:
            raise ValueError(f"want a head and a norm that fit, got {missing or over} in {found.origin}")

    @torch.no_grad()
    def forward(self, image_BHWC: Tensor) -> Tensor:
        """`[B, H, W, C]` uint8 to `[B, K]` fp32."""
        x_BTD = self.encoder(Tokens(image_BHWC)).tokens_BTD
        feature_BD = x_BTD[:, 1:].mean(1) if self.mean else x_BTD[:, 0]
        return self.head(self.fc_norm(feature_BD)).float()
