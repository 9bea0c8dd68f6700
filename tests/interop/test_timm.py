"""Encoders of every family of methods in timm's own models: loaded strictly, with equal tokens."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastmim.commands.export import main
from fastmim.interop.mae import to_file
from fastmim.interop.timm import class_in_timm, export_timm, for_timm
from fastmim.methods import METHODS
from fastmim.models.mae_decoder import DecoderConfig
from fastmim.models.tokens import Tokens
from fastmim.models.vit import Encoder, ViTConfig
from fastmim.recipes import METHOD_RECIPES
from tests.methods.crops import make_batch

SIZE = ViTConfig(width=48, depth=3, heads=3, patch=16, image_size=224)
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def make(name: str, model: ViTConfig = SIZE):
    torch.manual_seed(0)
    model = replace(model, **METHODS[name].encoder)
    method = METHODS[name]().fit(model, DecoderConfig(width=16, depth=1, heads=2)).build(model).eval()
    for p in method.encoder.parameters():  # no bias or table of zeros
        p.data.add_(0.02 * torch.randn_like(p))
    return method


def theirs_of(state, model: ViTConfig, **more):
    """timm's model of this size, with the state loaded strictly."""
    from timm.models.beit import Beit
    from timm.models.vision_transformer import VisionTransformer

    size = {"img_size": model.size, "patch_size": model.patch, "embed_dim": model.width, "depth": model.depth}
    size |= {"num_heads": model.heads, "num_classes": 0, "global_pool": "token"} | more
    if class_in_timm(state) == "Beit":
        absolute = "pos_embed" in state
        has = {"use_abs_pos_emb": absolute, "use_rel_pos_bias": not absolute, "init_values": 0.1}
        found = Beit(qkv_bias=True, **size, **has)
    else:
        found = VisionTransformer(**size)
    found.load_state_dict(state, strict=True)
    return found.eval()


@pytest.mark.parametrize("name", METHODS)
def test_every_encoder_is_one_of_timms(torchvision_loads, tmp_path, name):
    method = make(name)
    state = {
        n.removeprefix("encoder."): t for n, t in method.state_dict().items() if n.startswith("encoder.")
    }
    state.pop("mask_token", None)
    final = {"global_pool": "", "final_norm": False} if name == "supervised" else {}
    theirs = theirs_of(for_timm(state), method.model, **final)
    (image, *_) = make_batch(method, size=2).crops
    x_BCHW = ((image.float() / 255 - MEAN) / STD).permute(0, 3, 1, 2)
    with torch.no_grad():
        ours = method.encoder(Tokens(image)).tokens_BTD
        torch.testing.assert_close(theirs.forward_features(x_BCHW), ours, rtol=1e-4, atol=1e-4)


def test_beits_base_model_of_timm_is_that_of_the_recipe(torchvision_loads):
    """Strictly, by names and shapes: ViT-B's weights take a minute to make."""
    import timm

    run = METHOD_RECIPES["beit"]()
    with torch.device("meta"):
        encoder = Encoder(run.model)
        theirs = timm.create_model("beit_base_patch16_224", num_classes=0, global_pool="token")
    theirs.load_state_dict(for_timm(encoder.state_dict()), strict=True, assign=True)


def test_the_command_writes_what_a_run_left(tmp_path, capsys):
    method = make("beit")
    whole = {name: tensor.contiguous() for name, tensor in to_file(method.state_dict()).items()}
    save_file(whole, tmp_path / "model.safetensors")
    main([str(tmp_path), str(tmp_path / "timm.safetensors"), "--to", "timm"])
    assert capsys.readouterr().out == "for timm's Beit\n"
    written = load_file(tmp_path / "timm.safetensors")
    table = method.encoder.rel_pos_bias.relative_position_bias_table
    assert all(torch.equal(written[f"blocks.{i}.attn.relative_position_bias_table"], table) for i in range(3))
    assert not any("mask_token" in name or name.startswith("head") for name in written)


def test_a_classifier_takes_its_head_along():
    method = make("supervised")
    flat = {name.removeprefix("encoder."): tensor for name, tensor in method.state_dict().items()}
    assert {"fc_norm.weight", "head.weight", "head.bias"} <= for_timm(flat).keys()
    assert not {"head.weight"} & for_timm({n: t for n, t in flat.items() if "fc_norm" not in n}).keys()


def test_what_is_no_encoder_or_no_file_is_refused(tmp_path):
    save_file({"head.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="want the weights of an encoder, got none"):
        export_timm(tmp_path, tmp_path / "x.safetensors")
    save_file({"cls_token": torch.zeros(1, 1, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"ends in \.pth"):
        export_timm(tmp_path, tmp_path / "x.bin")
