"""What a training step should take: bytes, FLOP and launches of every op, and the time these allow.

python -m benchmarks.cost --method mae --model vit_base --batch 1024 [--device H200] [--by op|group] [--all]

    op      max(bytes / (copy rate x share), FLOP / (matmul rate x share), instructions / issue rate)
            + gap                                         of each launch
    step    max(sum over ops, launches x host cost)       the host queues ahead of the device

The ops are those of the code (`ledger.py`); every constant stands in `devices.py`, with its source. A
forecast is no measurement: it is printed beside one to show where time goes that nothing accounts for.

Left out  clocks that fall under load beyond what the measured rate has in it, caches that spare traffic,
          kernels that overlap, waiting for data, collectives of several ranks.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from benchmarks.devices import DEVICES, HOST_MS, Device, device_named, known_device, op_ms
from benchmarks.flops import step_flops
from benchmarks.ledger import ENGINES, PRECISIONS, ledger
from benchmarks.op_facts import Op
from fastmim.methods import METHODS, suited
from fastmim.methods.base import MethodConfig
from fastmim.models import VITS
from fastmim.models.vit import ViTConfig

# --- a step ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Line:
    """An op in all its calls, or a group of ops."""

    stage: str
    name: str
    what: str
    count: int
    flops: int
    bytes: int
    launches: int
    ms: float
    bound: str


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Of one step of one micro-batch on one device."""

    device: Device
    batch: int
    precision: str
    reference_flops: int  # of the step by `flops.py`: MFU is taken with these
    lines: tuple[Line, ...]
    groups: tuple[Line, ...]

    @property
    def device_ms(self) -> float:
        return sum(line.ms for line in self.lines)

    @property
    def launches(self) -> int:
        return sum(line.launches for line in self.lines)

    @property
    def host_ms(self) -> float:
        return self.launches * HOST_MS

    @property
    def ms(self) -> float:
        return max(self.device_ms, self.host_ms)

    @property
    def images_per_s(self) -> float:
        return self.batch * 1e3 / self.ms

    @property
    def tflop_per_s(self) -> float:
        return self.reference_flops / self.ms / 1e9

    @property
    def mfu(self) -> float:
        """Of the measured matmul rate; in fp32, of that without tensor cores."""
        half = self.precision == "bf16"
        return self.tflop_per_s / (self.device.matmul_tflop_per_s if half else self.device.fp32_tflop_per_s)


def foreseen(
    method: MethodConfig,
    model: ViTConfig,
    *,
    batch: int,
    precision: str = "bf16",
    device: str | Device = "H200",
    engine: str = "deepspeed",
) -> Forecast:
    """The forecast of a step of `batch` images on one device. ValueError for a name that is not known."""
    chip = device if isinstance(device, Device) else device_named(device)
    ops = ledger(method, model, batch=batch, precision=precision, engine=engine)
    lines = [(op.group, line_of(op, chip)) for op in ops]
    groups: dict[str, list[Line]] = {}
    for group, line in lines:
        groups.setdefault(group, []).append(line)
    return Forecast(
        device=chip,
        batch=batch,
        precision=precision,
        reference_flops=batch * step_flops(method, model),
        lines=tuple(line for _, line in lines),
        groups=tuple(together(name, found) for name, found in groups.items()),
    )


def line_of(op: Op, device: Device) -> Line:
    ms, bound = op_ms(op, device)
    n = op.count
    return Line(
        stage=op.stage, name=f"{op.name}, {op.role}" if op.role else op.name, what=op.what, count=n,
        flops=n * op.flops, bytes=n * op.bytes, launches=n * op.launches, ms=n * ms, bound=bound,
    )  # fmt: skip


def together(name: str, lines: Sequence[Line]) -> Line:
    """A group's sums, bound by what bounds most of its time."""
    bounds = {line.bound: 0.0 for line in lines}
    for line in lines:
        bounds[line.bound] += line.ms
    count, flops, size, launches = (
        sum(getattr(line, field) for line in lines) for field in ("count", "flops", "bytes", "launches")
    )
    return Line(
        stage="", name=name, what="", count=count, flops=flops, bytes=size, launches=launches,
        ms=sum(line.ms for line in lines), bound=max(bounds, key=lambda bound: bounds[bound]),
    )  # fmt: skip


# --- beside a measurement -------------------------------------------------------------------------------


def beside(
    method: MethodConfig, model: ViTConfig, *, batch: int, precision: str, device: str, engine: str
) -> dict[str, float | str | None]:
    """What a row of a measured step says of the forecast: four fields, or None and the reason."""
    chip, reason = known_device(device)
    if chip is None:
        names = ("foreseen_ms", "foreseen_images_per_s", "foreseen_mfu", "foreseen_launches")
        return {**dict.fromkeys(names), "foreseen_absent": reason}
    forecast = foreseen(method, model, batch=batch, precision=precision, device=chip, engine=engine)
    return {
        "foreseen_ms": forecast.ms,
        "foreseen_images_per_s": forecast.images_per_s,
        "foreseen_mfu": forecast.mfu,
        "foreseen_launches": forecast.launches,
        "foreseen_absent": None,
    }


# --- command --------------------------------------------------------------------------------------------


def table(lines: Iterable[Line], forecast: Forecast) -> str:
    """One line for each, and the total."""
    lines = list(lines)
    names = [" ".join(filter(None, (line.stage, line.name, line.what))) for line in lines]
    wide = max(map(len, names))
    head = f"{'':{wide}}  count      GFLOP        GB  launches       ms  bound by"
    rows = [
        f"{name:{wide}}  {line.count:5}  {line.flops / 1e9:9.1f}  {line.bytes / 1e9:8.3f}  "
        f"{line.launches:8}  {line.ms:7.3f}  {line.bound}"
        for name, line in zip(names, lines, strict=True)
    ]
    total = together("", lines)
    last = (
        f"{'total':{wide}}  {total.count:5}  {total.flops / 1e9:9.1f}  {total.bytes / 1e9:8.3f}  "
        f"{total.launches:8}  {forecast.device_ms:7.3f}  host {forecast.host_ms:.1f} ms"
    )
    return "\n".join([head, *rows, last])


def sentence(forecast: Forecast) -> str:
    f = forecast
    limit = "host" if f.host_ms > f.device_ms else "device"
    sheet = 100 * f.tflop_per_s / f.device.datasheet_tflop_per_s
    gflop = f.reference_flops / f.batch / 1e9
    return (
        f"{f.device.name}: {f.images_per_s:.0f} img/s foreseen, {100 * f.mfu:.1f} % MFU ({sheet:.1f} % of "
        f"the datasheet) at {gflop:.1f} GFLOP an image, {f.ms:.1f} ms a step, bound by the {limit}; "
        f"{f.launches} launches"
    )


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--method", choices=METHODS, default="mae")
    p.add_argument("--model", choices=VITS, default="vit_base")
    p.add_argument("--batch", type=int, default=1024, help="images per GPU and step")
    p.add_argument("--precision", choices=PRECISIONS, default="bf16")
    p.add_argument("--engine", choices=ENGINES, default="deepspeed")
    p.add_argument(
        "--device", choices=DEVICES, help="the table of this one; by default H200's, and a line each"
    )
    p.add_argument("--by", choices=["op", "group"], default="group")
    p.add_argument("--all", action="store_true", help="every method at B and L, a line for each device")
    p.add_argument("--image-size", type=int)
    p.add_argument("--patch", type=int)
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    p = parser()
    a = p.parse_args(arguments)
    runs = [(m, v) for m in METHODS for v in ("vit_base", "vit_large")] if a.all else [(a.method, a.model)]
    changes = {k: v for k, v in (("image_size", a.image_size), ("patch", a.patch)) if v is not None}
    options = {"batch": a.batch, "precision": a.precision, "engine": a.engine}
    try:
        for method, name in runs:
            model = replace(VITS[name], **changes)
            forecasts = [
                foreseen(*suited(method, model), device=chip, **options)
                for chip in ([a.device] if a.device else DEVICES)
            ]
            print(f"{method} {name}, batch {a.batch}, {a.precision}, {a.engine}, one GPU; nothing measured")
            if not a.all:
                print(table(forecasts[0].lines if a.by == "op" else forecasts[0].groups, forecasts[0]))
            print(*map(sentence, forecasts), sep="\n", flush=True)
    except ValueError as error:
        p.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
