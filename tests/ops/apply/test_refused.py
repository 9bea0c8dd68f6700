"""What a patched model cannot do says in one line to revert it first; what it can do, it does."""

import copy
import pickle
from collections.abc import Callable

import fastmim_kernels
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from tests.ops.apply.conftest import hf, images, mae_layout, make, timm_vit

BUILDS = {
    "timm": lambda: timm_vit(init_values=0.3),
    "timm blocks": lambda: timm_vit(qk_norm=True, proj_bias=False),  # add_layer_norm alone
    "timm MLPs": lambda: timm_vit(norm_layer="rmsnorm", qk_norm=True),  # bias_gelu alone
    "ViT": lambda: hf("ViTModel", attn_implementation="eager"),
    "Dinov2": lambda: hf("Dinov2Model", attn_implementation="eager"),
    "Beit": lambda: hf("BeitModel", attn_implementation="eager"),
    "ViTMAE": lambda: hf("ViTMAEForPreTraining", attn_implementation="eager"),
    "MAE layout": mae_layout,
}
Task = Callable[[nn.Module, Tensor], object]


def tensor(outputs) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs
    return next(iter(outputs.values())) if hasattr(outputs, "values") else outputs[1]


def script(model, x):
    torch.jit.script(model)


def symbolic(model, x):
    return torch.fx.symbolic_trace(model)(x)


def features(model, x):
    from torchvision.models.feature_extraction import create_feature_extractor

    return create_feature_extractor(model, ["blocks.1.mlp"])(x)


def functional_grad(model, x):
    weights = {name: p.detach() for name, p in model.named_parameters()}
    torch.func.grad(lambda w: tensor(torch.func.functional_call(model, w, (x,))).square().sum())(weights)


def per_sample(model, x):
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(w: dict[str, Tensor], one: Tensor) -> Tensor:
        return torch.func.functional_call(model, w, (one[None],)).square().sum()

    return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)


def vmapped(model, x):
    return torch.func.vmap(lambda one: tensor(model(one[None])), randomness="same")(x)


def jvp(model, x):
    return torch.func.jvp(lambda v: tensor(model(v)), (x,), (x,))


def vjp(model, x):
    return torch.func.vjp(lambda v: tensor(model(v)), x)


def dual(model, x):
    with forward_ad.dual_level():
        return model(forward_ad.make_dual(x, torch.ones_like(x)))


def twice_differentiated(model, x):
    given = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = tensor(model(x)).square().sum()
    grads = torch.autograd.grad(total, list(given.values()), create_graph=True, allow_unused=True)
    return torch.stack([g.square().sum() for g in grads if g is not None]).sum().backward()


FX, FUNC, FORWARD = (
    "torch.fx cannot trace",
    r"torch.func \(grad, vmap, vjp, jvp\) cannot transform",
    "forward-mode",
)
REFUSED: dict[str, tuple[Task, str]] = {
    "jit.script": (script, "torch.jit.script cannot read"),
    "fx": (symbolic, FX),
    "torchvision": (features, FX),
    "func.grad": (functional_grad, FUNC),
    "per-sample gradients": (per_sample, FUNC),
    "vmap": (vmapped, FUNC),
    "vjp": (vjp, FUNC),
    "jvp": (jvp, FUNC),
    "forward mode": (dual, FORWARD),
    "double backward": (twice_differentiated, "has no second derivative"),
}


OF_TIMM_ALONE = {"fx", "torchvision", "per-sample gradients"}  # the others cannot do it unpatched either
CASES = [
    (name, task) for name in BUILDS for task in REFUSED if name[:4] == "timm" or task not in OF_TIMM_ALONE
]


@pytest.mark.parametrize(("name", "task"), CASES)
def test_one_line_that_says_revert(name, task):
    run, why = REFUSED[task]
    model = make(BUILDS[name]).train(name in ("ViTMAE", "MAE layout"))
    fastmim_kernels.apply(model)
    with unfused(), pytest.raises(ValueError, match=why) as caught:
        run(model, images())
    said = str(caught.value)
    assert "fastmim_kernels.revert(model) first" in said and "\n" not in said
    fastmim_kernels.revert(model)
    if name.startswith("timm"):
        with unfused():
            run(model, images())  # as it could before


def unfused():
    """torch's own fused attention has neither forward mode nor second derivatives."""
    return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)


# --- what works ------------------------------------------------------------------------------------------


def traced(model, x):
    return torch.jit.trace(model, x)


def exported(model, x):
    return torch.export.export(model, (x,), strict=False).module()


def exported_strictly(model, x):
    return torch.export.export(model, (x,), strict=True).module()


def copied(model, x):
    return copy.deepcopy(model)


def pickled(model, x):
    return pickle.loads(pickle.dumps(model))


def parallel(model, x):
    return nn.DataParallel(model)


def called_by_weights(model, x):
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return lambda y: torch.func.functional_call(model, weights, (y,))


def parametrized(model, x):
    from torch.nn.utils import parametrizations, prune

    parametrizations.weight_norm(model.blocks[0].mlp.fc1)
    prune.identity(model.blocks[1].mlp.fc1, "weight")
    return model


@pytest.mark.parametrize(
    "make_new",
    [traced, exported, exported_strictly, copied, pickled, parallel, called_by_weights, parametrized],
)
def test_what_a_patched_model_can_do(make_new):
    model = make(BUILDS["timm"]).eval()
    expected, other = model(images()), images(3).flip(0)
    there = model(other)
    fastmim_kernels.apply(model)
    new = make_new(model, images())
    # DataParallel goes to a GPU where there is one
    torch.testing.assert_close(new(images()).cpu(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(new(other).cpu(), there, rtol=1e-4, atol=1e-5)


def test_several_gradients_at_once():
    """is_grads_batched maps the backward alone: each op does it, one after the other."""
    model = make(BUILDS["timm"]).eval()
    weight, x = model.blocks[0].mlp.fc1.weight, images()
    each = torch.eye(5)[:, None].expand(5, 3, 5)

    def jacobian() -> Tensor:
        return torch.autograd.grad(model(x), weight, each, is_grads_batched=True)[0]

    expected = jacobian()
    fastmim_kernels.apply(model)
    torch.testing.assert_close(jacobian(), expected, rtol=1e-4, atol=1e-5)


def test_create_graph_alone_is_no_second_derivative():
    model = make(BUILDS["timm"])
    fastmim_kernels.apply(model)
    weight = model.blocks[0].mlp.fc1.weight
    (once,) = torch.autograd.grad(model(images()).sum(), weight, create_graph=True)
    (plain,) = torch.autograd.grad(model(images()).sum(), weight)
    assert torch.equal(once, plain)
