"""What a method with labels gets right of images that it does not train on, after each epoch.

    value of a metric = sum over all images of what `forward` says in evaluation / number of images

Rows     RUN_DIR/validation.jsonl: step, epoch, images, left_out, seconds, and the method's metrics, as top1
Images   central crops, every one of them once on some rank; ranks with one fewer run it on padding, for
         under ZeRO 3 each rank must enter each pass. One that cannot be decoded counts as left out.
Resume   rows after the checkpoint's step are dropped; one that a stop prevented is made up for.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from fastmim_kernels.philox import sample_seeds
from torch import Tensor

from fastmim.data import Images
from fastmim.data.feed.center import center_crops
from fastmim.engine.durable import open_to_add
from fastmim.engine.metrics import keep_rows_up_to
from fastmim.engine.ranks import Ranks
from fastmim.views import Batch

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

BEST = "top1"  # metrics that end with this have a best epoch


def check_classes_alike(train: Images, val: Images) -> None:
    """ValueError unless both sets have labels, of the same classes."""
    if val.labels is None:
        raise ValueError(f"data.val: want labeled images, a folder of each class, got none in {val.root}")
    if train.classes != val.classes:
        over = sorted(set(val.classes) ^ set(train.classes))[:3]
        raise ValueError(
            f"data.val: want the {len(train.classes)} classes of data.path, got {len(val.classes)}"
            + (f"; not in both: {', '.join(over)}" if over else " in another order")
        )


class Validation:
    """Passes over the validation images, on all ranks together; the first keeps the rows."""

    def __init__(
        self,
        images: Images,
        ranks: Ranks,
        run_dir: Path,
        *,
        size: tuple[int, int],
        channels: int,
        batch: int,
        threads: int,
        device: torch.device,
        steps_per_epoch: int,
        total_steps: int,
        start_step: int,
    ):
        assert images.labels is not None
        self.images, self.ranks, self.device = images, ranks, device
        self.size, self.channels, self.batch, self.threads = size, channels, batch, threads
        self.steps_per_epoch, self.total_steps = steps_per_epoch, total_steps
        self.path = run_dir / "validation.jsonl"
        self.rows: list[dict[str, Any]] = []
        if ranks.is_main:
            keep_rows_up_to(self.path, start_step)
            self.rows = read_rows(self.path)
        self.done = ranks.broadcast([row["step"] for row in self.rows])

    def due(self, step: int) -> bool:
        """Whether an epoch, or the run, ends with this step, and it was not looked at yet."""
        ends = step > 0 and (step % self.steps_per_epoch == 0 or step == self.total_steps)
        return ends and step not in self.done

    def __call__(self, engine: "DeepSpeedEngine", step: int) -> dict[str, Any]:
        """Look at every image, and give the row; a call for all ranks at once."""
        start = time.perf_counter()
        engine.eval()
        with torch.no_grad():
            sums = self.summed(engine)
        engine.train()
        images = sums.pop("images")
        row: dict[str, Any] = {"step": step, "epoch": step / self.steps_per_epoch, "images": int(images)}
        row["left_out"] = len(self.images) - int(images)
        row |= {name: value / images if images else math.nan for name, value in sums.items()}
        row["seconds"] = time.perf_counter() - start
        self.done.append(step)
        if self.ranks.is_main:
            self.rows.append(row)
            with open_to_add(self.path) as file:
                file.write(json.dumps(row) + "\n")
            print(f"{'val':>8}  epoch {row['epoch']:g}: {words_of(row)}", flush=True)
        return row

    def summed(self, engine: "DeepSpeedEngine") -> dict[str, float]:
        """Every metric summed over all images of all ranks."""
        total: Tensor | None = None
        names: list[str] = []
        for batch in self.batches():
            metrics = engine(batch).metrics
            names = list(metrics)
            values = torch.stack([value.double() for value in metrics.values()])
            total = values if total is None else total + values
        assert total is not None
        total = self.ranks.mean(total) * self.ranks.world
        return dict(zip(names, total.tolist(), strict=True))

    def batches(self) -> Iterator[Batch]:
        """This rank's share. A label of -1 says that an image does not count."""
        padded, count = share_of(range(len(self.images)), self.ranks)
        bad: set[int] = set()
        crops = center_crops(
            self.images, self.size, ids=padded, channels=self.channels, batch=self.batch,
            threads=self.threads, bad=lambda sample_id, _: bad.add(sample_id),
        )  # fmt: skip
        seen = 0
        for pixels, ids_B in crops:
            labels = [
                -1 if i in bad or seen + k >= count else int(self.images.labels[i])  # type: ignore[index]
                for k, i in enumerate(ids_B.tolist())
            ]
            seen += len(labels)
            yield Batch(
                (pixels.to(self.device),), sample_seeds(0, 0, ids_B).to(self.device), ids_B, 0,
                torch.tensor(labels, device=self.device),
            )  # fmt: skip

    def summary(self) -> str | None:
        """The last row, and the best of each accuracy; None where nothing was looked at."""
        if not self.rows:
            return None
        last = self.rows[-1]
        lines = [f"final {words_of(last)}"]
        for name in (name for name in last if name.endswith(BEST)):
            best = max(self.rows, key=lambda row: row[name])
            lines.append(f"best {name} {100 * best[name]:.2f} % after epoch {best['epoch']:g}")
        return "; ".join(lines)


def share_of(ids: Sequence[int], ranks: Ranks) -> tuple[list[int], int]:
    """This rank's ids, each world-th from its own on, and how many are not padding: all ranks get as many."""
    own = list(ids[ranks.rank :: ranks.world])
    return own + [ids[0]] * (math.ceil(len(ids) / ranks.world) - len(own)), len(own)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that are there."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def words_of(row: dict[str, Any]) -> str:
    """A row for a person."""
    shares = [f"{name} {100 * row[name]:.2f} %" for name in row if "top" in name]
    left = f", {row['left_out']} left out" if row["left_out"] else ""
    return f"{'  '.join(shares)} of {row['images']} images{left}, {row['seconds']:.1f} s"
