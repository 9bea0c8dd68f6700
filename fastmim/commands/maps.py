"""`fastmim attention` and `fastmim pca`: what an encoder looks at, and which patches are alike to it.

fastmim attention runs/dino photos            the last block, head by head, and the rollout of all blocks
fastmim pca runs/mae photos --block 8         three principal components of the patches as colors
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmim.commands.reconstruct import chosen
from fastmim.commands.weights import add_reading, add_weights, check_counts, device_here, pretrained
from fastmim.data.feed.center import center_crops
from fastmim.evals.features import features_in_batches
from fastmim.evals.maps import as_colors, attention_of, components, rollout
from fastmim.models.vit import Encoder

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".pdf")
INCHES = 1.3  # of a cell
MAX_HEADS = 12


def main(kind: str, arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog=f"fastmim {kind}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_weights(parser)
    parser.add_argument("images", type=Path, help="a folder, an image, or any other set of images")
    parser.add_argument("--out", type=Path, default=Path(f"{kind}.png"), help=f"file to write ({kind}.png)")
    parser.add_argument("--rows", type=int, default=6, help="images, evenly spaced over the set (6)")
    parser.add_argument("--block", type=int, help="the block, 1 the first (the last)")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), help="pixels of the input (as it was trained)"
    )
    add_reading(parser, crop=1.0)
    args = parser.parse_args(arguments)
    try:
        check_counts(args, "rows", "workers", "block")
        if args.out.suffix.lower() not in SUFFIXES:
            raise ValueError(f"--out: want a file that ends in {', '.join(SUFFIXES)}, got {args.out}")
        encoder = pretrained(args, args.weights).encoder
        if not isinstance(encoder, Encoder):
            raise ValueError(f"{kind}: want a vision transformer, got Swin in {args.weights}")
        depth = encoder.config.depth
        if args.block is not None and args.block > depth:
            raise ValueError(f"want a block from 1 to {depth}, got {args.block}")
        pixels = read(args, encoder)
        columns = (attention_columns if kind == "attention" else pca_columns)(args, encoder, pixels)
        draw(pixels, columns, args.out)
    except (ValueError, OSError) as error:
        parser.exit(2, f"fastmim: error: {error}\n")
    print(args.out)


def read(args: argparse.Namespace, encoder: Encoder) -> Tensor:
    """The images, uint8 `[B, H, W, C]`. ValueError for a size that is none of whole patches."""
    size, patch = tuple(args.size or encoder.config.size), encoder.config.patch
    if min(size) < patch or size[0] % patch or size[1] % patch:
        raise ValueError(f"--size: want multiples of the patch, {patch}, got {size[0]} x {size[1]}")
    images, ids = chosen(args.images, args.rows)
    crops = center_crops(
        images, (size[0], size[1]), ids=ids, channels=encoder.config.channels, fraction=args.crop,
        threads=args.workers,
    )  # fmt: skip
    return torch.cat([pixels for pixels, _ in crops])


def attention_columns(args: argparse.Namespace, encoder: Encoder, pixels: Tensor) -> dict[str, Tensor]:
    """Titles and maps `[B, h, w]`: the mean of the heads, each head, and the rollout of the blocks so far."""
    device, grid = device_here(), grid_of(encoder, pixels)
    last = (args.block or encoder.config.depth) - 1
    found = attention_of(encoder.to(device), pixels.to(device), range(last + 1))
    of_class_BHN = found[last][:, :, 0, 1:].cpu()
    maps = {f"block {last + 1}, mean": of_class_BHN.mean(1)}
    maps[f"rollout of {last + 1}"] = rollout([found[i] for i in range(last + 1)]).cpu()
    maps |= {f"head {i + 1}": of_class_BHN[:, i] for i in range(min(of_class_BHN.shape[1], MAX_HEADS))}
    return {title: x_BN.view(-1, *grid) for title, x_BN in maps.items()}


def pca_columns(args: argparse.Namespace, encoder: Encoder, pixels: Tensor) -> dict[str, Tensor]:
    """Title and colors `[B, h, w, 3]`."""
    ids_B = torch.arange(len(pixels))
    [(_, found)] = features_in_batches(encoder, [(pixels, ids_B)], device_here(), ["patches"], args.block)
    x_BNC, share_C = components(found["patches"].cpu())
    title = f"{100 * float(share_C.sum()):.0f} % of the variance"
    return {title: as_colors(x_BNC).float().view(len(pixels), *grid_of(encoder, pixels), 3)}


def grid_of(encoder: Encoder, pixels: Tensor) -> tuple[int, int]:
    patch = encoder.config.patch
    return pixels.shape[1] // patch, pixels.shape[2] // patch


def draw(pixels: Tensor, columns: dict[str, Tensor], path: Path) -> None:
    """A row for each image: itself, then each map, enlarged to its size."""
    from fastmim.engine.pictures import no_backend_named

    with no_backend_named():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    B, H, W, C = pixels.shape
    figure = Figure(
        figsize=(INCHES * (1 + len(columns)) * W / max(H, W), INCHES * B * H / max(H, W) + 0.3), dpi=200,
        layout="constrained",
    )  # fmt: skip
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)  # type: ignore[union-attr, call-arg]
    axes: Any = figure.subplots(B, 1 + len(columns), squeeze=False)
    for b in range(B):
        axes[b, 0].imshow(pixels[b].expand(-1, -1, 3) if C == 1 else pixels[b])
        for axis, (title, maps) in zip(axes[b, 1:], columns.items(), strict=True):
            if maps.ndim == 4:
                axis.imshow(enlarged(maps[b].permute(2, 0, 1), (H, W)).permute(1, 2, 0))
            else:
                axis.imshow(enlarged(maps[b][None], (H, W))[0], cmap="inferno", vmin=0)
            if b == 0:
                axis.set_title(title, fontsize=6)
    for axis in axes.flatten():
        axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def enlarged(x_CHW: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x_CHW[None].float(), size=size, mode="nearest")[0]
