"""Tokenizers in files: those that were trained here, and the released weights of DALL-E by their keys.

Ours     tokenizer.safetensors of a run of `fastmim tokenizer train`; what it is stands in its metadata.
DALL-E   a dictionary of the encoder's weights, `blocks.input.w` ..., as safetensors or as torch.save writes
         it. The file that was released holds pickled modules, whose code would be run: save its state_dict.
"""

import ast
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from fastmim.models.tokenizers.base import Tokenizer, TokenizerConfig, values_of
from fastmim.models.tokenizers.dalle import GROUPS, DALLEConfig
from fastmim.models.tokenizers.dvae import DVAEConfig
from fastmim.models.tokenizers.patches import KMeansConfig
from fastmim.models.tokenizers.vq import VQConfig

TOKENIZERS: dict[str, type[TokenizerConfig]] = {
    "dvae": DVAEConfig,
    "dvae_large": DALLEConfig,
    "vq": VQConfig,
    "kmeans": KMeansConfig,
}
NAME = "tokenizer.safetensors"
FIRST = "blocks.input.w"  # of DALL-E's encoder


def metadata_of(config: TokenizerConfig) -> dict[str, str]:
    """What a file says of the tokenizer in it."""
    return {"format": "pt", "tokenizer": config.kind} | {k: str(v) for k, v in values_of(config).items()}


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in tokenizer.state_dict().items()}
    save_file(tensors, path, metadata=metadata_of(tokenizer.config))


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a run directory or a file, frozen, on the CPU. ValueError for what is none."""
    from safetensors import safe_open  # benchmarks without files go without it

    file = path / NAME if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"tokenizer: want a run of `fastmim tokenizer train` or a file, got nothing at {file}"
        )
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        else:
            metadata, tensors = {}, torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(
            f"tokenizer: {file} cannot be read as weights; of pickled modules save the state_dict: {why}"
        ) from None
    if "tokenizer" in metadata:
        tokenizer = ours(metadata, file)
    elif isinstance(tensors, dict) and any(FIRST in name for name in tensors):
        tokenizer, tensors = dalle(tensors, file)
    else:
        raise ValueError(
            f"tokenizer: want {NAME} of a run, or the keys of DALL-E's encoder, got neither in {file}"
        )
    try:
        tokenizer.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"tokenizer: {file}: {' '.join(str(error).split())[:300]}") from None
    return tokenizer.requires_grad_(False).eval()


def ours(metadata: dict[str, str], file: Path) -> Tokenizer:
    kind = metadata["tokenizer"]
    if kind not in TOKENIZERS:
        raise ValueError(f"tokenizer: want one of {', '.join(TOKENIZERS)}, got {kind!r} in {file}")
    config = TOKENIZERS[kind]
    try:
        values = {field.name: ast.literal_eval(metadata[field.name]) for field in fields(config)}
    except (KeyError, ValueError, SyntaxError):
        raise ValueError(f"tokenizer: {file} does not say all that a {kind} is: {metadata}") from None
    return config(**values).build()


def dalle(tensors: dict[str, Tensor], file: Path) -> tuple[Tokenizer, dict[str, Tensor]]:
    """DALL-E's tokenizer of the sizes that the keys have. Without a decoder it draws no pictures."""
    if FIRST in tensors:
        tensors = {f"encoder.{name}": tensor for name, tensor in tensors.items()}
    out = tensors.get("encoder.blocks.output.conv.w")
    blocks = sum(name.startswith("encoder.blocks.group_1.") and name.endswith("conv_1.w") for name in tensors)
    if out is None or not blocks:
        raise ValueError(f"tokenizer: {file} has only some of the keys of DALL-E's encoder")
    first = tensors.get("decoder.blocks.input.w")
    config = DALLEConfig(
        codes=len(out), hidden=out.shape[1] // GROUPS[-1], blocks_per_group=blocks,
        first_width=128 if first is None else len(first),
    )  # fmt: skip
    tokenizer = config.build()
    if first is None:
        own = {name: t for name, t in tokenizer.state_dict().items() if name.startswith("decoder.")}
        tensors, tokenizer.draws = own | tensors, False
    return tokenizer, tensors
