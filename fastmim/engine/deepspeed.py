"""The only door to DeepSpeed: process group, dictionary, wrapped model, whole weights out of shards."""

import glob
import logging
import os
import socket
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# read when DeepSpeed is imported; unset, it looks for accelerators and warns that it found none
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import safe_get_local_fp32_param
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor, nn

from fastmim.engine.config import Plan, Run
from fastmim.engine.ranks import COLLECTIVE_TIMEOUT, Ranks
from fastmim.methods.base import Method
from fastmim.optim import OPTIMIZERS
from fastmim.optim.groups import parameter_groups

LOOPBACK = ("127.0.0.1", "localhost")
# what DeepSpeed 0.19.8 saves beside tensors: none of it is code
PLAIN = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]

# What a rank holds of a parameter: where it begins in the flat parameter, and a flat view of it
Shard = tuple[int, Tensor]


def start_process_group(device: str) -> Ranks:
    """Join the ranks the launcher started, or be the only one. NCCL on CUDA, gloo on CPU."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 renamed, and says so at every first use
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # The op would be compiled for forty seconds at the first start and serve CPU ranks only; gloo serves too.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:  # ranks of one machine share its cores
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    if not dist.is_initialized():
        meet(torch.device("cuda", local_rank) if device == "cuda" else None)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return Ranks.from_environment()


def meet(device: torch.device | None) -> None:
    """Join the other ranks where the launcher said, by NCCL on this rank's CUDA device, else by gloo.

    ValueError if that place is taken or out of reach.
    """
    # told its device, NCCL meets at once and on the right one, not by a guess at the first barrier
    how: dict[str, Any] = {"backend": "gloo" if device is None else "nccl", "device_id": device}
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # alone: no port to share with other runs
        dist.init_process_group(**how, store=dist.HashStore(), rank=0, world_size=1)
        return
    try:
        how |= {"store": loopback_store()} if is_one_node() else {}
        if "store" in how:
            how |= {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
        dist.init_process_group(**how, timeout=COLLECTIVE_TIMEOUT)
    except (dist.DistNetworkError, OSError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ValueError(
            f"ranks: cannot meet at {place}; does another run use it? Give deepspeed another --master_port "
            f"({str(error).splitlines()[0]})"
        ) from error


def is_one_node() -> bool:
    """Whether all ranks are on this node, and DeepSpeed's launcher said that they meet there."""
    local = os.environ.get("LOCAL_SIZE")
    return local == os.environ["WORLD_SIZE"] and os.environ.get("MASTER_ADDR") in LOOPBACK


def loopback_store() -> dist.TCPStore:
    """The store of one node's ranks, which no other machine can reach: torch's own listens on all interfaces.

    OSError where the port is taken.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if "lo" in dict((name, i) for i, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    options: dict[str, Any] = {"world_size": int(os.environ["WORLD_SIZE"]), "timeout": COLLECTIVE_TIMEOUT}
    if os.environ["RANK"] != "0":
        return dist.TCPStore(host, port, is_master=False, **options)
    listening = socket.create_server((host, port))
    return dist.TCPStore(
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach(), **options
    )


def leave_process_group() -> None:
    """Leave the ranks, if they had met. The last call of all together: who fails alone must not wait."""
    if dist.is_initialized():
        deepspeed.comm.destroy_process_group()


def deepspeed_dictionary(run: Run, plan: Plan) -> dict[str, Any]:
    """DeepSpeed's configuration, whole: what is not written here changes with its versions."""
    bf16 = plan.precision == "bf16"
    # fp32 sums of micro-batch gradients exist in ZeRO 1 only, where DeepSpeed then has another optimizer
    sums_in_fp32 = bf16 and run.zero == 1 and run.accumulate > 1
    alone = plan.world == 1  # nothing to reduce: gradients stay where autograd has put them
    dictionary: dict[str, Any] = {
        "train_batch_size": run.batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": run.accumulate,
        "gradient_clipping": 0.0,  # 1.0 if unwritten, since DeepSpeed 0.19.3; clip.py does it without a wait
        "prescale_gradients": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        # a search of every gradient, with a wait, after which the step is left out in silence: `Finite` looks
        "bf16": {"enabled": bf16, "check_grad_overflow": False},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "bf16" if bf16 and not sums_in_fp32 else "fp32"},
        "timers": {"throughput": {"enabled": False, "synchronized": False}},  # it waits for the device
        "zero_optimization": {
            "stage": run.zero,
            "compute_grad_norm": needs_gradient_norm(run, sums_in_fp32),
            "contiguous_gradients": not alone,
            "reduce_scatter": not alone,
            "reduce_bucket_size": 200_000_000,
            "allgather_partitions": True,
            "allgather_bucket_size": 200_000_000,
            "overlap_comm": plan.device == "cuda" and plan.world > 1,
            "round_robin_gradients": False,
            "sub_group_size": 1_000_000_000,
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 100_000,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "stage3_gather_16bit_weights_on_model_save": False,
            "memory_efficient_linear": False,  # it would add the bias apart, rounding bf16 once more
        },
    }
    if run.optim.name == "deepspeed":  # made by DeepSpeed from these; the groups carry their own decay
        o = run.optim
        dictionary["optimizer"] = {
            "type": "AdamW",
            "params": {"lr": 0.0, "betas": list(o.betas), "eps": o.eps, "weight_decay": o.weight_decay},
        }
    return dictionary


def needs_gradient_norm(run: Run, sums_in_fp32: bool) -> bool:
    """Whether DeepSpeed does not go without the norm of the gradients, which nothing here reads."""
    return run.zero not in (1, 2) or sums_in_fp32


def groups_of(method: Method, run: Run) -> list[dict[str, Any]]:
    """The method's parameters as its optimizer groups them."""
    return parameter_groups(
        method.named_parameters(),
        weight_decay=run.optim.weight_decay,
        layer_decay=run.optim.layer_decay,
        depth=run.model.depth,
        group=method.group,
    )


def wrap(method: Method, run: Run, plan: Plan) -> tuple[deepspeed.DeepSpeedEngine, list[dict[str, Any]]]:
    """The method under DeepSpeed, with its optimizer, and the groups that this was made of."""
    groups = groups_of(method, run)
    # apart, for DeepSpeed puts shards in the place of the parameters
    kept = [{**group, "params": list(group["params"])} for group in groups]
    by_deepspeed = run.optim.name == "deepspeed"
    engine, *_ = deepspeed.initialize(
        model=method,
        optimizer=None if by_deepspeed else OPTIMIZERS[run.optim.name](groups, run.optim),
        model_parameters=groups if by_deepspeed else None,
        config=deepspeed_dictionary(run, plan),
        dist_init_required=False,
    )
    if plan.world == 1:
        leave_gradients_in_place(engine)
    forget_first_step(engine)
    hold_frozen(engine, kept)
    return engine, kept


def forget_first_step(engine: deepspeed.DeepSpeedEngine) -> None:
    """Let the first step be the first: in bf16 without ZeRO DeepSpeed takes one of zero gradients before it.

    It makes the moments so, which the real first step makes as well; their correction for a cold start would
    be one step ahead.
    """
    if isinstance(engine.optimizer, FP16_Optimizer | FP16_UnfusedOptimizer):
        engine.optimizer.optimizer.state.clear()


def hold_frozen(engine: deepspeed.DeepSpeedEngine, groups: Sequence[Mapping[str, Any]]) -> None:
    """Let the optimizer pass by groups that `set_rates` has said are frozen: no decay, no moments, no count.

    An optimizer passes by what has no gradient. DeepSpeed steps one group at a time in ZeRO: by its name it
    is known.
    """
    engine.frozen_groups = set()
    if not any(group["frozen_epochs"] for group in groups):
        return

    def without_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            if group["name"] in engine.frozen_groups:
                for p in group["params"]:
                    p.grad = None

    inner_optimizer(engine).register_step_pre_hook(without_gradients)


def inner_optimizer(engine: deepspeed.DeepSpeedEngine) -> torch.optim.Optimizer:
    """The optimizer that moves the weights, which DeepSpeed's own may wrap."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def leave_gradients_in_place(engine: deepspeed.DeepSpeedEngine) -> None:
    """On one rank, where a reduction flattens all gradients and then copies each back as it was, do none."""
    if not engine.zero_optimization():
        engine.enable_backward_allreduce = False
    elif isinstance(engine.optimizer, DeepSpeedZeroOptimizer):  # ZeRO 1 and 2: what surrounds it must stay
        engine.optimizer.buffered_reduce_fallback = lambda *_, **__: None
    # ZeRO 3 takes its shards from the reduction, and DeepSpeed's BF16_Optimizer rounds fp32 sums in it


def backward(engine: deepspeed.DeepSpeedEngine, loss: Tensor) -> None:
    """Add the gradients of a micro-batch's loss to those of its step.

    DeepSpeed 0.19.8's BF16_Optimizer adds bf16 gradients to its fp32 sums after each micro-batch and leaves
    them in their place, where the next adds its own: the first of two would count twice.
    """
    engine.backward(loss)
    if isinstance(engine.optimizer, BF16_Optimizer):
        engine.optimizer.clear_lp_grads()


def save_shards(engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    """Write this rank's shards into `folder`. A call for all ranks at once; raises what its writes raised.

    DeepSpeed's save has barriers: a rank that left at its first failed write would leave the others waiting,
    so it goes through to the end and fails there.
    """
    write, failures = engine.checkpoint_engine.save, []

    def write_or_remember(*args: Any, **options: Any) -> Any:
        try:
            return write(*args, **options)
        except Exception as error:
            failures.append(error)

    engine.checkpoint_engine.save = write_or_remember
    try:
        engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
    finally:
        engine.checkpoint_engine.save = write
    if failures:
        raise failures[0]


def load_shards(engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    """Load what `save_shards` wrote, without running any code that is in it. A call for all ranks at once.

    pickle.UnpicklingError for a file that holds anything but tensors, plain values and the classes in
    `PLAIN`; FileNotFoundError where DeepSpeed finds nothing.
    """
    load, names = engine.checkpoint_engine.load, engine._get_all_ckpt_names

    def load_plain(path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(PLAIN):
            return torch.load(path, map_location=map_location, weights_only=True)

    engine.checkpoint_engine.load = load_plain
    # DeepSpeed 0.19.8 looks for its files by a pattern: brackets in the folder's name would be part of it
    engine._get_all_ckpt_names = lambda folder, tag: names(glob.escape(folder), glob.escape(tag))
    try:
        path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    finally:
        engine.checkpoint_engine.load, engine._get_all_ckpt_names = load, names
    if path is None:
        raise FileNotFoundError(f"DeepSpeed finds nothing to load in {folder}")


def set_rates(
    engine: deepspeed.DeepSpeedEngine,
    groups: Sequence[Mapping[str, Any]],
    rates: Mapping[str | None, float],
    decay: float,
    epoch: int,
) -> None:
    """Give each group its learning rate, by the schedule that it names or the run's (None), and its decay.

    `groups` are those of `wrap`: what a checkpoint has of them need not have every word.
    """
    asked = {group["name"]: group for group in groups}
    engine.frozen_groups = {name for name, group in asked.items() if epoch < group["frozen_epochs"]}
    for group in engine.optimizer.param_groups:
        of = asked[group["name"]]
        group["lr"] = rates[of["schedule"]] * of["lr_scale"]
        if of["decays"]:
            group["weight_decay"] = decay


# --- weights and shards of weights ------------------------------------------------------------------


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter, of which ZeRO 3 may have left a shard only."""
    return getattr(parameter, "ds_shape", parameter.shape)


def stored(parameter: Any) -> Shard:
    """What the module itself holds on this rank: its shard in ZeRO 3, else all of the parameter."""
    if hasattr(parameter, "ds_id"):
        return _without_padding(parameter, parameter.ds_tensor)
    return 0, parameter.data.view(-1)


def _without_padding(parameter: Any, shard: Tensor) -> Shard:
    """A shard of ZeRO 3, of which all ranks have one as long: the last ones end in nothing."""
    start = min(dist.get_rank() * shard.numel(), parameter.ds_numel)
    return start, shard.detach()[: parameter.ds_numel - start]


def masters(engine: deepspeed.DeepSpeedEngine) -> dict[nn.Parameter, Shard]:
    """The fp32 values that the optimizer moves, of every trained parameter, as far as this rank has them.

    Views that stay valid: DeepSpeed loads checkpoints into the same memory.
    """
    optimizer = engine.optimizer
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    if engine.zero_optimization_partition_weights():
        return {p: _without_padding(p, safe_get_local_fp32_param(p)) for p in trained}
    if not engine.bfloat16_enabled():  # the weights themselves; a rank's shard of ZeRO 1 and 2 is their copy
        return {p: (0, p.data.view(-1)) for p in trained}
    if isinstance(optimizer, FP16_UnfusedOptimizer):  # ZeRO 0, as its name does not say
        groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        pairs = (pair for weights, copies in groups for pair in zip(weights, copies, strict=True))
        return {p: (0, master.detach().view(-1)) for p, master in pairs}
    if isinstance(optimizer, FP16_Optimizer):  # the same for FusedAdam
        found: dict[nn.Parameter, Shard] = {}
        for weights, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
            parts = flat.detach().split([p.numel() for p in weights])
            found |= {p: (0, part) for p, part in zip(weights, parts, strict=True)}
        return found
    return {p: _fragment(p) for p in trained}


def _fragment(parameter: Any) -> Shard:
    """The shard of ZeRO 1 and 2: a rank's share of the weights may end within one and have none of others."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return 0, torch.empty(0, device=parameter.device)
    return mapping.lp_fragment_address.start, mapping.hp_fragment.detach()


def moved_values(engine: deepspeed.DeepSpeedEngine) -> list[Tensor]:
    """The same values in the tensors in which the optimizer moves them: a few flat ones in ZeRO 1 and 2.

    Never the padding of ZeRO 3, which holds what was in its memory before.
    """
    if engine.zero_optimization_partition_weights():
        return [part for _, part in masters(engine).values() if part.numel()]
    return [p.detach() for group in inner_optimizer(engine).param_groups for p in group["params"]]


def masters_are_sharded(engine: deepspeed.DeepSpeedEngine) -> bool:
    """Whether `masters` differ from rank to rank."""
    stage = engine.zero_optimization_stage()
    return stage == 3 or (stage > 0 and engine.bfloat16_enabled())


def kept_whole(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Those that ZeRO 3 keeps whole on every rank beside their shards, because they are small."""
    return [p for p in parameters if getattr(p, "ds_persist", False)]


def gather_again(parameters: Sequence[nn.Parameter]) -> None:
    """Make parameters that are `kept_whole` anew from their shards, in one exchange."""
    first: Any = parameters[0]  # DeepSpeed's methods of one parameter work on lists
    first.partition(param_list=parameters)
    first.all_gather(param_list=parameters)


@torch.no_grad()
def whole_state(
    engine: deepspeed.DeepSpeedEngine, averages: Mapping[nn.Parameter, Shard]
) -> dict[str, Tensor]:
    """The method's state dict in fp32 on the CPU; a call for all ranks at once.

    Trained weights are the optimizer's, those of `averages` what is given; one at a time is ever whole.
    """
    shards, sharded = {**masters(engine), **averages}, masters_are_sharded(engine)
    state = {}
    for name, value in engine.module.state_dict(keep_vars=True).items():
        if value in shards:
            start, part = shards[value]
            whole = torch.zeros(whole_shape(value).numel(), device=part.device)
            whole[start : start + part.numel()] = part
            if sharded:
                dist.all_reduce(whole)
            whole = whole.view(whole_shape(value))
        else:
            with deepspeed.zero.GatheredParameters([value]):  # one that does not move, or a buffer
                whole = value.detach().clone()
        state[name] = (whole.float() if whole.is_floating_point() else whole).cpu()
    return state
