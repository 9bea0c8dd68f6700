"""The MAE checkpoint layout: keys and shapes as published, strict both ways, no pickled code."""

import argparse

import pytest
import torch
from safetensors.torch import save_file

from fastmim.interop.mae import (
    check_names,
    export_mae,
    from_mae,
    missing_in,
    to_file,
    to_mae,
    to_timm,
    words_on_weights,
)
from fastmim.interop.weights_file import read_weights
from fastmim.methods.mae import MAEConfig
from fastmim.methods.rmae import RMAEConfig
from fastmim.models import VITS
from fastmim.models.mae_decoder import DecoderConfig
from fastmim.models.vit import ViTConfig
from tests.engine.siamese import SiameseConfig

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


def test_an_untied_second_decoder_comes_back_from_a_runs_own_file():
    one, two = (RMAEConfig(decoder=DECODER, tie_decoders=False).build(MODEL) for _ in range(2))
    two.load_state_dict(from_mae(to_file(one.state_dict()), two.state_dict(), "file"))
    assert all(torch.equal(t, one.state_dict()[name]) for name, t in two.state_dict().items())
    assert not torch.equal(two.decoder2.mask_token, two.decoder.mask_token)


# --- methods with more than an MAE checkpoint has -----------------------------------------------------


def test_all_of_a_method_is_in_its_file_and_an_mae_checkpoint_within():
    torch.manual_seed(1)
    method = SiameseConfig().build(MODEL)
    state = method.state_dict()
    flat = to_file(state)
    assert len(flat) == len(state)
    own = {"encoder.mask_token", "head.bias", "teacher.mask_token", "teacher.blocks.1.norm1.bias"}
    assert own < flat.keys()
    theirs = {name for name in layout(2, 16, 1, 8, 16, 4) if not name.startswith(("decoder", "mask_token"))}
    assert theirs < flat.keys()
    assert to_timm(state).keys() == to_mae(state).keys() == theirs
    other = SiameseConfig().build(MODEL)
    assert not missing_in(flat, other.state_dict())
    other.load_state_dict(from_mae(flat, other.state_dict(), "file"))
    assert all(torch.equal(t, state[name]) for name, t in other.state_dict().items())


def test_an_mae_checkpoint_gives_a_method_its_encoder_and_leaves_the_rest():
    flat = official_checkpoint()["model"]
    method = SiameseConfig().build(MODEL)
    before = {name: t.clone() for name, t in method.state_dict().items()}
    method.load_state_dict(from_mae(flat, before, "file"))
    for name, t in method.state_dict().items():
        bare = name.removeprefix("encoder.")
        assert torch.equal(t, flat[bare] if name != bare and bare != "mask_token" else before[name]), name
    assert words_on_weights(flat, before) == (
        "encoder; not there: encoder.mask_token, teacher, head, teacher_head, norm_of_head; left out: decoder"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher.norm.bias": None}, "missing teacher.norm.bias"),  # a part is whole or not there
        ({"norm.bias": None}, "missing norm.bias"),
        ({"head.bias": torch.zeros(7)}, r"head.bias is \(7,\), this model has \(5,\)"),
        ({"projector.weight": torch.zeros(1)}, "not of this model projector.weight"),
    ],
)
def test_parts_in_pieces_and_parts_of_others_are_refused(changes, message):
    state = SiameseConfig().build(MODEL).state_dict()
    flat = {name: t for name, t in (to_file(state) | changes).items() if t is not None}
    with pytest.raises(ValueError, match=message):
        from_mae(flat, state, "file")


def test_a_file_of_another_method_is_no_checkpoint_of_mae_until_it_is_exported(tmp_path, capsys):
    mae = MAEConfig(decoder=DECODER).build(MODEL)
    file = to_file(
        mae.state_dict() | {"teacher.norm.bias": torch.zeros(16), "encoder.mask_token": torch.ones(1)}
    )
    with pytest.raises(ValueError, match="not of this model encoder.mask_token, teacher.norm.bias"):
        from_mae(file, mae.state_dict(), "file")
    save_file(file, tmp_path / "model.safetensors")
    export_mae(tmp_path, tmp_path / "mae.pth")
    assert capsys.readouterr().out.endswith("no place for it: encoder.mask_token, teacher\n")
    flat = read_weights(tmp_path / "mae.pth")
    assert flat.keys() == layout(2, 16, 1, 8, 16, 4).keys()
    mae.load_state_dict(from_mae(flat, mae.state_dict(), "file"))


def test_a_name_that_a_file_would_take_for_the_encoders_is_refused():
    check_names(["encoder.norm.weight", "decoder.mask_token", "teacher.norm.weight"])
    with pytest.raises(ValueError, match="want norm.weight under another name"):
        check_names(["norm.weight"])


def test_another_model_is_refused_by_name():
    flat = official_checkpoint()["model"]
    wanted = MAEConfig(decoder=DECODER).build(MODEL).state_dict()
    other = {**flat, "blocks.0.norm1.weight": torch.zeros(24)}
    with pytest.raises(
        ValueError, match=r"another model.*blocks.0.norm1.weight is \(24,\), this model has \(16,\)"
    ):
        from_mae(other, wanted, "file")
    encoder_only = {name: t for name, t in flat.items() if "decoder" not in name and name != "mask_token"}
    half = encoder_only | {"decoder_embed.bias": flat["decoder_embed.bias"]}
    with pytest.raises(ValueError, match="missing decoder_blocks.0.attn.proj.bias, .* and 16 more"):
        from_mae(half, wanted, "file")
    with pytest.raises(ValueError, match="not of this model head.weight"):
        from_mae({**flat, "head.weight": torch.zeros(1)}, wanted, "file")


@pytest.mark.parametrize(
    "config", [MAEConfig(decoder=DECODER), RMAEConfig(decoder=DECODER, tie_decoders=False)]
)
def test_an_encoder_alone_starts_a_method_with_a_fresh_decoder(config):
    """As released (mae_pretrain_vit_base.pth), as timm has it, and as our own encoder.safetensors."""
    flat = official_checkpoint()["model"]
    encoder = {name: t for name, t in flat.items() if "decoder" not in name and name != "mask_token"}
    method = config.build(MODEL)
    fresh = {name: t.clone() for name, t in method.state_dict().items()}
    method.load_state_dict(from_mae(encoder, fresh, "file"))
    for name, t in method.state_dict().items():
        assert torch.equal(t, encoder[name.removeprefix("encoder.")] if "encoder." in name else fresh[name])
    assert words_on_weights(encoder, fresh).startswith("encoder; not there: decoder")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    save_file({"cls_token": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="want a file that ends in"):
        export_mae(tmp_path, tmp_path / "out.bin")
