"""What a method is: two transformations T1 and T2, an encoder f and a similarity M.

    L = E over x of M(f(T1(x)), f(T2(x)))                        Kong & Zhang, arXiv:2208.04164, Eq. 1

    method      views of a sample        T1 sees            second branch              M
    mae         one crop                 25 % of patches    the pixels                 l2 to hidden pixels
    rmae        one crop                 25 %               f on the other 75 %        l2 of decodes, anchor
    cmae        one crop, two colors    25 %, mask tokens  EMA of f, other 75 %       InfoNCE per token
    cmae_huang  a crop and its shift     35 %               EMA of f on all            l2, InfoNCE of pools
    simmim      one crop                 40 %, mask tokens  the pixels                 l1 to hidden pixels
    beit        one box, two sizes       60 %, mask tokens  a frozen tokenizer         cross entropy
    ibot        2 large, 10 small crops  mask tokens        EMA of f on whole crops    cross entropy, centerd
    data2vec    one crop                 40 %, mask tokens  EMA of f, several blocks   smooth l1
    mocov3      two crops                all                EMA of f on the other      InfoNCE across ranks
    dino        2 large, 8 small crops   all                EMA of f on large crops    cross entropy, centerd
    cae         one box, two sizes       25 %               f itself; a tokenizer      cross entropy, l2

A method sees three things: the uint8 views and sample keys of a `Batch`; index tensors of fixed size for
what is visible and what is scored, drawn from the keys; and `ranks`, through which contrastive methods
gather the keys of other ranks. It owns every parameter that it trains, and its teacher if it has one,
whose parameters carry requires_grad=False. The engine calls `forward`, moves the `averages` after each step,
hands the `views` to the data and keeps `encoder` when training ends. It knows nothing else of a method.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from torch import Tensor, nn

from fastmim.models.vit import ViTConfig
from fastmim.views import Batch, Crop


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Choices of one method; a subclass names its fields."""

    name: ClassVar[str]
    couples_batch: ClassVar[bool] = False  # whether the loss of an image depends on the others beside it

    def check_batch(self, micro_batch: int, ranks: int) -> None:
        """ValueError if the method cannot work on micro-batches of this many images on each of the ranks."""

    def build(self, model: ViTConfig) -> "Method":
        """Make the method for an encoder of this size, initialized from torch's global generator."""
        raise NotImplementedError


@dataclass(frozen=True)
class Output:
    loss: Tensor  # scalar, fp32: what the engine differentiates
    metrics: dict[str, Tensor] = field(default_factory=dict)  # detached scalars, still on the device


@dataclass(frozen=True)
class Reconstruction:
    """What a picture needs of a method that predicts pixels."""

    image_BHWC: Tensor  # uint8
    seen_BK: Tensor  # int64, visible patches
    pred_BNP: Tensor  # prediction for every patch, row, column, channel
    norm_pix: bool  # whether it predicts patch-normalized values


class AcrossRanks(Protocol):
    """The ranks that share the batch, for methods whose loss looks across it."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def gather(self, x: Tensor) -> Tensor:
        """`[B, ...]` of every rank as `[world * B, ...]`, in rank order, without gradient."""


class Method(nn.Module):
    """One pre-training objective."""

    encoder: nn.Module  # f: what is kept when pre-training ends
    crops: tuple[Crop, ...]  # what it asks of the data, in this order
    ranks: AcrossRanks  # set by the engine before the first step

    def forward(self, batch: Batch) -> Output:
        raise NotImplementedError

    def decays(self, name: str, parameter: nn.Parameter) -> bool | None:
        """Whether weight decay applies to this parameter; None leaves it to MAE's 1-D rule."""
        return None

    def averages(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        """(teacher, student) modules of this method: every parameter of a teacher follows the student's.

        Pairs of one class and size; the teacher's parameters start as copies and carry requires_grad=False.
        After each step the engine moves all of them in one launch, t <- m t + (1 - m) s, in fp32 and on the
        master weights, whatever the precision and the sharding of the run.
        """
        return ()

    def momentum(self, progress: float) -> float:
        """m of the averages after a step that ends at this fraction of training, in (0, 1]."""
        raise NotImplementedError

    def after_step(self, progress: float) -> None:
        """Called after each optimizer step, and after the averages, with the fraction of training done."""

    def diagnose(self, row: Mapping[str, float]) -> str | None:
        """What is wrong with this row of `metrics.jsonl` and what to try, in a line; None if nothing is.

        Asked about each interval's last row; the engine prints the first answer, once.
        """
        return None

    def reconstruct(self, batch: Batch) -> Reconstruction | None:
        """Predicted pixels of a batch, without gradient; None for a method that predicts none."""
        return None
