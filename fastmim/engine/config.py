"""A whole run in one typed value, and the numbers that follow from it on a given machine."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import torch
from fastmim_kernels.attention import choose_attention

from fastmim.data import DataConfig, Images, labels_of
from fastmim.methods.base import MethodConfig
from fastmim.models.vit import ViTConfig
from fastmim.optim import OptimConfig

Config = TypeVar("Config")
LARGEST, LARGEST_DEPTH = 2**20, 1024  # sizes and counts of a model or method
MOST_STEPS = 10**12  # of a run: more is a slip of the keyboard
WARMUP_SHARE = 0.2  # of a run too short for the warm-up asked for
LAST_MILESTONE = 7 / 8  # of a run that ends before it, as in SimMIM: 700 of 800 epochs


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """kNN on the frozen features of a labeled set while training goes on."""

    data: Path | None = None
    """Labeled images. Without it: no probe"""
    every: int = 5
    """Epochs between two looks"""
    images: int = 2000
    """Images of the set, evenly spaced"""

    def __post_init__(self) -> None:
        for name in ("every", "images"):
            if getattr(self, name) < 1:
                raise ValueError(f"probe.{name}: want at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One pre-training run."""

    method: MethodConfig
    model: ViTConfig
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    batch: int = 1024
    """Images per optimizer step, over all ranks and micro-batches"""
    accumulate: int = 1
    """Micro-batches per optimizer step; each rank holds batch / (ranks * accumulate) images at a time"""
    epochs: float = 100.0
    """Passes over the data, or over --data.epoch-images samples of it"""
    steps: int | None = None
    """Optimizer steps; overrides epochs"""
    seed: int = 0
    """Of the weights, the order, the crops and the masks"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16: weights in bfloat16, master copy and moments in fp32. auto: bf16 on CUDA, fp32 on CPU"""
    zero: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage: what is sharded over ranks. 1 optimizer, 2 and gradients, 3 and weights"""
    run_dir: Path | None = None
    """Where everything about the run is written; by default runs/METHOD-DATE-TIME"""
    resume: bool = False
    """Continue the run in --run-dir from its newest whole checkpoint, with its saved configuration. --epochs
    or --steps make it longer: the schedule is from then on that of a run of the new length"""
    resume_step: int | None = None
    """With --resume: the checkpoint of this step, which must be there, instead of the newest"""
    allow_changes: tuple[str, ...] = ()
    """With --resume: facts of the run that may differ from the checkpoint's, by the names the error gives"""
    init_from: Path | None = None
    """Start from these weights: a run directory, or an MAE checkpoint as .pth or .safetensors. Heads that it
    lacks stay fresh, and a teacher is made a copy of its student; the run says so"""
    save_every: int = 1000
    """Optimizer steps between checkpoints; the last step always makes one"""
    keep: int = 2
    """Checkpoints kept"""
    log_every: int = 20
    """Optimizer steps between reports"""
    timeout: float = 120.0
    """Seconds beyond what a step or a save has been taking, after which a rank without progress is taken for
    one that hangs: all ranks write their stacks to the run directory and end. 0: never"""

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("batch", "accumulate", "save_every", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', '-')}: want at least 1, got {getattr(self, name)}")
        if self.optim.name == "lars" and self.zero:
            raise ValueError(
                "zero: want 0 with --optim.name lars, whose steps need the norms of whole tensors, "
                f"got {self.zero}"
            )
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps: want at least 1, got {self.steps}")
        if self.timeout < 0:
            raise ValueError(f"timeout: want 0 or more seconds, got {self.timeout}")
        if self.epochs <= 0:
            raise ValueError(f"epochs: want more than 0, got {self.epochs}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: want 0 to 2^63 - 1, got {self.seed}")
        if self.resume_step is not None and not self.resume:
            raise ValueError(f"resume-step: of use with --resume only, got {self.resume_step}")
        if self.allow_changes and not self.resume:
            raise ValueError(f"allow-changes: of use with --resume only, got {' '.join(self.allow_changes)}")


def check_numbers(config: Any, prefix: str = "") -> None:
    """ValueError, with the flag's name, for a number that no run can mean, whatever its configuration says.

    That is one that is not finite, of which comparisons say nothing; an integer of more than 63 bits; a size
    or count of the model or method above `LARGEST`, whose building would take all memory and never end.
    """
    for f in dataclasses.fields(config):
        flag, value = f"{prefix}{f.name.replace('_', '-')}", getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            check_numbers(value, f"{flag}.")
            continue
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, float) and not math.isfinite(item):
                raise ValueError(f"{flag}: want a finite number, got {item}")
            if isinstance(item, int) and not abs(item) < 2**63:
                raise ValueError(f"{flag}: want an integer below 2^63, got {item:.3e}")
            most = LARGEST_DEPTH if f.name.endswith("depth") else LARGEST
            if isinstance(item, int) and item > most and flag.startswith(("model.", "method.")):
                raise ValueError(f"{flag}: want at most {most}, got {item}")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a `Run` comes to with this data on these ranks; every number that training uses."""

    device: Literal["cuda", "cpu"]
    precision: Literal["fp32", "bf16"]
    world: int
    micro_batch: int  # images per rank and micro-batch
    num_samples: int  # of an epoch
    steps_per_epoch: int
    left_out: int  # images of each epoch that fill no whole batch; others each epoch
    total_steps: int
    warmup_steps: float
    milestones: tuple[float, ...] = ()  # steps
    peak_lr: float
    attention: str
    notes: tuple[str, ...]  # what was settled otherwise than asked, for a person


def make_plan(run: Run, images: Images, *, world: int, device: Literal["cuda", "cpu"]) -> Plan:
    """Derive the plan; ValueError where the run cannot be done on these ranks with these images."""
    precision = run.precision
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "fp32"
    if run.batch % (world * run.accumulate):
        raise ValueError(
            f"batch: want a multiple of ranks * accumulate = {world} * {run.accumulate}, got {run.batch}"
        )
    num_samples = run.data.samples_per_epoch(len(images))
    if run.batch > num_samples:
        there = "images there are" if run.data.epoch_images is None else "samples of an epoch"
        raise ValueError(f"batch: want at most the {num_samples} {there}, got {run.batch}")
    micro_batch = run.batch // (world * run.accumulate)
    run.method.check_batch(micro_batch, world)
    if run.method.labeled:
        run.method.check_classes(1 + int(labels_of(images).max()))
    steps_per_epoch, left_out = divmod(num_samples, run.batch)
    length = run.epochs * steps_per_epoch if run.steps is None else run.steps
    if length > MOST_STEPS:
        raise ValueError(f"steps, epochs: want a run of at most {MOST_STEPS:.0e} steps, got {length:.3g}")
    total = max(1, round(length))
    notes = []
    if left_out:
        notes.append(
            f"{left_out} of {num_samples} images fill no batch of {run.batch}: "
            "each epoch leaves out as many, others each time"
        )
    if run.accumulate > 1 and run.method.couples_batch:
        notes.append(
            f"{run.method.name} compares the images of a micro-batch with one another: with --accumulate "
            f"{run.accumulate} each meets {micro_batch * world - 1} others, not {run.batch - 1}, which is "
            "another loss than without"
        )
    milestones = tuple(epoch * steps_per_epoch for epoch in run.optim.milestones)
    if milestones and milestones[-1] >= total:
        milestones = tuple(LAST_MILESTONE * total * step / milestones[-1] for step in milestones)
        epochs, steps = (" ".join(f"{x:g}" for x in xs) for xs in (run.optim.milestones, milestones))
        notes.append(f"milestones at epoch {epochs} do not fit in {total} steps: moved to step {steps}")
    warmup = run.optim.warmup_epochs * steps_per_epoch
    if warmup >= total:
        warmup = WARMUP_SHARE * total
        notes.append(
            f"warm-up of {run.optim.warmup_epochs:g} epochs does not fit in {total} steps: "
            f"shortened to {warmup:g} steps"
        )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    attention, why = choose_attention(run.model.attention, device, dtype)
    return Plan(
        device=device,
        precision=precision,
        world=world,
        micro_batch=micro_batch,
        num_samples=num_samples,
        steps_per_epoch=steps_per_epoch,
        left_out=left_out,
        total_steps=total,
        warmup_steps=warmup,
        milestones=milestones,
        peak_lr=run.optim.peak_lr(run.batch),
        attention=f"{attention} ({why})",
        notes=tuple(notes),
    )


def with_absolute_paths(run: Run) -> Run:
    """The run as it means the same in any folder, whoever goes to another before it ends."""
    data, init_from = run.data, run.init_from
    if data.path is not None:
        data = dataclasses.replace(data, path=Path(data.path).absolute())
    if data.val is not None:
        data = dataclasses.replace(data, val=Path(data.val).absolute())
    if data.subset is not None and Path(data.subset).is_file():
        data = dataclasses.replace(data, subset=str(Path(data.subset).absolute()))
    probe = run.probe
    if probe.data is not None:
        probe = dataclasses.replace(probe, data=Path(probe.data).absolute())
    if init_from is not None:
        init_from = Path(init_from).absolute()
    return dataclasses.replace(run, data=data, probe=probe, init_from=init_from)


def as_dict(value: Any) -> Any:
    """A configuration as plain JSON values; a method's carries its name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = {"name": value.name} if isinstance(value, MethodConfig) else {}
        return named | {f.name: as_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [as_dict(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def from_dict(kind: type[Config], content: Mapping[str, Any]) -> Config:
    """The configuration of this class that `as_dict` wrote. What it does not say has its default.

    ValueError for a word that the class does not know, as from another version, or that it refuses.
    """
    hints = get_type_hints(kind)
    fields = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(content.keys() - fields - {"name"}):
        raise ValueError(f"{kind.__name__} has no {', '.join(unknown)}: another version wrote this")
    return kind(**{name: as_hinted(hints[name], content[name]) for name in fields & content.keys()})


def as_hinted(hint: Any, value: Any) -> Any:
    """A JSON value as the type of a field has it: lists are tuples, paths are paths."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return from_dict(hint, value)
    kinds = {hint, *get_args(hint)}
    if isinstance(value, list):
        return tuple(value)
    return Path(value) if isinstance(value, str) and Path in kinds else value


def run_facts(run: Run, plan: Plan, images: Images) -> dict[str, Any]:
    """What a checkpoint must share with the run that resumes it: all that shapes numbers or shards."""
    config = as_dict(run)
    facts = {
        name: config[name] for name in ("method", "model", "optim", "batch", "accumulate", "seed", "zero")
    }
    facts["model"].pop("attention")  # the same numbers up to rounding
    for flag in run.method.files():  # what is in it counts, not where it lies
        facts["method"].pop(flag)
    for part in ("model", "optim"):
        leave_out_defaults(facts[part], getattr(run, part))
    facts |= {"world": plan.world, "precision": plan.precision, "total_steps": plan.total_steps}
    facts["data"] = {
        "images": len(images),
        "fingerprint": images.fingerprint,
        "decoder": run.data.decoder,
        "augment": run.data.augment,
    }
    if plan.num_samples != len(images):  # otherwise absent, as from checkpoints that know of no repeats
        facts["data"]["epoch_images"] = plan.num_samples
    return facts


LATER = {  # fields that checkpoints may not know of: facts where they are as they were before there was such
    "model": ("positions", "layer_scale", "drop_path", "qkv_bias", "final_norm", "init"),
    "optim": ("warmup_start", "clip_per", "schedule", "milestones", "gamma", "weight_decay_end"),
}


def leave_out_defaults(facts: dict[str, Any], config: Any) -> None:
    """Take from the facts of a configuration the later fields that have their defaults."""
    later = {name for names in LATER.values() for name in names}
    for known in dataclasses.fields(config):
        if known.name in later and getattr(config, known.name) == known.default:
            facts.pop(known.name)


def fingerprint(facts: dict[str, Any]) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
