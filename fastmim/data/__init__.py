"""Images in, uint8 crops out: sources, sample order, crops, decoders, the loader. Knows no method."""

from fastmim.data.bad import BadImages
from fastmim.data.config import DataConfig
from fastmim.data.decoder import check_decoder, why_no_dali
from fastmim.data.loader import Loader
from fastmim.data.memory import MemoryImages
from fastmim.data.order import SampleOrder
from fastmim.data.sizes import Sizes, look_at_sizes
from fastmim.data.source import Images, find_images

__all__ = [
    "BadImages",
    "DataConfig",
    "Images",
    "Loader",
    "MemoryImages",
    "SampleOrder",
    "Sizes",
    "check_decoder",
    "find_images",
    "look_at_sizes",
    "why_no_dali",
]
