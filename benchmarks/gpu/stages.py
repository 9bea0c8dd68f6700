"""The stages of a round, in order of what would be missed most, and the share of the time that each has."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu.parts import Part, Stage
from fastmim.methods import METHODS

OPS = (
    "attention", "info_nce", "code_loss", "norm_pix_loss_image", "add_layer_norm", "bias_gelu",
    "gather_patches", "restore_tokens", "gather_tokens", "split_patches", "ema_update", "color_jitter",
    "resized_crop",
)  # fmt: skip
RIVALS = ("transformers_vitmae", "timm_mae", "timm_cmae")  # the package before the underscore
FIRST_TESTS = (
    "attention",
    "attention_tile",
    "info_nce",
    "norm_pix_loss_image",
    "add_layer_norm",
    "bias_gelu",
)
NOT_HERE = ("compile_ahead", "readme_snippets", "lanes", "native")  # they say the same on any machine
TINY = "--model vit_tiny --image-size 32 --patch 8 --decoder-size 32 1 2 --batch 8 --warmup 1 --steps 5"
TESTS = Path(__file__).resolve().parents[2] / "tests"


def module(name: str, arguments: str = "") -> tuple[str, ...]:
    return ("-m", name, *arguments.split())


def full(scratch: Path) -> list[Stage]:
    step = "--seconds 2 --steps 20"
    base = f"--model vit_base --batch 1024 {step}"
    compiled = (ours_compiled(f"{base} --fit"), *rivals(f"{base} --compile", RIVALS[1:2]))
    return [
        Stage("prepare", 0.10, prepare(("vit_base", "vit_large")), least_s=15, always=True),
        Stage(
            "sanitizer", 0.09, (Part("memcheck, racecheck", module("benchmarks.gpu.sanitize")),), least_s=20
        ),
        Stage("tests", 0.17, suite(op_tests(), "ops"), least_s=20),
        Stage("step", 0.06, (profiled("mae", f"{base} --fit"),), least_s=15),
        Stage("methods", 0.24, methods(("vit_base", "vit_large"), f"--batch 1024 --fit {step}"), least_s=7),
        Stage("kernels", 0.10, kernels("--rounds 3"), least_s=2.5),
        Stage("rivals", 0.08, rivals(f"{base} --no-compile"), least_s=10),
        Stage("compile", 0.10, compiled, least_s=20),
        Stage(
            "jpeg", 0.03, jpeg(scratch, 512, "--rounds 2 --seconds 1", f"--model vit_base {step}"), least_s=4
        ),
        Stage("rest", 0.03, suite(("tests/models", "tests/methods"), "models, methods"), least_s=12),
    ]


def quick(scratch: Path) -> list[Stage]:
    """Each question once, in its largest case."""
    step = "--model vit_base --seconds 1.5 --steps 20 --batch 1024"
    return [
        Stage("prepare", 0.20, prepare(("vit_base",)), least_s=12, always=True),
        Stage("tests", 0.10, suite(op_tests()[:3], "ops"), least_s=10),
        Stage("step", 0.10, (profiled("mae", f"{step} --fit"),), least_s=12),
        Stage("methods", 0.36, methods(("vit_base",), f"{step} --fit"), least_s=6),
        Stage("kernels", 0.14, kernels("--quick --providers fastmim"), least_s=1.5),
        Stage("rivals", 0.10, rivals(f"{step} --no-compile", RIVALS[:1]), least_s=8),
    ]


def rehearsal(scratch: Path) -> list[Stage]:
    """Every kind of stage at tiny shapes, and what can go wrong in one."""
    step = f"{TINY} --seconds 1"
    with_faults = scratch / "test_with_faults.py"
    with_faults.write_text(FAULTS)
    fails = Part("fails", ("-c", "raise SystemExit('as it should')"))
    hangs = Part("hangs", ("-c", "import time; print('waiting'); time.sleep(600)"), share=0.05)
    small = prepare((), f"--flags={step} --warm")
    return [
        Stage("prepare", 0.12, small, least_s=1, always=True),
        Stage(
            "sanitizer", 0.05, (Part("memcheck, racecheck", module("benchmarks.gpu.sanitize")),), least_s=1
        ),
        Stage("faults", 0.05, (hangs, fails), least_s=1),
        Stage("tests", 0.15, suite((str(with_faults),), "with faults", "--workers 2 --each-s 4"), least_s=1),
        Stage("step", 0.10, (profiled("mae", f"{step} --engine plain"),), least_s=1),
        Stage("methods", 0.18, methods((), f"{step} --fit"), least_s=1),
        Stage("kernels", 0.10, kernels("--quick --providers fastmim")[-1:], least_s=1),
        Stage("rivals", 0.10, rivals(f"{step} --no-compile --engine plain"), least_s=1),
        Stage("compile", 0.05, (ours_compiled(f"{step} --engine plain"),), least_s=1),
        Stage("jpeg", 0.10, jpeg(scratch, 8, "--rounds 1 --seconds 1", step), least_s=1),
    ]


FAULTS = '''"""What a round must tell of: one test that passes, one that fails, hangs, ends its process."""
import os, time
def test_sound(): pass
def test_unequal(): assert 1 + 1 == 3
def test_endless(): time.sleep(600)
def test_deadly(): os._exit(11)
def test_sound_as_well(): pass
'''


# --- their parts ------------------------------------------------------------------------------------


def prepare(models: Sequence[str], flags: str = "") -> tuple[Part, ...]:
    command = module("benchmarks.gpu.prepare")
    if models:
        command += ("--models", *models, "--ops", *OPS)
    else:
        command += ("--models", "vit_tiny", flags)
    return (Part("machine, Triton", command),)


def op_tests() -> tuple[str, ...]:
    """Files of tests of the ops, those of the largest kernels first."""
    names = sorted(path.stem.removeprefix("test_") for path in (TESTS / "ops").rglob("test_*.py"))
    paths = {path.stem.removeprefix("test_"): path for path in (TESTS / "ops").rglob("test_*.py")}
    order = [*FIRST_TESTS, *(name for name in names if name not in (*FIRST_TESTS, *NOT_HERE))]
    return tuple(paths[name].relative_to(TESTS.parent).as_posix() for name in order)


def suite(paths: Sequence[str], name: str, flags: str = "--each-s 60") -> tuple[Part, ...]:
    return (Part(name, module("benchmarks.gpu.tests", f"{flags} {' '.join(paths)}"), needs=("pytest",)),)


def profiled(method: str, flags: str) -> Part:
    return Part(f"{method} by kernel", module("benchmarks.step_profile", f"--method {method} {flags}"))


def methods(models: Sequence[str], flags: str) -> tuple[Part, ...]:
    """Every method at every size; the size is among the flags where none is named."""
    return tuple(
        Part(
            f"{method} {model}".strip(),
            module("benchmarks.throughput", f"--method {method} {model and '--model ' + model} {flags}"),
            share=2.0 if model == "vit_large" else 1.0,
        )
        for model in models or ("",)
        for method in METHODS
    )


def kernels(flags: str) -> tuple[Part, ...]:
    return tuple(
        Part(op, module("benchmarks.harness", f"{op} {flags}"), share=2.0 if op in OPS[:2] else 1.0)
        for op in OPS
    )


def rivals(flags: str, names: Sequence[str] = RIVALS) -> tuple[Part, ...]:
    parts = []
    for name in names:
        package = name.partition("_")[0]
        patched = "--apply" if package == "transformers" else ""
        command = module(f"benchmarks.rivals.{name}", f"{flags} {patched}")
        parts.append(Part(name, command, needs=(package,)))
    return tuple(parts)


def ours_compiled(flags: str) -> Part:
    return Part("mae", module("benchmarks.throughput", f"--method mae --compile {flags}"))


def jpeg(scratch: Path, batch: int, loader: str, step: str) -> tuple[Part, ...]:
    """The decoders alone, then a whole step that waits for them."""
    folder, needs = scratch / "photographs", ("PIL", "nvidia.dali")
    step = step.replace("--batch 8", "")
    make = module("benchmarks.pipeline.loader", f"{folder} --make {12 * batch}")
    alone = module("benchmarks.pipeline.loader", f"{folder} --batch {batch} {loader}")
    alone += ("--providers", "dataloader", "dali_plain", "dali")
    both = module("benchmarks.throughput", f"--method mae --batch {batch} --data {folder} {step}")
    parts = (Part("photographs", make, needs), Part("loader", alone, needs), Part("to loss", both, needs))
    return tuple(replace(part, share=share) for part, share in zip(parts, (0.5, 1, 1), strict=True))
