"""The cost model: its ops are the method's, its sums those of the reference, its limits physical."""

import tomllib
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from benchmarks import cost, devices
from benchmarks.cost import beside, foreseen
from benchmarks.devices import DEVICES, Device, known_device, op_ms, product_efficiency
from benchmarks.flops import step_flops
from benchmarks.ledger import ledger
from benchmarks.op_facts import Op
from benchmarks.provenance import ROOT
from fastmim.methods import (
    METHODS,
    BEiTConfig,
    CAEConfig,
    CMAEConfig,
    CMAEHuangConfig,
    Data2VecConfig,
    DINOConfig,
    IBOTConfig,
    MAEConfig,
    MoCoV3Config,
    RMAEConfig,
    SimMIMConfig,
    SupervisedConfig,
    suited,
)
from fastmim.methods.base import MethodConfig
from fastmim.methods.cmae_huang import checked_num_seen
from fastmim.methods.codes import LARGE
from fastmim.methods.masking import hidden_count
from fastmim.models import VITS
from fastmim.models.mae_decoder import DecoderConfig
from fastmim.models.vit import ViTConfig

BASE, BATCH = VITS["vit_base"], 8
SMALL = ViTConfig(width=128, depth=2, heads=2, patch=16, image_size=64)  # 16 patches
CONFIGS: list[MethodConfig] = [
    *(suited(name, SMALL)[0] for name in METHODS),
    MAEConfig(mask_ratio=0.5, decoder=DecoderConfig(width=96, depth=1, heads=3)),
    RMAEConfig(t2="full"),
    RMAEConfig(t2="independent", tie_decoders=False),
    CMAEConfig(symmetric=True, compare="patch+cls"),
    CMAEConfig(mask_token=False, t2="full", head_norm="bn"),
    CMAEConfig(freeze_patch_embed=True),
    CMAEHuangConfig(target_cls=False, mask="uniform", feature_depth=1),
]


def of(ops: tuple[Op, ...], **fields: str) -> list[Op]:
    return [op for op in ops if all(getattr(op, k) == v for k, v in fields.items())]


def left_out(method: MethodConfig, model: ViTConfig) -> int:
    """FLOP of the paper's method that ours does not run: patches nobody sees, rows whose pixels do not count.

    4 a value of a trained patch embedding (there is no gradient of the image), 6 of a trained head.
    """
    N, P, D = model.num_patches, model.patch_values, model.width
    if isinstance(method, CMAEConfig):
        first = int(N * (1 - method.mask_ratio))
        second = {"complement": N - first, "full": N}[method.t2]
        both = ((first, second), (second, first))[: 1 + method.symmetric]
        passes = 2 if method.freeze_patch_embed else 4
        return sum(P * D * (passes * (N - online) + 2 * (N - target)) for online, target in both)
    if isinstance(method, SimMIMConfig):
        hidden = 4 * method.num_hidden_cells(model)  # cells of two patches on each side
        return 4 * hidden * P * D + 6 * (N - hidden) * D * P
    if isinstance(method, IBOTConfig):  # the student's head, and the teacher's codes, of hidden patches alone
        rows = LARGE * (N - method.most_hidden(model))
        widths = D, method.hidden, method.hidden, method.bottleneck, method.out
        codes = method.bottleneck * method.out
        head = sum(n_in * n_out for n_in, n_out in pairwise(widths))
        return 6 * rows * head + 2 * rows * codes - 2 * codes // BATCH  # and the mean point of a batch
    if isinstance(method, DINOConfig | Data2VecConfig | MoCoV3Config | BEiTConfig | SupervisedConfig):
        return 0
    if isinstance(method, CAEConfig):  # each half is embedded by itself, once with a gradient
        hidden = hidden_count("", model, method.mask_ratio)
        return 4 * hidden * P * D + 2 * (N - hidden) * P * D
    d = method.decoder.width
    if isinstance(method, CMAEHuangConfig):
        seen = checked_num_seen(method, model)
        return 4 * (N - seen) * P * D + 6 * d * P * (1 + seen) + 6 * d * D * N  # the second head has one row
    seen = int(N * (1 - method.mask_ratio))
    views, shown = 1, seen
    if isinstance(method, RMAEConfig):
        second = {"complement": N - seen, "full": N, "independent": int(N * (1 - method.t2_ratio))}
        views, shown = 2, seen + second[method.t2]
    return 4 * (N - shown) * P * D + 6 * d * P * views * (1 + seen)


@pytest.mark.parametrize("method", CONFIGS, ids=lambda config: config.name)
def test_products_are_the_references_less_what_is_left_out(method):
    model = BASE if method in CONFIGS[: len(METHODS)] else SMALL
    model = replace(model, final_norm=method.encoder.get("final_norm", True))
    ops = ledger(method, model, batch=BATCH, precision="bf16")
    counted = sum(op.count * op.flops for op in ops if op.group.startswith(("products", "attention")))
    assert counted + BATCH * left_out(method, model) == BATCH * step_flops(method, model)
    assert foreseen(method, model, batch=BATCH).reference_flops == BATCH * step_flops(method, model)


def test_one_block_by_hand():
    """An encoder block of MAE on 4 images of 4 + 1 tokens of width 128, heads of 64, in bf16."""
    ops = ledger(MAEConfig(), SMALL, batch=4, precision="bf16", engine="plain")
    M, D = 4 * 5, 128
    (fc1,) = of(ops, what="encoder.blocks.mlp.fc1", role="forward")
    assert (fc1.count, fc1.product, fc1.flops) == (2, (1, M, 4 * D, D), 2 * M * 4 * D * D)
    assert fc1.bytes == 2 * (M * D + D * 4 * D + M * 4 * D)
    (qkv,) = of(ops, what="encoder.blocks.attn.qkv", role="weight gradient")
    assert qkv.product == (1, 3 * D, D, M) and qkv.bytes == 2 * (M * 3 * D + M * D + 3 * D * D)
    (back,) = of(ops, what="encoder.blocks.attn.qkv", role="data gradient")
    assert back.product == (1, M, D, 3 * D)
    (norm,) = of(ops, name="add_layer_norm", what="encoder.blocks.norm2")
    assert (
        norm.bytes == 4 * 2 * M * D + 2 * 2 * D + 2 * 4 * M and norm.launches == 1
    )  # weight, bias; mean, rstd
    (gelu,) = of(ops, name="bias_gelu", what="encoder.blocks.mlp.fc1")
    assert gelu.bytes == 2 * 2 * M * 4 * D + 2 * 4 * D
    (attention,) = of(ops, name="attention_tile", what="4 x 5 x 2 x 64")
    assert attention.bytes == 4 * 2 * M * D + 4 * 4 * 2 * 5  # q, k, v and out; the log of each row's sum
    assert attention.flops == 4 * 4 * 2 * 64 * 5 * 5 and attention.elements == 4 * 2 * 64 * 16
    (stack,) = of(ops, name="stack", what="4 x 5 x 3 x 2 x 64")
    assert stack.bytes == 2 * 2 * M * 3 * D and stack.group == "casts, copies"
    (scored,) = of(ops, name="gather")
    assert scored.bytes == 2 * 2 * 4 * 12 * 512 + 8 * 4 * 12  # 12 of 16 patches are; not all 16 are read
    (crop,) = of(ops, name="gather_patches")
    assert crop.bytes == 4 * 4 * 768 * (1 + 2) + 8 * 4 * 4  # bytes seen, written in bf16; the index


def test_the_update_by_hand():
    """28 bytes a value for AdamW, 6 for each cast, 12 and 6 for a teacher, of every trained value."""
    plain = ledger(CMAEConfig(), SMALL, batch=4, precision="bf16", engine="plain")
    method = CMAEConfig().build(SMALL)
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    followed = sum(p.numel() for m, s in method.averages() for p in s.parameters() if p.requires_grad)
    updates = {(op.group, op.name): op.count * op.bytes for op in of(plain, stage="update")}
    assert updates == {
        ("optimizer", "adamw"): 28 * trained,
        ("optimizer", "cast"): 12 * trained,
        ("teacher", "ema_update"): 12 * followed,
        ("teacher", "cast"): 6 * followed,
    }
    wide = ledger(CMAEConfig(), SMALL, batch=4, precision="fp32", engine="plain")
    assert {op.name for op in of(wide, stage="update")} == {"adamw", "ema_update"}
    engine = ledger(CMAEConfig(), SMALL, batch=4, precision="bf16", engine="deepspeed")
    (moved,) = of(engine, name="copy")
    assert moved.count == sum(p.requires_grad for p in method.parameters())
    (flat,) = of(engine, name="flatten")
    assert flat.bytes == 4 * trained


@pytest.mark.parametrize(("engine", "forward", "updates"), [("plain", 189, 30), ("deepspeed", 189, 16)])
def test_launches_are_those_that_a_device_without_kernels_counts(engine, forward, updates):
    """Of MAE-B at 1,024, in torch 2.11: kernels, fills and copies on the device."""
    ops = ledger(MAEConfig(), BASE, batch=1024, precision="bf16", engine=engine)
    found = {
        stage: sum(op.count * op.launches for op in of(ops, stage=stage)) for stage in ("forward", "update")
    }
    assert found == {"forward": pytest.approx(forward, abs=2), "update": pytest.approx(updates, abs=1)}


@pytest.mark.parametrize("name", METHODS)
def test_every_trained_product_has_its_gradients(name):
    """Each layer's weight gradient takes what its forward took; nothing in a target branch has one."""
    ops = ledger(*suited(name, SMALL), batch=4, precision="bf16")
    found: dict[str, dict[str, int]] = {}
    for op in ops:
        if op.role and op.group.startswith("products"):
            roles = found.setdefault(op.what, {})
            roles[op.role] = roles.get(op.role, 0) + op.count * op.flops
    assert any("mlp.fc1" in what for what in found)
    shared = ("decoder.decoder_embed", "feature_decoder.decoder_embed")  # they read one tensor
    for what, roles in found.items():
        frozen = name == "mocov3" and what == "encoder.patch_embed.proj"
        if frozen or what.startswith(("target", "teacher", "key_")):
            assert set(roles) == {"forward"}
        elif what not in shared or name != "cmae_huang":
            passes = (
                2 if name == "cae" and what.startswith("encoder.") else 1
            )  # of as many tokens, one trained
            assert passes * roles["weight gradient"] == roles["forward"], what
            assert ("data gradient" in roles) == (what != "encoder.patch_embed.proj")


def test_shapes_that_no_tile_serves_are_counted_too():
    fine = replace(BASE, patch=8, depth=1)  # 785 tokens
    for precision in ("bf16", "fp32"):
        ops = ledger(CMAEConfig(), fine, batch=2, precision=precision)
        assert {op.count for op in ops if op.name == "attention_other"} == {2}
        assert foreseen(CMAEConfig(), fine, batch=2, precision=precision).ms > 0
    assert not of(ledger(CMAEConfig(), BASE, batch=2, precision="bf16"), name="attention_other")


# --- time -----------------------------------------------------------------------------------------------


def test_more_takes_longer_and_larger_batches_serve_better():
    steps = [foreseen(MAEConfig(), BASE, batch=batch) for batch in (8, 128, 1024)]
    assert steps[0].ms == steps[0].host_ms and steps[-1].ms == steps[-1].device_ms
    for small, large in pairwise(steps):
        assert small.device_ms < large.device_ms and small.images_per_s < large.images_per_s
    base, wide = (foreseen(MAEConfig(), VITS[v], batch=256) for v in ("vit_base", "vit_large"))
    assert base.ms < wide.ms and base.mfu < wide.mfu < 1
    chips = [foreseen(MAEConfig(), BASE, batch=1024, device=name).ms for name in ("H200", "H100", "A100")]
    assert chips == sorted(chips)


def test_no_product_beats_the_rate_that_was_measured():
    for forecast in (foreseen(*suited(name, BASE), batch=1024) for name in METHODS):
        for line in forecast.lines:
            assert line.flops <= line.ms * forecast.device.matmul_tflop_per_s * 1e9, line.name
            assert line.bytes <= line.ms * forecast.device.copy_gb_per_s * 1e6, line.name


@pytest.fixture
def ideal(monkeypatch):
    """A device without losses and with any bandwidth."""
    monkeypatch.setattr(devices, "TILES", ((1, 1),))
    monkeypatch.setattr(devices, "TILE_RATE", {1: 1.0})
    monkeypatch.setattr(devices, "FILL", 0)
    monkeypatch.setattr(devices, "GAP_MS", 0.0)
    monkeypatch.setattr(cost, "HOST_MS", 0.0)
    monkeypatch.setattr(devices, "INSTRUCTIONS", {})
    monkeypatch.setattr(devices, "MATMUL_OF", {})
    product_efficiency.cache_clear()
    yield Device(
        name="ideal", sms=1, copy_gb_per_s=float("inf"), matmul_tflop_per_s=500, fp32_tflop_per_s=500,
        datasheet_tflop_per_s=500, flop_per_cycle=4096, source="none",
    )  # fmt: skip
    product_efficiency.cache_clear()


@pytest.mark.parametrize("name", METHODS)
def test_with_any_bandwidth_a_step_is_its_flops_over_the_rate(name, ideal):
    forecast = foreseen(*suited(name, SMALL), batch=8, device=ideal)
    flops = sum(line.flops for line in forecast.lines)
    assert forecast.ms == pytest.approx(flops / 500e12 * 1e3, rel=1e-9)
    assert 8 * step_flops(*suited(name, SMALL)) / forecast.ms / 1e9 == pytest.approx(500 * forecast.mfu)


def test_a_wave_that_is_not_full_costs_a_whole_one():
    """133 tiles on 132 SMs; and a short product fills its pipeline as often as a long one."""
    full = product_efficiency(132, 128 * 132, 256, 4096)[0]
    assert product_efficiency(132, 128 * 132 + 1, 256, 4096)[0] < 0.75 * full
    assert full == pytest.approx(4096 / (4096 + devices.FILL))
    efficiency, split = product_efficiency(132, 768, 768, 50_000)  # 18 tiles: K is cut
    assert split > 1 and efficiency > 0.5


def test_what_bounds_an_op():
    chip = DEVICES["H200"]
    copy = Op(stage="forward", group="casts, copies", name="clone", what="", bytes=4_300_000_000)
    assert op_ms(copy, chip) == (pytest.approx(1 / devices.BANDWIDTH + devices.GAP_MS), "bytes")
    gelu = replace(copy, name="bias_gelu", bytes=4000, elements=10**9)
    ms = 40.1 * 10**9 / (989e12 / 4096 * 128 * devices.ISSUE) * 1e3
    assert op_ms(gelu, chip) == (pytest.approx(ms + devices.GAP_MS), "instructions")
    assert op_ms(replace(copy, bytes=8, launches=3), chip) == (
        pytest.approx(3 * devices.GAP_MS, rel=1e-3),
        "launch",
    )


# --- names ----------------------------------------------------------------------------------------------


def test_a_measured_row_says_what_was_foreseen_or_why_not():
    ask = {"batch": 64, "precision": "bf16", "engine": "plain"}
    there = beside(MAEConfig(), SMALL, device="NVIDIA H100 80GB HBM3", **ask)
    assert there["foreseen_ms"] == foreseen(MAEConfig(), SMALL, device="H100", **ask).ms
    assert there["foreseen_absent"] is None and 0 < there["foreseen_mfu"] < 1
    absent = beside(MAEConfig(), SMALL, device="cpu, AVX2, 2 threads", **ask)
    assert absent.keys() == there.keys() and absent["foreseen_ms"] is None
    assert absent["foreseen_absent"] == "cpu, AVX2, 2 threads is not among H200, H100, A100"
    assert known_device("NVIDIA H100 PCIe") == (None, "its PCIe form is not among H200, H100, A100")
    assert known_device("NVIDIA A100-SXM4-80GB")[0] is DEVICES["A100"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--method maee", "invalid choice: 'maee' (choose from "),
        ("--model vit_giant", "invalid choice: 'vit_giant'"),
        ("--device B200", "invalid choice: 'B200'"),
        ("--batch 0", "batch: want 1 or more images, got 0"),
        ("--patch 15", "model.image-size: want multiples of the patch, 15, got 224 x 224"),
        ("--method cmae --batch 1", "method.negatives: InfoNCE wants two or more images"),
    ],
)
def test_what_is_not_known_is_named(flags, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        cost.main(flags.split())
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("field", ["device", "precision", "engine"])
def test_the_function_names_it_as_well(field):
    with pytest.raises(ValueError, match=f"{field}: want one of .*, got 'x'"):
        foreseen(MAEConfig(), SMALL, **{"batch": 4, field: "x"})


def test_the_command_prints_a_table_and_a_line_for_each_device(capsys, monkeypatch):
    assert cost.main(["--model", "vit_tiny", "--batch", "32", "--by", "op"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "mae vit_tiny, batch 32, bf16, deepspeed, one GPU; nothing measured"
    assert lines[1].split() == ["count", "GFLOP", "GB", "launches", "ms", "bound", "by"]
    assert any(line.startswith("backward attention_tile_backward") for line in lines)
    forecast = foreseen(MAEConfig(), VITS["vit_tiny"], batch=32)
    total = next(line.split() for line in lines if line.startswith("total"))
    assert total[4] == str(forecast.launches) and total[5] == f"{forecast.device_ms:.3f}"
    assert [line.split(":")[0] for line in lines[-3:]] == ["H200", "H100", "A100"]
    monkeypatch.setattr(cost, "VITS", {"vit_base": SMALL, "vit_large": SMALL})
    assert cost.main(["--all", "--batch", "4", "--device", "A100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 2 * len(METHODS) and all("img/s foreseen" in line for line in lines[1::2])


@pytest.mark.parametrize("op", ["bias_gelu", "norm_pix_loss_image", "attention"])
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_instructions_are_those_of_the_machine_code(op, mode):
    """Of the last case of each in the table, which is the decoder's."""
    of_op = [case for case in read_cases() if case["row"]["op"] == op and case["row"]["mode"] == mode]
    found = sum(kernel["issues"]["instructions"] for kernel in of_op[-1]["kernels"])
    name = ("attention_tile" if op == "attention" else op) + ("_backward" if mode == "backward" else "")
    assert devices.INSTRUCTIONS[name] == pytest.approx(found, abs=0.05)


def read_cases():
    table = tomllib.loads((ROOT / "benchmarks" / "machine_code" / "bounds.toml").read_text())
    return [case for case in table["cases"] if "row" in case]


def test_groups_hold_all_ops():
    forecast = foreseen(CMAEHuangConfig(), SMALL, batch=4)
    for field in ("count", "flops", "bytes", "launches", "ms"):
        sums = [sum(getattr(x, field) for x in lines) for lines in (forecast.lines, forecast.groups)]
        assert sums[0] == pytest.approx(sums[1])
    wanted = {
        "attention", "add_layer_norm", "bias_gelu", "pixel loss", "info_nce", "masks", "gather, restore",
        "optimizer", "teacher", "casts, copies", "bias gradients",
    }  # fmt: skip
    assert wanted <= {group.name for group in forecast.groups}


def test_nothing_is_computed():
    """The largest encoder at a batch that no device holds."""
    before = torch.get_default_dtype()
    assert foreseen(MAEConfig(), VITS["vit_huge"], batch=65536).ms > 1000
    assert torch.get_default_dtype() == before and torch.empty(1).device.type == "cpu"
