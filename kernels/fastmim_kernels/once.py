"""Ops that are differentiable once: their gradients say so where one asks for gradients of gradients."""

import torch


def differentiable_once(backward_op: torch.library.CustomOpDef) -> None:
    """To be called where the op that computes an op's gradients is registered."""
    name = backward_op._qualname.removesuffix("_backward")

    def refuse(ctx, *grads):
        raise ValueError(
            f"{name} has no second derivative (create_graph=True): fastmim_kernels.revert(model) first where "
            "apply put it in"
        )

    backward_op.register_autograd(refuse)
