"""Why a micro-batch cannot be decoded: images that are none, and boxes drawn beyond what an image has."""

from collections.abc import Mapping
from concurrent.futures import Future

from torch import Tensor

from fastmim.data.augment.draws import Draws
from fastmim.data.decode.bad_image import BadImage


def rejected_of(tasks: Mapping[int, Future[Tensor]], draws: Draws) -> dict[int, str]:
    """Slots whose task found a bad image, or one without the box drawn in it, and why; waits for all."""
    reasons: dict[int, str] = {}
    for slot, task in tasks.items():
        error = task.exception()
        if isinstance(error, BadImage):
            reasons[slot] = str(error)
        elif not holds_boxes(size := tuple(task.result().shape[:2]), draws, slot):
            reasons[slot] = f"it has {size[0]} x {size[1]} pixels, a box drawn in it ends beyond"
    return reasons


def holds_boxes(size: tuple[int, ...], draws: Draws, slot: int) -> bool:
    """Whether every box of a slot lies within an image of (height, width) `size`."""
    ends = [box[slot, :2] + box[slot, 2:] for box in draws.boxes.values()]
    return not any(bottom > size[0] or right > size[1] for bottom, right in ends)
