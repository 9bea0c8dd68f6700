"""Ten losses of each method, the same on every x86-64 machine: `tests/losses/golden.py METHOD... [--write]`.

Exact numbers depend on the order of sums, which libraries choose by processor and by threads. Here both are
fixed: one thread, and the code paths that every x86-64 processor has. `--write` records the result as
tests/losses/METHOD_cpu.txt; a change that should not change results leaves that file as it is.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

PORTABLE = {  # read by libraries when they start, so set before the first import
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "FASTMIM_NATIVE": "0",  # the definitions, with or without a compiler
}
STEPS = 10


def losses(method_name: str) -> list[float]:
    import torch
    from fastmim_kernels import draw_uint32, sample_seeds

    from fastmim.engine.ranks import Ranks
    from fastmim.methods import METHODS
    from fastmim.models.mae_decoder import DecoderConfig
    from fastmim.optim import OptimConfig, torch_adamw
    from fastmim.optim.groups import parameter_groups
    from fastmim.optim.schedule import learning_rate
    from fastmim.recipes import METHOD_RECIPES
    from fastmim.views import Batch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    size = {"width": 64, "depth": 3, "heads": 2, "patch": 8, "image_size": (48, 64)}
    model = replace(METHOD_RECIPES[method_name]().model, **size)
    config = METHODS[method_name]()
    small = {
        "decoder": DecoderConfig(width=48, depth=2, heads=3), "hidden": 128, "out": 48, "bottleneck": 48,
        "mask_unit": 16, "local_size": 24, "codes": 64,
    }  # fmt: skip
    config = replace(config, **{name: size for name, size in small.items() if hasattr(config, name)})
    method = config.build(model)
    method.share(Ranks.single())
    groups = parameter_groups(method.named_parameters(), weight_decay=0.05, group=method.group)
    optimizer = torch_adamw(groups, OptimConfig())
    found = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak=1e-3, warmup_steps=3, total_steps=STEPS)
        ids = torch.arange(4) + 4 * step
        keys = sample_seeds(0, 0, ids)
        views = tuple(
            draw_uint32(keys, v.size[0] * v.size[1] * 3, 200 + i)
            .view(4, *v.size, 3)
            .bitwise_and(255)
            .to(torch.uint8)
            for i, v in enumerate(method.crops)
        )
        labels = ids % 3 if method.config.labeled else None
        loss = method(Batch(views, keys, ids, 0, labels)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for teacher, student in method.averages():
                m = method.momentum((step + 1) / STEPS)
                for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
                    t.copy_(m * t + (1 - m) * s)
        method.after_step((step + 1) / STEPS)
        found.append(loss.item())
    return found


def main() -> None:
    if any(os.environ.get(k) != v for k, v in PORTABLE.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | PORTABLE)
    for name in (argument for argument in sys.argv[1:] if argument != "--write"):
        text = "".join(f"{step} {loss!r}\n" for step, loss in enumerate(losses(name), start=1))
        if "--write" in sys.argv:
            Path(__file__).with_name(f"{name}_cpu.txt").write_text(text)
        print(name, text, sep="\n", flush=True)


if __name__ == "__main__":
    main()
