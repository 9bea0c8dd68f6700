"""Encoders out of others' files: their features are those of the library that the file is of."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastmim.interop.encoders import load_encoder, load_pretrained
from fastmim.models.tokens import Tokens
from fastmim.models.vit import Encoder, ViTConfig
from tests.interop.test_layouts import FILES, encoder_of, method_of

SIDE, PATCH, WIDTH, HEADS = 32, 8, 128, 2
SIZES = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "intermediate_size": 4 * WIDTH, "image_size": SIDE, "patch_size": PATCH,
}  # fmt: skip
DECODER = {
    "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 128,
}  # fmt: skip


def shaken(model):
    """Every parameter away from where it begins: zeros and ones hide a swap."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def tokens_of(encoder, image_BHWC):
    with torch.no_grad():
        return encoder.eval()(Tokens(image_BHWC)).tokens_BTD


def pixels(mean, std, B=2):
    torch.manual_seed(2)
    image_BHWC = torch.randint(0, 256, (B, SIDE, SIDE, 3), dtype=torch.uint8)
    x_BCHW = (image_BHWC.float() / 255 - torch.tensor(mean)) / torch.tensor(std)
    return image_BHWC, x_BCHW.permute(0, 3, 1, 2)


@pytest.mark.usefixtures("torchvision_loads")
@pytest.mark.parametrize("kind", ["ViT", "ViTMAE", "Dinov2"])
@pytest.mark.parametrize("form", ["safetensors", "shards", "bin"])
def test_folders_of_transformers_have_their_features(kind, form, tmp_path):
    import transformers

    config = getattr(transformers, f"{kind}Config")(**SIZES, **(DECODER if kind == "ViTMAE" else {}))
    whole = {"ViT": "ViTModel", "ViTMAE": "ViTMAEForPreTraining", "Dinov2": "Dinov2Model"}[kind]
    model = shaken(getattr(transformers, whole)(config))
    model.save_pretrained(tmp_path, max_shard_size="200KB" if form == "shards" else "1GB")
    if form == "bin":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    found = load_pretrained(tmp_path)
    assert found.encoder.config.size == (SIDE, SIDE) and found.encoder.config.heads == HEADS
    image_BHWC, x_BCHW = pixels(mean, std)
    with torch.no_grad():
        if kind == "ViTMAE":
            model.config.mask_ratio = 0.0
            torch.manual_seed(0)
            z = model.vit(x_BCHW, noise=torch.arange(16.0).expand(2, -1)).last_hidden_state
        else:
            z = model(x_BCHW).last_hidden_state
    assert torch.allclose(tokens_of(found.encoder, image_BHWC), z, atol=2e-4)
    if kind == "ViTMAE":
        assert "decoder_blocks.0.attn.qkv.weight" in found.beside and "mask_token" in found.beside


@pytest.mark.usefixtures("torchvision_loads")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("how", ["plain", "layer_scale", "no_bias", "beit"])
def test_files_of_timm_have_their_features(how, suffix, tmp_path):
    import timm

    sizes = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 2, "num_heads": HEADS}
    sizes |= {"num_classes": 3}
    if how == "beit":
        model = timm.models.beit.Beit(
            **sizes, init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=True, global_pool="token"
        )
    else:
        extra = {"plain": {}, "layer_scale": {"init_values": 0.1}, "no_bias": {"qkv_bias": False}}[how]
        model = timm.models.VisionTransformer(**sizes, **extra)
    model = shaken(model)
    path = tmp_path / f"weights{suffix}"
    state = {
        name: t for name, t in model.state_dict().items() if not name.endswith("relative_position_index")
    }
    save_file(state, path) if suffix == ".safetensors" else torch.save({"model": state}, path)
    found = load_pretrained(path)
    assert set(found.beside) == {"head.weight", "head.bias"}
    image_BHWC, x_BCHW = pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        z = model.forward_features(x_BCHW)
    assert torch.allclose(tokens_of(found.encoder, image_BHWC), z, atol=1e-4)


@pytest.mark.parametrize("name", FILES)
def test_official_layouts_give_their_encoder(name, tmp_path):
    state = method_of(name, seed=3).state_dict()
    make = FILES[name][0]
    torch.save(make(state), tmp_path / "x.pth")
    encoder = load_pretrained(tmp_path / "x.pth", heads=2).encoder
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, encoder_of(state)[key])


def test_what_is_no_encoder_is_a_line(tmp_path):
    good = Encoder(ViTConfig(width=64, depth=1, heads=1, patch=4, image_size=(16, 24))).state_dict()
    cases = {
        "names": ({"conv1.weight": torch.zeros(3)}, "a vision transformer with a class token"),
        "mlp": (good | {"blocks.0.mlp.fc1.weight": torch.zeros(96, 64)}, "want an MLP of 4 x 64"),
        "positions": (good, "positions of a class token and of 4 x 4 patches, got 25 rows"),
        "missing": ({n: t for n, t in good.items() if "proj.bias" not in n}, "positions"),
        "registers": (good | {"pos_embed": torch.zeros(1, 24, 64)}, "got 24 rows"),
    }
    for name, (state, message) in cases.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(state, path)
        with pytest.raises(ValueError, match=message):
            load_encoder(path)
    encoder = load_pretrained(tmp_path / "positions.safetensors", image_size=(16, 24)).encoder
    assert encoder.config.grid == (4, 6) and encoder.config.positions == "sincos"
    with pytest.raises(ValueError, match="missing blocks.0.attn.proj.bias, patch_embed.proj.bias"):
        load_pretrained(tmp_path / "missing.safetensors", image_size=(16, 24))
    with pytest.raises(ValueError, match="got nothing at"):
        load_encoder(tmp_path / "nothing")
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="one of vit, vit_mae, dinov2, got 'bert'"):
        load_encoder(folder)
    (folder / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="does not say 'hidden_size'"):
        load_encoder(folder)
    path = tmp_path / "evil.pth"
    torch.save({"model": Evil()}, path)
    with pytest.raises(ValueError, match="would be run"):
        load_encoder(path)


class Evil:
    def __reduce__(self):
        return print, ("ran",)
