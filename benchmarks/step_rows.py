"""The row of a timed step: its rate, shares of ceilings, what served; and rows as a sentence or a table."""

import argparse
from collections.abc import Sequence
from typing import Any

from fastmim_kernels import native
from fastmim_kernels.attention import attention_choices, choose_attention

from benchmarks.clock import matmul_tflop_per_s, quantiles
from benchmarks.devices import known_device
from benchmarks.engines import DTYPES
from benchmarks.flops import step_flops
from benchmarks.provenance import DEVICE, device_name
from fastmim.methods.base import MethodConfig
from fastmim.models.vit import ViTConfig


def rates(times: Sequence[float], batch: int) -> dict[str, float]:
    """Images per second of each step's time: median, and the slow and the fast end of the middle 60 %."""
    fast, median, slow = quantiles(times)
    return {
        "ms": median,
        "images_per_s": batch * 1e3 / median,
        "images_per_s_p20": batch * 1e3 / slow,
        "images_per_s_p80": batch * 1e3 / fast,
        "images_per_s_mean": batch * 1e3 * len(times) / sum(times),
        "steps": len(times),
    }


def fractions(tflop_per_s: float, precision: str) -> dict[str, float | None]:
    """The measured ceiling of this run and the datasheet's, and the shares of them that were reached."""
    ceiling = matmul_tflop_per_s(DTYPES[precision])
    chip, _ = known_device(device_name())
    sheet = chip and chip.datasheet_tflop_per_s
    return {
        "matmul_tflop_per_s": ceiling,
        "mfu_of_matmul": tflop_per_s / ceiling,
        "mfu_of_datasheet": tflop_per_s / sheet if sheet and precision == "bf16" else None,
    }


def describe(config: MethodConfig, model: ViTConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "method": config.name,
        "model": arguments.model if arguments.recipe is None else f"recipe {arguments.recipe}",
        "variant": arguments.variant,
        "image_size": model.size,
        "patch": model.patch,
        "precision": arguments.precision,
        "attention": attention_served(model, arguments.precision),
        "kernels": kernels_served(),
        "gflop_per_image": step_flops(config, model) / 1e9,
    }


def attention_served(model: ViTConfig, precision: str) -> str:
    """The back end of attention; of `auto`, once it has run, the fastest of each shape as measured."""
    chosen, why = choose_attention(model.attention, DEVICE, DTYPES[precision])
    choices = {
        f"{' + '.join(map(str, c['segments']))} x {c['width']}: {c['use']}" for c in attention_choices()
    }
    return f"{chosen} ({'; '.join(sorted(choices)) if chosen == 'auto' and choices else why})"


def kernels_served() -> str:
    """What runs behind our own ops on this device."""
    if DEVICE == "cuda":
        return "triton"
    obstacle = native.why_not()
    return "C++, and the references of ops that have none" if obstacle is None else f"references ({obstacle})"


def foreseen_words(row: dict[str, Any]) -> str:
    if row.get("foreseen_absent"):
        return f"; nothing foreseen: {row['foreseen_absent']}"
    if "foreseen_ms" not in row:
        return ""
    reached, mfu = 100 * row["foreseen_ms"] / row["ms"], 100 * row["foreseen_mfu"]
    return f"; {reached:.0f} % of the foreseen {row['foreseen_images_per_s']:.1f} img/s ({mfu:.1f} %)"


def sentence(row: dict[str, Any]) -> str:
    variant = f" {row['variant']}" if row.get("variant") else ""
    name = f"{row['method']}{variant} {row['model']} {row['provider']} batch {row['batch']}"
    name += f" ({row['why_batch']})" if row.get("why_batch") else ""
    if "failed" in row:
        return f"{name}: {row['failed']}"
    sheet, shapes = row["mfu_of_datasheet"], row.get("mfu_of_shapes")
    return (
        f"{name}: {row['images_per_s']:.1f} img/s ({row['images_per_s_p20']:.1f} to "
        f"{row['images_per_s_p80']:.1f}), {100 * row['mfu_of_matmul']:.1f} % of the matmul ceiling "
        f"{row['matmul_tflop_per_s']:.4g} TFLOP/s"
        + (f", {100 * shapes:.1f} % of its shapes' own ceiling" if shapes else "")
        + (f", {100 * sheet:.1f} % of the datasheet" if sheet else "")
        + f", {row['peak_gib']:.1f} GiB"
        + foreseen_words(row)
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The last batch size of each method, in Markdown."""
    lines = [
        "| method | batch | images/s | GFLOP per image | GFLOP/s | peak, GiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        rate, gflop = row["images_per_s"], row["gflop_per_image"]
        lines.append(
            f"| {row['method']} | {row['batch']} | {rate:,.1f} ({row['images_per_s_p20']:,.1f} to "
            f"{row['images_per_s_p80']:,.1f}) | {gflop:,.2f} | {rate * gflop:,.0f} | {row['peak_gib']:.2f} |"
        )
    return "\n".join(lines)
