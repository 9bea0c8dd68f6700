"""Images in, uint8 views out: sources, sample order, crops, decoders, the loader. Knows no method."""

from fastmim.data.config import DataConfig
from fastmim.data.decoder import check_decoder, why_no_dali
from fastmim.data.loader import BadImages, Loader
from fastmim.data.memory import MemoryImages
from fastmim.data.order import SampleOrder
from fastmim.data.source import Images, find_images

__all__ = [
    "BadImages",
    "DataConfig",
    "Images",
    "Loader",
    "MemoryImages",
    "SampleOrder",
    "check_decoder",
    "find_images",
    "why_no_dali",
]
