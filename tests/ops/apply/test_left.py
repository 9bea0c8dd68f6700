"""What is left alone, and the reason that is given for it."""

import re

import fastmim_kernels
import pytest
import torch
from torch import nn

from tests.ops.apply.conftest import hf, mae_layout, make, timm_vit


def reasons(model: nn.Module) -> dict[str, str]:
    """Of what was left: op and why."""
    return {f"{row.where} {row.op}": row.note for row in fastmim_kernels.apply(model).left}


def listen(*paths: str):
    def change(model: nn.Module) -> nn.Module:
        for path in paths:
            model.get_submodule(path).register_forward_hook(lambda *_: None)
        return model

    return change


def replace(path: str, make_new):
    def change(model: nn.Module) -> nn.Module:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, make_new(model.get_submodule(path)))
        return model

    return change


class OwnMlp(nn.Module):
    """Reads the normed tokens twice: once by a linear layer, once as they are."""

    def __init__(self, *_):
        super().__init__()
        self.fc = nn.Linear(48, 48)

    def forward(self, x):
        return x * self.fc(x)


def forward_of_its_own(path: str):
    def change(model: nn.Module) -> nn.Module:
        module = model.get_submodule(path)
        module.forward = type(module).forward.__get__(module)
        return model

    return change


def same(model: nn.Module) -> nn.Module:
    return model


LEFT = [  # build, what is done to it, where and which op, why
    (lambda: timm_vit(act_layer="gelu_tanh"), same, "blocks.*.mlp bias_gelu", "GELUTanh.*not the exact GELU"),
    (timm_vit, replace("blocks.0.mlp.act", lambda m: nn.GELU("tanh")), "blocks.*.mlp bias_gelu", "tanh"),
    (lambda: timm_vit(act_layer="quick_gelu"), same, "blocks.*.mlp bias_gelu", "not the exact GELU"),
    (lambda: hf("ViTModel", hidden_act="gelu_new"), same, "layers.*.mlp bias_gelu", "not the exact GELU"),
    (lambda: hf("ViTModel", hidden_act="gelu_python"), same, "layers.*.mlp bias_gelu", "not the exact GELU"),
    (lambda: timm_vit(proj_bias=False), same, "blocks.*.mlp bias_gelu", "no bias"),
    (lambda: timm_vit(qk_norm=True), same, "blocks.*.attn attention", "normalizes or gates queries"),
    (lambda: timm_vit(scale_attn_norm=True), same, "blocks.*.attn attention", "normalizes or gates queries"),
    (lambda: timm_vit(attn_drop_rate=0.1), same, "blocks.*.attn attention", "attention dropout"),
    (lambda: timm_vit(norm_layer="rmsnorm"), same, "blocks.* add_layer_norm", "RmsNorm whose"),
    (lambda: hf("ViTModel"), same, "layers.*.attention attention", "config._attn_implementation chooses it"),
    (timm_vit, listen("blocks.0.mlp.fc1"), "blocks.*.mlp bias_gelu", "hooks on its first layer"),
    (timm_vit, listen("blocks.0.mlp.act"), "blocks.*.mlp bias_gelu", "hooks on its first layer"),
    (timm_vit, listen("blocks.1.norm2"), "blocks.* add_layer_norm", "hooks on its second norm"),
    (lambda: timm_vit(init_values=1.0), listen("blocks.1.ls1"), "blocks.* add_layer_norm", "hooks on"),
    (lambda: timm_vit(drop_path_rate=0.5), listen("blocks.1.drop_path1"), "blocks.* add_layer_norm", "hooks"),
    (timm_vit, listen("blocks.1.attn.q_norm"), "blocks.*.attn attention", "no longer fire"),
    (timm_vit, listen("blocks.1.attn.attn_drop"), "blocks.*.attn attention", "no longer fire"),
    (
        timm_vit, replace("blocks.0.norm2", lambda m: nn.LayerNorm(48, bias=False)),
        "blocks.* add_layer_norm", "no weight or no bias",
    ),
    (
        timm_vit, replace("blocks.0.norm2", lambda m: nn.LayerNorm(48, elementwise_affine=False)),
        "blocks.* add_layer_norm", "no weight or no bias",
    ),
    (timm_vit, replace("blocks.0.mlp", OwnMlp), "blocks.* add_layer_norm", "may read more"),
    (timm_vit, replace("blocks.0.ls1", lambda m: nn.Dropout()), "blocks.* add_layer_norm", "its Dropout is"),
    (timm_vit, replace("blocks.0.mlp.fc1", nn.Sequential), "blocks.*.mlp bias_gelu", "a Sequential"),
    (timm_vit, forward_of_its_own("blocks.0.mlp.fc1"), "blocks.*.mlp bias_gelu", "a Linear whose"),
    (timm_vit, replace("blocks.0.mlp", lambda m: m.double()), "blocks.*.mlp bias_gelu", "weights of"),
    (mae_layout, listen("decoder_pred"), "forward_loss norm_pix_loss_image", "it has hooks"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "change", "where", "why"), LEFT)
def test_the_reason_is_said(build, change, where, why):
    found = reasons(change(make(build)))
    assert re.search(why, found.get(where, "")), found


def test_parts_that_serve_two_masters_are_left():
    model = make(timm_vit)
    model.blocks[1].mlp.act = model.blocks[0].mlp.act
    assert "serves another module too" in reasons(model)["blocks.*.mlp bias_gelu"]


def test_nothing_to_patch_is_an_error():
    with pytest.raises(ValueError, match=r"nothing to patch in torch.nn.*\.Sequential. Looked for .*timm"):
        fastmim_kernels.apply(nn.Sequential(nn.Linear(3, 3), nn.GELU()))
    before = make(lambda: hf("ViTModel")).double()
    classes = [type(m) for m in before.modules()]
    with pytest.raises(ValueError, match=r"layers\.\*\.mlp \(ViTMLP\): weights of torch.float64; want fp32"):
        fastmim_kernels.apply(before)
    assert [type(m) for m in before.modules()] == classes


def test_the_report_is_a_table():
    report = fastmim_kernels.apply(make(lambda: timm_vit(attn_drop_rate=0.1)))
    lines = str(report).splitlines()
    assert lines[0] == "timm.models.vision_transformer.VisionTransformer"
    assert lines[1].split() == ["where", "class", "count", "op", "why", "not"]
    assert lines[2].split() == ["replaced", "blocks.*", "Block", "2", "add_layer_norm"]
    assert lines[4].split()[:5] == ["left", "blocks.*.attn", "Attention", "2", "attention"]
    assert lines[4].endswith("attention dropout: the op has none")


# --- forwards of another kind --------------------------------------------------------------------------


def test_a_block_that_does_something_else_is_left():
    from timm.models.vision_transformer import Block

    class Louder(Block):
        def forward(self, x, attn_mask=None, is_causal=False):
            return 2 * super().forward(x, attn_mask, is_causal)

    class Named(Block):  # changes nothing
        pass

    report = fastmim_kernels.apply(nn.ModuleList([Louder(48, 2), Named(48, 2)]))
    assert [row.what for row in report.replaced if row.op == "add_layer_norm"] == ["Named"]


def test_a_layer_of_another_layout_is_left():
    """Releases before 5.23 hold dense and activation apart: the MLP is served, the layer is not."""
    from transformers.activations import ACT2FN
    from transformers.models.vit import modeling_vit

    class ViTIntermediate(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense, self.intermediate_act_fn = nn.Linear(48, 96), ACT2FN["gelu"]

        def forward(self, hidden_states):
            return self.intermediate_act_fn(self.dense(hidden_states))

    class ViTLayer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layernorm_before, self.layernorm_after = nn.LayerNorm(48), nn.LayerNorm(48)
            self.intermediate = ViTIntermediate()

        def forward(self, hidden_states, head_mask=None, output_attentions=False):
            return self.intermediate(self.layernorm_after(hidden_states))

    for cls in (ViTIntermediate, ViTLayer):
        cls.__module__ = modeling_vit.__name__
    layer, x = ViTLayer(), torch.randn(2, 3, 48)
    expected = layer(x)
    report = fastmim_kernels.apply(layer)
    assert [(row.what, row.op) for row in report.replaced] == [("ViTIntermediate", "bias_gelu")]
    assert [row.note for row in report.left] == ["a layer of another version of transformers"]
    torch.testing.assert_close(layer(x), expected)


def test_a_changed_method_of_vitmae_is_left():
    class OwnMasks(type(hf("ViTMAEForPreTraining").vit.embeddings)):
        def random_masking(self, sequence, noise=None):
            return super().random_masking(sequence, 1 - noise)

    OwnMasks.__module__ = "somewhere"
    model = make(lambda: hf("ViTMAEForPreTraining"))
    model.vit.embeddings = OwnMasks(model.config)
    report = fastmim_kernels.apply(model)
    notes = {row.what: row.note for row in report.left}
    assert notes["OwnMasks"] == "its random_masking is not that of its class"


# --- models that only look like MAE's --------------------------------------------------------------------


def changed_layout(**methods):
    model = make(mae_layout)
    model.__class__ = type("Changed", (type(model),), methods)
    return model


def blockwise(self, x, mask_ratio):
    kept = int(x.shape[1] * (1 - mask_ratio))
    mask = torch.ones(x.shape[:2])
    mask[:, :kept] = 0
    torch.rand(1)
    return x[:, :kept], mask, torch.arange(x.shape[1]).expand(len(x), -1)


def l1(self, imgs, pred, mask):
    return (((pred - self.patchify(imgs)).abs().mean(-1)) * mask).sum() / mask.sum()


def visible_first(self, x, ids_restore):
    x = self.decoder_embed(x)
    masks = self.mask_token.expand(len(x), ids_restore.shape[1] + 1 - x.shape[1], -1)
    x = torch.cat([x, masks], dim=1) + self.decoder_pos_embed
    for block in self.decoder_blocks:
        x = block(x)
    return self.decoder_pred(self.decoder_norm(x))[:, 1:]


def broken(self, x, ids_restore):
    raise KeyError("teacher")


@pytest.mark.parametrize(
    ("methods", "left", "why"),
    [
        ({"random_masking": blockwise}, {"forward_encoder"}, "something else than MAE's"),
        ({"forward_loss": l1}, {"forward_loss"}, "something else than MAE's"),
        ({"forward_decoder": visible_first}, {"forward_decoder"}, "something else than MAE's"),
        ({"forward_decoder": broken}, {"forward_decoder", "forward_loss"}, "does not run|could not be run"),
        (
            {"forward_loss": lambda self, imgs, pred, mask, weight=1.0: l1(self, imgs, pred, mask)},
            {"forward_encoder", "forward_decoder", "forward_loss"}, "takes other arguments",
        ),
    ],
)  # fmt: skip
def test_a_method_that_is_not_maes_is_left(methods, left, why):
    model = changed_layout(**methods)
    report = fastmim_kernels.apply(model)
    assert {row.where for row in report.left} == left
    assert all(re.search(why, row.note) for row in report.left)


def test_the_trial_leaves_no_trace():
    model = make(mae_layout)
    model.decoder_blocks.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    training = [m.training for m in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    fastmim_kernels.apply(model)
    assert torch.equal(torch.rand(2), expected)
    assert [m.training for m in model.modules()] == training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_model_on_the_meta_device_is_not_tried():
    with pytest.raises(ValueError, match=r"forward_loss \(MaskedAutoencoder\): it is on the meta device"):
        fastmim_kernels.apply(mae_layout().to("meta"))
