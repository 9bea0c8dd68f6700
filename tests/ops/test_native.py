"""The C++ ops: each against its fp64 definition, alike on any number of threads; how the library is built."""

import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fastmim_kernels import native
from fastmim_kernels.gather_patches import affine, gather_patches_reference
from fastmim_kernels.info_nce import info_nce_reference
from fastmim_kernels.norm_pix_loss import DISTANCES, norm_pix_loss_reference
from fastmim_kernels.norm_pix_loss_image import norm_pix_loss_image_reference
from fastmim_kernels.restore_tokens import restore_tokens_reference
from fastmim_kernels.testing import assert_no_worse

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DTYPES = [FP32, BF16, FP16]
EPS = 1e-6

try:
    LIBRARY: Path | None = native.library()
    WHY = ""
except native.Unavailable as reason:
    LIBRARY, WHY = None, str(reason)

needs_library = pytest.mark.skipif(LIBRARY is None, reason=f"no C++ ops: {WHY}")


@pytest.fixture
def ops():
    assert native.ready(), native.why_not()
    return torch.ops.fastmim


def rand(*shape, dtype=FP32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def compare(names, actual, definition, inputs, grads):
    """Output and gradients of `definition` at `inputs`, in fp64 and in fp32: what `actual` is held to."""

    def run(cast):
        leaves = [x.to(cast).requires_grad_() for x in inputs]
        out = definition(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grads.to(cast))]

    oracle, naive = run(FP64), run(FP32)
    for name, x, exact, plain in zip(names, actual, oracle, naive, strict=True):
        assert_no_worse(name, x, exact, plain.to(x.dtype))


# --- the ops ------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("distance", [0, 1, 2])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "D", [2, 43, 588, 768]
)  # less than a vector; odd; 14 x 14 x 3 leaves 12 of 16; whole
def test_norm_pix_loss(D, dtype, normalize, distance, ops):
    pred, target, dloss = rand(41, D, dtype=dtype), rand(41, D, dtype=dtype, seed=1), rand(41, seed=2)
    target[0] = 0.5  # flat: only eps divides
    form = normalize, EPS, distance, 0.7
    loss = ops.native_norm_pix_loss(pred, target, *form)
    dpred, dtarget = ops.native_norm_pix_loss_backward(dloss, pred, target, *form, True, not normalize)
    assert dpred.dtype == dtype and dtarget.shape == ((0, D) if normalize else (41, D))

    def definition(p, t=None):
        t = target.to(p.dtype) if t is None else t
        return norm_pix_loss_reference(p, t, normalize, EPS, DISTANCES[distance], 0.7)

    if normalize:
        compare(["loss", "dpred"], [loss, dpred], definition, [pred], dloss)
    else:
        compare(["loss", "dpred", "dtarget"], [loss, dpred, dtarget], definition, [pred, target], dloss)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["bytes", "channels first", "bf16"])
@pytest.mark.parametrize("patch", [4, 14, 16])
def test_norm_pix_loss_image(patch, layout, dtype, ops):
    image = torch.randint(0, 256, (2, 56 if patch == 14 else 48, 112, 3), dtype=torch.uint8)
    if layout == "channels first":
        image = image.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    elif layout == "bf16":
        image = (image / 255).to(BF16)
    count = image.shape[1] // patch * (112 // patch)
    index = torch.stack([torch.randperm(count)[:9] for _ in range(2)])
    pred = rand(2, 11, patch * patch * 3, dtype=dtype)[:, 1:-1]  # as after the class token is cut off
    dloss, form = rand(2, 9, seed=1), (True, EPS, 0, 1.0)
    norm = affine(image.dtype, MEAN, STD).values()
    loss = ops.native_norm_pix_loss_image(pred, image, index, patch, *norm, *form)
    dpred = ops.native_norm_pix_loss_image_backward(dloss, pred, image, index, patch, *norm, *form)

    def definition(p):
        return norm_pix_loss_image_reference(p, image, index, patch, MEAN, STD)

    compare(["loss", "dpred"], [loss, dpred], definition, [pred], dloss)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_gather_patches(channels, dtype, ops):
    mean, std = (0.4, 0.5, 0.6, 0.1, 0.2)[:channels], (0.2, 0.3, 0.4, 0.5, 0.6)[:channels]
    index = torch.tensor([[0, 5, 5, 2], [3, 1, 0, 4]])  # one patch twice: its gradients add up
    norm = affine(FP32, mean, std)
    for image in (rand(2, 8, 12, channels), rand(2, channels, 8, 12).permute(0, 2, 3, 1)):
        rows = ops.native_gather_patches(image, index, 4, *norm.values(), dtype)
        grad = rand(*rows.shape, dtype=dtype)
        dimage = ops.native_gather_patches_backward(grad, index, image.shape, FP32, 4, [1 / s for s in std])

        def definition(x):
            return gather_patches_reference(x, index, 4, mean, std, x.dtype)

        compare(["rows", "dimage"], [rows, dimage], definition, [image], grad)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_patches_rounds_to_nearest(dtype, ops):
    """The tolerance of the other tests would let a value be cut off."""
    image = rand(1, 16, 16, 3)
    image.view(-1)[:5] = torch.tensor([float("inf"), -float("inf"), float("nan"), 1 + 2**-8, 1 + 3 * 2**-8])
    rows = ops.native_gather_patches(
        image, torch.zeros(1, 1, dtype=torch.int64), 16, [1.0] * 3, [0.0] * 3, dtype
    )
    torch.testing.assert_close(rows.view(-1), image.view(-1).to(dtype), rtol=0, atol=0, equal_nan=True)


@needs_library
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, False)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [5, 48])
def test_restore_tokens(D, dtype, needs, ops):
    B, N, R = 3, 7, 12
    source = torch.full((B, N), -1)
    rows = torch.randperm(B * N, generator=torch.Generator().manual_seed(0))[: R - 2]
    source.view(-1)[rows] = torch.arange(1, R - 1)  # two tokens that nobody asks for
    tokens, mask, pos = rand(R, 2 * D, dtype=dtype)[:, D:], rand(D, seed=1), rand(N, D, seed=2)
    out = ops.native_restore_tokens(tokens, source, mask, pos)
    grad = rand(B, N, D, dtype=dtype, seed=3)
    grads = ops.native_restore_tokens_backward(grad, source, R, *needs)

    leaves = [x.to(FP64).requires_grad_() for x in (tokens, mask, pos)]
    exact = restore_tokens_reference(leaves[0], source, *leaves[1:])
    assert_no_worse("out", out, exact.detach(), exact.detach().to(dtype))
    exact_grads = torch.autograd.grad(exact, leaves, grad.to(FP64))
    for name, x, expected, need in zip(("tokens", "mask", "pos"), grads, exact_grads, needs, strict=True):
        if need:
            assert_no_worse(name, x, expected, expected.to(x.dtype))
        else:
            assert not x.any()  # no rows, or zeros


@needs_library
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
# queries, positions, keys, width: keys of other ranks, no whole vector of them; one key; several blocks
@pytest.mark.parametrize(
    ("B", "N", "G", "D", "offset"), [(9, 3, 21, 24, 5), (1, 2, 1, 8, 0), (70, 2, 3000, 16, 11)]
)
def test_info_nce(B, N, G, D, offset, dtype, normalize, ops):
    q, k, dloss = rand(B, N, D, dtype=dtype), rand(G, N, D, dtype=dtype, seed=1), rand(B, N, seed=2)
    q = torch.stack([q, q], 3)[..., 0].contiguous() if D > 8 else q
    settings = 0.2, offset, normalize
    loss, lse = ops.native_info_nce(q, k, *settings)
    dq, dk = ops.native_info_nce_backward(dloss, q, k, lse, *settings, True, True)
    none = ops.native_info_nce_backward(dloss, q, k, lse, *settings, False, False)
    assert [len(x) for x in none] == [0, 0]

    def definition(q, k):
        return info_nce_reference(q, k, *settings)[0]

    compare(["loss", "dq", "dk"], [loss, dq, dk], definition, [q, k], dloss)
    labels = (torch.arange(B * N).view(N, B).T * 7) % G  # several queries name one key
    loss, lse = ops.native_info_nce(q, k, 0.2, 0, normalize, labels)
    dq, dk = ops.native_info_nce_backward(dloss, q, k, lse, 0.2, 0, normalize, True, True, labels)

    def labeled(q, k):
        return info_nce_reference(q, k, 0.2, 0, normalize, labels)[0]

    compare(["loss", "dq", "dk"], [loss, dq, dk], labeled, [q, k], dloss)


@needs_library
def test_info_nce_of_rows_without_a_direction_and_of_far_logits(ops):
    q, k = rand(6, 2, 16), rand(6, 2, 16, seed=1)
    q[2], k[3] = 0, 0
    settings = 0.01, 0, True
    loss, lse = ops.native_info_nce(q, k, *settings)
    expected, expected_lse = info_nce_reference(q.double(), k.double(), *settings)
    torch.testing.assert_close(loss, expected.float())
    torch.testing.assert_close(lse, expected_lse.float())
    dq, dk = ops.native_info_nce_backward(torch.ones(6, 2), q, k, lse, *settings, True, True)
    assert dq.isfinite().all() and dk.isfinite().all()
    loss, lse = ops.native_info_nce(300 * q, k, 0.01, 0, False)  # logits of 1e5: all but one vanish
    torch.testing.assert_close(
        loss, info_nce_reference(300 * q.double(), k.double(), 0.01, 0, False)[0].float()
    )


@needs_library
def test_any_number_of_threads_gives_the_same_bits(ops):
    pred, dloss = rand(64, 147, 48), rand(64, 147, seed=1)
    image = torch.randint(0, 256, (64, 56, 56, 3), dtype=torch.uint8)
    index = torch.rand(64, 196).argsort(1)[:, :147]
    source = torch.cat([torch.full((64, 1), -1), torch.arange(64 * 196).view(64, 196)], 1)
    norm, form = affine(torch.uint8, MEAN, STD).values(), (True, EPS, 0, 1.0)

    def everything():
        yield ops.native_norm_pix_loss_image(pred, image, index, 4, *norm, *form)
        yield ops.native_norm_pix_loss_image_backward(dloss, pred, image, index, 4, *norm, *form)
        yield ops.native_gather_patches_backward(pred, index, (64, 56, 56, 3), FP32, 4, [1.0, 2.0, 3.0])
        yield from ops.native_restore_tokens_backward(rand(64, 197, 8), source, 64 * 196, True, True, True)

    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(list(everything()))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_library
def test_the_public_ops_go_through_it(monkeypatch):
    """And without it the references serve, with the same numbers up to rounding."""
    from fastmim_kernels import gather_patches, info_nce, norm_pix_loss, norm_pix_loss_image, restore_tokens

    image = torch.randint(0, 256, (2, 8, 12, 3), dtype=torch.uint8)
    index = torch.tensor([[0, 5, 1], [3, 1, 2]])
    source = torch.tensor([[0, -1, 2], [-1, 3, 1]])

    def everything():
        yield gather_patches(image, index, 4, MEAN, STD)
        floats = (image / 255).requires_grad_()
        yield torch.autograd.grad(gather_patches(floats, index, 4, MEAN, STD).square().sum(), floats)[0]
        for distance in DISTANCES:
            p = rand(2, 3, 48).requires_grad_()
            yield torch.autograd.grad(
                norm_pix_loss_image(p, image, index, 4, MEAN, STD, distance=distance, beta=0.3).sum(), p
            )[0]
            p = rand(6, 48).requires_grad_()
            yield torch.autograd.grad(
                norm_pix_loss(p, rand(6, 48, seed=1), distance=distance, beta=0.3).sum(), p
            )[0]
        leaves = [x.requires_grad_() for x in (rand(4, 8), rand(8, seed=1), rand(3, 8, seed=2))]
        out = restore_tokens(leaves[0], source, *leaves[1:])
        yield from torch.autograd.grad(out.square().sum(), leaves)
        q, k = rand(4, 8, 16).requires_grad_(), rand(4, 8, 16, seed=1).requires_grad_()
        yield from torch.autograd.grad(info_nce(q, k, temperature=0.2)[0].sum(), (q, k))

    seen = set()
    with torch.profiler.profile() as profile:
        fast = list(everything())
    seen = {event.key for event in profile.key_averages() if "native_" in event.key}
    assert seen == {
        f"fastmim::native_{op}{suffix}"
        for op in ("gather_patches", "norm_pix_loss", "norm_pix_loss_image", "restore_tokens", "info_nce")
        for suffix in ("", "_backward")
    }
    monkeypatch.setattr(native, "ready", lambda: False)
    for a, b in zip(fast, everything(), strict=True):
        torch.testing.assert_close(a, b)


# --- how it is built ---------------------------------------------------------------------------------

REPORT = """
import sys, warnings
from fastmim_kernels import native
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(native.why_not(), len(caught), native.ready(), sep="|")
"""


def start(code=REPORT, **env):
    kept = {k: v for k, v in os.environ.items() if k not in ("CXX", "FASTMIM_NATIVE")}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**kept, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def report(**env):
    out, err = start(**env).communicate()
    assert out, err
    return out.strip().split("|"), err


def fake_compiler(path: Path, library: Path | None, seconds: float = 0.0) -> Path:
    """Links a library made earlier and notes every call: the real one takes half a minute."""
    link = f'cp "{library}" "$out"' if library else "echo 'ops.cpp:3: error: no such thing' >&2; exit 1"
    path.write_text(
        f"""#!/bin/sh
[ "$1" = --version ] && {{ echo fake 1.0; exit; }}
for argument; do out="$argument"; done
echo "$out" >> "{path}.calls"
case "$out" in *.so) sleep {seconds}; {link};; *) : > "$out";; esac
"""
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@needs_library
def test_what_is_built_serves_from_then_on(tmp_path):
    tmp_path = tmp_path / "a folder of its own"  # whose name is four words
    tmp_path.mkdir()
    compiler = fake_compiler(tmp_path / "c++", LIBRARY)
    env = {"CXX": str(compiler), "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}
    assert report(**env)[0] == ["None", "0", "True"]
    calls = Path(f"{compiler}.calls").read_text()
    sources = list(native.SOURCES.glob("*.cpp"))
    assert calls.count(".o\n") == len(sources) and calls.splitlines()[-1] == native.LIBRARY
    answer, err = report(**env)
    assert answer == ["None", "0", "True"] and "building" not in err
    assert Path(f"{compiler}.calls").read_text() == calls


@needs_library
def test_a_compiler_of_several_words(tmp_path):
    compiler = fake_compiler(tmp_path / "c++", LIBRARY)
    env = {"CXX": f"env A=b '{compiler}'", "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}
    assert report(**env)[0] == ["None", "0", "True"]
    assert Path(f"{compiler}.calls").read_text().endswith(f"{native.LIBRARY}\n")


@needs_library
def test_a_library_that_others_could_have_written_is_built_anew_or_refused(tmp_path, monkeypatch):
    compiler = fake_compiler(tmp_path / "c++", LIBRARY)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    built = native.library()
    assert built.parent.stat().st_mode & 0o777 == 0o700
    built.write_bytes(b"planted")
    built.parent.chmod(0o777)
    assert native.library().read_bytes() != b"planted"
    assert built.parent.stat().st_mode & 0o777 == 0o700
    built.parent.rename(tmp_path / "elsewhere")
    built.parent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(native.Unavailable, match="another user's, or a link, and code would be loaded"):
        native.library()
    built.parent.unlink()
    (tmp_path / "elsewhere").rename(built.parent)
    lstat = os.lstat
    monkeypatch.setattr(os, "lstat", lambda path: os.stat_result([*lstat(path)[:4], 4711, *lstat(path)[5:]]))
    with pytest.raises(native.Unavailable, match="TORCH_EXTENSIONS_DIR"):
        native.library()


@needs_library
def test_one_library_serves_every_environment_with_this_torch(tmp_path, monkeypatch):
    compiler = [str(fake_compiler(tmp_path / "c++", LIBRARY))]
    before = native._folder(compiler)
    monkeypatch.setattr(native, "TORCH", tmp_path)
    assert native._folder(compiler) == before
    assert f"-isystem{tmp_path}/include" in native._ninja_file(compiler)
    monkeypatch.setattr(torch, "__version__", "2.9.0")
    assert native._folder(compiler) != before


@needs_library
def test_processes_wait_for_one_another_and_not_for_the_dead(tmp_path):
    compiler = fake_compiler(tmp_path / "c++", LIBRARY, seconds=30)
    env = {"CXX": str(compiler), "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}
    killed, calls = start(**env), Path(f"{compiler}.calls")
    while not (calls.exists() and native.LIBRARY in calls.read_text()):
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()  # its compiler sleeps on: the lock is gone with the process that held it
    calls.unlink()
    fake_compiler(compiler, LIBRARY, seconds=1)
    both = [start(**env) for _ in range(2)]
    for process in both:
        assert process.communicate()[0].strip() == "None|0|True"
    assert calls.read_text().count(native.LIBRARY) == 1
    (folder,) = (tmp_path / "cache").iterdir()
    assert {path.name for path in folder.iterdir()} == {"lock", native.LIBRARY}


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda tmp: {"PATH": str(tmp)}, "no C++ compiler"),
        (lambda tmp: {"CXX": "no-such-compiler"}, "no C++ compiler (no-such-compiler)"),
        (lambda tmp: {"CXX": str(fake_compiler(tmp / "c++", None))}, "no such thing"),
        (lambda tmp: {"TORCH_EXTENSIONS_DIR": "/proc/nowhere"}, "cannot write"),
    ],
    ids=["no compiler", "not the one asked for", "compiler fails", "nowhere to put it"],
)
def test_what_cannot_be_built_is_said(spoil, reason, tmp_path, monkeypatch):
    if LIBRARY is None and "no C++ compiler" not in reason:
        pytest.skip(f"no C++ ops: {WHY}")
    for name, value in {"TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"), **spoil(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    with pytest.warns(UserWarning, match=f"its references serve.*{re.escape(reason)}"):
        assert reason in native.why_not.__wrapped__()


def test_the_references_may_be_chosen(monkeypatch, recwarn):
    monkeypatch.setenv("FASTMIM_NATIVE", "0")
    assert native.why_not.__wrapped__() == "FASTMIM_NATIVE=0"
    assert not recwarn
