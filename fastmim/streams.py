"""Every random stream of a sample: which words of its seed are drawn for what.

A sample has one seed, a function of (run's seed, epoch, sample id), and as many independent streams of words
as there are numbers (fastmim_kernels.philox). Draws of two streams have nothing to do with one another. A
number stays what it is: recorded losses, and runs that are resumed, depend on it.
"""

from typing import NamedTuple


class Stream(NamedTuple):
    """A range of streams: `first`, and `size` of them, told apart by a number from 0."""

    first: int
    size: int

    def of(self, number: int = 0) -> int:
        """The stream of this number. ValueError beyond the range."""
        if not 0 <= number < self.size:
            raise ValueError(f"want a number from 0 to {self.size - 1} of this stream, got {number}")
        return self.first + number


MASK = Stream(0, 1)  # what the first branch sees
SECOND_MASK = Stream(1, 1)  # what the second branch sees, where that is a draw of its own
MORE_MASKS = Stream(2, 62)  # masks of further crops, and further masks of one crop
CUTMIX = Stream(90, 1)  # the box of CutMix, and which images are partners
MIXING = Stream(91, 1)  # Mixup or CutMix of a block of images, by the seed of its first
ERASING = Stream(92, 2)  # which box is erased, and the noise in its place
BOXES = Stream(100, 100)  # where a crop is cut, and whether it is flipped, by `Crop.box`
WINDOWS = Stream(200, 100)  # how far a window lies below and right of its master, by `Crop.draw`
COLORS = Stream(300, 100)  # jitter, gray, blur and solarize, by `Crop.draw`
RAND_AUGMENT = Stream(400, 100)  # operations and their strengths, by `Crop.draw`
GUMBEL = Stream(600, 1)  # which codes a discrete VAE mixes
DROP_PATH = Stream(700, 3)  # which samples skip which branches of which blocks: encoder, regressor, decoder

STREAMS: dict[str, Stream] = {
    "mask": MASK,
    "second mask": SECOND_MASK,
    "more masks": MORE_MASKS,
    "cutmix": CUTMIX,
    "mixing": MIXING,
    "erasing": ERASING,
    "boxes": BOXES,
    "windows": WINDOWS,
    "colors": COLORS,
    "rand augment": RAND_AUGMENT,
    "gumbel": GUMBEL,
    "drop path": DROP_PATH,
}
BLOCK_BIT = 1 << 31  # fastmim_kernels sets this bit for the coin and size of iBOT's masks: no stream has it
