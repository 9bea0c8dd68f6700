"""Tokenizers: what BEiT and CAE predict. Trained by methods/tokenizers.py, frozen where they serve."""

from fastmim.models.tokenizers.base import Tokenizer, TokenizerConfig
from fastmim.models.tokenizers.files import TOKENIZERS, load_tokenizer
from fastmim.models.tokenizers.patches import RandomConfig

__all__ = ["TOKENIZERS", "RandomConfig", "Tokenizer", "TokenizerConfig", "load_tokenizer"]
