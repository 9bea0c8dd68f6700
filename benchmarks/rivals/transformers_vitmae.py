"""ViTMAEForPreTraining of transformers: `python -m benchmarks.rivals.transformers_vitmae`.

Made from a configuration, so that nothing is downloaded; the weights are those of our method. Their names are
those of 5.23, or of 4.x where the model nests its layers as that did; one that calls a weight otherwise is
refused when they are loaded, and is then not timed. `--apply` races it with the ops of fastmim_kernels, too.
"""

import sys
from collections.abc import Iterator

from torch import Tensor, nn

from benchmarks.rivals.race import Rival, main
from fastmim.methods.mae import MAE

NORMS = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
LAYER = {  # of a block: theirs by ours
    **NORMS,
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "layers": "vit.layers",
    "qkv": "attention.{}_proj",
}
EARLIER_LAYER = {  # of 4.x
    **NORMS,
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "layers": "vit.encoder.layer",
    "qkv": "attention.attention.{}",
}
WHOLE = {
    "encoder.cls_token": "vit.embeddings.cls_token",
    "encoder.pos_embed": "vit.embeddings.position_embeddings",
    "encoder.patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "encoder.norm": "vit.layernorm",
}


def renamed(name: str, tensor: Tensor, names: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """One of our weights under the names it has there; the fused qkv becomes three."""
    stem, _, kind = name.rpartition(".")
    if name in WHOLE or stem in WHOLE:
        yield (WHOLE[name] if name in WHOLE else f"{WHOLE[stem]}.{kind}"), tensor
        return
    if "blocks." not in name:  # the decoder's own weights have the same names in both
        yield name, tensor
        return
    part, _, number, *inner = stem.split(".")
    layer = f"{names['layers']}.{number}" if part == "encoder" else f"decoder.decoder_layers.{number}"
    if ".".join(inner) == "attn.qkv":
        which = ("q", "k", "v") if names is LAYER else ("query", "key", "value")
        for one, third in zip(which, tensor.chunk(3), strict=True):
            yield f"{layer}.{names['qkv'].format(one)}.{kind}", third
    else:
        yield f"{layer}.{names['.'.join(inner)]}.{kind}", tensor


class LossOf(nn.Module):
    """`(pixels, noise) -> loss` of a transformers model."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, pixels: Tensor, noise: Tensor | None) -> Tensor:
        return self.net(pixel_values=pixels, noise=noise).loss


def build(method: MAE) -> LossOf:
    """The rival with the weights of `method`; RuntimeError if a name or shape differs."""
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
    names = EARLIER_LAYER if hasattr(net.vit, "encoder") else LAYER
    state = method.state_dict()
    net.load_state_dict(dict(pair for name, tensor in state.items() for pair in renamed(name, tensor, names)))
    return LossOf(net)


if __name__ == "__main__":
    sys.exit(main("transformers", "transformers", lambda method: Rival(build(method), method.model)))
