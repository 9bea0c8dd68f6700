"""A run from its configuration to its results: `train(prepare(run))`."""

import json
import logging
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastmim.data import (
    BadImages,
    Images,
    Loader,
    SampleOrder,
    Sizes,
    check_decoder,
    find_images,
    look_at_sizes,
    subset,
)
from fastmim.data.feed.sizes import bytes_as_text
from fastmim.data.sources.sample import sample_set
from fastmim.engine import durable
from fastmim.engine.checkpoint import Checkpoint, CheckpointError, Checkpoints
from fastmim.engine.config import (
    Plan,
    Run,
    as_dict,
    fingerprint,
    make_plan,
    run_facts,
    with_absolute_paths,
)
from fastmim.engine.deepspeed import start_process_group, whole_state, wrap
from fastmim.engine.doctor import versions
from fastmim.engine.extension import build_fused_adam
from fastmim.engine.frozen import check_files, facts_of_frozen, place_frozen
from fastmim.engine.judge import NonFinite, require_finite
from fastmim.engine.lock import RunLock
from fastmim.engine.loop import train_loop
from fastmim.engine.metrics import Metrics, Stopwatch
from fastmim.engine.one_run import require_one_run
from fastmim.engine.pictures import draw_loss, draw_reconstruction
from fastmim.engine.probe import Probe, probed_images
from fastmim.engine.ranks import RankError, Ranks
from fastmim.engine.run_dir import (
    check_room,
    check_run_dir,
    claimed,
    no_empty_folder_left,
    place_of,
    saved_fingerprint,
    write_configuration,
)
from fastmim.engine.shards import checkpoint_bytes, restore, write_shards
from fastmim.engine.stop import STOP, Agreement, Stopped
from fastmim.engine.teacher import Teacher, check_copies, copy_students
from fastmim.engine.validate import Validation, check_classes_alike
from fastmim.engine.watchdog import Watchdog, forget_hang
from fastmim.interop.encoders import load_pretrained, transfer
from fastmim.interop.mae import (
    check_names,
    from_mae,
    missing_in,
    to_file,
    to_timm,
    words_on_weights,
)
from fastmim.interop.metadata import architecture_of, encoder_metadata
from fastmim.interop.weights_file import read_weights, write_weights
from fastmim.methods.base import Method
from fastmim.optim import check_optimizer
from fastmim.views import Batch, augmented

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

log = logging.getLogger("fastmim")

REFUSALS = (ValueError, ImportError, RankError, CheckpointError)  # of `prepare`
SHARED_ENDINGS = (NonFinite, CheckpointError, Stopped)  # of `train`, the same on every rank


class NotLoaded(RuntimeError):
    """A whole checkpoint that DeepSpeed cannot load into this run."""


# the last three on one rank, while others may be in the middle of a step or of loading
ENDINGS = (*SHARED_ENDINGS, BadImages, NotLoaded, OSError)


def device_type() -> Literal["cuda", "cpu"]:
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_of(plan: Plan, ranks: Ranks) -> torch.device:
    """The device that this rank trains on."""
    return torch.device(plan.device, ranks.local_rank) if plan.device == "cuda" else torch.device("cpu")


def images_of(run: Run) -> Images:
    """The images of the run: its folder, or the training half of the embedded sample set."""
    images = find_images(sample_set() / "train" if run.data.path is None else run.data.path)
    return images if run.data.subset is None else subset(images, run.data.subset)


def val_of(run: Run, images: Images) -> Images | None:
    """The images to validate on, if there are any. ValueError where they are of no use."""
    if run.data.val is None:
        return None
    if not run.method.labeled:
        raise ValueError(f"data.val: want a method with labels, as supervised, got {run.method.name}")
    val = find_images(run.data.val)
    check_classes_alike(images, val)
    return val


def sizes_of(run: Run, plan: Plan, images: Images, ranks: Ranks) -> Sizes | None:
    """What the headers of the images say, if these are to be cached. ValueError if there is no room."""
    if run.data.cache == "none":
        return None
    device, channels = device_of(plan, ranks), run.model.channels
    return look_at_sizes(images, config=run.data, channels=channels, device=device, quiet=not ranks.is_main)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that can be done: all that could be refused has been looked at, and nothing has been written.

    An empty directory of its own is there for a run that was not given one.
    """

    run: Run
    plan: Plan
    ranks: Ranks
    images: Images
    val: Images | None  # to validate on
    probed: Images | None  # on which neighbors are looked for
    sizes: Sizes | None  # of the images, where they are cached
    method: Method
    run_dir: Path
    checkpoints: Checkpoints
    facts: dict[str, Any]
    found: Checkpoint | None  # where to resume
    changed: list[str]  # facts that differ from that checkpoint's, as was allowed
    weights: str | None  # what came from --init-from and what did not
    lock: RunLock | None  # on the directory of a run that resumes


def prepare(run: Run) -> Prepared:
    """Join the ranks, find the data, build the model, look for the checkpoint to resume.

    Raises ValueError, ImportError, RankError or CheckpointError, the same on every rank, for what cannot be
    done.
    """
    device = device_type()
    run = with_absolute_paths(run)
    check_run_dir(run)
    check_decoder(run.data.decoder, run.model.channels)
    check_optimizer(run.optim)
    check_files(run.method)
    ranks = start_process_group(device)
    if run.optim.name == "deepspeed":
        ranks.all_succeed(build_fused_adam, "building the optimizer")
    images = ranks.all_succeed(lambda: images_of(run), "finding the images")
    val = ranks.all_succeed(lambda: val_of(run, images), "finding the images to validate on")
    probed = ranks.all_succeed(lambda: probed_images(run.probe), "finding the images of the probe")
    plan = make_plan(run, images, world=ranks.world, device=device)
    sizes = ranks.all_succeed(lambda: sizes_of(run, plan, images, ranks), "looking at the images")
    method, weights = ranks.all_succeed(lambda: build_method(run), "building the model")
    if probed is not None and not hasattr(method, "encoder"):
        raise ValueError(f"probe.data: want a method that trains an encoder, got {run.method.name}")
    facts = run_facts(run, plan, images) | facts_of_frozen(method)
    require_one_run(ranks, facts)
    durable.seal({"facts": facts, "run": as_dict(run)})  # what JSON cannot hold is refused now, not by a save
    need_bytes = checkpoint_bytes(method, run, plan)
    ranks.from_main(lambda: check_room(place_of(run), need_bytes), "looking for room for a checkpoint")
    run_dir = place_of(run)
    if run.run_dir is None:  # last: nothing that follows refuses a run without one
        run_dir = ranks.from_main(lambda: claimed(run.method.name), "making the run directory")
    checkpoints = Checkpoints(run_dir / "checkpoints", ranks, keep=run.keep)
    lock = RunLock(run_dir) if run.resume else None
    if lock is not None and run_dir.is_dir():  # before: the run that is in it may remove what is found
        ranks.from_main(lambda: lock.acquire(wait=True), "locking the run directory")
    found, changed = find_checkpoint(run, run_dir, checkpoints, facts)
    return Prepared(
        run=run, plan=plan, ranks=ranks, images=images, val=val, probed=probed, sizes=sizes, method=method,
        run_dir=run_dir, checkpoints=checkpoints, facts=facts, found=found, changed=changed, weights=weights,
        lock=lock,
    )  # fmt: skip


def train(p: Prepared, *, arguments: list[str] | None = None) -> None:
    """Train, checkpoint, export and draw. `arguments` is the command line, kept for --resume.

    Raises NonFinite, CheckpointError, NotLoaded or BadImages, for what stops a run; its last checkpoint
    stays, and a run that could not begin is as it was.
    """
    ranks = p.ranks
    if ranks.is_main:
        describe(p)
    ours = p.run.run_dir is None or not p.run_dir.exists()
    lock = p.lock or RunLock(p.run_dir)
    with no_empty_folder_left(p.run_dir, ours=ours), STOP.listen(), closing(lock):
        p.method.share(ranks)
        place_frozen(p.method, device_of(p.plan, ranks))
        engine, groups = wrap(p.method, p.run, p.plan)
        teacher = Teacher(engine, ranks)
        start_step = load(engine, teacher, p.found, ranks) if p.found else 0
        with loader_of(p, start_step) as loader:  # the last that may refuse: only now is anything written
            content = configuration(p, arguments)
            if p.lock is None:
                ranks.from_main(lambda: lock_new(lock), "locking the run directory", CheckpointError)
            ranks.from_main(lambda: begin(p.run_dir, content), "writing config.json", CheckpointError)
            batches = iter(loader)
            validation = validation_of(p, start_step)
            with Watchdog(p.run_dir, ranks, p.run.timeout) as watchdog:
                train_steps(p, engine, groups, teacher, batches, start_step, validation, watchdog)
            state = whole_state(engine, teacher.values())
            require_finite(state)
            if ranks.is_main:
                write_results(p.run, p.run_dir, state, next(batches))
                if validation is not None and (words := validation.summary()):
                    print(f"{'val':>8}  {words}", flush=True)
    ranks.barrier()


def begin(run_dir: Path, content: dict[str, Any]) -> None:
    """The first that is written into the directory of a run."""
    write_configuration(run_dir, content)
    forget_hang(run_dir)


def lock_new(lock: RunLock) -> None:
    """Lock the directory of a run that begins, made now if it is not there."""
    lock.run_dir.mkdir(parents=True, exist_ok=True)
    lock.acquire()


def train_steps(
    p: Prepared,
    engine: "DeepSpeedEngine",
    groups: Sequence[Mapping[str, Any]],
    teacher: Teacher,
    batches: Iterator[Batch],
    start_step: int,
    validation: Validation | None,
    watchdog: Watchdog,
) -> None:
    """Every step that is left, with its metrics, checkpoints and looks at the validation images."""
    need_bytes = checkpoint_bytes(p.method, p.run, p.plan)
    agreement = Agreement(STOP, p.ranks)
    metrics = Metrics(
        p.run_dir, p.plan, p.ranks, log_every=p.run.log_every, batch=p.run.batch, start_step=start_step,
        diagnose=p.method.diagnose, samples=lambda step: samples_of(p, step),
    )  # fmt: skip

    def save(step: int) -> None:
        path = p.checkpoints.save(
            step,
            lambda folder: write_shards(engine, teacher, folder, p.ranks),
            facts=p.facts,
            need_bytes=need_bytes,
        )
        log.info("checkpoint %s", path)

    def end_of(step: int) -> None:
        if validation is not None and validation.due(step):
            with Stopwatch() as looking, watchdog.during("validation"):
                row = validation(engine, step)
            metrics.leave_out(looking.seconds)
            metrics.events(
                step, {f"val/{name}": row[name] for name in row if "top" in name or "loss" in name}
            )

    probe = probe_of(p)

    def look(step: int) -> Mapping[str, float]:
        if probe is None or not probe.due(step):
            return {}
        with Stopwatch() as looking, watchdog.during("probe"):
            found = probe(engine)
        metrics.leave_out(looking.seconds)
        return found

    try:
        end_of(start_step)  # where a stop came between the checkpoint and the look
        train_loop(
            engine, groups, teacher, batches, metrics, save, end_of, look, agreement=agreement,
            watchdog=watchdog, run=p.run, plan=p.plan, start_step=start_step,
        )  # fmt: skip
        agreement.close()
    finally:
        metrics.close()


# --- before the first step ------------------------------------------------------------------------


def build_method(run: Run) -> tuple[Method, str | None]:
    """The method with fresh weights of the seed, or with those of `--init-from` and a line on which.

    A teacher that is not in that file starts as a copy of what its student has become. A method that
    transfers takes the encoder alone, whatever the file is of.
    """
    torch.manual_seed(run.seed)
    method = run.method.build(run.model)
    check_names(method.state_dict())
    check_copies(method)
    if run.method.transfers and run.init_from is not None and not (run.resume and not method.frozen):
        found = load_pretrained(run.init_from, heads=run.model.heads)
        return method, transfer(found, method.start)
    if run.init_from is None or run.resume:
        return method, None
    flat, wanted = read_weights(run.init_from), method.state_dict()
    method.load_state_dict(from_mae(flat, wanted, f"init-from: {run.init_from}"))
    copy_students(method, missing_in(flat, wanted))
    return method, f"{words_on_weights(flat, wanted)}, from {run.init_from}"


def find_checkpoint(
    run: Run, run_dir: Path, checkpoints: Checkpoints, facts: dict[str, Any]
) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to resume, and what differs from it as was allowed: now, or at a start that went on and
    ended before the next checkpoint, of which config.json has the fingerprint. CheckpointError for all else.
    """
    if not run.resume:
        return None, []
    found = checkpoints.find() if run.resume_step is None else checkpoints.at(run.resume_step)
    if found is None:
        raise CheckpointError(f"resume: there is no checkpoint in {checkpoints.folder}")
    accepted = checkpoints.ranks.broadcast(saved_fingerprint(run_dir)) == fingerprint(facts)
    also = facts.keys() | found.facts.keys() if accepted else ()
    changed = found.check_facts(facts, allow=[*run.allow_changes, *also])
    if (total := facts["total_steps"]) < found.step:
        raise CheckpointError(f"steps, epochs: {found.path} has {found.step} steps, got a run of {total}")
    return found, changed


def load(engine: "DeepSpeedEngine", teacher: Teacher, found: Checkpoint, ranks: Ranks) -> int:
    """`restore`, with NotLoaded in a line for whatever DeepSpeed stumbles over, or what is no plain data."""
    try:
        return restore(engine, teacher, found, ranks)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        what = re.search(r"GLOBAL ([\w.]+)", str(error))
        kind = what[1] if what else "something that is no tensor"
        raise NotLoaded(
            f"resume: {found.path} holds {kind}, which may run code when it is loaded, and no run of ours "
            "saves it: refused"
        ) from error
    except Exception as error:
        why = " ".join(str(error).split())
        raise NotLoaded(f"resume: {found.path} cannot be loaded by this run: {why}") from error


def loader_of(p: Prepared, start_step: int) -> Loader:
    run, plan, ranks = p.run, p.plan, p.ranks
    order = SampleOrder(
        plan.num_samples, run.batch,
        accumulate=run.accumulate, world=ranks.world, rank=ranks.rank, seed=run.seed,
    )  # fmt: skip
    return Loader(
        p.images,
        augmented(p.method.crops, run.data.augment),
        order,
        config=run.data,
        channels=run.model.channels,
        seed=run.seed,
        device=device_of(plan, ranks),
        bad_samples=p.run_dir / "bad_samples.jsonl",
        start_step=start_step,
        sizes=p.sizes,
        labeled=run.method.labeled,
    )


def samples_of(p: Prepared, done: int) -> list[str]:
    """The names of the images of the step after which `done` were finished, of all ranks."""
    order = SampleOrder(p.plan.num_samples, p.run.batch, seed=p.run.seed)  # one rank has them all
    _, ids = order.ids(done - 1)
    return [p.images.names[i] for i in (ids % len(p.images)).tolist()]


def validation_of(p: Prepared, start_step: int) -> Validation | None:
    """What looks at the validation images, if there are any."""
    if p.val is None:
        return None
    return Validation(
        p.val, p.ranks, p.run_dir, size=p.run.model.size, channels=p.run.model.channels,
        batch=p.plan.micro_batch, threads=p.run.data.num_threads(), device=device_of(p.plan, p.ranks),
        steps_per_epoch=p.plan.steps_per_epoch, total_steps=p.plan.total_steps, start_step=start_step,
    )  # fmt: skip


def probe_of(p: Prepared) -> Probe | None:
    """What looks for neighbors, if there are images to do so."""
    if p.probed is None:
        return None
    return Probe(
        p.run.probe, p.probed, p.ranks, size=p.run.model.size, channels=p.run.model.channels,
        batch=p.plan.micro_batch, threads=p.run.data.num_threads(), device=device_of(p.plan, p.ranks),
        steps_per_epoch=p.plan.steps_per_epoch, total_steps=p.plan.total_steps,
    )  # fmt: skip


def configuration(p: Prepared, arguments: list[str] | None) -> dict[str, Any]:
    """What config.json says of the run."""
    return {
        "run": as_dict(p.run),
        "plan": asdict(p.plan),
        "fingerprint": fingerprint(p.facts),
        "versions": versions(),
        "arguments": arguments,
    }


def describe(p: Prepared) -> None:
    """A few lines on what is about to happen."""
    run, plan, model = p.run, p.plan, p.run.model
    trained = sum(parameter.numel() for parameter in p.method.parameters() if parameter.requires_grad)
    lines = [
        ("method", f"{run.method.name}, {trained / 1e6:.1f} M trained parameters"),
        ("encoder", run.method.words(model)),
        ("data", f"{len(p.images)} images in {p.images.root}, decoder {run.data.decoder}"),
        *([("part", f"--data.subset {run.data.subset}")] if run.data.subset else []),
        *([("val", f"{len(p.val)} images in {p.val.root}, after each epoch")] if p.val else []),
        *([("probe", f"kNN on {p.probed.root} every {run.probe.every} epochs")] if p.probed else []),
        *([("left out", str(p.images.left_out))] if p.images.left_out else []),
        *cache_line(p),
        (
            "batch",
            f"{run.batch} = {plan.world} ranks x {run.accumulate} micro-batches x {plan.micro_batch} images",
        ),
        ("length", f"{plan.total_steps} steps, {plan.steps_per_epoch} per {plan.num_samples} images"),
        ("rate", f"{plan.peak_lr:.3g} after {plan.warmup_steps:g} steps, optimizer {run.optim.name}"),
        ("on", f"{plan.device}, {plan.precision}, ZeRO {run.zero}, attention {plan.attention}"),
        *([("weights", p.weights)] if p.weights else []),
        ("run dir", str(p.run_dir)),
        *(("changed", line) for line in p.changed),
        *(("note", note) for note in plan.notes),
    ]
    if p.found and p.found.step == plan.total_steps:
        lines.append(("note", f"all {plan.total_steps} steps are done: --epochs or --steps makes them more"))
    print("\n".join(f"{name:>8}  {line}" for name, line in lines), flush=True)


def cache_line(p: Prepared) -> list[tuple[str, str]]:
    """What is kept decoded, and where, if it is."""
    if p.sizes is None:
        return []
    on_device = p.run.data.cache == "device" and p.plan.device == "cuda"
    where = "on the device" if on_device else "in the memory"
    return [("cache", f"{bytes_as_text(p.sizes.total)} of decoded images, {where} of each rank")]


# --- after the last step ----------------------------------------------------------------------------


def write_results(run: Run, run_dir: Path, state: dict[str, Tensor], batch: Batch) -> None:
    """The weights, the encoder alone, and the pictures, on one rank, from whole fp32 weights."""
    method = run.method.build(replace(run.model, attention="auto"))  # in fp32, which xformers may not serve
    metadata = {"format": "pt"}
    if hasattr(method, "encoder"):
        metadata = encoder_metadata(run.model, architecture_of(method.encoder))
        write_weights(to_timm(state), run_dir / "encoder.safetensors", metadata)
    write_weights(to_file(state), run_dir / "model.safetensors", metadata)
    try:
        draw_loss(run_dir / "metrics.jsonl", run_dir / "loss.png")
    except ValueError as error:  # rows are lost: the weights are not
        print(f"{'note':>8}  no loss.png: {error}", flush=True)
    method.load_state_dict(state)
    for name, (tensors, about) in method.exports().items():
        write_weights(tensors, run_dir / name, about)
    place_frozen(method, batch.seeds_B.device)
    picture = method.to(batch.seeds_B.device).eval().reconstruct(batch)
    if picture is not None:
        draw_reconstruction(picture, run.model, run_dir / "reconstruction.png")
    report_bad_samples(run_dir / "bad_samples.jsonl")
    written = sorted(path.name for path in run_dir.iterdir() if path.suffix in (".png", ".safetensors"))
    print(f"{'done':>8}  {run_dir}: {', '.join(written)}", flush=True)


def report_bad_samples(path: Path) -> None:
    if path.exists():
        names = {json.loads(line)["path"] for line in path.read_text().splitlines()}
        print(f"{'note':>8}  {len(names)} files could not be decoded and were replaced: {path}")
