"""Methods with labels that start from an encoder: what pre-training is worth. `TRANSFERS` lists them."""

from fastmim.methods.base import MethodConfig
from fastmim.methods.transfer.finetune import FinetuneConfig
from fastmim.methods.transfer.linear import LinearConfig

TRANSFERS: dict[str, type[MethodConfig]] = {
    "finetune": FinetuneConfig,  # He et al., arXiv:2111.06377, A.2
    "linear": LinearConfig,  # the same, A.1
}
