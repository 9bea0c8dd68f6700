"""One file per paper: T, f and M. `METHODS` is the list of what can be trained."""

from dataclasses import replace

from fastmim.methods.base import MethodConfig
from fastmim.methods.beit import BEiTConfig
from fastmim.methods.cae import CAEConfig
from fastmim.methods.cmae import CMAEConfig
from fastmim.methods.cmae_huang import CMAEHuangConfig
from fastmim.methods.data2vec import Data2VecConfig
from fastmim.methods.dino import DINOConfig
from fastmim.methods.ibot import IBOTConfig
from fastmim.methods.mae import MAEConfig
from fastmim.methods.mocov3 import MoCoV3Config
from fastmim.methods.rmae import RMAEConfig
from fastmim.methods.simmim import SimMIMConfig
from fastmim.methods.supervised import SupervisedConfig
from fastmim.models.vit import ViTConfig

METHODS: dict[str, type[MethodConfig]] = {
    "mae": MAEConfig,  # He et al., arXiv:2111.06377
    "rmae": RMAEConfig,  # Kong & Zhang, arXiv:2208.04164
    "cmae": CMAEConfig,  # Kong & Zhang, arXiv:2208.04164
    "cmae_huang": CMAEHuangConfig,  # Huang et al., arXiv:2207.13532
    "simmim": SimMIMConfig,  # Xie et al., arXiv:2111.09886
    "beit": BEiTConfig,  # Bao et al., arXiv:2106.08254
    "ibot": IBOTConfig,  # Zhou et al., arXiv:2111.07832
    "data2vec": Data2VecConfig,  # Baevski et al., arXiv:2202.03555
    "mocov3": MoCoV3Config,  # Chen et al., arXiv:2104.02057
    "dino": DINOConfig,  # Caron et al., arXiv:2104.14294
    "cae": CAEConfig,  # Chen et al., arXiv:2202.03026
    "supervised": SupervisedConfig,  # the tables' baseline, arXiv:2208.04164
}


def suited(name: str, model: ViTConfig) -> tuple[MethodConfig, ViTConfig]:
    """A method as its paper has it for an encoder of this size and images of this size, and that encoder."""
    model = replace(model, **METHODS[name].encoder)
    return METHODS[name]().for_image(model), model
