"""Reference FLOPs of one training step, per image: what MFU is always taken with.

    block     24 T D^2 + 4 D sum over segments of n^2          T tokens of width D, forward
    linear    2 rows in out                                    patch embedding, decoder embedding, head
    step      forward + backward; backward = 2 forward, 1 forward for the patch embedding, whose input is
              the image and takes no gradient; none in a target branch

They are those of the method as its paper computes it: all N patches are embedded, once, whatever is seen, and
all tokens go through the decoder's head. What an implementation leaves out, or computes twice, does not
change them: leaving out shows up as speed.

Not counted  LayerNorm, GELU, softmax, biases, residual sums, positions, the loss, the optimizer.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from fastmim_kernels import num_seen

from fastmim.methods import CMAEConfig, CMAEHuangConfig, MAEConfig, RMAEConfig
from fastmim.methods.base import MethodConfig
from fastmim.methods.cmae_huang import checked_num_seen
from fastmim.models.vit import ViTConfig


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
class Work:
    """All the products of one image's step."""

    stacks: tuple[Stack, ...]
    others: tuple[Linear, ...]

    def linears(self) -> Iterator[Linear]:
        for stack in self.stacks:
            yield from stack.linears()
        yield from self.others

    @property
    def flops(self) -> int:
        attention = sum(stack.attention_flops for stack in self.stacks)
        return sum(linear.flops for linear in self.linears()) + attention


def work(method: MethodConfig, model: ViTConfig) -> Work:
    """The reference work of one image. ValueError for a method whose formula is not written here."""
    if isinstance(method, CMAEConfig):
        return siamese_work(method, model)
    if isinstance(method, CMAEHuangConfig):
        return huang_work(method, model)
    views = seen_of_views(method, model)
    assert isinstance(method, MAEConfig)
    N, V, d = model.num_patches, len(views), method.decoder.width
    tokens = tuple(1 + seen for seen in views)
    return Work(
        stacks=(
            Stack(tokens, model.width, model.depth),
            Stack((1 + N,) * V, d, method.decoder.depth),
        ),
        others=(
            Linear(N, model.patch_values, model.width, input_gradient=False),
            Linear(sum(tokens), model.width, d),
            Linear(V * (1 + N), d, model.patch_values),
        ),
    )


def siamese_work(method: CMAEConfig, model: ViTConfig) -> Work:
    """Of C-MAE: an online branch with two heads, a target branch with one and without a gradient."""
    N, P, D, h, out = model.num_patches, model.patch_values, model.width, method.hidden, method.out
    first = int(N * (1 - method.mask_ratio))
    second = {"complement": N - first, "full": N, "independent": int(N * (1 - method.t2_ratio))}[method.t2]
    stacks, others = [], []
    for online, target in ((first, second), (second, first))[: 1 + method.symmetric]:
        for seen, trained in ((online, True), (target, False)):
            patches = N if method.mask_token else seen
            rows = 1 if method.instances else patches + (method.compare == "patch+cls")
            heads = ((D, h), (h, out), (out, h), (h, out))[: 4 if trained else 2]
            stacks.append(Stack((1 + patches,), D, model.depth, trained))
            embedding = trained and not method.freeze_patch_embed
            others.append(Linear(N, P, D, input_gradient=False, trained=embedding))
            others += [Linear(rows, n_in, n_out, trained=trained) for n_in, n_out in heads]
    return Work(tuple(stacks), tuple(others))


def huang_work(method: CMAEHuangConfig, model: ViTConfig) -> Work:
    """Of CMAE: MAE, a second decoder and two heads; a target branch on all patches without a gradient."""
    N, P, D, d = model.num_patches, model.patch_values, model.width, method.decoder.width
    h, out, tokens = method.hidden, method.out, 1 + checked_num_seen(method, model)
    head = ((D, h), (h, out))
    return Work(
        stacks=(
            Stack((tokens,), D, model.depth),
            Stack((1 + N,), d, method.decoder.depth + method.feature_depth),
            Stack((method.target_cls + N,), D, model.depth, trained=False),
        ),
        others=(
            Linear(N, P, D, input_gradient=False),
            Linear(N, P, D, input_gradient=False, trained=False),
            *(x for out in (P, D) for x in (Linear(tokens, D, d), Linear(1 + N, d, out))),
            *(Linear(1, n_in, n_out) for n_in, n_out in (*head, (out, h), (h, out))),
            *(Linear(1, n_in, n_out, trained=False) for n_in, n_out in head),
        ),
    )


def seen_of_views(method: MethodConfig, model: ViTConfig) -> tuple[int, ...]:
    """How many patches each view of the method shows to the encoder."""
    N = model.num_patches
    if type(method) is MAEConfig:
        return (num_seen(N, method.mask_ratio),)
    if type(method) is RMAEConfig:
        first = num_seen(N, method.mask_ratio)
        second = {"complement": N - first, "full": N, "independent": num_seen(N, method.t2_ratio)}
        return first, second[method.t2]
    raise ValueError(f"want a method whose FLOPs are known, one of METHODS, got {method.name}")


def step_flops(method: MethodConfig, model: ViTConfig) -> int:
    """Reference FLOPs of one image, forward and backward."""
    return work(method, model).flops
