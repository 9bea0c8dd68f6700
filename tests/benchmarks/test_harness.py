"""The harness: nothing wrong is timed, what cannot be had is named, rows say where they come from."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from fastmim_kernels import native

from benchmarks import clock, harness, plot, provenance
from benchmarks.gpu.stages import OPS
from benchmarks.harness import Case


def case(provider: str, *outputs: torch.Tensor, absent: str | None = None) -> Case:
    return Case(
        op="twice", provider=provider, mode="forward", shape={"n": 4}, dtype="float32", bytes_moved=32,
        run=lambda: outputs, absent=absent,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(clock, "ROUND_MS", 0.1)
    monkeypatch.setattr(harness, "copy_gb_per_s", lambda: 1.0)
    monkeypatch.setattr(harness, "matmul_tflop_per_s", lambda dtype: 1.0)


GOOD = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1e-8, 2e-8])


@pytest.mark.parametrize(
    "wrong",
    [
        (GOOD[0], GOOD[1] * 1.05),  # a small gradient: an absolute tolerance would let it pass
        (GOOD[0], torch.zeros(2)),
        (GOOD[0], torch.tensor([1e-8, float("nan")])),
        (GOOD[0][:2], GOOD[1]),
        (GOOD[0],),
    ],
    ids=["scale", "zero", "nan", "shape", "missing"],
)
def test_what_is_wrong_is_not_timed(wrong):
    rows = list(harness.measure([case("eager", *GOOD), case("wrong", *wrong)], rounds=1))
    assert {row["provider"]: "ms" in row for row in rows} == {"wrong": False, "eager": True}
    assert "failed" in rows[0]


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_nothing_is_timed_against_a_baseline_that_shows_nothing(value):
    rows = list(harness.measure([case(name, torch.full((3,), value)) for name in ("eager", "x")], rounds=1))
    assert len(rows) == 2
    assert all("want a baseline that is finite and not zero" in row["failed"] for row in rows)


def test_rates_come_from_the_median():
    (row,) = harness.measure([case("eager", *GOOD)], rounds=2)
    assert row["ms_p20"] <= row["ms"] <= row["ms_p80"]
    assert row["gb_per_s"] == pytest.approx(32 / row["ms"] / 1e6)
    assert "run" not in row and row["error"] == 0


def test_turns_alternate(monkeypatch):
    said = []
    runs = [lambda: said.append("a"), lambda: said.append("b")]
    monkeypatch.setattr(clock, "samples", lambda run, count: [run() or 1.0])
    clock.take_turns(runs, rounds=3)
    assert "".join(said) == "ab" + "abbaab"


def test_a_round_is_as_long_as_it_is_asked_to_be(monkeypatch):
    counts = []
    monkeypatch.setattr(clock, "samples", lambda run, count: counts.append(count) or [2.0] * count)
    for round_ms, calls in ((20.0, 10), (1.0, 3), (1e4, 100), (None, 3)):
        counts.clear()
        clock.take_turns([lambda: None], rounds=2, round_ms=round_ms)
        assert counts == [3, calls, calls], round_ms


@pytest.mark.parametrize(("host", "cycles"), [(20.0, 40_000), (0.01, 500)])
def test_the_head_start_covers_the_host(host, cycles, monkeypatch):
    """The device is kept busy for twice the time in which the call is queued, then timed."""
    said: list[object] = []

    class Event:
        def __init__(self, enable_timing=False):
            pass

        def record(self):
            said.append("mark")

        def elapsed_time(self, end):
            return 1.5

    monkeypatch.setattr(clock, "DEVICE", "cuda")
    monkeypatch.setattr(clock, "host_ms", lambda run: host)
    monkeypatch.setattr(clock, "cycles_per_ms", lambda: 1000.0)
    monkeypatch.setattr(clock, "flush", lambda: said.append("flush"))
    monkeypatch.setattr(torch.cuda, "_sleep", said.append)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("wait"))
    assert clock.samples(lambda: said.append("call"), 2) == [1.5, 1.5]
    assert said == ["flush", cycles, "mark", "call", "mark"] * 2 + ["wait"]


def test_the_time_of_the_host_is_that_of_a_call_that_has_run_before(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    naps = iter([0.2, 0.03])
    assert 30 <= clock.host_ms(lambda: time.sleep(next(naps))) < 150


def test_the_cache_is_filled_by_reading(monkeypatch):
    """What zero_ wrote would be carried to memory within the call that is timed."""
    buffer = torch.arange(8, dtype=torch.int32)
    monkeypatch.setattr(clock, "flush_buffer", lambda: buffer)
    clock.flush()
    assert buffer._version == 0 and buffer.tolist() == list(range(8))


@pytest.mark.parametrize("path", ["csrc/ops.cpp", "csrc/rows.h", "kernels/k.py", "fastmim/f.py"])
def test_the_digest_is_that_of_all_sources(path, tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setattr(provenance, "sources_digest", provenance.sources_digest.__wrapped__)
    before = provenance.sources_digest()
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text("1")
    one = provenance.sources_digest()
    (tmp_path / path).write_text("2")
    assert len({before, one, provenance.sources_digest()}) == 3


@pytest.mark.parametrize(
    ("op", "provider", "ready", "name"),
    [
        ("norm_pix_loss_image", "fastmim", True, "C++"),
        ("norm_pix_loss_image", "fastmim", False, "reference"),
        ("add_layer_norm", "fastmim", True, "reference"),
        ("norm_pix_loss_image", "compile", True, "compile"),
    ],
)
def test_a_row_names_what_served(op, provider, ready, name, monkeypatch):
    if ready and not native.ready():
        pytest.skip(f"no C++ ops: {native.why_not()}")
    monkeypatch.setattr(native, "ready", lambda: ready)
    (row,) = harness.measure([replace(case(provider, *GOOD), op=op)], rounds=1)
    assert row["served"] == name and name in harness.sentence(row)


def test_a_row_says_what_was_foreseen():
    plain, product = case("eager", *GOOD), replace(case("eager", *GOOD), flops=10**9)
    (row,) = harness.measure([plain], rounds=1)
    assert row["foreseen_ms"] == 32 / 1e6 and row["foreseen_code_ms"] is None  # at 1 GB/s
    (row,) = harness.measure([product], rounds=1)
    assert row["foreseen_ms"] == 1.0  # at 1 TFLOP/s


def test_the_forecast_of_machine_code_is_asked_of_its_table(monkeypatch):
    asked = []

    def forecast(*call):
        asked.append(call)
        return {"ms": 0.25} if call[0] == "twice" else None

    table = SimpleNamespace(CHIPS={"H100": None}, forecast=forecast)
    monkeypatch.setattr(harness, "module_exists", lambda name: name == "benchmarks.machine_code")
    monkeypatch.setitem(sys.modules, "benchmarks.machine_code", table)
    ours = case("fastmim", *GOOD)
    assert harness.machine_code_ms(ours) is None  # on a CPU
    monkeypatch.setattr(harness, "device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert harness.machine_code_ms(ours) == 0.25
    assert asked == [("twice", "forward", {"n": 4}, "float32", "H100")]
    assert harness.machine_code_ms(replace(ours, op="other")) is None
    assert harness.machine_code_ms(case("eager", *GOOD)) is None
    monkeypatch.setattr(harness, "device_name", lambda: "NVIDIA A100-SXM4-80GB")
    assert harness.machine_code_ms(ours) is None and len(asked) == 2


def test_attention_is_timed_as_training_calls_it(monkeypatch):
    """q, k and v are views of one product, and their gradient comes back as one."""
    module = import_module("benchmarks.ops.attention")
    seen = []

    def spy(q, k, v, segments):
        seen.append((q.stride(1), v.data_ptr() - q.data_ptr()))
        return module.attention_reference(q, k, v, segments)

    monkeypatch.setitem(module.PROVIDERS, "eager", spy)
    monkeypatch.setattr(module, "IMAGES", [2])
    group = next(module.cases())
    out, *grads = group[0].run()
    shape = (2, 197, 16, 32)
    assert seen == [(3 * 16 * 32, 2 * 16 * 32 * 4)] and out.shape == shape
    assert [g.shape for g in grads] == [shape] * 3 and grads[0].stride(1) == 3 * 16 * 32
    assert {c.provider: c.served() for c in group if c.provider in ("tile", "fastmim")} == {
        "tile": "reference", "fastmim": "sdpa",
    }  # fmt: skip


def test_providers_are_chosen_and_the_absent_are_named(capsys):
    group = [case("eager", *GOOD), case("x", *GOOD), case("y", absent="no y here"), case("z", *GOOD)]
    rows = harness.measure_groups([group], ["y", "z"], rounds=1)
    assert [row["provider"] for row in rows] == ["eager", "z"]
    assert "y  absent: no y here" in capsys.readouterr().out


def test_rows_say_where_they_come_from(monkeypatch):
    argv = [str(provenance.ROOT / "benchmarks" / "x.py"), "--data", "/elsewhere/photographs", "--batch", "8"]
    monkeypatch.setattr(sys, "argv", argv)
    env = provenance.environment()
    assert env["command"] == "python benchmarks/x.py --data photographs --batch 8"
    assert len(env["sources"]) == 12 and torch.__version__ in env["versions"].values()
    assert set(env) >= {"commit", "dirty", "sources", "device", "versions", "command", "time"}
    assert str(provenance.ROOT) not in json.dumps(env)


def test_without_git_there_is_no_commit_but_the_digest_of_the_sources(monkeypatch):
    monkeypatch.setenv("PATH", "")
    env = provenance.environment()
    assert env["commit"] is None and env["dirty"] is None and len(env["sources"]) == 12


@pytest.mark.parametrize("op", OPS)
def test_every_case_of_every_op_agrees_with_its_baseline(op, monkeypatch):
    """All providers but the compiled one, which takes a compiler and half a minute."""
    module = import_module(f"benchmarks.ops.{op}")
    if op == "info_nce":  # its logits would be 2.5 GB
        monkeypatch.setattr(module, "N", 3)
        monkeypatch.setattr(module, "CHUNK", 5000)
    for group in module.cases():
        expected = (group[0].oracle or group[0].run)()
        assert len({c.bytes_moved for c in group}) == 1
        for c in group:
            if c.provider != "compile" and not c.absent:
                assert harness.relative_error(c.run(), expected) <= 1e-4, c.provider


def test_a_teacher_that_stays_is_not_timed():
    """The first step is checked: a momentum near one would let anything pass."""
    module = import_module("benchmarks.ops.ema_update")
    group = next(module.cases())
    start = [torch.randn(4), torch.randn(4)]
    student = [torch.randn(4), torch.randn(4)]
    eager = module.step(module.eager, [t.clone() for t in start], student)
    cases = [
        replace(group[0], run=eager, oracle=lambda: module.oracle(start, student)),
        replace(group[0], provider="none", run=lambda: tuple(start)),
    ]
    assert ["failed" in row for row in harness.measure(cases, rounds=1)] == [True, False]


def test_logits_that_do_not_fit_are_refused(monkeypatch):
    module = import_module("benchmarks.ops.info_nce")
    assert module.unfit(1000) is None
    assert module.unfit(2**50).startswith("its logits are 4194304 GiB, wanted three times in ")
    monkeypatch.setattr(module, "N", 2)
    monkeypatch.setattr(module, "unfit", lambda logits: "too large")
    for group in module.cases():
        assert {c.provider for c in group if not c.absent} == {"chunks", "fastmim"}
        rows = list(harness.measure([c for c in group if not c.absent], rounds=1))
        assert all("ms" in row and row["tflop_per_s"] > 0 for row in rows)


def test_extra_memory_is_the_most_at_one_time():
    def run():
        a = torch.ones(2**20)
        b = a + 1
        del a
        return b[:1].clone() + 1, torch.zeros(2**18)

    assert harness.extra_mib(run) == pytest.approx(8 - 1, abs=0.01)  # 1 is given back


def test_the_floor_of_the_pixel_loss_is_the_published_one(monkeypatch):
    module = import_module("benchmarks.ops.norm_pix_loss_image")
    monkeypatch.setattr(module, "DTYPES", [torch.bfloat16])
    forward, both = (group[0] for group in module.cases())
    scale = 1024 / forward.shape["B"]
    assert both.bytes_moved * scale / 1e9 == pytest.approx(0.58, abs=0.005)


def test_the_command_appends_rows_and_plot_draws_them(tmp_path):
    assert harness.main(["attention", "--quick", "--providers", "fastmim", "--results", str(tmp_path)]) == 0
    path = tmp_path / "attention.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["provider"] for row in rows] == ["eager", "fastmim"]
    assert plot.main(["attention", "--results", str(tmp_path)]) == 0
    assert (tmp_path / "attention.png").stat().st_size > 5000


def test_an_unknown_op_is_named(capsys):
    with pytest.raises(SystemExit):
        harness.main(["atention"])
    assert "want one of add_layer_norm, attention" in capsys.readouterr().err


def test_importing_the_harness_needs_no_engine():
    code = "import sys, benchmarks.harness; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=provenance.ROOT, capture_output=True, text=True, check=True
    )
    assert set(run.stdout.split()) & {"deepspeed", "tyro", "nvidia", "PIL", "matplotlib"} == set()
