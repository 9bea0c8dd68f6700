"""Models laid out as facebookresearch/mae: one class with forward_encoder, forward_decoder and forward_loss.

Their code was copied far and changed often, so its name says nothing. One with all its parts is tried:
each of the three methods runs on two random images, its own code and the patched one from one seed, in
eval mode and without gradients; where they do not agree the method is left.

Source  the layout of models_mae.py in facebookresearch/mae: names of modules and methods, no code.
Limits  square patches; a model with hooks is left, since the trial would fire them; so is one on the meta
        device. An image that wants a gradient goes the class's own way.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastmim_kernels.apply.masking import masked, pixel_loss, restored
from fastmim_kernels.apply.swap import (
    FLOATS,
    Finding,
    Swapped,
    arguments,
    demand_plain,
    hooked,
    strange_dtype,
)
from fastmim_kernels.apply.trial import rehearsal

PARTS = (
    "patch_embed", "cls_token", "pos_embed", "blocks", "norm", "decoder_embed", "mask_token",
    "decoder_pos_embed", "decoder_blocks", "decoder_norm", "decoder_pred", "norm_pix_loss", "random_masking",
)  # fmt: skip
RATIO, AGREE = 0.75, {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 1e-2}  # of the largest value


class FusedEncoder(Swapped):
    def forward_encoder(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        demand_plain(x)
        tokens = self.patch_embed(x)
        noise = torch.rand(tokens.shape[:2], device=tokens.device)
        z, mask, restore = masked(tokens, self.pos_embed, self.cls_token, noise, mask_ratio)
        for block in self.blocks:
            z = block(z)
        return self.norm(z), mask, restore


class FusedDecoder(Swapped):
    def forward_decoder(self, x: Tensor, ids_restore: Tensor) -> Tensor:
        demand_plain(x)
        y = restored(self.decoder_embed(x), ids_restore, self.mask_token, self.decoder_pos_embed)
        for block in self.decoder_blocks:
            y = block(y)
        return self.decoder_pred(self.decoder_norm(y))[:, 1:]


class FusedLoss(Swapped):
    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        demand_plain(imgs)
        if imgs.requires_grad:
            return super().forward_loss(imgs, pred, mask)
        return pixel_loss(imgs, pred, mask, self.patch_embed.patch_size[0], self.norm_pix_loss)


METHODS: dict[str, tuple[type, str, tuple[str, ...]]] = {  # mixin, op, arguments
    "forward_encoder": (FusedEncoder, "gather_tokens", ("x", "mask_ratio")),
    "forward_decoder": (FusedDecoder, "restore_tokens", ("x", "ids_restore")),
    "forward_loss": (FusedLoss, "norm_pix_loss_image", ("imgs", "pred", "mask")),
}


def find_mae_layout(name: str, module: nn.Module) -> list[Finding]:
    if not all(hasattr(module, part) for part in (*PARTS, *METHODS)):
        return []
    obstacle = unfit(module)
    disagree = {} if obstacle else trial(module)
    findings = []
    for method, (mixin, op, _) in METHODS.items():
        why = obstacle or disagree.get(method)
        swaps = () if why else ((module, mixin),)
        findings.append(Finding(f"{name}.{method}".lstrip("."), type(module).__name__, op, swaps, why))
    return findings


def unfit(module: Any) -> str | None:
    """Why it cannot be tried."""
    replaced = [method for method in METHODS if method in vars(module)]
    other = [m for m, (_, _, takes) in METHODS.items() if not replaced and arguments(module, m) != takes]
    patch = module.patch_embed
    if replaced or other:
        return f"its {', '.join(replaced or other)} is replaced or takes other arguments"
    if not all(hasattr(patch, part) for part in ("proj", "img_size", "patch_size")):
        return f"its patch embedding is a {type(patch).__name__} without proj, img_size or patch_size"
    if len({*patch.patch_size}) != 1:
        return f"want square patches, got {patch.patch_size}"
    if any(hooked(m) for m in module.modules()):
        return "it has hooks, and trying it on two images would fire them"
    if any(p.is_meta for p in module.parameters()):
        return "it is on the meta device and cannot be tried"
    return strange_dtype(module)


def trial(module: Any) -> dict[str, str]:
    """Of each method that does not do what its patch would do: what differs. Leaves no trace."""
    weight, training = module.patch_embed.proj.weight, [m for m in module.modules() if m.training]
    module.eval()
    try:
        with rehearsal(weight.device) as seed, torch.no_grad():
            seed(0)
            size = 2, weight.shape[1], *module.patch_embed.img_size
            images = torch.rand(size, device=weight.device).to(weight.dtype)
            found: dict[str, str] = {}
            z, mask, restore = (
                _compare(module, "forward_encoder", (images, RATIO), found, seed) or (None,) * 3
            )
            if z is not None:
                pred = _compare(module, "forward_decoder", (z, restore), found, seed)
                if pred is not None:
                    _compare(module, "forward_loss", (images, pred, mask), found, seed)
            for method in METHODS:
                if z is None or (method == "forward_loss" and pred is None):
                    found.setdefault(method, "what comes before it could not be run")
            return found
    finally:
        for m in training:
            m.training = True


def _compare(module: Any, method: str, given: tuple, found: dict[str, str], seed: Callable) -> Any:
    """What its own method returns; a note in `found` where the patched one returns something else."""
    own: Callable = getattr(module, method)
    try:
        seed(1)
        expected = own(*given)
    except Exception as error:  # anything may be wrong with a method that is not what its name says
        found[method] = f"its own code does not run on two images: {error}"
        return None
    try:
        seed(1)
        actual = getattr(METHODS[method][0], method)(module, *given)
        pairs = zip(*((out,) if isinstance(out, Tensor) else out for out in (actual, expected)), strict=True)
        agree = all(_agree(a, e) for a, e in pairs)
    except (ValueError, RuntimeError) as error:
        found[method] = f"the patched code does not run on its tensors: {error}"
        return expected
    if not agree:
        found[method] = "on two images it does something else than MAE's"
    return expected


def _agree(actual: Tensor, expected: Tensor) -> bool:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    if actual.dtype not in FLOATS:
        return torch.equal(actual, expected)
    error = (actual.float() - expected.float()).abs().max()
    return bool(error <= AGREE[actual.dtype] * expected.float().abs().max())
