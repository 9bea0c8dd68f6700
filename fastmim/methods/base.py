"""What a method is: two transformations T1 and T2, an encoder f and a similarity M.

    L = E over x of M(f(T1(x)), f(T2(x)))                        Kong & Zhang, arXiv:2208.04164, Eq. 1

`fastmim methods` prints what these are in each: every paper's `about`.

A method sees three things: the uint8 crops and the seeds of a `Batch`; index tensors for what is visible and
what is scored, drawn from the seeds; and `ranks`, through which it gathers keys, or takes means, over the
whole batch. It owns every parameter that it trains, and its teacher if it has one, whose parameters carry
requires_grad=False. The engine calls `forward`, moves the `averages` after each step, hands the `crops` to
the data and keeps `encoder` when training ends. It knows nothing else of a method.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from fastmim.group import Group
from fastmim.methods.variants import Variant
from fastmim.methods.work import Work
from fastmim.models.mae_decoder import DecoderConfig
from fastmim.models.vit import ViTConfig
from fastmim.ranks import ALONE, AcrossRanks
from fastmim.views import Batch, Crop


@dataclass(frozen=True, kw_only=True)
class About:
    """A method in a line of the README's table, in Markdown."""

    paper: str = ""
    t1: str = ""  # what the first transformation shows
    t2: str = ""  # what the second branch is
    similarity: str = ""  # M
    needs: str = ""  # beside images


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Choices of one method, and the facts of it that others derive theirs from; subclasses name fields."""

    name: ClassVar[str]
    about: ClassVar[About] = About()
    labeled: ClassVar[bool] = False  # whether its batches must have labels
    couples_batch: ClassVar[bool] = False  # whether the loss of an image depends on the others beside it
    variants: ClassVar[Mapping[str, Variant]] = {}  # other rows of the paper's tables: --variant
    transfers: ClassVar[bool] = False  # whether --init-from is an encoder of whatever method or library
    # by --recipe: what it changes beside sizes, by the dotted names of a run, as method.ema
    scales: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    file_words: ClassVar[str] = "the file of a frozen module"  # what `files` are, for a person
    encoder: ClassVar[Mapping[str, Any]] = {}  # fields of `ViTConfig` beside sizes, as the paper has them

    def files(self) -> Mapping[str, Path]:
        """Files of frozen modules, as a tokenizer's, by flag; the engine asks first if they are there."""
        return {}

    def words(self, model: ViTConfig) -> str:
        """What is trained, for a person."""
        height, width = model.size
        return f"{model.depth} blocks of width {model.width}, patch {model.patch}, {height} x {width} px"

    def check_batch(self, micro_batch: int, ranks: int) -> None:
        """ValueError if the method cannot work on micro-batches of this many images on each of the ranks."""

    def check_classes(self, classes: int) -> None:
        """ValueError if a method with labels cannot tell so many classes apart."""

    def small_encoder(self, model: ViTConfig) -> ViTConfig:
        """An encoder of about this size that the method can have; of a ViT it is this one."""
        return model

    def for_image(self, model: ViTConfig) -> Self:
        """The same method for images of another size: crops and cells in proportion, all else as it is."""
        return self

    def fit(self, model: ViTConfig, decoder: DecoderConfig) -> Self:
        """The same method for a small encoder: heads and crops in proportion, a decoder of this size."""
        return self

    def work(self, model: ViTConfig) -> Work:
        """The matrix products of one image's step, as the paper computes them."""
        raise NotImplementedError(f"{self.name} does not say what it computes: {type(self).__name__}.work")

    def build(self, model: ViTConfig) -> "Method":
        """Make the method for an encoder of this size, initialized from torch's global generator.

        ValueError for an encoder it cannot have, and for files of frozen modules that are not there.
        """
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


class Method(nn.Module):
    """One pre-training objective."""

    config: MethodConfig
    model: ViTConfig
    encoder: nn.Module  # f: what is kept when pre-training ends; a tokenizer in training has none
    crops: tuple[Crop, ...]  # what it asks of the data, in this order
    ranks: AcrossRanks = ALONE  # those that share the batch, from the engine before the first step
    frozen: Mapping[
        str, nn.Module
    ] = {}  # tokenizers: placed by the engine; not trained, cast, sharded, saved

    @property
    def start(self) -> nn.Module:
        """What --init-from fills, in a method that `transfers`."""
        return self.encoder

    def forward(self, batch: Batch) -> Output:
        """The loss of a batch. In evaluation, of methods with labels, metrics are sums over its images."""
        raise NotImplementedError

    def share(self, ranks: AcrossRanks) -> None:
        """Work on the batch that these ranks share, as does every module that looks across ranks."""
        self.ranks = ranks
        for module in self.modules():
            if module is not self and hasattr(module, "ranks"):
                module.ranks = ranks  # type: ignore[assignment]

    def group(self, name: str, parameter: nn.Parameter) -> Group:
        """How the optimizer treats this parameter; as it treats all others unless something else is said."""
        return Group()

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

    def exports(self) -> Mapping[str, tuple[dict[str, Tensor], dict[str, str]]]:
        """What is kept beside the encoder: file names, each with its tensors and what it says of them."""
        return {}

    def reconstruct(self, batch: Batch) -> Reconstruction | None:
        """Predicted pixels of a batch, without gradient; None for a method that predicts none."""
        return None
