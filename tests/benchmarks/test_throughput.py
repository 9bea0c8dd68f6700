"""Whole steps: what is timed is what is trained, a wrong step is refused, and PyTorch alone is enough."""

import copy
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from fastmim_kernels import native

from benchmarks import engines, step_rows, throughput
from benchmarks.cost import beside
from benchmarks.engines import PlainEngine, WrongLoss, check_method, check_step, first, step, synthetic
from benchmarks.ledger import ledger
from benchmarks.provenance import ROOT
from fastmim.engine.ranks import Ranks
from fastmim.methods import METHODS, suited
from fastmim.optim import OptimConfig, torch_adamw
from fastmim.optim.groups import parameter_groups
from fastmim.recipes import METHOD_RECIPES, SCALES
from tests.methods.conftest import DECODER, MODEL

TINY = "--model vit_tiny --image-size 32 --patch 8 --decoder-size 32 1 2 --batch 8 --warmup 1 --steps 5"
BARE = """
import sys
HIDDEN = (
    "deepspeed", "xformers", "mslk", "tyro", "nvidia", "PIL", "safetensors", "tensorboard", "matplotlib",
)  # fmt: skip
class Without:
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, *rest):
        return None if name.split(".")[0] in HIDDEN else self.finder.find_spec(name, *rest)
    def __getattr__(self, name): return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
from benchmarks.throughput import main
sys.exit(main(sys.argv[1:]))
"""


def make(name: str = "mae"):
    torch.manual_seed(0)
    small = {"decoder": DECODER, "hidden": 40, "out": 20}
    config, model = suited(name, MODEL)
    method = replace(config, **{k: v for k, v in small.items() if hasattr(config, k)}).build(model)
    method.share(Ranks.single())
    return method


@pytest.mark.parametrize("name", METHODS)
def test_the_plain_engine_in_fp32_is_adamw(name):
    batch = synthetic(make(name), 3, 6)
    engine, twin = PlainEngine(make(name), torch.float32, OptimConfig()), make(name)
    groups = parameter_groups(twin.named_parameters(), weight_decay=0.05, group=twin.group)
    optimizer = torch_adamw(groups, OptimConfig())
    for group in optimizer.param_groups:
        group["lr"] = engines.LEARNING_RATE
    for _ in range(3):
        optimizer.zero_grad()
        loss = twin(batch).loss
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for teacher, student in twin.averages():
                for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
                    t.lerp_(s, 1 - twin.momentum(0.5))
        twin.after_step(0.5)
        assert step(engine, batch).item() == loss.item()
    for (key, p), q in zip(twin.named_parameters(), engine.method.parameters(), strict=True):
        assert torch.equal(p, q), key


def test_the_plain_engine_in_bf16_updates_a_master_copy():
    """Steps too small for bf16 weights add up in the master, and the weights are its rounding."""
    method = make()
    batch = synthetic(method, 3, 6)
    engine = PlainEngine(method, torch.bfloat16, OptimConfig())
    start = [m.clone() for m in engine.masters]
    losses = [step(engine, batch).item() for _ in range(30)]
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.bfloat16 and m.dtype == torch.float32 for p, m in pairs(engine))
    assert all(torch.equal(p, m.bfloat16()) for p, m in pairs(engine))
    assert not all(torch.equal(m, m.bfloat16().float()) for m in engine.masters)
    assert all(not torch.equal(m, s) for m, s in zip(engine.masters, start, strict=True))


def pairs(engine):
    return list(zip(engine.weights, engine.masters, strict=True))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_sound_method_passes_the_check(name, precision):
    method = make(name)
    errors = check_method(method, synthetic(method, 3, engines.check_images(method)), precision)
    assert errors["loss_error"] <= engines.LOSS_TOLERANCE[precision]


def test_the_check_runs_where_the_attention_asked_for_cannot():
    method = METHODS["mae"](decoder=DECODER).build(replace(MODEL, attention="xformers"))
    twin = copy.deepcopy(method)
    engines.use_any_attention(twin)
    assert twin(synthetic(method, 3, 2, "cpu")).loss.isfinite()


class Off(torch.nn.Module):
    """The decoder, with something wrong in bf16 only: on the device of the timing."""

    def __init__(self, decoder, what):
        super().__init__()
        self.decoder, self.what = decoder, what

    def forward(self, z, *rest):
        if z.dtype == torch.float32:
            return self.decoder(z, *rest)
        if self.what == "scale":
            return tuple(p * 1.1 for p in self.decoder(z, *rest))
        return tuple(p.detach() + 0 * p if self.what == "no gradient" else p * float("nan")
                     for p in self.decoder(z, *rest))  # fmt: skip


@pytest.mark.parametrize(
    ("what", "words"), [("scale", "loss on"), ("no gradient", "gradient on"), ("nan", "loss on")]
)
def test_a_wrong_method_is_not_timed(what, words):
    method = make()
    if what == "scale":  # predictions start near zero: let them matter
        torch.nn.init.normal_(method.decoder.decoder_pred.weight, std=0.5)
    method.decoder = Off(method.decoder, what)
    with pytest.raises(WrongLoss, match=words):
        check_method(method, synthetic(method, 3, 4), "bf16")


def test_a_step_that_is_not_the_methods_is_not_timed():
    method = make()
    batch = synthetic(method, 3, 6)
    engine = PlainEngine(method, torch.float32, OptimConfig())
    assert check_step(engine, method, batch, "fp32") > 0
    forward = engine.forward
    engine.forward = lambda batch: forward(first(batch, 3, "cpu"))
    with pytest.raises(WrongLoss, match="loss of the step"):
        check_step(engine, method, batch, "fp32")


def test_stages_add_up_to_the_step():
    method = make()
    batch = synthetic(method, 3, 6)
    engine = PlainEngine(method, torch.float32, OptimConfig())
    whole, *stages = engines.time_steps(engine, engines.repeated(batch), 4)
    assert len(whole) == 4 and all(len(times) == 4 for times in stages)
    for i in range(4):
        assert sum(times[i] for times in stages) == pytest.approx(whole[i])


def test_rates_and_knee():
    rates = throughput.rates([100.0, 50.0, 100.0, 100.0, 200.0], batch=10)
    assert rates["images_per_s"] == pytest.approx(100) and rates["images_per_s_mean"] == pytest.approx(
        50e3 / 550
    )
    assert rates["images_per_s_p20"] <= rates["images_per_s"] <= rates["images_per_s_p80"]
    assert throughput.knee([(8, 50.0), (16, 97.5), (32, 100.0), (64, 99.0)]) == 16


def test_a_sweep_on_a_cpu_ends_where_nothing_is_gained():
    arguments = throughput.parser().parse_args(["--batch", "4", "--sweep", "batch"])
    found: list[tuple[int, float]] = []
    for batch in throughput.batch_sizes(arguments, found):
        found.append((batch, min(batch, 16) * 10.0))
    assert [batch for batch, _ in found] == [4, 8, 16, 32, 64]


def test_the_command_writes_a_whole_row(tmp_path, capsys):
    assert throughput.main([*TINY.split(), "--engine", "plain", "--results", str(tmp_path)]) == 0
    (row,) = [json.loads(line) for line in (tmp_path / "throughput.jsonl").read_text().splitlines()]
    wanted = {
        "provider", "method", "model", "precision", "attention", "kernels", "batch", "images_per_s",
        "images_per_s_p20", "images_per_s_p80", "mfu_of_matmul", "mfu_of_shapes", "mfu_of_datasheet",
        "matmul_tflop_per_s", "peak_gib", "ms_forward", "ms_backward", "ms_update", "loss", "loss_error",
        "grad_error", "device", "versions", "commit", "command", "time", "library_products_ms", "shapes_ms",
        "foreseen_ms", "foreseen_images_per_s", "foreseen_mfu", "foreseen_launches", "foreseen_absent",
    }  # fmt: skip
    assert wanted <= row.keys()
    assert row["provider"] == "plain" and row["steps"] == 5 and row["mfu_of_datasheet"] is None
    tflops = row["images_per_s"] * row["gflop_per_image"] / 1e3
    assert row["mfu_of_matmul"] == pytest.approx(tflops / row["matmul_tflop_per_s"])
    assert row["mfu_of_shapes"] == pytest.approx(row["shapes_ms"] / row["ms"])
    assert 0 < row["library_products_ms"] < row["shapes_ms"]
    assert row["foreseen_ms"] is None and "is not among H200, H100, A100" in row["foreseen_absent"]
    assert row["kernels"].startswith("C++" if native.ready() else "references (")
    said = capsys.readouterr().out
    assert "img/s" in said and f"; nothing foreseen: {row['foreseen_absent']}" in said


def test_what_was_foreseen_stands_beside_what_was_measured():
    config, model = METHODS["mae"](), MODEL
    known = beside(config, model, batch=8, precision="bf16", device="NVIDIA H100 80GB HBM3", engine="plain")
    words = step_rows.foreseen_words({**known, "ms": 2 * known["foreseen_ms"]})
    assert words.startswith(f"; 50 % of the foreseen {known['foreseen_images_per_s']:.1f} img/s (")
    assert step_rows.foreseen_words({"ms": 1.0}) == ""  # of a rival nothing is


@pytest.mark.parametrize("role", ["forward", "data gradient", "weight gradient"])
def test_products_are_timed_at_their_shape_and_in_their_layout(role):
    ops = ledger(METHODS["mae"](decoder=DECODER), MODEL, batch=3, precision="fp32", engine="plain")
    op = next(op for op in ops if op.role == role)
    call = throughput.product(op)
    assert call().shape == op.product[1:3]
    a, b = call.args
    assert (a.is_contiguous(), b.is_contiguous()) == (role != "weight gradient", role != "forward")


def test_shapes_of_a_step_take_each_product_as_often_as_it_runs(monkeypatch):
    config = METHODS["mae"](decoder=DECODER)
    monkeypatch.setattr(throughput, "samples", lambda run, count: [1.0] * count)
    monkeypatch.setattr(throughput, "copy_gb_per_s", lambda: 1.0)
    monkeypatch.setattr(throughput, "matmul_tflop_per_s", lambda dtype: 1e-6)
    products, rest = throughput.shapes_ms(config, MODEL, 3, "fp32", "plain")
    ops = ledger(config, MODEL, batch=3, precision="fp32", engine="plain")
    assert products == sum(op.count for op in ops if op.product)
    attention = sum(op.count * op.flops for op in ops if op.name.startswith("attention")) / 1e3
    others = sum(op.count * op.bytes for op in ops if not op.product and not op.flops) / 1e6
    assert rest == pytest.approx(attention + others)


def test_pytorch_alone_is_enough(tmp_path):
    """No DeepSpeed, Pillow, tyro: `auto` takes the plain engine, and says why."""
    run = subprocess.run(
        [sys.executable, "-c", BARE, *TINY.split(), "--results", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "engine  plain: ModuleNotFoundError: No module named" in run.stdout
    assert json.loads((tmp_path / "throughput.jsonl").read_text())["provider"] == "plain"


@pytest.mark.slow
def test_the_engine_of_real_training(tmp_path):
    """As a script: DeepSpeed starts a process group of one."""
    pytest.importorskip("deepspeed")
    flags = f"{TINY} --engine deepspeed --method rmae --precision fp32 --results {tmp_path}"
    command = [sys.executable, "benchmarks/throughput.py", *flags.split()]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    row = json.loads((tmp_path / "throughput.jsonl").read_text())
    assert row["provider"] == "deepspeed" and row["zero"] == 1 and row["method"] == "rmae"


@pytest.mark.long
def test_a_compiled_method_is_checked_against_the_eager_one():
    method = make()
    method.compile(dynamic=False)
    batch = synthetic(method, 3, 6)
    engine = PlainEngine(method, torch.float32, OptimConfig())
    torch._dynamo.utils.counters.clear()
    assert check_step(engine, method, batch, "fp32") > 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_recipe_says_all_sizes_and_several_methods_make_a_table(tmp_path, capsys):
    flags = "--recipe sample --batch 4 --steps 1 --warmup 1 --seconds 0 --method mae beit supervised"
    assert throughput.main([*flags.split(), "--engine", "plain", "--results", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [line.split(" | ") for line in lines if line.startswith("| ")]
    assert [row[0] for row in table] == ["| method", "| mae", "| beit", "| supervised"]
    rows = [json.loads(line) for line in (tmp_path / "throughput.jsonl").read_text().splitlines()]
    assert {(row["model"], row["patch"], *row["image_size"]) for row in rows} == {
        ("recipe sample", 8, 64, 64)
    }
    run = SCALES["sample"](METHOD_RECIPES["mae"]())
    assert rows[0]["gflop_per_image"] == run.method.work(run.model).flops / 1e9
    assert all(0.2 < row["peak_gib"] < 20 for row in rows)


@pytest.mark.parametrize(
    "flags",
    [
        "--batch 0", "--data x --sweep batch", "--model vit_giant", "--recipe sample --patch 4",
        "--method data2vec --variant eight-masks", "--recipe sample --method mae --variant eight-masks",
    ],
)  # fmt: skip
def test_bad_flags_are_refused(flags):
    with pytest.raises(SystemExit, match="2"):
        throughput.main(flags.split())
