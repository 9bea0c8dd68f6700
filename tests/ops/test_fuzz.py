"""Random shapes, dtypes, strides and options: an op refuses with ValueError, or does what its reference does.

Every example is made by hypothesis from a fixed seed. The public function runs on the CPU and the launchers
in Triton's interpreter; both are held against fp64, and against themselves on contiguous copies. What may be
refused is a last dim with gaps. Then one argument is spoiled, and nothing but ValueError may come of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

import fastmim_kernels as ops
import pytest
import torch
from fastmim_kernels.ema_update import CHUNK, ema_update_reference
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
HALVES = (BF16, FP16)
WIDTHS = (8, 17, 48, 130)
LAYOUTS = ("plain", "offset", "row gaps", "turned", "expanded")
STRIDES = (*LAYOUTS, *LAYOUTS, "gaps")  # few, because most ops refuse them
EXAMPLES = settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # examples are small as they are; to make one smaller takes minutes
    suppress_health_check=list(HealthCheck),
)
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="every shape would compile its own kernel"),
    pytest.mark.filterwarnings("ignore:var_mean"),  # of no values
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of numpy: a row without a negative
]
Tensors = list[Tensor | None]


@dataclass(frozen=True)
class Example:
    """One call: its tensors as they lie in memory, and three ways to make it."""

    tensors: Tensors
    learns: tuple[int, ...]  # which of them get a gradient
    public: Callable[..., tuple[Tensor, ...]]
    reference: Callable[..., tuple[Tensor, ...]]
    launch: Callable[[Tensors, Sequence[Tensor]], tuple[Tensor, ...]]  # outputs, then gradients
    constants: int = 0  # outputs at the end that are not differentiable


def lie(x: Tensor, layout: str) -> Tensor:
    """`x` in memory another way, with NaN (0 for integers) between; "expanded" repeats its first row."""
    nothing = torch.full_like(x, float("nan") if x.is_floating_point() else 0)
    if layout == "offset":
        return torch.cat([nothing.flatten()[:3], x.flatten()])[min(3, x.numel()) :].view(x.shape)
    if layout == "row gaps" and x.ndim > 1:
        return torch.cat([nothing, x], -1)[..., x.shape[-1] :]
    if layout == "turned" and (x.ndim > 2 or (x.ndim == 2 and not x.is_floating_point())):
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expanded" and len(x):
        return x[:1].expand(x.shape)
    return torch.stack([x, nothing], -1)[..., 0] if layout == "gaps" else x


class Draw:
    """What one example is made of."""

    def __init__(self, data: st.DataObject):
        self.data = data
        self.rng = torch.Generator().manual_seed(self.size(0, 2**16))

    def size(self, low: int, high: int) -> int:
        return self.data.draw(st.integers(low, high))

    def pick(self, *options):
        return self.data.draw(st.sampled_from(options))

    def floats(
        self, *shape: int, dtype: torch.dtype | None = None, layouts: Sequence[str] = STRIDES
    ) -> Tensor:
        x = torch.randn(shape, generator=self.rng).to(dtype or self.pick(FP32, BF16, FP16))
        return lie(x, self.pick(*layouts))

    def index(self, B: int, K: int, N: int) -> Tensor:
        """K of N in each of B rows."""
        rows = [torch.randperm(N, generator=self.rng)[:K] for _ in range(B)]
        return lie(
            torch.stack(rows) if B else torch.zeros(0, K, dtype=torch.int64), self.pick(*LAYOUTS[:4], "gaps")
        )

    def image(self) -> tuple[Tensor, int, tuple]:
        """An image, how many patches it has, and how it is normalized."""
        B, patch, C = self.size(0, 3), self.size(2, 4), self.size(1, 4)
        C = max(C, 8 // patch**2)
        H, W = (patch * self.size(1, 3) for _ in range(2))
        image = torch.randint(0, 256, (B, H, W, C), generator=self.rng, dtype=torch.uint8)
        dtype = self.pick(torch.uint8, FP32, BF16)
        image = lie(image if dtype == torch.uint8 else (image / 255).to(dtype), self.pick(*STRIDES))
        means, stds = (0.485, 0.456, 0.406, 0.3), (0.229, 0.224, 0.225, 0.5)
        return image, (H // patch) * (W // patch), (patch, means[:C], stds[:C])


def module(name: str):
    return import_module(f"fastmim_kernels.{name}")


# --- the ops ------------------------------------------------------------------------------------------


def gather_patches(d: Draw) -> Example:
    of = module("gather_patches")
    image, count, norm = d.image()
    index, dtype = d.index(len(image), d.size(0, count), count), d.pick(FP32, BF16, FP16)

    def launch(tensors, douts):
        image, index = tensors
        rows = of.launch_forward(image, index, *norm, dtype)
        if not douts:
            return (rows,)
        return rows, of.launch_backward(douts[0], index, image.shape, image.dtype, norm[0], norm[2])

    return Example(
        [image, index],
        (0,) if image.is_floating_point() else (),
        lambda image, index: (ops.gather_patches(image, index, *norm, dtype=dtype),),
        lambda image, index, cast: (of.gather_patches_reference(image, index, *norm, cast),),
        launch,
    )


def norm_pix_loss(d: Draw) -> Example:
    of = module("norm_pix_loss")
    M, D, normalize = d.size(0, 6), d.pick(*WIDTHS), d.pick(True, False)

    def launch(tensors, douts):
        loss = of.launch_forward(*tensors, normalize, 1e-6)
        grads = of.launch_backward(douts[0], *tensors, normalize, 1e-6, (True, not normalize))
        return loss, *(grads[:1] if normalize else grads)

    return Example(
        [d.floats(M, D), d.floats(M, D)],
        (0,) if normalize else (0, 1),
        lambda p, t: (ops.norm_pix_loss(p, t, normalize=normalize),),
        lambda p, t, cast: (of.norm_pix_loss_reference(p, t, normalize),),
        launch,
    )


def norm_pix_loss_image(d: Draw) -> Example:
    of = module("norm_pix_loss_image")
    image, count, norm = d.image()
    index, normalize = d.index(len(image), d.size(0, count), count), d.pick(True, False)
    pred = d.floats(*index.shape, norm[0] ** 2 * image.shape[3])

    def launch(tensors, douts):
        options = *norm, normalize, 1e-6
        return of.launch_forward(*tensors, *options), of.launch_backward(douts[0], *tensors, *options)

    return Example(
        [pred, image, index],
        (0,),
        lambda p, image, index: (ops.norm_pix_loss_image(p, image, index, *norm, normalize=normalize),),
        lambda p, image, index, cast: (of.norm_pix_loss_image_reference(p, image, index, *norm, normalize),),
        launch,
    )


def gather_tokens(d: Draw) -> Example:
    of = module("gather_tokens")
    B, N, D = d.size(0, 4), d.size(1, 6), d.pick(*WIDTHS)
    index = d.index(B, d.size(0, N), N)
    pos, cls = d.pick(True, False), d.pick(True, False)
    vectors = [d.floats(N, D) if pos else None, d.floats(D) if cls else None]

    def launch(tensors, douts):
        grads = of.launch_backward(douts[0], tensors[1], N, cls, (True, pos, cls))
        return of.launch_forward(*tensors), *(g for g, t in zip(grads, (1, pos, cls), strict=True) if t)

    learns = (0, *((2,) if pos else ()), *((3,) if cls else ()))
    reference = lambda *tensors, cast: (of.gather_tokens_reference(*tensors),)  # noqa: E731
    return Example(
        [d.floats(B, N, D), index, *vectors],
        learns,
        lambda *tensors: (ops.gather_tokens(*tensors),),
        reference,
        launch,
    )


def restore_tokens(d: Draw) -> Example:
    of = module("restore_tokens")
    B, N, D, R = d.size(0, 4), d.size(1, 6), d.pick(*WIDTHS), d.size(0, 12)
    asked = d.size(0, min(R, B * N))
    source = torch.full((B * N,), -1)
    source[torch.randperm(B * N, generator=d.rng)[:asked]] = torch.randperm(R, generator=d.rng)[:asked]
    source = lie(source.view(B, N), d.pick(*LAYOUTS[:4], "gaps"))

    def launch(tensors, douts):
        return of.launch_forward(*tensors), *of.launch_backward(douts[0], tensors[1], R, (True,) * 3)

    return Example(
        [d.floats(R, D), source, d.floats(D), d.floats(N, D)],
        (0, 2, 3),
        lambda *tensors: (ops.restore_tokens(*tensors),),
        lambda *tensors, cast: (of.restore_tokens_reference(*tensors),),
        launch,
    )


def info_nce(d: Draw) -> Example:
    of, triton = module("info_nce"), module("info_nce_triton")
    B, more, offset, D = d.size(0, 6), d.size(0, 4), d.size(0, 4), d.pick(*WIDTHS)
    shape = d.pick((), (1,), (3,))
    dtype, temperature, normalize = d.pick(FP32, BF16, FP16), d.pick(0.1, 0.7), d.pick(True, False)
    temperature = temperature if normalize else 10 * temperature
    settings = temperature, offset, normalize
    apart = tuple(name for name in STRIDES if name != "expanded")  # equal keys cancel in every gradient

    def launch(tensors, douts):
        q, k = (x if shape else x[:, None] for x in tensors)
        dloss = douts[0] if shape else douts[0][:, None]
        loss, lse, rate, pull, norm = triton.launch_forward(q, k, *settings, True)
        dk = triton.launch_backward_keys(dloss, q, k, lse, rate, norm, *settings)
        found = loss, lse, (pull * (rate * dloss)[..., None]).to(dtype), dk
        return found if shape else tuple(x[:, 0] for x in found)

    return Example(
        [d.floats(rows, *shape, D, dtype=dtype, layouts=apart) for rows in (B, B + offset + more)],
        (0, 1),
        lambda q, k: ops.info_nce(q, k, temperature=temperature, label_offset=offset, normalize=normalize),
        lambda q, k, cast: of.info_nce_reference(q, k, *settings),
        launch,
        constants=1,
    )


def add_layer_norm(d: Draw) -> Example:
    of = module("add_layer_norm")
    B, T, D = d.size(0, 3), d.size(0, 4), d.pick(*WIDTHS)
    shape = d.pick((B,), (B, T))
    scale, keep = d.pick(True, False), d.pick(True, False)
    # a sum rounded to 16 bits before its gradient is test_add_layer_norm's
    tensors: Tensors = [
        d.floats(*shape, D),
        d.floats(*shape, D, dtype=FP32),
        *(d.floats(D) for _ in range(2)),
    ]
    tensors += [d.floats(D) if scale else None, d.floats(B, dtype=FP32).abs() if keep else None]

    def launch(tensors, douts):
        x, residual, weight, bias, scale_, keep_ = tensors
        x, residual, *douts = (v if len(shape) == 2 else v[:, None] for v in (x, residual, *douts))
        keep_ = None if keep_ is None else keep_.contiguous()
        outs = of.launch_forward(x, residual, weight, bias, scale_, keep_, 1e-6)
        needs = *(True,) * 4, scale
        grads = of.launch_backward(*douts, *outs[1:], weight, x, scale_, keep_, x.dtype, needs)
        rows = [v if len(shape) == 2 else v[:, 0] for v in (*outs[:2], *grads[:2])]
        return *rows, *(grads[2:] if scale else grads[2:4])

    return Example(
        tensors,
        (0, 1, 2, 3, *((4,) if scale else ())),
        lambda *t: ops.add_layer_norm(*t[:4], scale=t[4], keep=t[5]),
        lambda *t, cast: of.add_layer_norm_reference(*t[:4], 1e-6, *t[4:]),
        launch,
    )


def bias_gelu(d: Draw) -> Example:
    of = module("bias_gelu")
    shape, D = d.pick((0,), (1,), (7,), (2, 3), (2, 0, 2)), d.pick(*WIDTHS)

    def launch(tensors, douts):
        x, bias = tensors
        out = of.launch_forward(x.flatten(0, -2), bias)
        dx, dbias = of.launch_backward(douts[0].flatten(0, -2), x.flatten(0, -2), bias, (True, True))
        return out.view(x.shape), dx.view(x.shape), dbias

    return Example(
        [d.floats(*shape, D), d.floats(D)],
        (0, 1),
        lambda *tensors: (ops.bias_gelu(*tensors),),
        lambda *tensors, cast: (of.bias_gelu_reference(*tensors),),
        launch,
    )


OPS = (
    gather_patches, norm_pix_loss, norm_pix_loss_image, gather_tokens, restore_tokens, info_nce,
    add_layer_norm, bias_gelu,
)  # fmt: skip


# --- what holds for all of them -----------------------------------------------------------------------


def through_autograd(e: Example, call: Callable, tensors: Tensors, douts: Sequence[Tensor]) -> tuple:
    """Outputs, and the gradients of what learns."""
    leaves = [None if t is None else t.detach().requires_grad_(i in e.learns) for i, t in enumerate(tensors)]
    outs = call(*leaves)
    if not e.learns:
        return outs
    learn = [leaves[i] for i in e.learns]
    grads = torch.autograd.grad(
        outs[: len(outs) - e.constants], learn, douts, allow_unused=True, materialize_grads=True
    )
    return *(out.detach() for out in outs), *grads


def wide(tensors: Tensors, cast: torch.dtype) -> Tensors:
    return [t.to(cast) if t is not None and t.is_floating_point() else t for t in tensors]


def definition(e: Example, tensors: Tensors, douts: Sequence[Tensor], cast: torch.dtype) -> tuple:
    def call(*leaves):
        return e.reference(*leaves, cast=cast)

    return through_autograd(e, call, wide(tensors, cast), [g.to(cast) for g in douts])


def assert_near(name: str, actual: Tensor, oracle: Tensor, naive: Tensor) -> None:
    """Four times the reference's error in fp32, some digits of the largest value, and some of 1 in fp32."""
    assert actual.shape == oracle.shape, f"{name}: {tuple(actual.shape)} is not {tuple(oracle.shape)}"
    if actual.numel():
        ulps = 16 if actual.dtype == FP32 else 3
        digits = ulps * torch.finfo(actual.dtype).eps * oracle.abs().max() + 16 * torch.finfo(FP32).eps
        error = (actual.double() - oracle).abs().max()
        budget = 4 * (naive.to(actual.dtype).double() - oracle).abs().max() + digits
        assert error <= budget, f"{name}: error {error:.3e}, budget {budget:.3e}"


def may_be_refused(tensors: Tensors) -> bool:
    return any(t is not None and t.is_floating_point() and t.stride(-1) != 1 for t in tensors)


@pytest.mark.parametrize("make", OPS, ids=lambda make: make.__name__)
@EXAMPLES
@given(data=st.data())
def test_refuses_or_does_what_its_reference_does(make, data):
    d = Draw(data)
    e = make(d)
    plain = [None if t is None else t.clone(memory_format=torch.contiguous_format) for t in e.tensors]
    outs = e.public(*plain)
    differentiable = outs[: len(outs) - e.constants] if e.learns else ()
    douts = [d.floats(*out.shape, dtype=out.dtype) for out in differentiable]
    oracle, naive = (definition(e, plain, douts, cast) for cast in (FP64, FP32))
    try:
        public = through_autograd(e, e.public, e.tensors, douts)
    except ValueError:
        more_dims = make is bias_gelu and e.tensors[0].ndim > 2 and not e.tensors[0].is_contiguous()
        if may_be_refused(e.tensors) or more_dims:
            return
        raise
    tight = [g.contiguous() for g in douts]
    launched = e.launch(e.tensors, douts)
    assert len(launched) == len(public) == len(oracle)
    for i, (a, b, o, n) in enumerate(zip(public, launched, oracle, naive, strict=True)):
        assert_near(f"{i} of the op", a, o, n)
        assert_near(f"{i} of the kernel", b, o, n)
    assert [g.dtype for g in public[len(outs) :]] == [e.tensors[i].dtype for i in e.learns]
    for a, b in zip(public, through_autograd(e, e.public, plain, tight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype in HALVES else 1e-5, atol=1e-5)
    for a, b in zip(launched, e.launch(plain, tight), strict=True):
        assert torch.equal(a, b)  # the same bits


SPOILS = {
    "one more dim": lambda t: t[None],
    "one dim less": lambda t: t[0] if t.ndim and len(t) else t.flatten(),
    "a shorter first dim": lambda t: t[1:],
    "a shorter last dim": lambda t: t[..., 1:],
    "fp64": lambda t: t.double(),
    "int32": lambda t: t.int(),
    "another device": lambda t: t.to("meta"),
}


@pytest.mark.parametrize("make", OPS, ids=lambda make: make.__name__)
@EXAMPLES
@given(data=st.data())
def test_a_spoiled_argument_is_a_value_error(make, data):
    """Or another good call: nothing else comes of it, no error from deep inside and no odd value."""
    d = Draw(data)
    e = make(d)
    tensors = [None if t is None else t.contiguous() for t in e.tensors]
    which = d.pick(*(i for i, t in enumerate(tensors) if t is not None))
    how = d.pick(*SPOILS)
    tensors[which] = SPOILS[how](tensors[which])
    try:
        outs = e.public(*tensors)
    except ValueError as error:
        assert "want" in str(error) or "must be" in str(error)  # noqa: PT017
        return
    assert how not in ("fp64", "int32", "another device") or tensors[which].dtype == e.tensors[which].dtype
    oracle = e.reference(*wide(tensors, FP64), cast=FP64)
    assert [out.shape for out in outs] == [out.shape for out in oracle]
    assert all(out.isfinite().all() for out in outs)


@EXAMPLES
@given(data=st.data())
def test_a_teacher_of_any_tensors(data):
    """Slices of flat buffers at any address: what lies between them stays as it is."""
    d = Draw(data)
    update = d.pick(ops.ema_update, module("ema_update").launch)
    momentum = d.pick(0.0, 0.3, 0.5, 0.9, 0.9999, 1.0)
    teacher, student, expected, buffers = [], [], [], []
    for _ in range(d.size(1, 4)):
        sizes = [d.pick(0, 1, 5, CHUNK - 1, CHUNK, CHUNK + 3) for _ in range(d.size(1, 3))]
        odd, dtypes = d.size(0, 9), [d.pick(FP32, BF16, FP16) for _ in range(2)]
        t, s = (torch.randn(sum(sizes) + 2 * odd, generator=d.rng).to(dtype) for dtype in dtypes)
        inner = slice(odd, len(t) - odd)
        want = t.double()
        ema_update_reference([want[inner]], [s[inner].double()], momentum)
        teacher += t[inner].split(sizes)
        student += s[inner].split(sizes)
        buffers.append(t)
        expected.append((want, t.clone(), inner))
    update(teacher, student, momentum)
    for t, (want, before, inner) in zip(buffers, expected, strict=True):
        assert torch.equal(t[: inner.start], before[: inner.start])
        assert torch.equal(t[inner.stop :], before[inner.stop :])
        if t.numel():
            assert (t - want).abs().max() <= 1.1 * torch.finfo(t.dtype).eps * want.abs().max()


@EXAMPLES
@given(data=st.data())
def test_masks_of_any_keys(data):
    d, of = Draw(data), module("split_patches")
    N = d.size(0, 70)
    K, stream = d.size(0, N), d.pick(0, 1, 2**31 - 1)
    keys = torch.randint(-(2**63), 2**63 - 1, (d.size(0, 3),), generator=d.rng)
    keys = lie(keys, d.pick("plain", "offset", "expanded", "gaps"))
    expected = of.split_patches_reference(keys, N, K, stream)
    for found in (ops.split_patches(keys, N, K, stream=stream), of.launch(keys, N, K, stream)):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    both = torch.cat(expected, 1).sort(1).values
    assert torch.equal(both, torch.arange(N).expand(len(keys), N))
