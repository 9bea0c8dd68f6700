"""Images in, uint8 views out: sources, sample order, crops, decoders, the loader. Knows no method."""

from fastmim.data.config import DataConfig
from fastmim.data.loader import Loader
from fastmim.data.order import SampleOrder
from fastmim.data.source import Images, find_images

__all__ = ["DataConfig", "Images", "Loader", "SampleOrder", "find_images"]
