"""ViT, ViTMAE, Dinov2 and BEiT of transformers.

Source  transformers/models/{vit,vit_mae,dinov2,beit}/modeling_*.py of transformers 5.23, Apache-2.0. Layers
        of earlier releases hold their parts otherwise: their MLPs are patched, the rest is left and reported.
Limits  attention is left: `config._attn_implementation` already chooses it, and returns its weights on
        request. One add of two in a layer, as in timm's. Positions that are interpolated, and an image that
        wants a gradient, go the class's own way.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from fastmim_kernels.apply.masking import masked, pixel_loss, restored
from fastmim_kernels.apply.parts import add_norm, find_block
from fastmim_kernels.apply.swap import Finding, Swapped, arguments, demand_plain, home, is_a, strange_dtype
from fastmim_kernels.apply.trial import TOKENS, Call, Calls, Randn, tokens

MODELS = tuple(f"transformers.models.{name}" for name in ("vit", "vit_mae", "dinov2", "beit"))


def theirs(module: nn.Module, *names: str) -> bool:
    return any(is_a(module, package, *names) for package in MODELS)


def of_transformers(module: nn.Module) -> bool:
    return home(module).__module__.startswith("transformers.models.") and "forward" not in vars(module)


# --- layers ------------------------------------------------------------------------------------------


class FusedViTLayer(Swapped):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        demand_plain(hidden_states)
        branch, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)
        normed, total = add_norm(self.layernorm_after, self.dropout(branch), hidden_states)
        return self.dropout(self.mlp(normed)) + total


class FusedDinov2Layer(Swapped):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        demand_plain(hidden_states)
        branch, _ = self.attention(self.norm1(hidden_states), attention_mask=attention_mask, **kwargs)
        normed, total = add_norm(self.norm2, branch, hidden_states, self.layer_scale1, self.drop_path)
        return self.drop_path(self.layer_scale2(self.mlp(normed))) + total


class FusedBeitLayer(Swapped):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: Any = None,
        **kwargs,
    ) -> Tensor:
        demand_plain(hidden_states)
        if self.relative_position_bias is not None:
            window = tuple(side // self.patch_size for side in resolution)
            bias = self.relative_position_bias(
                window, interpolate_pos_encoding, dim_size=hidden_states.shape[1]
            )
            attention_mask = bias if attention_mask is None else bias + attention_mask
        branch, _ = self.attention(
            self.layernorm_before(hidden_states), attention_mask=attention_mask, **kwargs
        )
        scale = self.lambda_1 if isinstance(self.lambda_1, Tensor) else None
        normed, total = add_norm(
            self.layernorm_after, self.dropout(branch), hidden_states, scale, self.drop_path
        )
        return self.drop_path(self.lambda_2 * self.dropout(self.mlp(normed))) + total


LAYERS: dict[str, tuple[type, set[str], tuple[str, ...]]] = {  # mixin, children, arguments
    "ViTLayer": (
        FusedViTLayer,
        {"attention", "layernorm_before", "layernorm_after", "mlp", "dropout"},
        ("hidden_states", "attention_mask", "kwargs"),
    ),
    "Dinov2Layer": (
        FusedDinov2Layer,
        {"norm1", "attention", "layer_scale1", "drop_path", "norm2", "mlp", "layer_scale2"},
        ("hidden_states", "attention_mask", "kwargs"),
    ),
    "BeitLayer": (
        FusedBeitLayer,
        {"attention", "layernorm_before", "layernorm_after", "mlp", "dropout", "drop_path"},
        ("hidden_states", "attention_mask", "interpolate_pos_encoding", "resolution", "kwargs"),
    ),
}
LAYERS["ViTMAELayer"] = LAYERS["ViTLayer"]


def find_layer(name: str, layer: Any) -> Finding | None:
    """A layer of one of the three layouts, in whatever model; None where another model's is of another."""
    has, takes = {child for child, _ in layer.named_children()} - {"relative_position_bias"}, arguments(layer)
    fitting = [row for row in LAYERS.values() if (has, takes) == row[1:]]
    if not fitting:
        what = "a layer of another version of transformers"
        known = theirs(layer, *LAYERS)
        return Finding(name, type(layer).__name__, "add_layer_norm", obstacle=what) if known else None
    norm = getattr(layer, "norm2", None) or layer.layernorm_after
    scale, drop_path = (getattr(layer, part, None) for part in ("layer_scale1", "drop_path"))

    def calls(width: int) -> Calls:
        if getattr(layer, "relative_position_bias", None) is None:
            return tokens(width, takes)
        return positioned(width, (2 * layer.patch_size, 2 * layer.patch_size))

    return find_block(name, layer, fitting[0][0], norm, layer.mlp, scale, drop_path, calls)


def positioned(width: int, resolution: tuple[int, int]) -> Calls:
    """For a layer with relative positions: 2 x 2 patches and a class token, with a mask and without."""

    def make(randn: Randn) -> list[Call]:
        given: dict[str, Any] = {"resolution": resolution}
        masked_too = given | {"attention_mask": randn(2, 1, 5, 5)}
        return [(TOKENS, randn(2, 5, width), options) for options in (given, masked_too)]

    return make


# --- ViTMAE --------------------------------------------------------------------------------------------


def output_class(module: nn.Module, name: str) -> Any:
    return getattr(sys.modules[type(module).__module__], name)


class FusedMAEEmbeddings(Swapped):
    def forward(
        self, pixel_values: Tensor, noise: Tensor | None = None, interpolate_pos_encoding: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        demand_plain(pixel_values)
        if interpolate_pos_encoding or tuple(pixel_values.shape[2:]) != tuple(self.image_size):
            return super().forward(pixel_values, noise, interpolate_pos_encoding)
        tokens = self.patch_embeddings(pixel_values)
        noise = torch.rand(tokens.shape[:2], device=tokens.device) if noise is None else noise
        return masked(tokens, self.position_embeddings, self.cls_token, noise, self.config.mask_ratio)


class FusedMAEDecoder(Swapped):
    def forward(
        self, hidden_states: Tensor, ids_restore: Tensor, interpolate_pos_encoding: bool = False
    ) -> Any:
        demand_plain(hidden_states)
        if interpolate_pos_encoding:
            return super().forward(hidden_states, ids_restore, interpolate_pos_encoding)
        tokens = self.decoder_embed(hidden_states)
        hidden_states = restored(tokens, ids_restore, self.mask_token, self.decoder_pos_embed)
        for layer in self.decoder_layers:
            hidden_states = layer(hidden_states)
        logits = self.decoder_pred(self.decoder_norm(hidden_states))[:, 1:]
        return output_class(self, "ViTMAEDecoderOutput")(logits=logits)


class FusedMAELoss(Swapped):
    def forward(
        self,
        pixel_values: Tensor | None = None,
        noise: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        **kwargs,
    ) -> Any:
        demand_plain(pixel_values)
        if pixel_values is None or pixel_values.requires_grad:
            return super().forward(pixel_values, noise, interpolate_pos_encoding, attention_mask, **kwargs)
        return_dict = kwargs.pop("return_dict", None)
        given = {"noise": noise, "interpolate_pos_encoding": interpolate_pos_encoding}
        encoded = self.vit(pixel_values, attention_mask=attention_mask, **given, **kwargs)
        logits = self.decoder(
            encoded.last_hidden_state, encoded.ids_restore, interpolate_pos_encoding=interpolate_pos_encoding
        ).logits
        config = self.config
        loss = pixel_loss(pixel_values, logits, encoded.mask, config.patch_size, config.norm_pix_loss)
        outputs = output_class(self, "ViTMAEForPreTrainingOutput")(
            loss=loss, logits=logits, mask=encoded.mask, ids_restore=encoded.ids_restore,
            hidden_states=encoded.hidden_states, attentions=encoded.attentions,
        )  # fmt: skip
        return outputs if (config.return_dict if return_dict is None else return_dict) else outputs.to_tuple()


MAE: dict[str, tuple[type, str, tuple[str, ...]]] = {  # mixin, op, arguments
    "ViTMAEEmbeddings": (
        FusedMAEEmbeddings, "gather_tokens", ("pixel_values", "noise", "interpolate_pos_encoding"),
    ),
    "ViTMAEDecoder": (
        FusedMAEDecoder, "restore_tokens", ("hidden_states", "ids_restore", "interpolate_pos_encoding"),
    ),
    "ViTMAEForPreTraining": (
        FusedMAELoss, "norm_pix_loss_image",
        ("pixel_values", "noise", "interpolate_pos_encoding", "attention_mask", "kwargs"),
    ),
}  # fmt: skip
MAE_METHODS = "random_masking", "patchify", "interpolate_pos_encoding"  # what the mixins take the place of


def find_mae(name: str, module: nn.Module) -> Finding:
    cls, what = home(module), type(module).__name__
    mixin, op, takes = MAE[cls.__name__]
    changed = [m for m in MAE_METHODS if hasattr(cls, m) and getattr(type(module), m) is not getattr(cls, m)]
    if arguments(module) != takes or hasattr(cls, "forward_loss"):
        return Finding(name, what, op, obstacle="a module of another version of transformers")
    if changed:
        return Finding(name, what, op, obstacle=f"its {', '.join(changed)} is not that of its class")
    obstacle = strange_dtype(module)
    return Finding(name, what, op, () if obstacle else ((module, mixin),), obstacle)


# --- all -----------------------------------------------------------------------------------------------


def find_transformers(name: str, module: nn.Module) -> Finding | None:
    if of_transformers(module) and (layer := find_layer(name, module)) is not None:
        return layer
    if theirs(module, *MAE):
        return find_mae(name, module)
    if theirs(module, *(f"{m}Attention" for m in ("ViT", "ViTMAE", "Dinov2", "Beit"))):
        what = "config._attn_implementation chooses it"
        return Finding(name, type(module).__name__, "attention", obstacle=what)
    return None
