"""Models of timm's registry and of transformers: applied, run and reverted, whatever they are made of."""

import copy

import fastmim_kernels
import pytest
import torch
from torch import Tensor, nn

from tests.ops.apply import zoo
from tests.ops.apply.conftest import SIZES, livelier, named, skip_layers_of_earlier_releases

SAMPLE = {  # and whether anything is replaced in it
    "test_vit": True, "test_vit2": True, "visformer_tiny": False, "samvit_base_patch16_224": True,
    "volo_d1_224": True, "cait_xxs24_224": True, "beit_base_patch16_224": True,
    "naflexvit_base_patch16_parfac_gap": True, "deit_tiny_distilled_patch16_224": True, "convit_tiny": True,
    "eva02_tiny_patch14_224": False, "test_maxvit": True, "edgenext_xx_small": True, "test_resnet": False,
}  # fmt: skip


def outputs(model: nn.Module, *given, **kwargs) -> dict[str, Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return named(model(*given, **kwargs))


def check(name: str, model: nn.Module, *given, **kwargs) -> bool:
    """Equal outputs in eval and training mode; reverted to what it was. Whether anything was replaced."""
    untouched = copy.deepcopy(model)
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    try:
        report = fastmim_kernels.apply(model)
    except ValueError as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert said.startswith("nothing to patch in") and "meta device" not in said, name
        assert [type(m) for m in model.modules()] == classes, name
        return False
    assert report.replaced and all(row.note for row in report.left), name
    assert list(model.state_dict()) == keys, name
    for training in (False, True):
        expected = outputs(untouched.train(training), *given, **kwargs)
        actual = outputs(model.train(training), *given, **kwargs)
        assert actual.keys() == expected.keys(), name
        for key, value in actual.items():
            torch.testing.assert_close(
                value, expected[key], rtol=1e-3, atol=1e-4, msg=f"{name}: {key}\n{report}"
            )
    fastmim_kernels.revert(model)
    assert [type(m) for m in model.modules()] == classes, name
    model.load_state_dict(untouched.state_dict())  # statistics of BatchNorm went apart by rounding
    before, after = (outputs(m.eval(), *given, **kwargs) for m in (untouched, model))
    assert all(torch.equal(after[key], before[key]) for key in before), name
    return True


@pytest.mark.parametrize("name", SAMPLE)
def test_a_model_of_timm(name):
    built = zoo.build(name)
    if built is None:
        pytest.skip(f"this timm builds no {name} small enough to run here")
    assert check(name, *built) == SAMPLE[name]


@pytest.mark.long
def test_every_model_of_timm():
    """Each that can be built with few enough parameters, file by file; the others are named."""
    counts = {"ops in": 0, "left": 0, "too large": 0}
    for file, names in zoo.architectures().items():
        large = []
        for name in names:
            built = zoo.build(name)
            if built is None:
                large.append(name)
            else:
                counts["ops in" if check(name, *built) else "left"] += 1
        counts["too large"] += len(large)
        print(f"{file}: {len(names)} models, too large: {', '.join(large) or 'none'}", flush=True)
    print(counts)
    assert counts["ops in"] > 100 and counts["left"] > 100


# --- transformers ----------------------------------------------------------------------------------------

TRANSFORMERS = {  # model, options of its configuration, whether anything is replaced
    "ViTModel": (SIZES | {"intermediate_size": 96}, True),
    "ViTMAEModel": (SIZES | {"intermediate_size": 96}, True),
    "DeiTModel": (SIZES | {"intermediate_size": 96}, True),
    "Dinov2Model": (SIZES | {"use_swiglu_ffn": True}, True),
    "Dinov2WithRegistersModel": (SIZES, True),
    "BeitModel": (SIZES | {"intermediate_size": 96, "use_relative_position_bias": True}, True),
    "Data2VecVisionModel": (SIZES | {"intermediate_size": 96}, True),
    "DINOv3ViTModel": (SIZES | {"intermediate_size": 96}, True),
    "YolosModel": (SIZES | {"intermediate_size": 96, "image_size": [32, 32]}, True),
    "SiglipVisionModel": (SIZES | {"intermediate_size": 96}, False),  # tanh GELU
    "CLIPVisionModel": (SIZES | {"intermediate_size": 96}, False),  # quick GELU
    "SwinModel": (
        {
            "image_size": 32, "patch_size": 4, "embed_dim": 16, "window_size": 4, "depths": [2, 2],
            "num_heads": [2, 2],
        },
        True,
    ),
    "PvtModel": (
        {
            "image_size": 64, "hidden_sizes": [16, 32, 40, 48], "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 2],
        },
        True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_model_of_transformers(name):
    import transformers

    options, replaced = TRANSFORMERS[name]
    if name == "Dinov2Model":  # with SwiGLU, whose layers alone are served
        skip_layers_of_earlier_releases()
    cls = getattr(transformers, name, None)
    if cls is None:
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    config = cls.config_class(**options)
    model = livelier(cls(config).eval())
    side = getattr(config, "image_size", 32)
    side = side if isinstance(side, int) else side[0]
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(7))
    assert check(name, model, x) == replaced
