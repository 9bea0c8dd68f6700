"""What becomes of the instance: weights, copies, pickles, hooks, devices and compiled graphs; and back."""

import copy
import io
import pickle
from collections import Counter

import fastmim_kernels
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.apply.conftest import hf, images, mae_layout, make, named, timm_vit

BUILDS = {
    "timm": lambda: timm_vit(init_values=0.3, drop_path_rate=0.5),
    "ViT": lambda: hf("ViTModel"),
    "ViTMAE": lambda: hf("ViTMAEForPreTraining", norm_pix_loss=True),
    "Dinov2": lambda: hf("Dinov2Model", drop_path_rate=0.5),
    "Beit": lambda: hf("BeitModel", use_relative_position_bias=True),
    "MAE layout": mae_layout,
}


@pytest.fixture(params=BUILDS)
def model(request) -> nn.Module:
    return make(BUILDS[request.param])


def run(model: nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return named(model(images()))


def assert_same(actual: nn.Module, expected: nn.Module) -> None:
    left, right = run(actual), run(expected)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def classes(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


def is_patched(model: nn.Module) -> bool:
    return any(hasattr(cls, "swapped_from") for cls in classes(model))


def test_weights_stay_the_tensors_that_the_optimizer_holds(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = dict(model.state_dict(keep_vars=True))
    fastmim_kernels.apply(model)
    after = dict(model.state_dict(keep_vars=True))
    assert list(before) == list(after) and all(before[name] is after[name] for name in before)
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    sum(out.sum() for out in run(model).values() if out.requires_grad).backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, old[name])}
    assert any(name.endswith(("fc1.bias", "dense.bias")) for name in moved)


def test_a_state_dict_goes_both_ways(model):
    twin = copy.deepcopy(model)
    fastmim_kernels.apply(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    twin.load_state_dict(model.state_dict())
    model.load_state_dict(twin.state_dict())
    fastmim_kernels.apply(twin)
    assert_same(model, twin)


def test_another_instance_and_its_class_stay(model):
    other, before = copy.deepcopy(model), classes(model)
    forwards = [cls.forward for cls in before]
    fastmim_kernels.apply(model)
    assert classes(other) == before and [cls.forward for cls in before] == forwards
    assert not is_patched(other) and is_patched(model)
    assert all(isinstance(m, cls) for m, cls in zip(model.modules(), before, strict=True))
    assert list(map(str, classes(model))) == list(map(str, before))  # some libraries know modules by name


def test_revert_leaves_nothing(model):
    before, attributes = classes(model), [dict(vars(m)) for m in model.modules()]
    expected = run(model)
    fastmim_kernels.apply(model)
    run(model)
    fastmim_kernels.revert(model)
    assert classes(model) == before
    for module, had in zip(model.modules(), attributes, strict=True):
        assert vars(module).keys() == had.keys() and all(vars(module)[k] is had[k] for k in had)
    actual = run(model)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="nothing to revert in"):
        fastmim_kernels.revert(model)
    assert fastmim_kernels.apply(model).replaced  # and again


def test_twice_is_an_error(model):
    fastmim_kernels.apply(model)
    before = classes(model)
    with pytest.raises(ValueError, match=r"patched already: .* and \d+ more; revert\(model\) comes first"):
        fastmim_kernels.apply(model)
    assert classes(model) == before


def test_a_deep_copy_is_patched_and_on_its_own(model):
    fastmim_kernels.apply(model)
    twin = copy.deepcopy(model)
    assert classes(twin) == classes(model)
    assert_same(twin, model)
    fastmim_kernels.revert(model)
    assert is_patched(twin) and not is_patched(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert any(out.any() for out in run(twin).values())
    fastmim_kernels.revert(twin)
    assert classes(twin) == classes(model)


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_a_pickle_is_patched(model, protocol):
    fastmim_kernels.apply(model)
    twin = pickle.loads(pickle.dumps(model, protocol))
    assert classes(twin) == classes(model)
    assert_same(twin, model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert_same(torch.load(buffer, weights_only=False), model)


def test_it_moves_with_the_model(model, device):
    fastmim_kernels.apply(model)
    model = model.to(device).to(torch.bfloat16)
    torch.manual_seed(0)
    outputs = named(model(images().to(device, torch.bfloat16)))
    assert all(out.isfinite().all() and out.device.type == device for out in outputs.values())


def test_fp64_after_apply_is_refused(model):
    fastmim_kernels.apply(model)
    model.double()
    with pytest.raises(
        ValueError, match=r"want fp32, bf16 or fp16, got torch.float64: .*revert\(model\) first"
    ):
        model(images().double())
    fastmim_kernels.revert(model)
    assert named(model(images().double()))


def test_one_graph(model):
    check_one_graph(model, "aot_eager")


@pytest.mark.slow
def test_one_graph_of_generated_code():
    check_one_graph(make(lambda: timm_vit(depth=1)), "inductor")


@pytest.mark.parametrize("name", ["timm", "Dinov2", "ViTMAE"])
def test_one_graph_in_training_under_autocast(name):
    model = make(BUILDS[name])
    fastmim_kernels.apply(model)
    torch._dynamo.reset()
    graph = torch.compile(model.train(), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        outputs = named(graph(images()))
    assert all(out.isfinite().all() for out in outputs.values())
    sum(out.float().sum() for out in outputs.values() if out.requires_grad).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def check_one_graph(model: nn.Module, backend: str) -> None:
    model.eval()
    unpatched = copy.deepcopy(model)
    fastmim_kernels.apply(model)
    torch._dynamo.reset()
    noise = {}
    if type(model).__name__ == "ViTMAEForPreTraining":
        noise["noise"] = torch.rand(3, 16, generator=torch.Generator().manual_seed(1))
    graph = torch.compile(model, fullgraph=True, backend=backend)
    torch.manual_seed(0)
    actual = named(graph(images(), **noise))
    if type(model).__name__ == "MaskedAutoencoder":  # its masks are drawn by the compiler's own generator
        assert actual["0.0"].isfinite() and actual["2.0"].sum() == 3 * 12
        return
    expected = named(unpatched(images(), **noise))
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    sum(v.sum() for v in actual.values() if v.requires_grad).backward()
    sum(v.sum() for v in expected.values() if v.requires_grad).backward()
    for (name, p), q in zip(model.named_parameters(), unpatched.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_hooks_set_after_apply_fire_on_every_module_with_weights(model):
    """FSDP and ZeRO-3 gather the weights of a module in such hooks, and let go of them in the other."""
    reference, calls = copy.deepcopy(model), [set(), set()]
    fastmim_kernels.apply(model)
    for net, names in zip((model, reference), calls, strict=True):
        for name, module in net.named_modules():
            if not list(module.parameters()):
                continue
            module.register_forward_pre_hook(lambda *_, name=name, names=names: names.add(name))
        run(net)
    assert calls[0] == calls[1]


def test_weights_are_used_inside_the_module_that_owns_them(model):
    """As FSDP would have it: outside of its own call a module of leaves has no weights."""
    model.eval()
    expected = run(copy.deepcopy(model))
    fastmim_kernels.apply(model)
    leaves = [m for m in model.modules() if not list(m.children()) and list(m.parameters())]
    kept = {m: {name: p.data for name, p in m.named_parameters(recurse=False)} for m in leaves}

    def gather(module, *_):
        for name, data in kept[module].items():
            getattr(module, name).data = data

    def release(module, *_):
        for name in kept[module]:
            getattr(module, name).data = torch.full_like(kept[module][name], float("nan"))

    for module in leaves:
        release(module)
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
    actual = run(model)
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_a_class_exchanged_again_is_not_reverted():
    model = make(BUILDS["timm"])
    fastmim_kernels.apply(model)
    mlp = model.blocks[0].mlp
    mlp.__class__ = type("FSDPMlp", (type(mlp),), {})
    before = classes(model)
    with pytest.raises(ValueError, match="FSDPMlp: its class was exchanged since apply"):
        fastmim_kernels.revert(model)
    assert classes(model) == before  # all or nothing


@pytest.mark.parametrize(
    "path", ["blocks.1.mlp.fc1", "blocks.1.mlp.act", "blocks.0.norm2", "blocks.0.ls1", "blocks.1.drop_path1"]
)
def test_a_module_exchanged_after_apply_is_an_error(path):
    """LoRA wraps a linear layer: behind its GELU, the sum would be wrong in silence."""
    model = make(BUILDS["timm"])
    fastmim_kernels.apply(model)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Sequential(model.get_submodule(path)))
    with pytest.raises(ValueError, match="a Sequential was put in place of a patched module"):
        run(model)


def test_attention_dropout_switched_on_after_apply_is_an_error():
    model = make(BUILDS["timm"])
    fastmim_kernels.apply(model)
    model.blocks[1].attn.attn_drop.p = 0.1
    with pytest.raises(ValueError, match="attention dropout was switched on"):
        run(model)
    assert run(model.eval())


def test_a_patched_norm_called_alone_is_a_norm():
    model = make(BUILDS["timm"])
    fastmim_kernels.apply(model)
    norm, x = model.blocks[0].norm2, torch.randn(2, 3, 48)
    expected = torch.nn.functional.layer_norm(x, (48,), norm.weight, norm.bias, norm.eps)
    assert torch.equal(norm(x), expected)


def test_fsdp_of_every_part(tmp_path):
    """FSDP2 exchanges classes too, on top of ours."""
    from torch.distributed import destroy_process_group, init_device_mesh, init_process_group, is_initialized
    from torch.distributed.fsdp import fully_shard

    model = make(BUILDS["timm"]).eval()
    expected = run(model)["output"]
    fastmim_kernels.apply(model)
    ours = not is_initialized()  # DeepSpeed leaves its group of one behind in this process
    if ours:
        init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for module in reversed([m for m in model.modules() if list(m.parameters())]):
            fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
        assert type(model.blocks[0].ls1).__name__ == "FSDPLayerScale"
        actual = run(model)["output"]
        actual.sum().backward()
    finally:
        if ours:
            destroy_process_group()
    torch.testing.assert_close(actual, expected)
    assert all(p.grad is not None for p in model.blocks.parameters())


@pytest.mark.parametrize("first", ["apply", "wrap"])
def test_ddp(tmp_path, first):
    from torch.distributed import destroy_process_group, init_process_group, is_initialized
    from torch.nn.parallel import DistributedDataParallel

    model = make(BUILDS["timm"]).eval()
    expected = run(model)["output"]
    ours = not is_initialized()
    if ours:
        init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        if first == "apply":
            fastmim_kernels.apply(model)
        wrapped = DistributedDataParallel(model)
        if first == "wrap":
            fastmim_kernels.apply(wrapped)
        actual = run(wrapped)["output"]
        actual.sum().backward()
    finally:
        if ours:
            destroy_process_group()
    assert is_patched(model)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert all(p.grad is not None for p in model.blocks.parameters())


def test_dtypes_of_a_patched_norm():
    """The sum in the widest dtype of what is added, normed in the sum's; in half precision under autocast."""
    model = make(BUILDS["timm"])
    fastmim_kernels.apply(model)
    norm, x = model.blocks[0].norm2, torch.randn(2, 3, 48)
    half, bf16 = x.to(torch.bfloat16), torch.bfloat16
    for given, scale, wanted in [
        ((half, x), None, (torch.float32, torch.float32)),
        ((x, half), None, (torch.float32, torch.float32)),
        ((half, half), None, (bf16, bf16)),
        ((half, half), torch.ones(48), (torch.float32, torch.float32)),
    ]:
        assert tuple(out.dtype for out in norm(*given, scale)) == wanted
    with torch.autocast("cpu", bf16):
        assert tuple(out.dtype for out in norm(half, x)) == (bf16, torch.float32)
        assert tuple(out.dtype for out in norm(x, half)) == (torch.float32, torch.float32)


def test_the_ops_of_the_report_are_those_that_run(model):
    class Record(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.ran = Counter()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.ran[str(func)] += 1
            return func(*args, **(kwargs or {}))

    report, said = fastmim_kernels.apply(model), Counter()
    for row in report.replaced:
        if row.op != "attention":  # which chooses among torch and xformers
            said[f"fastmim.{row.op}.default"] += row.count
    with Record() as record:
        run(model)
    assert Counter({op: n for op, n in record.ran.items() if op.startswith("fastmim.")}) == said
