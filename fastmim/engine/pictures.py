"""The two pictures of a run: its loss over the steps, and what it sees in the masked images.

Predictions become pixels as in fastmim/evals/psnr.py, rounded and clamped to 0..255.

Shapes  image uint8 `[B, H, W, C]`, C = 1 or 3; P = patch * patch * C in the order row, column, channel.
Limits  the only module of the engine that imports matplotlib and Pillow; no pyplot, so no global state.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastmim.evals.psnr import patches_of, predicted_pixels
from fastmim.methods.base import Reconstruction
from fastmim.models.vit import ViTConfig


@contextmanager
def no_backend_named() -> Iterator[None]:
    """Import matplotlib within this: it raises where MPLBACKEND names a backend that it does not find, as in
    every `!` command of a notebook. Files need none; who shows figures in this process finds it set."""
    named = os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if named is not None:
            os.environ["MPLBACKEND"] = named
    if named:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = named


with no_backend_named():
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

GRAY = 128  # hidden patches
GAP = 2  # white pixels between the cells of the grid
COLUMNS = ("original", "masked", "reconstruction", "prediction alone")
MAX_ROWS = 8  # samples in the file
MIN_SIDE = 128  # pixels: smaller images are enlarged in the file
PROBE = "knn_"  # how the names of the probe's numbers begin
NO_PARTS = {"step", "epoch", "loss", "lr", "images_per_s", "data_wait", "seconds"}


# --- the loss -------------------------------------------------------------------------------------


def draw_loss(metrics_jsonl: Path, png: Path) -> None:
    """Draw loss, its parts and the learning rate of a run. Of a step written twice the last row counts.

    Raises ValueError where there is no row.
    """
    steps, columns = read_metrics(metrics_jsonl)
    window = max(1, len(steps) // 50)
    figure = Figure(figsize=(8, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    loss_axis, lr_axis = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    loss_axis.plot(steps, columns["loss"], color="C0", alpha=0.35, linewidth=0.7, marker=_marker(steps))
    probes = sorted(name for name in columns if name.startswith(PROBE))
    for k, name in enumerate(["loss", *sorted(columns.keys() - NO_PARTS - set(probes))]):
        _plot_smoothed(loss_axis, steps, columns[name], window, name, f"C{k}")
    if probes:
        _draw_probes(loss_axis.twinx(), steps, {name: columns[name] for name in probes})
    loss_axis.set_ylabel("loss (mean per scored value)")
    loss_axis.legend(title=f"mean of {window} steps" if window > 1 else None)
    if "lr" in columns:
        lr_axis.plot(steps, columns["lr"], color="black", linewidth=1, marker=_marker(steps))
    lr_axis.set_ylabel("learning rate")
    lr_axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    lr_axis.set_xlabel("step (updates of the weights)")
    for axis in (loss_axis, lr_axis):
        axis.grid(alpha=0.3)
    figure.savefig(png)


def _draw_probes(axis: Axes, steps: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
    """What neighbors say of the frozen features, on a scale of its own."""
    for name, line in zip(columns, ("--", ":"), strict=False):
        known = np.isfinite(columns[name])
        axis.plot(steps[known], 100 * columns[name][known], f"k{line}", marker="o", markersize=3, label=name)
    axis.set_ylabel("right by 20 neighbors, %")
    axis.legend(loc="lower left", fontsize=8)


def read_metrics(metrics_jsonl: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Steps in order, and one fp64 array as long for every scalar; NaN where a row has none."""
    rows: dict[int, dict[str, float]] = {}
    for line in metrics_jsonl.read_text().splitlines():
        if line.strip():
            row = json.loads(line)
            rows[row["step"]] = row
    if not rows:
        raise ValueError(f"want rows with a step and a loss, got none in {metrics_jsonl}")
    steps = sorted(rows)
    names = dict.fromkeys(["loss", *(name for step in steps for name in rows[step])])
    columns = {name: np.array([rows[s].get(name) for s in steps], dtype=np.float64) for name in names}
    return np.array(steps), columns


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the finite values among the `window` around each place, fewer at the ends; NaN for none."""
    finite = np.isfinite(values)
    ends = np.arange(len(values)) + window // 2 + 1
    low, high = np.maximum(ends - window, 0), np.minimum(ends, len(values))
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    num = count[high] - count[low]
    return np.where(num > 0, (total[high] - total[low]) / np.maximum(num, 1), np.nan)


def _plot_smoothed(
    axis: Axes, steps: np.ndarray, values: np.ndarray, window: int, name: str, color: str
) -> None:
    mean = smoothed(values, window)
    known = np.isfinite(mean)  # a scalar that only some rows have is one line nevertheless
    axis.plot(steps[known], mean[known], color=color, linewidth=1.5, label=name, marker=_marker(steps))


def _marker(steps: np.ndarray) -> str | None:
    """One row is a point, not an invisible line."""
    return "o" if len(steps) == 1 else None


# --- the reconstruction ---------------------------------------------------------------------------


def reconstruction_grid(
    image_BHWC: Tensor,
    seen_BK: Tensor,
    pred_BNP: Tensor,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    norm_pix: bool,
) -> Tensor:
    """uint8 `[3, B * (H + GAP) - GAP, 4 * (W + GAP) - GAP]`, on the CPU: a row per sample, in real pixels.

    Columns: the original; hidden patches gray; the prediction with the visible patches pasted over it; the
    prediction alone. `mean` and `std` are per channel, on the scale 0..1.
    """
    _check(image_BHWC, seen_BK, pred_BNP, patch, mean, std)
    image_BHWC, seen_BK = image_BHWC.cpu(), seen_BK.cpu()
    true_BNP = patches_of(image_BHWC, patch)
    pixels_BNP = predicted_pixels(pred_BNP.detach().cpu(), true_BNP, mean, std, norm_pix=norm_pix)
    pred_BNP = (255 * pixels_BNP).round().clamp(0, 255).to(torch.uint8)
    seen_BN1 = torch.zeros(true_BNP.shape[:2], dtype=torch.bool).scatter_(1, seen_BK, True)[..., None]
    masked_BNP = torch.where(seen_BN1, true_BNP, torch.full_like(true_BNP, GRAY))
    pasted_BNP = torch.where(seen_BN1, true_BNP, pred_BNP)

    B, H, W, C = image_BHWC.shape
    grid = torch.full((B, H + GAP, len(COLUMNS), W + GAP, C), 255, dtype=torch.uint8)
    for k, cells_BNP in enumerate((true_BNP, masked_BNP, pasted_BNP, pred_BNP)):
        grid[:, :H, k, :W] = _image(cells_BNP, patch, H, W)
    flat = grid.reshape(B * (H + GAP), len(COLUMNS) * (W + GAP), C)[:-GAP, :-GAP]
    return flat.permute(2, 0, 1).expand(3, -1, -1).contiguous()


def _check(
    image: Tensor, seen: Tensor, pred: Tensor, patch: int, mean: Sequence[float], std: Sequence[float]
) -> None:
    if image.ndim != 4 or image.dtype != torch.uint8 or image.shape[3] not in (1, 3):
        raise ValueError(f"want uint8 [B, H, W, 1 or 3], got {image.dtype} {tuple(image.shape)}")
    B, H, W, C = image.shape
    if H % patch or W % patch:
        raise ValueError(f"want H and W divisible by the patch, {patch}, got {H} x {W}")
    want = B, H // patch * (W // patch), patch * patch * C
    if tuple(pred.shape) != want:
        raise ValueError(f"want a prediction [B, N, P] = {want}, got {tuple(pred.shape)}")
    if seen.ndim != 2 or len(seen) != B:
        raise ValueError(f"want visible patches [B, K], B = {B}, got {tuple(seen.shape)}")
    if len(mean) != C or len(std) != C:
        raise ValueError(f"want mean and std of {C} channels, got {tuple(mean)} and {tuple(std)}")


def _image(cells_BNP: Tensor, patch: int, height: int, width: int) -> Tensor:
    """`[B, N, P] -> [B, H, W, C]`."""
    B = len(cells_BNP)
    x = cells_BNP.reshape(B, height // patch, width // patch, patch, patch, -1)
    return x.transpose(2, 3).reshape(B, height, width, -1)


def draw_reconstruction(picture: Reconstruction, model: ViTConfig, png: Path) -> None:
    """Write the grid of the first `MAX_ROWS` samples, captioned; small images are enlarged without blur."""
    reconstruction_sheet(picture, model, MAX_ROWS).save(png)


def reconstruction_sheet(
    picture: Reconstruction, model: ViTConfig, rows: int, title: str = ""
) -> Image.Image:
    """The grid of the first samples with a caption over each column; the title is the second's."""
    grid = reconstruction_grid(
        picture.image_BHWC[:rows],
        picture.seen_BK[:rows],
        picture.pred_BNP[:rows],
        model.patch,
        model.pixel_mean,
        model.pixel_std,
        norm_pix=picture.norm_pix,
    )
    zoom = math.ceil(MIN_SIDE / min(model.size))
    cells = Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy())
    cells = cells.resize((cells.width * zoom, cells.height * zoom), Image.Resampling.NEAREST)
    margin = 18
    sheet = Image.new("RGB", (cells.width + 2 * GAP, cells.height + margin + GAP), "white")
    sheet.paste(cells, (GAP, margin))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for k, caption in enumerate(COLUMNS):
        middle = GAP + zoom * (k * (model.size[1] + GAP) + model.size[1] / 2)
        words = f"{caption} {title}".strip() if caption == "masked" else caption
        draw.text((middle, margin / 2), words, fill="black", font=font, anchor="mm")
    return sheet
