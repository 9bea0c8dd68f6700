"""Checkpoints in the layouts of the official repositories, made with their names, start our methods."""

from dataclasses import replace

import pytest
import torch

from fastmim.interop.mae import from_mae, in_file
from fastmim.interop.weights_file import read_weights
from fastmim.methods import METHODS
from fastmim.models.mae_decoder import DecoderConfig
from fastmim.models.vit import ViTConfig

SIZE = ViTConfig(width=32, depth=2, heads=2, patch=4, image_size=16)


def method_of(name, seed):
    torch.manual_seed(seed)
    model = replace(SIZE, **METHODS[name].encoder)
    return METHODS[name]().fit(model, DecoderConfig(width=16, depth=1, heads=2)).build(model)


def encoder_of(state):
    return {n.removeprefix("encoder."): t for n, t in state.items() if n.startswith("encoder.")}


def beit_file(state):
    found = encoder_of(state)
    found["rel_pos_bias.relative_position_index"] = torch.zeros(17, 17, dtype=torch.int64)
    found |= {n.replace("head.", "lm_head."): t for n, t in state.items() if n.startswith("head.")}
    return {"model": found, "optimizer": {"state": {}}, "epoch": 799}


def dino_file(state):
    backbone = {f"backbone.{n}": t for n, t in encoder_of(state).items()}
    if "backbone.mask_token" in backbone:
        backbone["backbone.masked_embed"] = backbone.pop("backbone.mask_token").reshape(1, -1)
    places = {"0": "0", "1": "2", "2": "4"}
    head = {}
    for name, tensor in state.items():
        if name.startswith("head.mlp."):
            _, _, number, what = name.split(".")
            head[f"head.mlp.{places[number]}.{what}"] = tensor
        elif name.startswith("head.codes."):
            head[name.replace("codes", "last_layer")] = tensor
    teacher = backbone | head
    return {"teacher": teacher, "student": {f"module.{n}": t + 1 for n, t in teacher.items()}, "epoch": 100}


def moco_file(state):
    found = {f"module.base_encoder.{n}": t for n, t in encoder_of(state).items()}
    found |= {
        n.replace("projector.", "module.base_encoder.head."): t
        for n, t in state.items()
        if n.startswith("projector.")
    }
    found |= {f"module.{n}": t for n, t in state.items() if n.startswith("predictor.")}
    found |= {f"module.momentum_encoder.{n}": t + 1 for n, t in encoder_of(state).items()}
    found["module.base_encoder.head.1.num_batches_tracked"] = torch.tensor(7)
    return {"state_dict": found, "arch": "vit_base", "epoch": 300}


def cae_file(state):
    found = {f"encoder.{n}": t for n, t in encoder_of(state).items()}
    found |= {"mask_token": torch.zeros(1, 1, 32), "regresser.regressers.0.norm1.weight": torch.ones(32)}
    return {"model": found}


FILES = {
    "beit": (beit_file, {"head"}),
    "data2vec": (beit_file, {"head"}),
    "dino": (dino_file, {"head"}),
    "ibot": (dino_file, {"head"}),
    "mocov3": (moco_file, {"projector", "predictor"}),
    "cae": (cae_file, set()),
}


@pytest.mark.parametrize("name", FILES)
def test_an_official_checkpoint_starts_the_method(name, tmp_path):
    make_file, parts = FILES[name]
    theirs, ours = method_of(name, 1), method_of(name, 2)
    torch.save(make_file(theirs.state_dict()), tmp_path / "official.pth")
    flat, wanted = read_weights(tmp_path / "official.pth"), ours.state_dict()
    ours.load_state_dict(from_mae(flat, wanted, "official.pth"))
    for key, tensor in theirs.state_dict().items():
        part = key.split(".")[0]
        if part == "encoder" or part in parts:
            assert in_file(key) in flat, key
            assert torch.equal(ours.state_dict()[key], tensor), key


def test_other_files_keep_their_names(tmp_path):
    state = {n: t for n, t in encoder_of(method_of("mae", 1).state_dict()).items()}
    torch.save({"model": state}, tmp_path / "mae.pth")
    assert read_weights(tmp_path / "mae.pth").keys() == state.keys()
