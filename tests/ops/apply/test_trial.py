"""A layer counts as what it is by its parts and a trial against its own code, whatever its name."""

import re

import fastmim_kernels
import pytest
import torch
from fastmim_kernels.apply.trial import rehearsal
from torch import Tensor, nn

from tests.ops.apply.conftest import images, make, timm_vit


class SelfAttn(nn.Module):
    """Attention of another codebase, with knobs of what may be wrong with it."""

    def __init__(self, width: int = 48, num_heads: int = 2, shift: float = 0.0, fault: str = ""):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.1)
        if fault == "weights":
            self.rel_pos = nn.Parameter(torch.zeros(1))
        if fault == "setting":
            self.window_size = 7
        if fault == "image":
            self.forward = self.of_images
        type(self).calls = 0

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        logits = q @ k.mT * self.scaled(q.shape[-1])
        return self.proj_drop(self.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(B, N, D)))

    def scaled(self, width: int) -> float:
        return width**-0.5


class Unscaled(SelfAttn):
    def scaled(self, width):
        return 1.0


class OfImages(SelfAttn):
    def forward(self, x):
        B, H, W, D = x.shape
        return super().forward(x.view(B, H * W, D)).view(B, H, W, D)


class WithRope(SelfAttn):
    def forward(self, x, rope):
        return super().forward(x * rope)


class LouderInTraining(SelfAttn):
    def forward(self, x):
        return super().forward(x) * (2 if self.training else 1)


class OddOnes(SelfAttn):
    """As it should be, but for an odd number of tokens."""

    def forward(self, x):
        return super().forward(x) + x.shape[1] % 2


class WrongGradient(SelfAttn):
    def forward(self, x):
        out = super().forward(x)
        return out.detach() * 2 - out if x.shape[1] == 16 else out


class OtherQueue(SelfAttn):
    """Queries and keys the other way round in the product: what zeros in their place would hide."""

    def forward(self, x):
        B, N, _ = x.shape
        v, k, q = self.qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(
            (((q @ k.mT) * self.scaled(q.shape[-1])).softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
        )


class Mlp(nn.Module):  # a place that is patched, so that apply has something to do
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Gated(Mlp):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)) * self.fc1(x))


def verdict(layer: nn.Module) -> str:
    """Empty where the layer was replaced, else why it was left."""
    report = fastmim_kernels.apply(nn.ModuleDict({"layer": layer, "other": Mlp()}))
    notes = {row.where: row.note for row in (*report.replaced, *report.left)}
    return notes["layer"]


def test_attention_of_another_name_is_replaced():
    torch.manual_seed(0)
    layer, x = SelfAttn(), torch.randn(3, 7, 48)
    torch.manual_seed(1)
    expected = layer.train()(x)
    assert verdict(layer) == ""
    torch.manual_seed(1)
    torch.testing.assert_close(layer(x), expected)
    assert type(layer) is not SelfAttn and type(layer).__name__ == "SelfAttn"


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (lambda: Unscaled(), r"outputs differ on \[B, N, D\]"),
        (lambda: OfImages(), r"takes \[B, H, W, D\]"),
        (lambda: WithRope(), r"forward wants rope"),
        (lambda: LouderInTraining(), r"outputs differ"),
        (lambda: OddOnes(), r"outputs differ"),
        (lambda: WrongGradient(), r"gradients differ"),
        (lambda: OtherQueue(), r"outputs differ"),
        (lambda: SelfAttn(fault="weights"), r"weights beside qkv and proj: rel_pos"),
        (lambda: SelfAttn(fault="setting"), r"may change its forward: window_size"),
        (lambda: Gated(), r"outputs differ"),
    ],
)
def test_what_is_not_what_it_looks_like_is_left(layer, why):
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        assert re.search(why, verdict(layer().to(dtype)))


def test_zero_weights_hide_nothing():
    """LayerScale of 1e-6 on a branch, or a projection of zeros, as models are initialized."""
    for cls in (SelfAttn, Unscaled):
        layer = cls()
        nn.init.zeros_(layer.proj.weight)
        nn.init.zeros_(layer.qkv.weight)
        assert (verdict(layer) == "") == (cls is SelfAttn)


class Counting(nn.Module):
    """A block of timm's parts that counts its calls, has a BatchNorm, and draws random numbers."""

    calls = 0

    def __init__(self):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(48), SelfAttn()
        self.norm2, self.mlp = nn.LayerNorm(48), Mlp()
        self.attn.qkv = nn.Sequential(Channels(48), nn.Linear(48, 144))
        self.attn.qkv.in_features = 48

    def forward(self, x):
        Counting.calls += 1
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Channels(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def test_a_trial_leaves_no_trace():
    heard = []
    model = nn.Sequential(*[Counting() for _ in range(4)])
    model[0].attn.proj.register_forward_hook(lambda *_: heard.append(1))
    model[1].register_full_backward_hook(lambda *_: heard.append(1))
    model[2].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    training, Counting.calls = [m.training for m in model.modules()], 0
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        report = fastmim_kernels.apply(model)
    assert {row.op for row in report.replaced} == {"add_layer_norm", "attention", "bias_gelu"}
    assert torch.equal(torch.rand(2), expected) and not heard
    assert [m.training for m in model.modules()] == training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert (
        0 < Counting.calls <= 40
    )  # one trial for each of two modes, with hooks or not, not for each of four


def test_layers_alike_are_tried_once(monkeypatch):
    from fastmim_kernels.apply import trial as trials

    tried, real = [], trials.trial
    monkeypatch.setattr(trials, "trial", lambda root, finding: tried.append(root) or real(root, finding))
    fastmim_kernels.apply(timm_vit(depth=6, drop_path_rate=0.3))
    assert len(tried) == 4  # the first block alone has no drop path
    tried.clear()
    model = timm_vit(depth=6)
    model.blocks[4].norm2.eps = 0.5
    model.blocks[5].mlp.fc2 = nn.Linear(192, 48, bias=False)
    fastmim_kernels.apply(model)
    assert len(tried) == 3 + 1 + 2


def test_a_verdict_is_not_taken_over_by_another_layer():
    """Equal classes and shapes; a setting decides."""
    one, other = Switched(False), Switched(True)
    report = fastmim_kernels.apply(nn.ModuleDict({"one": one, "other": other}))
    assert [row.where for row in report.replaced] == ["one"] and [row.where for row in report.left] == [
        "other"
    ]


class Switched(Mlp):
    def __init__(self, twice: bool):
        super().__init__()
        self.twice = twice

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x))) * (2 if not self.twice else 1) + (
            self.fc1(x).sum() if self.twice else 0
        )


def test_weights_that_are_not_there_yet():
    model = make(timm_vit).to("meta")
    with pytest.raises(ValueError, match=r"blocks.*it is on the meta device and cannot be tried"):
        fastmim_kernels.apply(model)
    lazy = Mlp()
    lazy.fc1 = nn.LazyLinear(64)
    assert verdict(lazy) == "its weights are not there yet: run the model once, then apply"
    lazy(torch.randn(2, 3, 48))
    assert verdict(lazy) == ""


def test_a_layer_that_cannot_be_copied_is_left():
    class Stuck(Mlp):
        def __deepcopy__(self, memo):
            raise RuntimeError("held by a lock")

    assert verdict(Stuck()) == "it cannot be copied for a trial: RuntimeError: held by a lock"


def test_dtypes_that_differ_are_tried_under_autocast():
    layer = Mlp()
    layer.fc2.to(torch.bfloat16)
    assert verdict(layer) == ""


def test_an_image_of_tokens_passes_a_block():
    class Unwindowed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.attn, self.norm2, self.mlp = (
                nn.LayerNorm(48),
                OfImages(),
                nn.LayerNorm(48),
                Mlp(),
            )

        def forward(self, x):
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    torch.manual_seed(0)
    block, x = Unwindowed().eval(), torch.randn(2, 4, 3, 48)
    expected = block(x)
    report = fastmim_kernels.apply(block)
    assert {row.op for row in report.replaced} == {"add_layer_norm", "bias_gelu"}
    torch.testing.assert_close(block(x), expected)


def test_nothing_is_timed_in_a_trial(monkeypatch):
    from fastmim_kernels.attention import timing

    call = timing.Call((5,), 2, 24, 2, "packed", "float32", True, "x")
    monkeypatch.setattr(timing, "measure", lambda *_: pytest.fail("measured"))
    with rehearsal(torch.device("cpu")):
        settings = torch.float32, torch.device("cpu"), {}, {}, lambda _: [], None
        backend = timing.fastest(call, *settings)
    assert backend == "sdpa" and timing.attention_choices() == []


def test_apply_after_a_cast_and_compile_after_apply():
    model = make(timm_vit).to(torch.bfloat16).eval()
    x = images().to(torch.bfloat16)
    expected = model(x)
    report = fastmim_kernels.apply(model)
    assert not report.left
    torch._dynamo.reset()
    graph = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(graph(x), expected, rtol=0.1, atol=0.1)
