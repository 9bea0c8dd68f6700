"""ViTMAEForPreTraining of transformers: `python -m benchmarks.peers.transformers_vitmae`.

Made from a configuration, so that nothing is downloaded; the weights are those of our method.
Not run yet where transformers is installed. The names are those of its 4.x releases; one that calls a weight
otherwise is refused when they are loaded, and is then not timed.
"""

import sys
from collections.abc import Iterator

from torch import Tensor, nn

from benchmarks.peers.race import main
from fastmim.methods.mae import MAE

LAYER = {  # of a block: theirs by ours
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
WHOLE = {
    "encoder.cls_token": "vit.embeddings.cls_token",
    "encoder.pos_embed": "vit.embeddings.position_embeddings",
    "encoder.patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "encoder.norm": "vit.layernorm",
}


def renamed(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One of our weights under the names it has there; the fused qkv becomes three."""
    stem, _, kind = name.rpartition(".")
    if name in WHOLE or stem in WHOLE:
        yield (WHOLE[name] if name in WHOLE else f"{WHOLE[stem]}.{kind}"), tensor
        return
    if "blocks." not in name:  # the decoder's own weights have the same names in both
        yield name, tensor
        return
    part, _, number, *inner = stem.split(".")
    layer = f"vit.encoder.layer.{number}" if part == "encoder" else f"decoder.decoder_layers.{number}"
    if ".".join(inner) == "attn.qkv":
        for which, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
            yield f"{layer}.attention.attention.{which}.{kind}", third
    else:
        yield f"{layer}.{LAYER['.'.join(inner)]}.{kind}", tensor


class LossOf(nn.Module):
    """`(pixels, noise) -> loss` of a transformers model."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, pixels: Tensor, noise: Tensor | None) -> Tensor:
        return self.net(pixel_values=pixels, noise=noise).loss


def build(method: MAE) -> LossOf:
    """The peer with the weights of `method`; RuntimeError if a name or shape differs."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    model, decoder = method.model, method.config.decoder
    net = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=model.width,
            num_hidden_layers=model.depth,
            num_attention_heads=model.heads,
            intermediate_size=4 * model.width,
            image_size=model.size[0],
            patch_size=model.patch,
            num_channels=model.channels,
            qkv_bias=True,
            hidden_act="gelu",
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            layer_norm_eps=1e-6,
            decoder_hidden_size=decoder.width,
            decoder_num_hidden_layers=decoder.depth,
            decoder_num_attention_heads=decoder.heads,
            decoder_intermediate_size=4 * decoder.width,
            mask_ratio=method.config.mask_ratio,
            norm_pix_loss=method.config.norm_pix,
        )
    )
    state = method.state_dict()
    net.load_state_dict(dict(pair for name, tensor in state.items() for pair in renamed(name, tensor)))
    return LossOf(net)


if __name__ == "__main__":
    sys.exit(main("transformers", "transformers", build))
