"""A patched model against itself unpatched: outputs, losses and all gradients, as near to fp64."""

import copy

import fastmim_kernels
import pytest
import torch
from fastmim_kernels.testing import assert_no_worse
from torch import Tensor, nn

from tests.ops.apply.conftest import (
    hf,
    images,
    mae_layout,
    make,
    skip_layers_of_earlier_releases,
    step,
    timm_vit,
)  # fmt: skip


def plainly(model, x):
    return model(x)


def checkpointed(model, x):
    enable = getattr(model, "set_grad_checkpointing", None) or model.gradient_checkpointing_enable
    enable()
    return model(x)


def with_a_mask(model, x):
    tokens = model.patch_embed(x)
    mask = torch.zeros(tokens.shape[1], tokens.shape[1], dtype=x.dtype).fill_diagonal_(-1.0)
    for block in model.blocks:
        tokens = block(tokens, attn_mask=mask)
    return model.blocks[0](tokens, is_causal=True)


def some_hidden(model, x):
    hidden = torch.arange(16).expand(len(x), -1) % 3 == 0
    return model(x, bool_masked_pos=hidden)


def everything(model, x):
    return model(x, output_attentions=True, output_hidden_states=True)


def larger(model, x):
    x = torch.nn.functional.interpolate(x, size=(48, 48))
    return model(x, interpolate_pos_encoding=True)


def as_tuple(model, x):
    return model(x, return_dict=False)


def image_learns(model, x):
    x = x.clone().requires_grad_()
    loss, pred, mask = model(x)
    return loss, pred, mask, torch.autograd.grad(loss, x, retain_graph=True)[0]


def relative(kind):
    return lambda: hf("BeitModel", **{f"use_{kind}relative_position_bias": True}, drop_path_rate=0.5)


EAGER = {"attn_implementation": "eager"}
ADD, GELU, ATTENTION, MAE = "add_layer_norm", "bias_gelu", "attention", "ViTMAEForPreTraining"
HF, TIMM = {ADD, GELU}, {ADD, GELU, ATTENTION}
MASKED = {"gather_tokens", "restore_tokens", "norm_pix_loss_image"}
CASES = {  # build, call, the ops that are in
    "timm": (timm_vit, plainly, TIMM),
    # tokens of a convolution, transposed: their last dim is not contiguous
    "timm without class token": (lambda: timm_vit(class_token=False, global_pool="avg"), plainly, TIMM),
    "timm with registers": (lambda: timm_vit(reg_tokens=3), plainly, TIMM),
    "timm LayerScale": (lambda: timm_vit(init_values=0.3), plainly, TIMM),
    "timm drop path": (lambda: timm_vit(drop_path_rate=0.6), plainly, TIMM),
    "timm drop path and LayerScale": (lambda: timm_vit(drop_path_rate=0.6, init_values=0.3), plainly, TIMM),
    "timm dropout": (lambda: timm_vit(proj_drop_rate=0.2, drop_path_rate=0.6), plainly, TIMM),
    "timm attention dropout": (lambda: timm_vit(attn_drop_rate=0.2), plainly, {ADD, GELU}),
    "timm qk_norm": (lambda: timm_vit(qk_norm=True), plainly, {ADD, GELU}),
    "timm masks": (timm_vit, with_a_mask, TIMM),
    "timm checkpointing": (lambda: timm_vit(drop_path_rate=0.6), checkpointed, TIMM),
    "timm no qkv bias": (lambda: timm_vit(qkv_bias=False), plainly, TIMM),
    "timm no mlp bias": (lambda: timm_vit(proj_bias=False), plainly, {ADD, ATTENTION}),
    "timm norm in the mlp": (lambda: timm_vit(scale_mlp_norm=True), plainly, TIMM),
    "timm gelu_tanh": (lambda: timm_vit(act_layer="gelu_tanh"), plainly, {ADD, ATTENTION}),
    "ViTModel": (lambda: hf("ViTModel"), plainly, HF),
    "ViTModel dropout": (lambda: hf("ViTModel", hidden_dropout_prob=0.2), plainly, HF),
    "ViTModel hidden patches": (lambda: hf("ViTModel", {"use_mask_token": True}), some_hidden, HF),
    "ViTModel attentions": (lambda: hf("ViTModel", **EAGER), everything, HF),
    "ViTModel larger": (lambda: hf("ViTModel"), larger, HF),
    "ViTModel checkpointing": (lambda: hf("ViTModel", hidden_dropout_prob=0.2), checkpointed, HF),
    "ViTModel tuple": (lambda: hf("ViTModel"), as_tuple, HF),
    "ViTModel gelu_new": (lambda: hf("ViTModel", hidden_act="gelu_new"), plainly, {ADD}),
    "ViTMAE": (lambda: hf(MAE, norm_pix_loss=True), plainly, HF | MASKED),
    "ViTMAE plain pixels": (lambda: hf(MAE), plainly, HF | MASKED),
    "ViTMAE larger": (lambda: hf(MAE, norm_pix_loss=True), larger, HF | MASKED),
    "ViTMAE attentions": (lambda: hf(MAE, **EAGER), everything, HF | MASKED),
    "ViTMAE tuple": (lambda: hf(MAE), as_tuple, HF | MASKED),
    "ViTMAE checkpointing": (lambda: hf(MAE), checkpointed, HF | MASKED),
    "Dinov2": (lambda: hf("Dinov2Model", layerscale_value=0.3), plainly, HF),
    "Dinov2 drop path": (lambda: hf("Dinov2Model", drop_path_rate=0.6), plainly, HF),
    "Dinov2 hidden patches": (lambda: hf("Dinov2Model"), some_hidden, HF),
    "Dinov2 SwiGLU": (lambda: hf("Dinov2Model", use_swiglu_ffn=True), plainly, {ADD}),
    "Beit": (lambda: hf("BeitModel"), plainly, HF),
    "Beit relative": (relative(""), plainly, HF),
    "Beit shared relative": (relative("shared_"), plainly, HF),
    "Beit no LayerScale": (
        lambda: hf("BeitModel", layer_scale_init_value=0.0, hidden_dropout_prob=0.1), plainly, HF,
    ),
    "Beit hidden patches": (lambda: hf("BeitModel", use_mask_token=True), some_hidden, HF),
    "MAE layout": (mae_layout, plainly, TIMM | MASKED),
    "MAE layout plain pixels": (lambda: mae_layout(norm_pix_loss=False), plainly, TIMM | MASKED),
    "MAE layout gradient to the image": (mae_layout, image_learns, TIMM | MASKED),
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_draw_in_any_precision(monkeypatch):
    """Uniform numbers asked for in fp64 or bf16 are those of fp32: the oracle drops the same paths."""
    real = torch.rand

    def rand(*size, dtype=None, **kwargs):
        return real(*size, **kwargs) if dtype is None else real(*size, **kwargs).to(dtype)

    monkeypatch.setattr(torch, "rand", rand)


def both(model: nn.Module, call, cast, autocast: bool) -> list[dict[str, Tensor]]:
    """A step in fp64, a step in `cast`, and a step in it patched."""
    x = images()
    oracle = step(copy.deepcopy(model).double(), call, x.double())
    naive_model = copy.deepcopy(model).to(cast)
    model = copy.deepcopy(naive_model)
    fastmim_kernels.apply(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        naive, actual = (step(m, call, x.to(cast)) for m in (naive_model, model))
    assert actual.keys() == naive.keys() == oracle.keys()
    for name, value in actual.items():
        assert value.dtype == naive[name].dtype, name
        assert value.is_floating_point() or torch.equal(value, naive[name]), name
    return [{n: v for n, v in d.items() if v.is_floating_point()} for d in (oracle, naive, actual)]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_as_near_to_fp64(case, mode):
    build, call, ops = CASES[case]
    if case.startswith("Dinov2"):
        skip_layers_of_earlier_releases()
    model = make(build).train(mode == "train")
    report = fastmim_kernels.apply(copy.deepcopy(model))
    assert {row.op for row in report.replaced} == ops
    oracle, naive, actual = both(model, call, torch.float32, autocast=False)
    for name, value in actual.items():
        # a key's bias moves all logits of a query alike: its gradient is 0, and rounding is all there is
        assert_no_worse(name, value, oracle[name], naive[name], 8.0 if "k_proj.bias" in name else 2.0)


HALF = [
    "timm",
    "timm drop path and LayerScale",
    "ViTModel",
    "ViTMAE",
    "Dinov2",
    "Beit relative",
    "MAE layout",
]


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16 weights"])
@pytest.mark.parametrize("case", HALF)
def test_in_bf16(case, autocast):
    """Dtypes are the unpatched ones; errors are compared over whole tensors: 2**-8 is coarse."""
    build, call, _ = CASES[case]
    oracle, naive, actual = both(make(build), call, torch.float32 if autocast else torch.bfloat16, autocast)

    def errors(found: dict[str, Tensor]) -> Tensor:
        """Root mean square error of each tensor, relative to its size."""
        pairs = [(found[name].double(), true) for name, true in oracle.items() if "k_proj.bias" not in name]
        return torch.stack([(x - true).norm() / (true.norm() + 1e-9) for x, true in pairs])

    assert errors(actual).mean() <= 1.25 * errors(naive).mean()
    assert (errors(actual) <= 2 * errors(naive) + 1e-6).all()
