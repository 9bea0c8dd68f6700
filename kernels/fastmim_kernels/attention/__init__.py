"""Multi-head attention, dense or in segments, with a bias or queries of another length; back ends by choice.

The only door to xformers and its heirs. `fastmim_kernels.attention` names the function in the package above.
"""

from fastmim_kernels.attention.api import (
    Backend,
    attention,
    attention_choices,
    attention_reference,
    choose_attention,
    obstacles,
    obstacles_of_general,
    pin_attention_choices,
)

__all__ = [
    "Backend",
    "attention",
    "attention_choices",
    "attention_reference",
    "choose_attention",
    "obstacles",
    "obstacles_of_general",
    "pin_attention_choices",
]
