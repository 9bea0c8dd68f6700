"""The matrix products of one training step: what throughput and MFU are counted in.

    block     24 T D^2 + 4 D sum over segments of n^2          T tokens of width D, forward
    linear    2 rows in out                                    patch embedding, decoder embedding, head
    step      forward + backward; backward = 2 forward, 1 forward for the patch embedding, whose input is
              the image and takes no gradient; none in a target branch

They are those of the method as its paper computes it: all N patches are embedded, once, whatever is seen, and
all tokens go through the decoder's head. What an implementation leaves out, or computes twice, does not
change them: leaving out shows up as speed.

Not counted  LayerNorm, GELU, softmax, biases, residual sums, positions, the loss, the optimizer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Linear:
    """A matrix product `[rows, n_in] x [n_in, n_out]` per image, `count` times in a step."""

    rows: int
    n_in: int
    n_out: int
    count: int = 1
    input_gradient: bool = True
    trained: bool = True  # otherwise forward only

    @property
    def flops(self) -> int:
        """Forward and backward."""
        passes = 1 + self.trained * (1 + self.input_gradient)
        return 2 * self.rows * self.n_in * self.n_out * self.count * passes


@dataclass(frozen=True)
class Stack:
    """`depth` blocks on runs of tokens that do not see one another."""

    segments: tuple[int, ...]
    width: int
    depth: int
    trained: bool = True

    def linears(self) -> Iterator[Linear]:
        rows, D = sum(self.segments), self.width
        for n_in, n_out in ((D, 3 * D), (D, D), (D, 4 * D), (4 * D, D)):
            yield Linear(rows, n_in, n_out, self.depth, trained=self.trained)

    @property
    def attention_flops(self) -> int:
        """Forward and backward."""
        return (3 if self.trained else 1) * 4 * self.width * sum(n * n for n in self.segments) * self.depth


@dataclass(frozen=True)
class Cross:
    """`depth` blocks in which so many queries look at so many tokens, CAE's regressor."""

    queries: int
    tokens: int
    width: int
    depth: int

    def linears(self) -> Iterator[Linear]:
        D = self.width
        shapes = (
            (self.queries, D, D), (self.tokens, D, D), (self.tokens, D, D), (self.queries, D, D),
            (self.queries, D, 4 * D), (self.queries, 4 * D, D),
        )  # fmt: skip
        for rows, n_in, n_out in shapes:
            yield Linear(rows, n_in, n_out, self.depth)

    @property
    def attention_flops(self) -> int:
        """Forward and backward."""
        return 3 * 4 * self.width * self.queries * self.tokens * self.depth


@dataclass(frozen=True)
class Work:
    """All the products of one image's step."""

    stacks: tuple[Stack | Cross, ...]
    others: tuple[Linear, ...]

    def linears(self) -> Iterator[Linear]:
        for stack in self.stacks:
            yield from stack.linears()
        yield from self.others

    @property
    def flops(self) -> int:
        """Forward and backward."""
        attention = sum(stack.attention_flops for stack in self.stacks)
        return sum(linear.flops for linear in self.linears()) + attention


def head_work(rows: int, widths: Sequence[int], *, trained: bool = True) -> tuple[Linear, ...]:
    """A head of Linear layers on so many rows of an image."""
    return tuple(Linear(rows, n_in, n_out, trained=trained) for n_in, n_out in pairwise(widths))
