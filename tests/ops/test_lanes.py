"""csrc/lanes.h: narrower registers give the same bits."""

import os
import platform
import subprocess
import sys

import pytest
from fastmim_kernels import native

NARROW = "-march=x86-64"  # 128 bits, what NEON has
DIGESTS = """
import hashlib, sys, torch
from fastmim_kernels import native
native.FLAGS = tuple(sys.argv[1] if flag.startswith("-march") else flag for flag in native.FLAGS)
assert native.ready(), native.why_not()
import fastmim_kernels as ops

make = torch.Generator().manual_seed(0)

def digest(name, *tensors):
    values = b"".join(x.detach().contiguous().view(torch.uint8).numpy().tobytes() for x in tensors)
    print(name, hashlib.sha256(values).hexdigest())

def randn(*shape):
    return torch.randn(*shape, generator=make).to(dtype).requires_grad_()

for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for distance in ("l2", "l1", "smooth_l1"):
        pred, target = randn(9, 771), randn(9, 771).detach()
        loss = ops.norm_pix_loss(pred, target, distance=distance, beta=0.5)
        digest(f"norm_pix_loss {distance} {dtype}", loss, *torch.autograd.grad(loss.sum(), pred))
    q, k = randn(40, 3, 37), randn(40, 3, 37)
    loss, lse = ops.info_nce(q, k, temperature=0.2)
    digest(f"info_nce {dtype}", loss, lse, *torch.autograd.grad(loss.sum(), [q, k]))

bytes_ = torch.randint(256, (6, 45, 53, 3), generator=make, dtype=torch.uint8)
boxes = torch.tensor([[0, 0, 45, 53], [3, 4, 40, 41], [0, 0, 7, 5]] * 2)
for filter in ("bilinear", "bicubic", "lanczos"):
    digest(f"resized_crop {filter}", ops.resized_crop(bytes_.unbind(0), boxes, (31, 37), filter=filter))
for gray in (False, True):
    factors, order = torch.rand(6, 4, generator=make) + torch.tensor([0.5, 0.5, 0.5, -0.5]), torch.arange(4)
    jittered = ops.color_jitter(bytes_, order.repeat(6, 1), factors, gray_B=torch.full((6,), gray))
    digest(f"color_jitter {gray}", jittered)
digest("color_blur", ops.color_blur(bytes_, torch.linspace(0.1, 2, 6)))
"""


@pytest.mark.long
@pytest.mark.skipif(platform.machine() != "x86_64", reason="builds for two kinds of x86-64")
def test_narrow_registers_give_the_same_bits(tmp_path):
    def digests(march):
        environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
        command = [sys.executable, "-c", DIGESTS, march]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-2000:]
        return run.stdout.splitlines()

    native_flag = next(flag for flag in native.FLAGS if flag.startswith("-march"))
    here, narrow = digests(native_flag), digests(NARROW)
    assert len(here) == 18 and here == narrow
