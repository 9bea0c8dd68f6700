"""Out of memory, in words: what was asked of it, what there is, and what to try."""

import torch

from fastmim.data.feed.sizes import bytes_as_text
from fastmim.engine.config import Plan, Run


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left: of a device, of torch on the CPU, or of Python."""
    words = ("can't allocate memory", "Cannot allocate memory", "not enough memory")
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))


def words_on_memory(run: Run, plan: Plan) -> str:
    """What the micro-batch is, what memory was taken and is free, and the next smaller micro-batch."""
    if plan.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        peak = torch.cuda.max_memory_allocated()
        taken, left, there_is = (bytes_as_text(count) for count in (peak, free, total))
        there = f"at most {taken} were taken, {left} of {there_is} are free"
    else:
        there = "the machine, its container or a limit of the shell has no more"
    return (
        f"out of memory with micro-batches of {plan.micro_batch} images (--batch {run.batch} = {plan.world} "
        f"ranks x --accumulate {run.accumulate} x {plan.micro_batch}): {there}. {advice(run, plan)}"
    )


def advice(run: Run, plan: Plan) -> str:
    """The next --accumulate that divides the micro-batch, for the same steps; else what else helps."""
    for parts in range(2, plan.micro_batch + 1):
        if plan.micro_batch % parts == 0:
            accumulate, micro = run.accumulate * parts, plan.micro_batch // parts
            return f"--accumulate {accumulate} makes the same steps of micro-batches of {micro}"
    return "A smaller --batch, more ranks, --zero 2 or 3, or a smaller --model need less"
