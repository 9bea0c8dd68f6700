"""The MAE checkpoint layout: keys and shapes as published, strict both ways, no pickled code."""

import argparse
import pickle

import pytest
import torch
from safetensors.torch import save_file

from fastmim.interop.mae import export_mae, from_mae, read_weights, to_mae
from fastmim.methods.mae import MAEConfig
from fastmim.methods.rmae import RMAEConfig
from fastmim.models import VITS
from fastmim.models.mae_decoder import DecoderConfig
from fastmim.models.vit import ViTConfig

MODEL = ViTConfig(width=16, depth=2, heads=2, patch=4, image_size=16)
DECODER = DecoderConfig(width=8, depth=1, heads=2)


def layout(depth: int, D: int, decoder_depth: int, d: int, N: int, p: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of facebookresearch/mae's MaskedAutoencoderViT, written from its published files."""

    def blocks(name: str, depth: int, w: int) -> dict[str, tuple[int, ...]]:
        shapes = {
            "norm1": (w,), "attn.qkv": (3 * w, w), "attn.proj": (w, w), "norm2": (w,),
            "mlp.fc1": (4 * w, w), "mlp.fc2": (w, 4 * w),
        }  # fmt: skip
        return {
            f"{name}.{i}.{layer}.{kind}": shape if kind == "weight" else shape[:1]
            for i in range(depth)
            for layer, shape in shapes.items()
            for kind in ("weight", "bias")
        }

    return {
        "cls_token": (1, 1, D), "pos_embed": (1, N + 1, D),
        "patch_embed.proj.weight": (D, 3, p, p), "patch_embed.proj.bias": (D,),
        **blocks("blocks", depth, D), "norm.weight": (D,), "norm.bias": (D,),
        "mask_token": (1, 1, d), "decoder_pos_embed": (1, N + 1, d),
        "decoder_embed.weight": (d, D), "decoder_embed.bias": (d,),
        **blocks("decoder_blocks", decoder_depth, d), "decoder_norm.weight": (d,), "decoder_norm.bias": (d,),
        "decoder_pred.weight": (p * p * 3, d), "decoder_pred.bias": (p * p * 3,),
    }  # fmt: skip


def test_layout_is_that_of_an_mae_checkpoint():
    with torch.device("meta"):
        flat = to_mae(MAEConfig().build(VITS["vit_base"]).state_dict())
    assert {name: tuple(t.shape) for name, t in flat.items()} == layout(12, 768, 8, 512, 196, 16)


def official_checkpoint() -> dict:
    """What the reference's training script writes, with random weights."""
    rng = torch.Generator().manual_seed(5)
    shapes = layout(2, 16, 1, 8, 16, 4)
    model = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    return {"model": model, "epoch": 7, "args": argparse.Namespace(lr=1e-3, model="mae")}


@pytest.mark.parametrize(
    "config", [MAEConfig(decoder=DECODER), RMAEConfig(decoder=DECODER)], ids=["mae", "rmae"]
)
def test_an_official_checkpoint_loads_strictly_and_ours_loads_back(tmp_path, config):
    official = official_checkpoint()
    torch.save(official, tmp_path / "mae.pth")
    method = config.build(MODEL)
    method.load_state_dict(from_mae(read_weights(tmp_path / "mae.pth"), method.state_dict(), "file"))
    assert torch.equal(method.encoder.blocks[1].mlp.fc1.weight, official["model"]["blocks.1.mlp.fc1.weight"])

    save_file(to_mae(method.state_dict()), tmp_path / "model.safetensors")
    for name in ("ours.pth", "ours.safetensors"):
        export_mae(tmp_path, tmp_path / name)  # a run directory
    ours = torch.load(tmp_path / "ours.pth", weights_only=True)["model"]
    assert ours.keys() == official["model"].keys()
    assert all(torch.equal(ours[name], t) for name, t in official["model"].items())
    assert read_weights(tmp_path / "ours.safetensors").keys() == ours.keys()


def test_an_untied_second_decoder_starts_as_the_first():
    method = RMAEConfig(decoder=DECODER, tie_decoders=False).build(MODEL)
    method.load_state_dict(from_mae(official_checkpoint()["model"], method.state_dict(), "file"))
    assert torch.equal(method.decoder2.mask_token, method.decoder.mask_token)
    assert torch.equal(method.decoder2.decoder_pred.weight, method.decoder.decoder_pred.weight)


def test_another_model_is_refused_by_name():
    flat = official_checkpoint()["model"]
    wanted = MAEConfig(decoder=DECODER).build(MODEL).state_dict()
    other = {**flat, "blocks.0.norm1.weight": torch.zeros(24)}
    with pytest.raises(
        ValueError, match=r"another model.*blocks.0.norm1.weight is \(24,\), this model has \(16,\)"
    ):
        from_mae(other, wanted, "file")
    encoder_only = {name: t for name, t in flat.items() if "decoder" not in name and name != "mask_token"}
    with pytest.raises(ValueError, match="missing decoder_blocks.0.attn.proj.bias, .* and 17 more"):
        from_mae(encoder_only, wanted, "file")
    with pytest.raises(ValueError, match="not of this model head.weight"):
        from_mae({**flat, "head.weight": torch.zeros(1)}, wanted, "file")


class Malicious:
    def __reduce__(self):
        return (print, ("this must never be printed",))


def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, capsys):
    torch.save({"model": {"cls_token": Malicious()}}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="or holds more than tensors"):
        read_weights(tmp_path / "bad.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(ValueError, match="init-from: "):
        read_weights(tmp_path / "raw.pth")
    assert capsys.readouterr().out == ""


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got nothing at"):
        read_weights(tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("text.pth", "text.safetensors"):
        with pytest.raises(ValueError, match="init-from: "):
            read_weights(tmp_path / name)
    save_file({"cls_token": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="want a file that ends in"):
        export_mae(tmp_path, tmp_path / "out.bin")
