"""The limits of a GPU, and the time that they allow an op. Every constant of the forecast, with its source.

    op      max(bytes / (copy rate x share), FLOP / (matmul rate x share), instructions / issue rate)
            + gap                                         of each launch

Product   SMs work on waves of tiles, of which the last is not full, and a tile fills and drains its pipeline:
          share = tiles / (waves x SMs) x K / (K + FILL), relative to that of the 8192^3 that the rate was
          measured on, and no more than that. Of TILES, and of SPLITS of K, whose partial sums are written and
          read in fp32, the best.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from benchmarks.op_facts import Op


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU. Rates are what was measured on large, random operands, not what the datasheet says."""

    name: str
    sms: int
    copy_gb_per_s: float  # read and written
    matmul_tflop_per_s: float  # bf16, 8192^3
    fp32_tflop_per_s: float  # without tensor cores
    datasheet_tflop_per_s: float  # dense bf16
    flop_per_cycle: float  # bf16, of the tensor cores of one SM
    source: str

    @property
    def issue_per_s(self) -> float:
        """Instructions of single lanes: four warps a cycle and SM, at the clock of the datasheet's rate."""
        clock = self.datasheet_tflop_per_s * 1e12 / (self.sms * self.flop_per_cycle)
        return clock * self.sms * 4 * 32


HOPPER: dict[str, Any] = {
    "sms": 132,
    "fp32_tflop_per_s": 54.0,
    "datasheet_tflop_per_s": 989.0,
    "flop_per_cycle": 4096,
}
DEVICES = {
    device.name: device
    for device in (
        Device(
            name="H200", copy_gb_per_s=4300, matmul_tflop_per_s=790, **HOPPER,
            source="copy, matmul measured; fp32: 0.8 of the datasheet's 67 TFLOP/s",
        ),
        Device(
            name="H100", copy_gb_per_s=3000, matmul_tflop_per_s=798, **HOPPER,
            source="copy, matmul measured (SXM); fp32: 0.8 of the datasheet's 67 TFLOP/s",
        ),
        Device(
            name="A100", sms=108, copy_gb_per_s=1830, matmul_tflop_per_s=252, fp32_tflop_per_s=15.6,
            datasheet_tflop_per_s=312, flop_per_cycle=2048,
            source="not measured: the shares of the datasheet (SXM, 80 GB) that an H100 reaches, 0.90 of "
            "2,039 GB/s and 0.81 of 312 TFLOP/s; fp32: 0.8 of 19.5 TFLOP/s",
        ),
    )
}  # fmt: skip

BANDWIDTH = 0.9  # of a copy's rate, by an op bound by memory: QuACK's figure on H100, published
BANDWIDTH_OF = {"add_layer_norm_backward": 0.65}  # one row in flight, barriers: from its machine code
ISSUE = 0.75  # of the issue rate, by a kernel bound by instructions: an estimate
INSTRUCTIONS = {  # an element; what machine_code/bounds.toml has for sm_90, to which a test holds them
    "bias_gelu": 40.1,
    "bias_gelu_backward": 51.3,
    "norm_pix_loss_image": 62.8,
    "norm_pix_loss_image_backward": 66.4,
    "attention_tile": 17.2,  # a logit of 197 tokens of 32, the decoder's
    "attention_tile_backward": 49.4,  # of the same, in two kernels
    "attention_other": 16,  # estimates: an online softmax, and no tile narrower than 64
    "attention_other_backward": 28,
}
MATMUL_OF = {  # of the matmul rate, by kernels that are not the library's
    "attention_tile": 0.4,  # products of 32 to 64 a side: an estimate
    "attention_tile_backward": 0.25,  # 5 to 7 products where the definition has 4: an estimate
    "attention_other": 0.4,
    "attention_other_backward": 0.3,
    "info_nce": 0.3,  # 0.30 MMA to issue cycles: from its machine code
    "info_nce_backward": 0.19,  # tf32 through mma.sync, 150 TFLOP/s at most: from its machine code
}
TILES = (
    (128, 256),
    (256, 128),
    (128, 128),
    (64, 128),
    (64, 64),
)  # of the library's kernels, as profiles name
TILE_RATE = {128 * 256: 1.0, 128 * 128: 0.9, 64 * 128: 0.75, 64 * 64: 0.55}  # operands read again: estimates
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)  # of K
FILL = 224  # of K, 16 cycles each in a tile of 128 x 256: 1,000 cycles until the pipeline is full, 2,600 to
# write 64 kB at an SM's share of the bandwidth, 25 bytes a cycle, as if neither overlapped with another tile
LARGE = 8192  # the product that the matmul rate is measured on
GAP_MS = 2e-3  # from one queued kernel to the next, its ramp up and down: published, 1 to 3 us
HOST_MS = 0.06  # a launch, from Python through autograd: 77 ms for 1,269 on a CUDA device that runs nothing


# --- one op ---------------------------------------------------------------------------------------------

Bound = Literal["bytes", "products", "instructions", "launch"]


@cache
def product_efficiency(sms: int, M: int, N: int, K: int, batch: int = 1) -> tuple[float, int]:
    """Of the matmul rate without its own losses, and the number of parts that K is split into."""
    best = 0.0, 1
    for rows, columns in TILES:
        for split in SPLITS:
            if split > 1 and K // split < 8 * FILL:
                break
            tiles = batch * split * -(-M // rows) * -(-N // columns)
            full = batch * split * M * N / (rows * columns) / (-(-tiles // sms) * sms)
            part = K / split
            efficiency = TILE_RATE[rows * columns] * full * part / (part + FILL)
            best = max(best, (efficiency, split), key=lambda found: found[0] - 0.002 * (found[1] > 1))
    return best


def product_ms(op: Op, device: Device) -> tuple[float, float]:
    """Milliseconds of one product by FLOP and by bytes."""
    assert op.product is not None
    batch, M, N, K = op.product
    if op.precision == "fp32":
        return op.flops / device.fp32_tflop_per_s / 1e9, byte_ms(op.bytes, op.name, device)
    efficiency, split = product_efficiency(device.sms, M, N, K, batch)
    relative = min(1.0, efficiency / product_efficiency(device.sms, LARGE, LARGE, LARGE)[0])
    partial = 8 * batch * M * N * split if split > 1 else 0  # written and read
    return (
        op.flops / (device.matmul_tflop_per_s * relative) / 1e9,
        byte_ms(op.bytes + partial, op.name, device),
    )


def byte_ms(size: float, name: str, device: Device) -> float:
    return size / (device.copy_gb_per_s * BANDWIDTH_OF.get(name, BANDWIDTH)) / 1e6


def op_ms(op: Op, device: Device) -> tuple[float, Bound]:
    """Milliseconds of one call, and what bounds it: the launch, where its gap is more than half."""
    gap = op.launches * GAP_MS
    if op.product:
        products, size = product_ms(op, device)
    else:
        rate = MATMUL_OF.get(op.name, 1.0) * device.matmul_tflop_per_s
        if op.precision == "fp32":
            rate = device.fp32_tflop_per_s
        products, size = op.flops / rate / 1e9, byte_ms(op.bytes, op.name, device)
    issued = INSTRUCTIONS.get(op.name, 0) * op.elements / (device.issue_per_s * ISSUE) * 1e3
    limits: dict[Bound, float] = {"bytes": size, "products": products, "instructions": issued}
    bound = max(limits, key=lambda name: limits[name])
    return limits[bound] + gap, bound if limits[bound] > gap else "launch"


# --- names ----------------------------------------------------------------------------------------------


def device_named(name: str) -> Device:
    if name not in DEVICES:
        raise ValueError(f"device: want one of {', '.join(DEVICES)}, got {name!r}")
    return DEVICES[name]


def known_device(name: str) -> tuple[Device | None, str | None]:
    """The row of DEVICES for a name as the driver gives it, or why there is none."""
    slower = next((form for form in ("PCIe", "NVL", "MIG") if form in name), None)
    found = next((device for device in DEVICES.values() if device.name in name), None)
    if found and slower is None:
        return found, None
    what = f"its {slower} form is not" if found else f"{name} is not"
    return None, f"{what} among {', '.join(DEVICES)}"
