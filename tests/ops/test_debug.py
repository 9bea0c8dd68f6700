"""Debug mode: what runs on CUDA looks at its index first, and says what the CPU would have said."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module

import fastmim_kernels
import pytest
import torch
from fastmim_kernels import debug, set_debug
from torch import Tensor

NORM = 4, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
FP32 = torch.float32


@pytest.fixture
def debugging():
    before = debug.debugging()
    set_debug(True)
    yield
    set_debug(before)


@pytest.fixture
def trusting():
    before = debug.debugging()
    set_debug(False)
    yield
    set_debug(before)


def good(op: str, device: str) -> tuple[tuple, Callable[[Tensor], tuple]]:
    """A good index `[2, 3]` of 6 patches or 7 tokens, and the arguments of the registered op around one."""
    image = torch.randint(0, 256, (2, 8, 12, 3), generator=torch.Generator().manual_seed(0)).byte().to(device)
    tokens, vector = torch.ones(2, 7, 16, device=device), torch.ones(16, device=device)
    arguments = {
        "gather_patches": lambda index: (image, index, *NORM, FP32),
        "norm_pix_loss_image": lambda index: (tokens.new_ones(2, 3, 48), image, index, *NORM, True, 1e-6),
        "gather_tokens": lambda index: (tokens, index, tokens[0], vector),
        "restore_tokens": lambda source: (tokens[0], source, vector, tokens[0, :3]),
    }[op]
    index = [[0, -1, 6], [-1, 3, 2]] if op == "restore_tokens" else [[0, 5, 1], [2, 3, 4]]
    return torch.tensor(index, device=device), arguments


BAD = [  # op, index of [1, 2], message
    ("gather_patches", -1, r"want patch indices in \[0, 6\), got -1 \.\. 5"),
    ("gather_patches", 6, r"want patch indices in \[0, 6\), got 0 \.\. 6"),
    ("gather_patches", 2**32, r"got 0 \.\. 4294967296"),  # 0 in 32 bits
    ("norm_pix_loss_image", -1, r"want patch indices in \[0, 6\), got -1 \.\. 5"),
    ("norm_pix_loss_image", 6, r"want patch indices in \[0, 6\), got 0 \.\. 6"),
    ("gather_tokens", -1, r"want token indices in \[0, 7\), got -1 \.\. 5"),
    ("gather_tokens", 7, r"want token indices in \[0, 7\), got 0 \.\. 7"),
    ("gather_tokens", 3, "want each token at most once in a sample, got 3 twice in 1"),
    ("restore_tokens", -2, r"want sources in \[-1, 7\), got -2 \.\. 6"),
    ("restore_tokens", 7, r"want sources in \[-1, 7\), got -1 \.\. 7"),
    ("restore_tokens", 6, "want each token at most once, got row 6 asked for 2 times"),
]


def of_cuda(op: str) -> Callable:
    """The function that is registered for CUDA; without a GPU its kernels run in the interpreter."""
    return import_module(f"fastmim_kernels.{op}")._op._init_fn


@pytest.mark.parametrize(("op", "bad", "message"), BAD)
def test_a_bad_index_is_found_in_debug_mode(op, bad, message, device, debugging):
    index, arguments = good(op, device)
    reference = getattr(torch.ops.fastmim, op)(*arguments(index))
    torch.testing.assert_close(of_cuda(op)(*arguments(index)), reference)
    index[1, 2] = bad
    for run in (of_cuda(op), getattr(torch.ops.fastmim, op)):
        with pytest.raises(ValueError, match=message):
            run(*arguments(index))


@pytest.mark.parametrize(("op", "bad", "message"), BAD)
def test_the_cpu_always_looks(op, bad, message, trusting):
    index, arguments = good(op, "cpu")
    index[1, 2] = bad
    with pytest.raises(ValueError, match=message):
        getattr(torch.ops.fastmim, op)(*arguments(index))


@pytest.mark.parametrize("op", ["gather_patches", "norm_pix_loss_image", "gather_tokens", "restore_tokens"])
def test_without_it_cuda_trusts_its_index(op, device, trusting):
    """Nothing is read back: an index out of range in the first sample reads what is behind, all ours here."""
    index, arguments = good(op, device)
    if op == "restore_tokens":
        index[1, 2] = index[0, 2]
    else:
        index[0, 1] = 6 if "pix" in op or "patches" in op else 7
    assert of_cuda(op)(*arguments(index)).isfinite().all()


def test_an_empty_index_is_a_good_one(device, debugging):
    for op in ("gather_patches", "gather_tokens", "restore_tokens"):
        index, arguments = good(op, device)
        if op == "restore_tokens":
            tokens, _, mask, pos = arguments(index)
            assert of_cuda(op)(tokens, index[:0], mask, pos).shape == (0, 3, 16)
            hidden = torch.full_like(index, -1)
            torch.testing.assert_close(
                of_cuda(op)(tokens[:0], hidden, mask, pos), torch.full_like(pos, 2).expand(2, 3, 16)
            )
        else:
            assert of_cuda(op)(*arguments(index[:, :0])).shape[1] == (op == "gather_tokens")


def test_a_compiled_graph_looks_too(device, debugging):
    index, arguments = good("gather_tokens", device)
    tokens, _, pos, _ = arguments(index)

    def step(index):
        return fastmim_kernels.gather_tokens(tokens, index, pos) * 2

    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(compiled(index), step(index))
    index[1, 2] = 7
    with pytest.raises(ValueError, match="want token indices"):
        compiled(index)


def test_the_variable_of_the_environment_is_read_once():
    code = (
        "import os, fastmim_kernels as f; from fastmim_kernels.debug import debugging\n"
        "os.environ['FASTMIM_DEBUG'] = '0'; print(debugging()); f.set_debug(False); print(debugging())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"FASTMIM_DEBUG": "1"}, capture_output=True, text=True
    )
    assert run.stdout.split() == ["True", "False"], run.stderr
    assert [debug._wanted(value) for value in ("", "0", "1")] == [False, False, True]
    with pytest.raises(ValueError, match="want FASTMIM_DEBUG 0 or 1, got 'yes'"):
        debug._wanted("yes")
