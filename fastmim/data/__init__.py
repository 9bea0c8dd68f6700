"""Images in, uint8 crops out: sources, sample order, crops, decoders, the loader. Knows no method."""

from fastmim.data.config import DataConfig
from fastmim.data.decode.choose import check_decoder, why_no_dali
from fastmim.data.feed.bad import BadImages
from fastmim.data.feed.loader import Loader, labels_of, open_loader
from fastmim.data.feed.order import SampleOrder
from fastmim.data.feed.sizes import Sizes, look_at_sizes
from fastmim.data.sources.memory import MemoryImages
from fastmim.data.sources.source import Images, find_images
from fastmim.data.sources.subset import subset

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
    "labels_of",
    "look_at_sizes",
    "open_loader",
    "subset",
    "why_no_dali",
]
