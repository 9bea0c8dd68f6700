"""Machine code is read as it is, and is as benchmarks/machine_code/bounds.toml says. No GPU is needed."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest

from benchmarks.devices import DEVICES, ISSUE
from benchmarks.machine_code import bounds, disassembly, forecast
from benchmarks.machine_code.cases import cases
from benchmarks.machine_code.facts import blocks_per_sm, mma_cycles
from benchmarks.machine_code.forecast import TABLE, estimate, most_instructions, table
from tests.ops.test_compile_ahead import kernels_of_the_package

ROOT = Path(__file__).resolve().parents[2]
ALL = os.environ.get("FASTMIM_COMPILE_ALL") == "1"
# streams, rows with sums, products
FEW = "bias_gelu forward, ViT-B encoder|norm_pix_loss_image forward|attention forward, ViT-B encoder"
SETTINGS = ("--sm", "80", "90", "100") if ALL else (FEW,)

LOOP = """
        /*0000*/                   S2R R0, SR_TID.X ;                     /* 0x0000000000007919 */
                                                                          /* 0x000e220000002100 */
        /*0010*/                   LDG.E.64 R2, desc[UR4][R4.64] ;
        /*0020*/              @!P0 LDG.E.128 R8, desc[UR4][R4.64+0x10] ;
        /*0030*/                   LDG.E.U8 R6, desc[UR4][R4.64+0x10] ;
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0050*/                   ISETP.GE.AND P0, PT, R0, R9, PT ;
        /*0060*/               @P0 BRA 0x20 ;
        /*0070*/               @P1 EXIT ;
        /*0080*/                   STG.E.128 desc[UR6][R2.64], R8 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   STG.E desc[UR6][R2.64], R8 ;
        /*00b0*/                   STL.64 [R1+0x8], R4 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   BRA 0xd0;
        /*00e0*/                   NOP;
"""
# the second product's rows lie in R4 to R7; its group ends with the third one's
PRODUCTS = """
        /*0000*/                   WARPGROUP.ARRIVE ;
        /*0010*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT, gsb0 ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R56, R4, gdesc[UR8].tnspB, R56 ;
        /*0030*/                   {before} ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R56, gdesc[UR8], R56, gsb0 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, {left} ;
        /*0060*/                   {behind} ;
        /*0070*/               @P0 BRA {top} ;
        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0090*/                   MOV R4, RZ ;
        /*00a0*/                   EXIT ;
"""


def products(before="NOP", left="0x0", behind="NOP", top="0x0"):
    return disassembly.parse(PRODUCTS.format(before=before, left=left, behind=behind, top=top))


def command(*arguments: str, cache: Path) -> subprocess.CompletedProcess:
    """A Python that compiles: without the interpreter, and cold."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(cache)
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_machine_code_is_as_the_table_says(tmp_path):
    run = command("-m", "benchmarks.machine_code", *SETTINGS, cache=tmp_path)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.skipif(not ALL, reason="make compile-ahead")
def test_a_kernel_with_too_few_registers_is_seen_to_spill(tmp_path):
    code = (
        "import json, torch\n"
        "from importlib import import_module\n"
        "gelu = import_module('fastmim_kernels.bias_gelu')\n"
        "from benchmarks.machine_code.compiling import compiled, machine_code\n"
        "from benchmarks.machine_code.facts import facts\n"
        "x, b = torch.empty(64, 3072, device='meta'), torch.empty(3072, device='meta')\n"
        "run = lambda: gelu._forward_kernel[(64,)](x, b, x, 64, 3072, D=3072, ROWS=4, COLS=512, maxnreg=24)\n"
        "(launch,) = compiled(run, 90)\n"
        "work = {'elements': 1, 'flops': 0, 'traffic': 0, 'turns': 1}\n"
        "print(json.dumps(facts(launch, machine_code(launch.kernel), 90, work)))"
    )
    run = command("-c", code, cache=tmp_path)
    assert run.returncode == 0, run.stderr[-4000:]
    assert json.loads(run.stdout)["spills"] > 0


def test_the_table_holds_every_kernel_and_describes_every_case():
    known = {case["name"]: case for case in table()["cases"]}
    assert {k["kernel"] for case in known.values() for k in case["kernels"]} == kernels_of_the_package()
    assert list(known) == [case.name for case in cases()]
    for case in cases():
        row = {key: getattr(case, key) for key in bounds.ROW} | {"rows": list(case.rows)}
        assert row == {key: known[case.name][key] for key in bounds.ROW}


def test_the_table_is_as_it_would_be_recorded():
    assert TABLE.read_text() == bounds.written(table())
    for case in table()["cases"]:
        for kernel in case["kernels"]:
            assert kernel.get("known", {}) == bounds.missed(case, kernel), (case["name"], kernel["kernel"])


def test_path_ends_at_the_exit_behind_the_longest_loop():
    code = disassembly.parse(LOOP)
    once, loop = disassembly.path(code)
    assert [x.address for x in loop] == [0x20, 0x30, 0x40, 0x50, 0x60]
    assert [x.address for x in once] == [0x00, 0x10, 0x70, 0x80, 0x90]
    assert disassembly.widths(loop, disassembly.GLOBAL_LOADS) == {128: 1, 8: 1}
    assert disassembly.widths(once, disassembly.GLOBAL_LOADS) == {64: 1}
    assert disassembly.widths(once, disassembly.GLOBAL_STORES) == {128: 1}
    assert disassembly.count(code, *disassembly.SPILLS) == 1  # in a slow path, and a spill all the same
    assert (code[2].guard, code[2].name) == ("!P0", "LDG.E.128")


def test_text_that_is_no_machine_code_is_refused():
    with pytest.raises(ValueError, match="want machine code as cuobjdump prints it, got 'nothing"):
        disassembly.parse("nothing of the kind")


@pytest.mark.parametrize(
    ("text", "registers"),
    [
        ("IMAD.WIDE.U32 R4, R12, UR9, RZ", {4, 5}),
        ("LEA R14, P0, R2, UR4, 0x1", {14}),
        ("ISETP.GE.AND P0, PT, R0, R9, PT", set()),
        ("SHFL.BFLY PT, R7, R6, 0x10, 0x1f", {7}),
        ("ATOMG.E.ADD.S32.STRONG.GPU PT, R3, desc[UR4][R4.64], R5", {3}),
        ("STS.128 [R5], R8", set()),
        ("LDS.128 R8, [R5]", {8, 9, 10, 11}),
        ("LDSM.16.M88.4 R8, [R5]", {8, 9, 10, 11}),
        ("LDSM.16.M88 R8, [R5]", {8}),
        ("CS2R R6, SRZ", {6, 7}),
        ("CS2R.32 R6, SR_CLOCKLO", {6}),
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", {4, 5, 6, 7}),
        ("R2UR UR4, R5", set()),
        ("F2FP.BF16.F32.PACK_AB R33, R22, R17", {33}),
        ("RET.REL.NODEC R12 0x0", set()),
        ("DFMA R4, R6, R8, R4", {4, 5}),
    ],
)
def test_registers_that_an_instruction_writes(text, registers):
    (x,) = disassembly.parse(f"        /*0000*/                   {text} ;")
    assert disassembly.results(x) == registers


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"behind": "MOV R4, RZ"},  # after the wait
        {"before": "MOV R8, RZ"},  # beside what is read
        {"before": "@P0 STS.128 [R4], R4"},
        {"left": "0x1", "top": "0x80"},
    ],
    ids=str,
)
def test_a_product_that_is_waited_for_is_no_hazard(settings):
    assert disassembly.hazards(products(**settings)) == []


@pytest.mark.parametrize(
    ("settings", "register"),
    [
        ({"before": "LDS.64 R6, [R10]"}, 6),
        ({"before": "@!P1 FMUL R7, R8, R9"}, 7),
        ({"left": "0x1", "behind": "MOV R5, RZ"}, 5),  # its group is the one that may be left
        ({"left": "0x1", "behind": "LDG.E.128 R0, desc[UR4][R4.64]", "top": "0x0"}, None),  # R0 to R3
        ({"left": "0x1", "behind": "LDG.E.128 R1, desc[UR4][R4.64]", "top": "0x0"}, 4),
    ],
    ids=str,
)
def test_a_planted_hazard_is_found(settings, register):
    found = disassembly.hazards(products(**settings))
    assert [x.register for x in found] == ([] if register is None else [register])
    assert all("R4, gdesc" in x.wgmma.operands for x in found)


def test_a_hazard_round_a_loop_is_found():
    text = PRODUCTS.format(before="NOP", left="0x1", behind="NOP", top="0x0")
    code = disassembly.parse(text.replace("WARPGROUP.ARRIVE", "MOV R7, RZ"))
    assert [(x.register, x.writer.address) for x in disassembly.hazards(code)] == [(7, 0)]


def test_products_take_the_cycles_of_their_flop():
    wgmma, sync, tf32 = disassembly.parse(
        """
        /*0000*/  HGMMA.64x64x16.F32.BF16 R56, R4, gdesc[UR8].tnspB, R56 ;
        /*0010*/  HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/  HMMA.1688.F32.TF32 R4, R8, R12, R4 ;
        """
    )
    assert mma_cycles(wgmma) * 4 == 2 * 64 * 64 * 16 / 4096  # four warps share it
    assert mma_cycles(sync) == pytest.approx(2 * 16 * 8 * 16 / 4096 / 0.63)
    assert mma_cycles(tf32) == pytest.approx(2 * 16 * 8 * 8 / 2048 / 0.63)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "blocks"),
    [(40, 1024, 4, 12), (64, 0, 1, 32), (32, 0, 4, 16), (235, 65664, 8, 1), (80, 100_000, 4, 2)],
    ids=["registers", "32 blocks", "64 warps", "registers of eight warps", "shared memory"],
)
def test_programs_that_an_sm_holds(registers, shared, warps, blocks):
    assert blocks_per_sm(registers, shared, warps, 90) == blocks


# --- the table ---------------------------------------------------------------------------------------


def a_case() -> dict:
    """One kernel of the table that has no targets of its own and misses one."""
    (case,) = (case for case in table()["cases"] if case["name"] == "bias_gelu forward, ViT-B encoder")
    case = deepcopy(case)
    case["kernels"] = [{**kernel, "spills": 0, "hazards": 0} for kernel in case["kernels"]]
    return case


def changed(**new) -> list[str]:
    case = a_case()
    case["kernels"][0] |= new
    return list(bounds.faults([case], table(), table()["triton"], 90))


def test_what_is_as_it_was_has_no_fault():
    assert changed() == []
    assert changed(instructions=a_case()["kernels"][0]["instructions"] * 1.01) == []


@pytest.mark.parametrize(
    ("new", "sentence"),
    [
        ({"spills": 8}, "has 8 spills, want none"),
        ({"hazards": 1}, "has 1 hazards, want none"),
        ({"instructions": 44.0}, "has instructions 44.0, in the table"),
        ({"instructions": 36.0}, "has instructions 36.0, in the table"),
        ({"instructions": 20.0}, "meets its target of instructions"),
        ({"load": {"128": 2, "16": 1}}, "moves 16 bits at a time, in the table at least 64"),
        ({"load": {"128": 2, "16": 1}}, "misses its target of narrowest, 32"),
        ({"blocks": 11}, "has blocks 11, in the table 12"),
        ({"registers": 48}, "has registers 48, in the table 40"),
        ({"kernel": "bias_gelu._other_kernel"}, "the table knows no such launch of bias_gelu._other_kernel"),
    ],
    ids=str,
)
def test_what_is_worse_or_better_is_said(new, sentence):
    assert any(sentence in fault for fault in changed(**new)), changed(**new)


def test_another_version_of_triton_is_held_to_hard_facts_alone():
    case = a_case()
    case["kernels"][0] |= {"instructions": 50.0, "registers": 60, "load": {"64": 2}}
    assert list(bounds.faults([case], table(), "3.6.0", 90)) == []
    case["kernels"][0] |= {"spills": 4, "load": {"16": 2}}
    assert len(list(bounds.faults([case], table(), "3.6.0", 90))) == 2
    assert len(list(bounds.faults([case], table(), table()["triton"], 80))) == 2


def test_recording_keeps_what_a_hand_wrote():
    case, by_hand = a_case(), {"targets": {"barriers": 0}, "why": "one row a warp has none"}
    old = deepcopy(table())
    (entry,) = (c for c in old["cases"] if c["name"] == case["name"])
    entry["kernels"][0] |= by_hand
    case["kernels"][0]["instructions"] = 10.0
    new = bounds.recorded([case], old, "4.0.0", 90, [c["name"] for c in old["cases"]])
    (found,) = (c for c in new["cases"] if c["name"] == case["name"])
    assert found["kernels"][0].items() >= by_hand.items()
    assert found["kernels"][0]["known"] == {"barriers": 0}
    assert new["triton"] == "4.0.0" and len(new["cases"]) == len(old["cases"])


# --- forecasts ---------------------------------------------------------------------------------------


def test_a_forecast_is_the_longest_of_its_times():
    device = DEVICES["H200"]
    kernel = {"elements": device.issue_per_s / 1e3, "instructions": 1, "mma_issued": 0.5}
    found = estimate({"bytes": device.copy_gb_per_s * 1e6, "kernels": [kernel]}, "H200")
    assert (found["bytes_ms"], found["mma_ms"]) == pytest.approx((1, 0.5))
    assert (found["issue_ms"], found["limit"]) == (pytest.approx(1 / ISSUE), "issue")
    assert (found["ms"], found["share"]) == pytest.approx((1 / ISSUE, ISSUE))


def test_the_bound_of_instructions_is_where_issue_takes_as_long_as_bytes():
    kernel = {"elements": 10**9, "flops": 0, "traffic": 0, "mma_issued": 0}
    case = {"bytes": 4 * 10**9, "kernels": [kernel]}
    kernel["instructions"] = most_instructions(case, kernel)
    found = estimate(case, "H200")
    assert found["issue_ms"] == pytest.approx(found["bytes_ms"], rel=5e-3)


def test_rows_of_benchmarks_have_forecasts():
    whole = forecast("bias_gelu", "forward_backward", {"M": 512 * 197, "D": 3072})
    halves = [forecast("bias_gelu", mode, {"M": 256 * 197, "D": 3072}) for mode in ("forward", "backward")]
    assert whole["ms"] == pytest.approx(2 * sum(half["ms"] for half in halves))
    shape = {"B": 512, "T": 197, "segments": 1, "H": 16, "d": 32}
    assert forecast("attention", "forward_backward", shape)["limit"] == "issue"
    assert forecast("attention", "forward_backward", {**shape, "d": 48}) is None
    values = {"tensors": 9, "values": 10**8}
    assert forecast("ema_update", "update", values, "float32 of bfloat16")["share"] == 1


def test_forecasts_compile_nothing():
    code = "import sys, benchmarks.machine_code as m; m.forecasts(); print('triton' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
