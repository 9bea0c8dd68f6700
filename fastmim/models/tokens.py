"""What goes into the encoder and what comes out: images, what is shown of each, and the packed tokens.

Shapes  B images, K visible patches, N patches of an image, T tokens of all segments together, S segments.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastmim.models.embed import Grid


@dataclass(frozen=True)
class Tokens:
    """An image, and what of it the encoder is shown: every patch, unless something else is said.

    seen_BK     int64, these patches alone: the others are dropped
    hidden_BN   bool, True where a mask token stands for the patch; how many may differ from image to image
    mask_tokens with `seen_BK`: the others are not dropped, but have the mask token in their places
    """

    image_BHWC: Tensor  # uint8
    seen_BK: Tensor | None = None
    hidden_BN: Tensor | None = None
    mask_tokens: bool = False

    def __post_init__(self) -> None:
        if self.seen_BK is not None and self.hidden_BN is not None:
            raise ValueError("want the patches that are seen or those that are hidden, got both")
        if self.mask_tokens and self.seen_BK is None:
            raise ValueError("want the patches that are seen beside mask tokens, got none; or give hidden_BN")

    @property
    def masks(self) -> bool:
        """Whether mask tokens stand in it."""
        return self.mask_tokens or self.hidden_BN is not None


class Encoded(NamedTuple):  # a tuple, for ZeRO 3 looks for the tensors in what a module gives
    """What the encoder makes of its inputs: their tokens along T, one segment after the other."""

    tokens_BTD: Tensor
    lengths: tuple[int, ...]  # of the segments, in the order of the inputs; class token first in each
    blocks: Mapping[int, Tensor] = {}  # [B, T, D] after each asked for
    mlps: Mapping[int, Tensor] = {}  # [B, T, D] what the MLP of each asked for gives, before LayerScale

    def split(self) -> tuple[Tensor, ...]:
        """The tokens of each input, `[B, 1 + K, D]`."""
        return self.tokens_BTD.split(self.lengths, dim=1)

    def class_tokens(self) -> Tensor:
        """The class token of each input. `[B, S, D]`."""
        return torch.cat([x_BTD[:, :1] for x_BTD in self.split()], dim=1)  # an index would wait for its copy


def runs_of(inputs: Sequence[Tokens], grids: Sequence[Grid]) -> list[tuple[int, int]]:
    """First and last + 1 of each run of inputs that can be embedded in one product."""
    starts = [0]
    for i in range(1, len(inputs)):
        a, b = inputs[i - 1], inputs[i]
        whole = a.seen_BK is None and b.seen_BK is None and grids[i - 1] == grids[i]
        visible = a.seen_BK is not None and b.seen_BK is not None and a.image_BHWC is b.image_BHWC
        if a.masks or b.masks or not (whole or visible):
            starts.append(i)
    return list(zip(starts, [*starts[1:], len(inputs)], strict=True))


def every_patch(image_BHWC: Tensor, grid: Grid) -> Tensor:
    """Indices of all patches of each image. `[B, N]` int64."""
    return torch.arange(grid[0] * grid[1], device=image_BHWC.device).expand(len(image_BHWC), -1)


def token_sources(seen: Sequence[Tensor], num_patches: int) -> Tensor:
    """For each position the row of the packed encoding that fills it, or -1. `[V * B, 1 + N]` int64.

    `seen` are the visible patches of V inputs. Rows count through `[B, T]`; inputs follow one another in the
    batch; position 0 is the class token.
    """
    lengths = [1 + s.shape[1] for s in seen]
    B, T, device = len(seen[0]), sum(lengths), seen[0].device
    first_row_B1 = torch.arange(B, device=device)[:, None] * T
    sources, start = [], 0
    for index_BK, length in zip(seen, lengths, strict=True):
        rows_BL = first_row_B1 + torch.arange(start, start + length, device=device)
        source = torch.full((B, 1 + num_patches), -1, device=device)
        position_BL = torch.cat([index_BK.new_zeros(B, 1), index_BK + 1], dim=1)
        sources.append(source.scatter_(1, position_BL, rows_BL))
        start += length
    return torch.cat(sources)
