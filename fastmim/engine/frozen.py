"""Frozen modules of a method, as a tokenizer: are their files there, what is in them, where they work."""

import hashlib
from typing import Any

import torch

from fastmim.methods.base import Method, MethodConfig


def check_files(config: MethodConfig) -> None:
    """ValueError for a file of a frozen module that is not there."""
    for flag, path in config.files().items():
        if not path.exists():
            raise ValueError(f"method.{flag}: want {config.file_words}, got nothing at {path}")


def facts_of_frozen(method: Method) -> dict[str, Any]:
    """The SHA-256 of each frozen module's weights, wherever the file lies; nothing without any."""
    digests = {}
    for name, module in method.frozen.items():
        digest = hashlib.sha256()
        for key, tensor in module.state_dict().items():
            digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        digests[name] = digest.hexdigest()[:16]
    return {"frozen": digests} if digests else {}


def place_frozen(method: Method, device: torch.device) -> None:
    """Put frozen modules where the method works. DeepSpeed never sees them: they stay as they were made."""
    for module in method.frozen.values():
        module.requires_grad_(False).eval().to(device)
