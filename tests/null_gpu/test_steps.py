"""What a training step asks of the device, by name: every method and engine, ViT-B, batch 1,024, bf16.

A difference is not a fault as such: it names what a change launches more or less. If it is meant,
`make null-gpu ARGS=--record` pins it.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import pytest

from fastmim.methods import METHODS
from tests.null_gpu import golden
from tests.null_gpu.count import differences
from tests.null_gpu.counts import Counts, total

EAGER = {
    "plain": ["--engine", "plain"],
    **{f"zero{stage}": ["--engine", "deepspeed", "--zero", str(stage)] for stage in range(4)},
}
# two blocks and a decoder of one: to compile all takes many minutes, and each further block adds the same
SHALLOW = ["--depth", "2", "--decoder-size", "512", "1", "16", "--compile"]
COMPILED = {
    "plain": ["--engine", "plain", *SHALLOW],
    "zero1": ["--engine", "deepspeed", "--zero", "1", *SHALLOW],
}
# 1,024 images of these are more than 80 GB
BATCH = {"rmae": 512, "mocov3": 512, "ibot": 128, "dino": 128}
VERSIONS = ", ".join(f"{name} {version(name)}" for name in ("torch", "triton", "deepspeed"))
MOST_LAUNCHES = 1400  # of MAE under DeepSpeed, memsets and copies among them
MOST_IN_UPDATE = 32  # of them 16 for the norm of the gradients


def work(counts):
    """All that the device is asked to do."""
    within = total(counts, "copy", "within the device")
    return total(counts, "launch") + total(counts, "memset") + within


def measured(on_null_device, tmp_path, method, flags):
    """Counts of each stage, of a process of its own."""
    path = tmp_path / f"{'-'.join(flags).replace('--', '')}.json"
    run = on_null_device(
        "-m", "tests.null_gpu.count", "--method", method, "--batch", str(BATCH.get(method, 1024)),
        "--timed", "1", "--json", str(path), *flags,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    counts = json.loads(path.read_text())["counts"]
    return {
        stage: Counts({tuple(key.split("\t")): n for key, n in rows.items()})
        for stage, rows in counts.items()
    }


def compare(on_null_device, tmp_path, request, path, method, engines):
    with ThreadPoolExecutor(2) as pool:
        steps = dict(
            zip(
                engines,
                pool.map(lambda flags: measured(on_null_device, tmp_path, method, flags), engines.values()),
                strict=True,
            )
        )
    if request.config.getoption("--record"):
        golden.write(path, steps, VERSIONS)
    versions, pinned = golden.read(path, list(engines))
    if versions != VERSIONS:
        pytest.skip(f"{path.name} is of {versions}, these are {VERSIONS}")
    different = [
        f"{engine}, {stage}:{differences(pinned[engine][stage], counts)}"
        for engine, step in steps.items()
        for stage, counts in step.items()
        if counts != pinned[engine][stage]
    ]
    assert not different, f"{method}: pinned -> now\n" + "\n".join(different)
    return steps


@pytest.mark.parametrize("method", METHODS)
def test_a_step_asks_for_what_is_pinned(on_null_device, tmp_path, request, method):
    path = golden.FOLDER / f"{method}.txt"
    steps = compare(on_null_device, tmp_path, request, path, method, EAGER)
    for engine, step in steps.items():
        for stage, counts in step.items():
            refused = [name for kind, name in counts if kind == "refused"]
            assert not refused, f"{engine}, {stage}"


@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_step_asks_for_what_is_pinned(on_null_device, tmp_path, request, method):
    path = golden.FOLDER / f"{method}_compiled.txt"
    compare(on_null_device, tmp_path, request, path, method, COMPILED)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("engine", ["plain", "zero1", "zero2"])
def test_no_step_waits_for_the_device(method, engine):
    """Of what is pinned: nothing is read, nothing is waited for, between two log steps.

    DeepSpeed's optimizers of ZeRO 0 and 3 do wait: how often is pinned as well.
    """
    _, pinned = golden.read(golden.FOLDER / f"{method}.txt", list(EAGER))
    step = sum(pinned[engine].values(), start=Counts())
    assert total(step, "wait") == 0
    assert total(step, "copy", "device to host") == 0
    assert total(step, "allocation") == 0


def test_mae_under_deepspeed_stays_within_its_bounds():
    _, pinned = golden.read(golden.FOLDER / "mae.txt", list(EAGER))
    step = pinned["zero1"]
    assert sum(work(counts) for counts in step.values()) <= MOST_LAUNCHES
    assert work(step["update"]) <= MOST_IN_UPDATE


# --- the comparison itself ----------------------------------------------------------------------------


def test_golden_counts_are_read_as_they_were_written(tmp_path):
    steps = {
        "plain": {"forward": Counts({("launch", "f<int, 2>"): 3}), "update": Counts()},
        "zero1": {
            "forward": Counts({("launch", "f<int, 2>"): 4, ("wait", "w"): 1}),
            "update": Counts({("launch", "adam"): 1}),
        },
    }
    golden.write(tmp_path / "m.txt", steps, "torch 1")
    assert golden.read(tmp_path / "m.txt", ["plain", "zero1"]) == ("torch 1", steps)
    with pytest.raises(ValueError, match="want columns plain, got"):
        golden.read(tmp_path / "m.txt", ["plain"])


def test_a_difference_names_the_kernel():
    before = Counts({("launch", "f"): 2, ("launch", "g"): 1})
    after = Counts({("launch", "f"): 3, ("launch", "g"): 1, ("wait", "w"): 1})
    assert differences(before, after) == "\n      2 ->     3  launch  f\n      0 ->     1  wait  w"
