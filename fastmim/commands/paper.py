"""The tables of Kong & Zhang, arXiv:2208.04164, in the numbering of CVPR 2023: which runs stand in which row.

Of a row it is said how its encoder comes about (`method`, `flags`, epochs, the images it may see), and of
each of its cells what the paper has there. Percentages are of ViT-B on ImageNet-1k, those of Table 5 of
ViT-S on ImageNet-100; PSNR is in dB. The colors that say which column of Table 5 is which, and which row of
Table 6 is which, were lost in the published text: their order is reconstructed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

SCRATCH = "scratch"  # the method of rows that pre-train nothing
COLUMNS = {
    "FT": "fine-tuning, top-1 %",
    "linear": "linear probe, top-1 %",
    "10% FT": "fine-tuning on 10 %, top-1 %",
    "PSNR": "PSNR, dB",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row: an encoder, and what the paper says of it by column."""

    label: str
    method: str = SCRATCH
    flags: tuple[str, ...] = ()  # of its pre-training, beside those of the scale
    epochs: float = 100.0  # of its pre-training; of a scratch row, of its fine-tuning
    subset: str | None = None  # the images that it may see, by the words of --data.subset
    model: str = "vit_base"  # at full scale
    paper: Mapping[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Names the runs: rows of several tables that are trained alike share them."""
        words = [self.method, *(word.removeprefix("--") for word in self.flags)]
        if self.subset is not None:
            words.append(self.subset)
        if self.model != "vit_base":
            words.append(self.model)
        if self.epochs != 100:
            words.append(f"{self.epochs:g}")
        return "-".join(words).replace("/", "-").replace(" ", "-").replace("+", "-").replace(".", "-")


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def variant(name: str) -> tuple[str, ...]:
    return ("--variant", name)


RANDOM = Row(label="random init", paper={"FT": 80.9})
MAE = Row(label="MAE", method="mae", paper={"FT": 83.1, "PSNR": 22.2, "linear": 54.5, "10% FT": 67.5})
RMAE = Row(label="R-MAE", method="rmae", paper={"FT": 82.7, "PSNR": 23.7})
CMAE = Row(label="C-MAE", method="cmae", paper={"FT": 82.9, "linear": 41.1, "10% FT": 66.4})
OTHERS = (
    Row(label="random init, 300 epochs", epochs=300, paper={"FT": 82.1}),
    Row(label="MoCo v3", method="mocov3", epochs=300, paper={"FT": 83.2}),
    Row(label="DINO", method="dino", epochs=800, paper={"FT": 82.8}),
    Row(label="BEiT", method="beit", epochs=300, paper={"FT": 82.9}),
    Row(label="CAE", method="cae", epochs=300, paper={"FT": 83.3}),
    Row(label="MAE, 1600 epochs", method="mae", epochs=1600, paper={"FT": 83.6, "PSNR": 19.3}),
)


def table_5() -> tuple[Row, ...]:
    mae = (71.9, 87.1, 83.3, 81.6, 86.1, 85.5, 83.8, 86.4)
    cmae = (80.0, 86.5, 83.5, 82.8, 86.9, 86.8, 83.1, 87.1)
    names = (
        "plain",
        "mask",
        "cutmix",
        "color",
        "mask+cutmix",
        "mask+color",
        "cutmix+color",
        "mask+cutmix+color",
    )
    return tuple(
        Row(
            label=f"{label}, {name}",
            method=method,
            flags=variant(name),
            model="vit_small",
            paper={"FT": value},
        )
        for label, method, values in (("MAE", "mae", mae), ("C-MAE", "cmae", cmae))
        for name, value in zip(names, values, strict=True)
    )


STRONG = ("--data.augment", "strong")
FEW = (  # images, stronger augmentation, epochs of ImageNet's length, fine-tuned
    (1, True, 5, 82.3), (10, False, 2, 81.9), (10, True, 5, 82.3), (100, False, 10, 82.1),
    (100, True, 10, 82.2), (1000, False, 100, 82.2), (1000, True, 100, 82.2),
)  # fmt: skip
PER_CLASS = "1000/per-class"


def table_8() -> tuple[Row, ...]:
    rows = (
        ("random init", SCRATCH, 6.1, 80.9, 34.9), ("supervised", "supervised", 33.1, 81.0, 52.6),
        ("MoCo v3", "mocov3", 37.3, 79.2, 45.8), ("MAE", "mae", 13.8, 82.2, 57.6),
        ("R-MAE", "rmae", 25.9, 82.1, 58.8), ("C-MAE", "cmae", 20.1, 82.1, 61.9),
    )  # fmt: skip
    return tuple(
        Row(
            label=label, method=method, subset=None if method == SCRATCH else PER_CLASS,
            paper={"linear": linear, "FT": ft, "10% FT": ten},
        )
        for label, method, linear, ft, ten in rows
    )  # fmt: skip


TABLES: dict[int, Table] = {
    1: Table(
        "one view of the methods", ("FT", "PSNR"),
        (
            RANDOM, *OTHERS, MAE, RMAE,
            Row(label="R-MAE, independent T2", method="rmae", flags=("--method.t2", "independent"),
                paper={"FT": 82.8, "PSNR": 23.0}),
            Row(label="R-MAE, T2 the image", method="rmae", flags=("--method.t2", "full"),
                paper={"FT": 82.7, "PSNR": 22.9}),
        ),
    ),
    2: Table(
        "C-MAE beside the others", ("FT",),
        (
            RANDOM, *OTHERS, MAE, Row(label="MAE, 400 epochs", method="mae", epochs=400, paper={"FT": 83.2}),
            CMAE, Row(label="C-MAE, 400 epochs", method="cmae", epochs=400, paper={"FT": 83.1}),
        ),
    ),
    3: Table(
        "what C-MAE compares", ("FT",),
        (
            Row(label="class token", method="cmae", flags=variant("cls"), paper={"FT": 82.5}),
            Row(label="mean of patches", method="cmae", flags=variant("avg"), paper={"FT": 82.6}),
            Row(label="patch tokens", method="cmae", paper={"FT": 82.9}),
            Row(label="patch and class tokens", method="cmae", flags=variant("patch+cls"),
                paper={"FT": 82.9}),
        ),
    ),
    4: Table(
        "colors, mask tokens and losses", ("linear", "FT", "10% FT"),
        (
            MAE,
            Row(label="MAE, colors on the image", method="mae", flags=variant("color-whole"),
                paper={"linear": 53.4, "FT": 83.1, "10% FT": 67.3}),
            Row(label="MAE, colors on what is seen", method="mae", flags=variant("color-visible"),
                paper={"linear": 54.0, "FT": 83.0, "10% FT": 67.3}),
            CMAE,
            Row(label="C-MAE without mask token", method="cmae", flags=variant("no-mask-token"),
                paper={"linear": 56.2, "FT": 82.6, "10% FT": 67.5}),
            Row(label="C-MAE, BYOL's loss", method="cmae", flags=variant("byol"),
                paper={"linear": 26.9, "FT": 82.8, "10% FT": 65.2}),
            Row(label="C-MAE without mask token, BYOL's loss", method="cmae",
                flags=variant("no-mask-token-byol"), paper={"linear": 55.2, "FT": 82.5, "10% FT": 66.1}),
        ),
    ),
    5: Table("augmentations", ("FT",), table_5()),
    6: Table(
        "MAE from few images", ("FT",),
        (
            RANDOM,
            *(
                Row(label=f"{images} images{', strong' * strong}", method="mae", subset=str(images),
                    flags=STRONG if strong else (), epochs=epochs, paper={"FT": value})
                for images, strong, epochs, value in FEW
            ),
        ),
    ),
    7: Table(
        "which thousand images", ("FT",),
        tuple(
            Row(label=label, method="mae", subset=subset, paper={"FT": 82.2})
            for label, subset in (
                ("one class", "1000/one-class"), ("random", "1000"), ("one per class", PER_CLASS),
            )
        ),
    ),
    8: Table("methods on a thousand images", ("linear", "FT", "10% FT"), table_8()),
}  # fmt: skip
