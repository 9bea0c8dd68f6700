"""Fine-tuning by timm, as facebookresearch/mae calls it: `python -m benchmarks.rivals.timm_finetune`.

timm's VisionTransformer, RandomErasing, Mixup and soft-target cross entropy, fp32 weights under autocast,
torch's fused AdamW. It gets the weights of our method; in evaluation its logits must be ours, on the CPU.
Both are timed on the same images, erased and mixed by each in its own way, in turns.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.engines import (
    AutocastEngine,
    Engine,
    demand,
    make_engine,
    repeated,
    synthetic,
    time_steps,
)
from benchmarks.provenance import append, environment, import_torchvision, module_exists
from benchmarks.rivals.race import Pixels, race
from benchmarks.step_rows import describe
from benchmarks.throughput import add_work, configured
from fastmim.engine.ranks import Ranks
from fastmim.methods.supervised import Supervised
from fastmim.optim import OptimConfig
from fastmim.views import Batch

TOLERANCE = 1e-4


class TimmFinetune(nn.Module):
    """`batch -> loss` of a timm model with the weights of ours."""

    def __init__(self, method: Supervised):
        super().__init__()
        from timm.data.mixup import Mixup
        from timm.data.random_erasing import RandomErasing
        from timm.loss import SoftTargetCrossEntropy
        from timm.models.vision_transformer import VisionTransformer

        c, m = method.config, method.model
        self.net = VisionTransformer(
            img_size=m.size, patch_size=m.patch, in_chans=m.channels, embed_dim=m.width, depth=m.depth,
            num_heads=m.heads, num_classes=c.classes, global_pool="avg", drop_path_rate=m.drop_path,
        )  # fmt: skip
        self.net.load_state_dict({n.removeprefix("encoder."): t for n, t in method.state_dict().items()})
        self.pixels = Pixels(m)
        self.erase = RandomErasing(c.erase, mode="pixel", device="cpu")
        self.mix = Mixup(c.mixup, c.cutmix, prob=1.0, label_smoothing=c.smoothing, num_classes=c.classes)
        self.loss = SoftTargetCrossEntropy()

    def forward(self, batch: Batch) -> Tensor:
        assert batch.labels_B is not None
        x_BCHW = self.pixels(batch.crops[0])
        self.erase.device = x_BCHW.device
        x_BCHW, target_BK = self.mix(self.erase(x_BCHW), batch.labels_B)
        return self.loss(self.net(x_BCHW), target_BK)


def check_logits(rival: TimmFinetune, method: Supervised, batch: Batch) -> float:
    """How far apart logits of the same weights are, in evaluation on the CPU. WrongLoss if too far."""
    method.eval(), rival.eval()
    with torch.no_grad():
        theirs = rival.net(rival.pixels(batch.crops[0]))
        error = float((method.logits(batch.crops[0]) - theirs).abs().max() / theirs.abs().max())
    demand("logits of timm's model", error, TOLERANCE)
    method.train(), rival.train()
    return error


def main(command: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="fine-tuning by timm against ours")
    add_work(parser)
    a = parser.parse_args(command)
    if not module_exists("timm"):
        print("skipped: timm is not installed")
        return 3
    if module_exists("torchvision"):
        import_torchvision()
    env = environment()
    torch.manual_seed(0)
    config, model = configured(a, "supervised")
    method: Any = config.build(model)
    nn.init.normal_(method.head.weight, std=0.02)  # of logits that are all 0 nothing could be said
    method.share(Ranks.single())
    rival = TimmFinetune(method)
    error = check_logits(rival, method, synthetic(method, model.channels, 8, "cpu"))
    batch = synthetic(method, model.channels, a.batch)
    engines: dict[str, Engine] = {"timm": AutocastEngine(rival, a.precision, OptimConfig())}
    ours = make_engine(method, config, model, a)
    engines[ours.name] = ours
    for engine in engines.values():
        time_steps(engine, repeated(batch), a.warmup)
    head = describe(config, model, a) | {"batch": a.batch, "race": "timm fine-tuning", "logits_error": error}
    figures = race(engines, batch, a)
    for provider, one in figures.items():
        append(a.results / "rivals.jsonl", head | {"provider": provider} | one | env)
        print(f"{provider:>10}  {one['images_per_s']:.1f} images/s", flush=True)
    faster = figures[ours.name]["images_per_s"] / figures["timm"]["images_per_s"]
    print(f"ours over timm's {faster:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
