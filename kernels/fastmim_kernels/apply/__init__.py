"""The fused ops inside a live ViT of timm, of transformers or of the MAE layout: `apply` and `revert`.

`fastmim_kernels.apply` names the function; modules are reached by `from fastmim_kernels.apply import timm`.
"""

from fastmim_kernels.apply.api import apply, revert

__all__ = ["apply", "revert"]
