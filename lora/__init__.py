"""lora: the layers. A frozen base (dense or 4-bit), small trainable matrices beside it, and PEFT's files for them."""

from quant.imports import check_kernels_import

check_kernels_import()

from .adapters import (  # noqa: E402  # after the check
    AdapterState,
    captured_adapters,
    delete_adapter,
    disabled_adapters,
    set_adapter,
    without_adapters,
)
from .attach import add_adapter, add_adapter_in_4bit, count_parameters, quantize_model, trainable_parameters  # noqa: E402
from .combine import combine_adapters  # noqa: E402
from .config import LoRAConfig  # noqa: E402
from .embedding import LoRAEmbedding  # noqa: E402
from .linear import LoRALinear  # noqa: E402
from .linear_nf4 import LinearNF4  # noqa: E402
from .merge import MergeReport, merge_adapter, unmerge_adapter  # noqa: E402
from .peft_format import load_adapter, load_adapters, save_adapter, save_adapters  # noqa: E402
from .saved_module import SavedModule  # noqa: E402

__all__ = [
    "AdapterState",
    "LinearNF4",
    "LoRAConfig",
    "LoRAEmbedding",
    "LoRALinear",
    "MergeReport",
    "SavedModule",
    "add_adapter",
    "add_adapter_in_4bit",
    "captured_adapters",
    "combine_adapters",
    "count_parameters",
    "delete_adapter",
    "disabled_adapters",
    "load_adapter",
    "load_adapters",
    "merge_adapter",
    "quantize_model",
    "save_adapter",
    "save_adapters",
    "set_adapter",
    "trainable_parameters",
    "unmerge_adapter",
    "without_adapters",
]
