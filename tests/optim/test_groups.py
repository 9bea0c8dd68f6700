"""Every parameter in exactly one group, with the decay and the scale of its layer."""

import pytest
import torch
from torch import nn

from fastmim.methods.mae import MAEConfig
from fastmim.models.mae_decoder import DecoderConfig
from fastmim.models.vit import ViTConfig
from fastmim.optim.groups import layer_of, parameter_groups

MODEL = ViTConfig(width=16, depth=12, heads=2, patch=8, image_size=32)


@pytest.fixture(scope="module")
def method() -> nn.Module:
    return MAEConfig(decoder=DecoderConfig(width=16, depth=1, heads=2)).build(MODEL)


@pytest.mark.parametrize("layer_decay", [1.0, 0.75])
def test_every_trained_parameter_is_in_exactly_one_group(method, layer_decay):
    groups = parameter_groups(method.named_parameters(), weight_decay=0.05, layer_decay=layer_decay, depth=12)
    grouped = [id(p) for group in groups for p in group["params"]]
    trained = [id(p) for p in method.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trained)
    assert len({group["name"] for group in groups}) == len(groups)


def test_one_dimensional_rule(method):
    groups = parameter_groups(method.named_parameters(), weight_decay=0.05)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, p in method.named_parameters():
        if p.requires_grad:
            assert decay[id(p)] == (0.0 if p.ndim == 1 else 0.05), name
    assert decay[id(method.encoder.cls_token)] == 0.05  # 1 x 1 x D: decayed, as in MAE
    assert decay[id(method.decoder.mask_token)] == 0.05


def test_a_bias_of_two_dimensions_is_not_decayed():
    p = nn.Parameter(torch.zeros(2, 2))
    (group,) = parameter_groups([("head.bias", p)], weight_decay=0.05)
    assert group["weight_decay"] == 0.0


def test_layer_scales_of_vit_base(method):
    groups = parameter_groups(method.named_parameters(), weight_decay=0.05, layer_decay=0.65, depth=12)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scale[id(method.encoder.patch_embed.proj.weight)] == pytest.approx(0.65**13)
    assert scale[id(method.encoder.cls_token)] == pytest.approx(0.65**13)
    assert scale[id(method.encoder.blocks[0].norm1.weight)] == pytest.approx(0.65**12)
    assert scale[id(method.encoder.blocks[11].mlp.fc2.bias)] == pytest.approx(0.65)
    assert scale[id(method.encoder.norm.weight)] == 1.0
    assert scale[id(method.decoder.decoder_pred.weight)] == 1.0
    assert layer_of("encoder.blocks.3.attn.qkv.weight", 12) == 4


def test_bad_decay_is_refused(method):
    with pytest.raises(ValueError, match="layer-decay: want a factor in"):
        parameter_groups(method.named_parameters(), weight_decay=0.05, layer_decay=1.5)
