"""Merge an adapter into its base, and take it out again to the exact bits.

    W' = cast(W + s · B A)        W: the dense weight, or dequantize(q); the sum in fp32, one rounding at the end
    W' = cast(m ⊙ V / ‖V‖)        with DoRA, V = W + s · B A

Rounding to 4 bits is another matter than rounding to bf16. dequantize(q) lies on the 4-bit levels already, and updates
smaller than half a step leave it there: quantizing the sum gives q back, and the adapter is gone. Original weights lie
anywhere between the levels, so that such updates come through on the average, beside the rounding errors of W itself;
a dense base is merged into 4 bits with `quant_type`. `qlora merge` measures what either costs.

A merged layer is an ordinary linear layer, with the adapter's bias where it has one; an embedding stays an embedding,
and a module that was trained whole takes the place of the original, in its dtype. The layers that were replaced stay,
untouched, in the MergeReport: putting them back is exact, where subtracting s · BA from W' would not be. Drop the
report to free them.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import kernels
from quant import QuantizedTensor

from .adapters import AdapterLayer, adapter_layers, adapter_state, check_known, replace_module
from .config import LoRAConfig
from .dora import row_norms, row_scale
from .embedding import LoRAEmbedding
from .linear import base_weight
from .linear_nf4 import LinearNF4
from .saved_module import SavedModule
from .sites import HEAD


@dataclass(frozen=True)
class MergeReport:
    """What merging cost, layer by layer, and the layers that unmerge_adapter puts back."""

    adapter: str
    weight_error: dict[str, float]
    """By path: ‖W' - (W + s·BA)‖ / ‖s·BA‖, Frobenius, in float64. Near 1 where rounding took the adapter back."""
    adapter_size: dict[str, float]
    """By path: ‖s·BA‖."""
    originals: dict[str, AdapterLayer]
    config: LoRAConfig
    active: tuple[str, ...]
    """The adapters that were active before."""

    @property
    def total_error(self) -> float:
        """weight_error of all layers together, as if they were one matrix: ‖errors‖ / ‖s·BA‖."""
        sizes = [size or 1.0 for size in self.adapter_size.values()]  # of a zero adapter the error is absolute
        errors = [error * size for error, size in zip(self.weight_error.values(), sizes, strict=True)]
        return math.hypot(*errors) / (math.hypot(*self.adapter_size.values()) or 1.0)


def merge_adapter(
    model: nn.Module,
    name: str = "default",
    into: str = "dense",
    dtype: torch.dtype | None = None,
    *,
    quant_type: str | None = None,
    blocksize: int = 64,
    double_quant: bool = True,
) -> MergeReport:
    """Replace each layer of adapter `name` by one merged layer, in place; the model then has no adapter of that name.

    into: "dense" (nn.Linear, in `dtype`, by default the dtype of the dense or quantized weight) or "nf4" (quantized
    again as the base was). A dense base is merged into "nf4" only with a quant_type, nf4 or fp4, whose blocks are then
    of `blocksize`; the head stays dense. Raises ValueError without one, for an unknown adapter or `into`, when
    another adapter sits on the same layers, and when a merged weight is NaN or infinite. On an error the model is as it
    was.
    """
    state = adapter_state(model)
    check_known(state, name)
    if into not in ("dense", "nf4"):
        raise ValueError(f"into must be 'dense' or 'nf4', got {into!r}")
    layers = {path: layer for path, layer in adapter_layers(model).items() if name in layer.adapters}
    others = sorted({other for layer in layers.values() for other in layer.adapters} - {name})
    if others:
        raise ValueError(f"merging {name!r} would lose {others}, on the same layers: merge before adding another")
    form = {"quant_type": quant_type, "blocksize": blocksize, "double_quant": double_quant}
    merged = {path: _merged(path, layer, name, into, dtype, form) for path, layer in layers.items()}
    for path, (new, _, _) in merged.items():
        _check_finite(path, new)
    for path, (new, _, _) in merged.items():
        replace_module(model, path, new)
    errors = {path: error for path, (_, error, _) in merged.items()}
    sizes = {path: size for path, (_, _, size) in merged.items()}
    report = MergeReport(name, errors, sizes, layers, state.configs[name], state.active)
    del state.configs[name]
    state.active = tuple(active for active in state.active if active != name)
    return report


def unmerge_adapter(model: nn.Module, report: MergeReport) -> None:
    """Put back the layers that merge_adapter replaced: the same objects, the same bits, the same active adapters.

    Raises ValueError when a merged layer has got another adapter since.
    """
    for path in report.originals:
        if isinstance(model.get_submodule(path), AdapterLayer):
            raise ValueError(f"unmerging {report.adapter!r} would lose the adapters that {path} has got since")
    for path, layer in report.originals.items():
        replace_module(model, path, layer)
    state = adapter_state(model)
    state.configs[report.adapter] = report.config
    state.active = report.active


@torch.no_grad()
def _merged(
    path: str, layer: AdapterLayer, name: str, into: str, dtype: torch.dtype | None, form: dict[str, Any]
) -> tuple[nn.Module, float, float]:
    """(the merged layer, its relative error, the size of the adapter there)."""
    if isinstance(layer, SavedModule):
        return _merged_whole(layer, name, dtype)
    if isinstance(layer, LoRAEmbedding):
        return _merged_embedding(layer, name, dtype)
    base = base_weight(layer.base_layer)
    exact = _dense(base)
    delta = torch.zeros_like(exact)
    if name in layer.lora_A:
        delta = layer.scaling[name] * (layer.lora_B[name].float() @ layer.lora_A[name].float())
    exact = exact + delta
    if name in layer.lora_magnitude_vector:
        scaled = row_scale(layer.lora_magnitude_vector[name], row_norms(exact))[:, None] * exact
        delta, exact = delta + (scaled - exact), scaled
    bias = layer.base_layer.bias
    if name in layer.trained_bias:
        bias = layer.trained_bias[name].to(layer.base_layer.bias.dtype)  # type: ignore[union-attr]
    stays_dense = isinstance(base, Tensor) and path.rsplit(".", 1)[-1] == HEAD and form["quant_type"]
    if into == "nf4" and not stays_dense:
        if isinstance(base, QuantizedTensor) and name not in layer.lora_A:
            return LinearNF4(base, bias), 0.0, 0.0  # its bias alone was trained
        if isinstance(base, QuantizedTensor):
            form = {"quant_type": base.quant_type, "blocksize": base.blocksize, "double_quant": base.double_quant}
        elif form["quant_type"] is None:
            raise ValueError(
                f"into='nf4' needs a 4-bit base, and {path} is dense: quantize the model first, or merge into 'dense'"
            )
        q = kernels.quantize(exact.to(base.dtype), **form)
        return LinearNF4(q, bias), *_error_and_size(kernels.dequantize(q), exact, delta)
    merged = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None, device="meta")
    merged.weight = nn.Parameter(exact.to(dtype or base.dtype), requires_grad=False)
    if bias is not None:
        merged.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return merged, *_error_and_size(merged.weight, exact, delta)


def _merged_embedding(layer: LoRAEmbedding, name: str, dtype: torch.dtype | None) -> tuple[nn.Module, float, float]:
    base = layer.base_layer
    A, B = layer.lora_embedding_A[name].float(), layer.lora_embedding_B[name].float()
    delta = layer.scaling[name] * (B @ A).T
    exact = base.weight.float() + delta
    merged = nn.Embedding(exact.shape[0], exact.shape[1], padding_idx=base.padding_idx, device="meta")
    merged.weight = nn.Parameter(exact.to(dtype or base.weight.dtype), requires_grad=False)
    return merged, *_error_and_size(merged.weight, exact, delta)


def _merged_whole(layer: SavedModule, name: str, dtype: torch.dtype | None) -> tuple[nn.Module, float, float]:
    merged = copy.deepcopy(layer.modules_to_save[name]).requires_grad_(False)
    before = dict(layer.original_module.named_parameters())
    trained, rounded, change = [], [], []
    for key, parameter in merged.named_parameters():
        trained.append(parameter.flatten())
        change.append(parameter.flatten() - before[key].to(parameter.dtype).flatten())
        parameter.data = parameter.to(dtype or before[key].dtype)
        rounded.append(parameter.flatten().to(trained[-1].dtype))
    return merged, *_error_and_size(torch.cat(rounded), torch.cat(trained), torch.cat(change))


def _check_finite(path: str, merged: nn.Module) -> None:
    for parameter in merged.parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise ValueError(f"merging {path} gives NaN or infinity in {str(parameter.dtype).removeprefix('torch.')}")


def _dense(base: Tensor | QuantizedTensor) -> Tensor:
    return kernels.dequantize(base, torch.float32) if isinstance(base, QuantizedTensor) else base.float()


def _error_and_size(weight: Tensor, exact: Tensor, delta: Tensor) -> tuple[float, float]:
    size = float(delta.double().norm())
    error = float((weight.double() - exact.double()).norm())
    return error / size if size else error, size
