"""Fused ops of fastmim: one module per op; what is exported here is the public surface.

A function hides the module of the same name: `from fastmim_kernels.norm_pix_loss import ...` reaches inside.
"""

from fastmim_kernels import inductor
from fastmim_kernels.add_layer_norm import add_layer_norm
from fastmim_kernels.apply import apply, revert
from fastmim_kernels.attention import attention
from fastmim_kernels.bias_gelu import bias_gelu
from fastmim_kernels.block_masks import block_mask, grid_mask, ibot_targets, uniform_mask
from fastmim_kernels.code_loss import code_loss
from fastmim_kernels.color_blur import color_blur
from fastmim_kernels.color_jitter import color_jitter
from fastmim_kernels.debug import set_debug
from fastmim_kernels.ema_update import ema_update
from fastmim_kernels.gather_patches import gather_patches
from fastmim_kernels.gather_tokens import gather_tokens
from fastmim_kernels.info_nce import info_nce
from fastmim_kernels.norm_pix_loss import norm_pix_loss
from fastmim_kernels.norm_pix_loss_image import norm_pix_loss_image
from fastmim_kernels.philox import draw_uint32, draw_uniform, sample_seeds
from fastmim_kernels.resized_crop import resized_crop
from fastmim_kernels.restore_tokens import restore_tokens
from fastmim_kernels.split_patches import (
    num_hidden,
    num_seen,
    split_mask,
    split_patches,
    split_patches_grouped,
)

inductor.install()

__all__ = [
    "add_layer_norm",
    "apply",
    "attention",
    "bias_gelu",
    "block_mask",
    "code_loss",
    "color_blur",
    "color_jitter",
    "draw_uint32",
    "draw_uniform",
    "ema_update",
    "gather_patches",
    "gather_tokens",
    "grid_mask",
    "ibot_targets",
    "info_nce",
    "norm_pix_loss",
    "norm_pix_loss_image",
    "num_hidden",
    "num_seen",
    "resized_crop",
    "restore_tokens",
    "revert",
    "sample_seeds",
    "set_debug",
    "split_mask",
    "split_patches",
    "split_patches_grouped",
    "uniform_mask",
]
