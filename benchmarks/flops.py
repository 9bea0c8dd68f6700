"""Reference FLOPs of one training step, per image: what MFU is always taken with.

They are facts of each method, `MethodConfig.work`, counted as fastmim/methods/work.py says.
"""

from fastmim.methods.base import MethodConfig
from fastmim.methods.work import Linear, Stack, Work
from fastmim.models.vit import ViTConfig

__all__ = ["Linear", "Stack", "Work", "step_flops", "work"]


def work(method: MethodConfig, model: ViTConfig) -> Work:
    """The reference work of one image."""
    return method.work(model)


def step_flops(method: MethodConfig, model: ViTConfig) -> int:
    """Reference FLOPs of one image, forward and backward."""
    return method.work(model).flops
