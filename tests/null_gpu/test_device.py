"""The null device itself: what it counts, what it says to be, and where it says no."""

import json

HEAD = """
import json, sys, torch
from tests.null_gpu.counts import read, reset, total
found = {}
def counted(name, stage):
    reset()
    value = stage()
    found[name] = [[kind, what, n] for (kind, what), n in sorted(read().items())]
    return value
"""
TAIL = "\nprint('FOUND' + json.dumps(found))"


def found_by(on_null_device, body, **variables):
    run = on_null_device("-c", HEAD + body + TAIL, **variables)
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(run.stdout.split("FOUND")[1])


def test_launches_copies_and_waits_are_counted_by_name(on_null_device):
    found = found_by(
        on_null_device,
        """
x = counted("to the device", lambda: torch.ones(8, 8).to("cuda"))
counted("product", lambda: x.bfloat16() @ x.bfloat16())
counted("library", lambda: x @ x)
counted("copy", lambda: x.clone())
counted("item", lambda: x[0, 0].item())
counted("synchronize", lambda: torch.cuda.synchronize())
counted("zero", lambda: x.zero_())
counted("event", lambda: torch.cuda.Event().record())
counted("none", lambda: x.view(-1)[3:])
""",
    )
    assert ["copy", "host to device", 1] in found["to the device"]
    assert ["allocation", "device memory", 1] in found["to the device"]
    assert [row[1:] for row in found["library"] if row[0] == "launch"] in (
        [["cublasSgemm_v2", 1]],
        [["cublasGemmEx", 1]],
        [["cublasLtMatmul", 1]],
    )
    assert sum(n for kind, _, n in found["product"] if kind == "launch") == 3  # two casts and a product
    assert any("bfloat16_copy_kernel" in name for _, name, _ in found["product"])
    assert found["copy"] == [["copy", "within the device", 1]]
    assert [row for row in found["item"] if row[0] != "allocation"] == [
        ["copy", "device to host", 1],
        ["wait", "cudaStreamSynchronize", 1],
    ]
    assert found["synchronize"] == [["wait", "cudaDeviceSynchronize", 1]]
    assert found["zero"][0][0] == "launch" and "FillFunctor<float>" in found["zero"][0][1]
    assert found["event"] == [["event", "an event is recorded", 1]]
    assert found["none"] == []


def test_a_triton_kernel_is_compiled_and_counted_with_its_file(on_null_device):
    found = found_by(
        on_null_device,
        """
import fastmim_kernels
x = torch.ones(4, 16, 8, device="cuda", dtype=torch.bfloat16, requires_grad=True)
b = torch.ones(8, device="cuda", dtype=torch.bfloat16, requires_grad=True)
y = counted("forward", lambda: fastmim_kernels.bias_gelu(x, b))
""",
    )
    assert ["launch", "bias_gelu.py:_forward_kernel", 1] in found["forward"]


def test_what_comes_back_is_what_was_just_put_there_or_zero(on_null_device):
    found = found_by(
        on_null_device,
        """
x = torch.tensor([1.0, float("nan")], device="cuda")
found["put"] = x[:1].tolist()
found["computed"] = (x * 2).tolist()
found["after a kernel"] = x.tolist()
found["finite"] = torch.full((3,), float("inf"), device="cuda").tolist()
""",
    )
    assert found == {"put": [1.0], "computed": [0.0, 0.0], "after a kernel": [0.0, 0.0], "finite": [0.0] * 3}


def test_memory_of_the_device_ends_and_the_host_cannot_read_it(on_null_device):
    found = found_by(
        on_null_device,
        """
kept = torch.empty(70 * 2**30, dtype=torch.uint8, device="cuda")
try:
    torch.empty(9 * 2**30, dtype=torch.uint8, device="cuda")
except torch.cuda.OutOfMemoryError as error:
    found["words"] = str(error)
found["free"] = torch.cuda.mem_get_info()[0] / 2**30
""",
    )
    assert "Tried to allocate 9.00 GiB" in found["words"] and "total capacity of 79.18 GiB" in found["words"]
    assert 8 < found["free"] < 9
    run = on_null_device(
        "-c", "import ctypes, torch; ctypes.string_at(torch.ones(1, device='cuda').data_ptr(), 4)"
    )
    assert run.returncode == -11


def test_several_devices_and_one_that_is_not_there(on_null_device):
    found = found_by(
        on_null_device,
        """
found["count"] = torch.cuda.device_count()
found["device"] = str(torch.ones(1, device="cuda:1").device)
try:
    torch.cuda.set_device(2)
except Exception as error:
    found["words"] = str(error).splitlines()[0]
""",
        NULL_CUDA_DEVICES="2",
    )
    assert (found["count"], found["device"]) == (2, "cuda:1")
    hidden = found_by(on_null_device, 'found["count"] = torch.cuda.device_count()', CUDA_VISIBLE_DEVICES="")
    assert hidden == {"count": 0}
    assert "invalid device ordinal" in found["words"]


def test_what_is_not_implemented_says_so(on_null_device):
    run = on_null_device(
        "-c", "import torch\nwith torch.cuda.graph(torch.cuda.CUDAGraph()): torch.ones(1, device='cuda')"
    )
    assert run.returncode == 1
    assert "null CUDA device: cudaStreamBeginCapture is not implemented" in run.stderr


def test_a_process_writes_its_counts_when_it_ends(on_null_device, tmp_path):
    run = on_null_device("-c", "import torch; torch.ones(3, device='cuda')", NULL_CUDA_COUNTS=str(tmp_path))
    assert run.returncode == 0, run.stderr
    [path] = tmp_path.glob("*.tsv")
    assert "\tlaunch\t" in path.read_text()
