"""PagedAdamW: AdamW whose state lies in pages, of which only a budget's worth is in fast memory.

A step walks the pages in order. For the elements whose state a page holds it does

    p ← p · (1 - lr·λ),   m ← β₁·m + (1-β₁)·g,   v ← β₂·v + (1-β₂)·g²,   p ← p - lr · m̂ / (√v̂ + ε)

(kernels/adamw.py, where t, m̂ and v̂ are), while the next page is on its way (pages.py). Where the slow tier is a file
and C does the step, the processors take a page each instead (kernels/adamw_pages.py). The numbers do not depend on
budget, page size or prefetch: each element's update reads that element alone (with 8 bits, its block of 256, which lies
in one page). With 32 bits they are torch.optim.AdamW's: to the bit on the reference backend on a CPU.

Done otherwise than torch: the state of a bf16 or fp16 parameter is fp32. QLoRA (arXiv 2305.14314, §3) leaves the
paging to NVIDIA's unified memory; here it is this code, and can be seen.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.adamw import AdamWStep, adamw, adamw_8bit
from kernels.adamw_pages import PageSpan, adamw_pages, serves_pages

from .layout import Item, Page, Span, lay_out, values_of
from .pages import AHEAD, PageTable
from .state_8bit import STATE_BITS, is_8bit, state_fields
from .state_file import StateFile, write_state_file
from .transport import FolderTransport, HostTransport, Transport, free_bytes

PAGE_BYTES = 2 * 2**20  # of larger ones less stays in a processor's cache; of smaller ones each costs Python its time
EVERYTHING = 2**62  # bytes: more than there are
STATE_FILE = "optimizer.safetensors"
NOT_HERE = ("amsgrad", "maximize", "differentiable")  # torch's options that change the update


class PagedAdamW(torch.optim.Optimizer):
    """AdamW over contiguous dense parameters of one device.

    state_bits: 32, or 8 for parameters of at least 4096 elements. device_budget: bytes of state in fast memory, "auto"
    for half of what is free at the first step, None for all of it; never less than one page and the next. spill: where
    the rest goes, "cpu" or a folder; for CPU parameters only a folder frees memory. transport: a slow tier of your own
    instead. Raises ValueError for a value out of range; OSError, at the first step, when the folder cannot take the
    pages.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        state_bits: int = 32,
        device_budget: int | str | None = None,
        page_bytes: int = PAGE_BYTES,
        spill: str | Path = "cpu",
        prefetch: bool = True,
        transport: Transport | None = None,
    ) -> None:
        _require(state_bits in STATE_BITS, f"state_bits must be 32 or 8, got {state_bits}")
        counted = isinstance(device_budget, int) and device_budget >= 0
        _require(
            counted or device_budget in ("auto", None),
            f"device_budget must be bytes, 'auto' or None: {device_budget!r}",
        )
        self.state_bits, self.device_budget, self.page_bytes = state_bits, device_budget, page_bytes
        self.spill, self.prefetch, self.transport = spill, prefetch, transport
        self.table: PageTable | None = None
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Before the first step only. Raises ValueError for what cannot be paged, or a hyperparameter out of range."""
        _require(self.table is None, "a parameter group must be added before the first step")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name, holds in (
            ("lr", group["lr"] >= 0),
            ("eps", group["eps"] >= 0),
            ("betas", all(0 <= beta < 1 for beta in group["betas"])),
            ("weight_decay", group["weight_decay"] >= 0),
        ):
            _require(holds, f"{name} is out of range: {group[name]}")
        self.parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self.group_of = [group for group in self.param_groups for _ in group["params"]]
        self.steps = [0] * len(self.parameters)
        for number, parameter in enumerate(self.parameters):
            _require(parameter.is_contiguous(), f"parameter {number} {tuple(parameter.shape)} must be contiguous")
            _require(parameter.is_floating_point(), f"parameter {number} must be real, got {parameter.dtype}")
            same = parameter.device == self.parameters[0].device
            _require(same, f"all parameters must be on one device, {number} is on {parameter.device}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Raises OSError when the slow tier fails: pages that were walked before are updated, the others are not.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        table = self._paged()
        with_gradient = {i for i, parameter in enumerate(self.parameters) if parameter.grad is not None}
        for i in with_gradient:
            self._check_gradient(i)
        for i in with_gradient:
            self.steps[i] += 1
        folder = table.transport if table.ahead and table.n_frames < len(self.pages) else None
        if isinstance(folder, FolderTransport) and serves_pages(self.parameters):
            self._update_in_one_call(folder, with_gradient)
            return loss
        threads = max(1, torch.get_num_threads() - table.movers)  # one too many would wait, spinning, for a core
        for span, state in self._walk(with_gradient):
            self._update(span, state, threads)
        return loss

    def _update_in_one_call(self, folder: FolderTransport, with_gradient: set[int]) -> None:
        """One AdamW step on all pages, by threads that bring a page, work on it and take it away."""
        table = self._paged()
        visits = table.visits(self._pages_of(with_gradient))
        step = {i: self._step_of(i) for i in with_gradient}
        flat = {i: (self.parameters[i].detach().view(-1), self._gradient(i)) for i in with_gradient}
        spans = [
            [
                PageSpan(*flat[span.item], span.start, span.stop, span.offsets, step[span.item])
                for span in self.pages[visit.page].spans
                if span.item in with_gradient
            ]
            for visit in visits
        ]
        error = adamw_pages(visits, spans, folder.descriptor(), table.free[: max(2, torch.get_num_threads())])
        table.visited(visits)
        if error:
            raise folder.failure(error)

    def _update(self, span: Span, state: list[Tensor], threads: int) -> None:
        """One AdamW step on the elements of a span, on the threads that move no pages."""
        p = self.parameters[span.item].detach().view(-1)[span.start : span.stop]
        g = self._gradient(span.item)[span.start : span.stop]
        numbers = self._step_of(span.item, threads)
        if is_8bit(self.items[span.item].fields):
            exp_avg, absmax, exp_avg_sq, absmax_sq = state
            adamw_8bit(p, g, exp_avg, absmax, exp_avg_sq, absmax_sq, numbers)
        else:
            exp_avg, exp_avg_sq = state
            adamw(p, g, exp_avg, exp_avg_sq, numbers)

    def _step_of(self, i: int, threads: int | None = None) -> AdamWStep:
        group = self.group_of[i]
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        return AdamWStep(lr, beta1, beta2, group["eps"], group["weight_decay"], self.steps[i], threads)

    def _gradient(self, i: int) -> Tensor:
        """(numel,), contiguous."""
        gradient = self.parameters[i].grad
        assert gradient is not None
        return gradient.detach().reshape(-1)

    def _check_gradient(self, i: int) -> None:
        gradient = self.parameters[i].grad
        sparse = gradient is not None and gradient.is_sparse
        _require(not sparse, f"parameter {i} has a sparse gradient: AdamW needs a dense one")

    def _walk(self, items: set[int], *, write: bool = True) -> Iterator[tuple[Span, list[Tensor]]]:
        """Every span of these parameters, in the order of the pages, with the values of its fields."""
        table = self._paged()
        for number, frame in table.walk(self._pages_of(items), write=write):
            for span in self.pages[number].spans:
                if span.item in items:
                    yield span, values_of(frame, span, self.items[span.item])

    def _pages_of(self, items: set[int]) -> list[int]:
        return [n for n, page in enumerate(self.pages) if any(span.item in items for span in page.spans)]

    def _paged(self) -> PageTable:
        """The page table, made when it is first needed: "auto" should know what is left beside the gradients."""
        if self.table is None:
            self.items = [Item(p.numel(), state_fields(p, self.state_bits)) for p in self.parameters]
            device = self.parameters[0].device
            budget = free_bytes(device) // 2 if self.device_budget == "auto" else self.device_budget
            self.pages: list[Page] = lay_out(self.items, self.page_bytes)
            if budget is None or int(budget) >= len(self.pages) * self.page_bytes:
                self.pages = lay_out(self.items, EVERYTHING)  # nothing will move: one page, a call for each parameter
            used = [page.used for page in self.pages]
            page_bytes = sum(used) if len(used) == 1 else self.page_bytes
            transport = self.transport or self._transport(device)
            ahead = AHEAD if self.prefetch else 0
            budget = sum(used) if budget is None else int(budget)
            self.table = PageTable(used, page_bytes, transport, budget=budget, ahead=ahead)
            if (
                self.transport is None
                and self.spill == "cpu"
                and device.type == "cpu"
                and self.table.n_frames < len(used)
            ):
                logging.getLogger("qlora").warning(
                    "the optimizer's pages are spilled from CPU memory to CPU memory: this frees nothing; name a folder"
                )
        return self.table

    def _transport(self, device: torch.device) -> Transport:
        return HostTransport(device) if self.spill == "cpu" else FolderTransport(self.spill, device)

    @property
    def stats(self) -> dict[str, Any]:
        """resident_bytes, spilled_bytes, hits, misses, page_ins, page_outs, bytes_in, bytes_out, wait_seconds."""
        return self._paged().counters()

    def close(self) -> None:
        """Give the state's memory back, in both tiers. The optimizer cannot be used after it."""
        if self.table is not None:
            self.table.close()

    def state_dict(self) -> dict[str, Any]:
        """All of the state in memory, as torch.optim.AdamW has it (8-bit fields: see state_8bit.py)."""
        packed = super().state_dict()
        stepped = {i for i, steps in enumerate(self.steps) if steps}
        state = packed["state"] = {i: self._empty_state(i) for i in sorted(stepped)}
        for span, values in self._walk(stepped, write=False):
            for target, value in zip(self._span_of(state[span.item], span), values, strict=True):
                target.copy_(value)
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What state_dict of this class, or of torch.optim.AdamW (32 bits), gave. The state is paged as before.

        Raises ValueError, naming parameter and field, for state of another shape, or options that are not here.
        """
        for name in NOT_HERE:
            used = any(group.get(name) for group in state_dict["param_groups"])
            _require(not used, f"the state was made with {name}, which PagedAdamW does not have")
        self._paged()
        for i, fields in state_dict["state"].items():
            _require(0 <= i < len(self.parameters), f"there is state for parameter {i} of {len(self.parameters)}")
            for wanted in (*self._empty_shapes(i), ("step", None, ())):
                self._check_field(i, fields.get(wanted[0]), *wanted)
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self.group_of = [group for group in self.param_groups for _ in group["params"]]
        state = state_dict["state"]
        self.steps = [int(state[i]["step"]) if i in state else 0 for i in range(len(self.parameters))]
        for span, values in self._walk(set(state)):
            for value, source in zip(values, self._span_of(state[span.item], span), strict=True):
                value.copy_(source)

    def save_state(self, folder: str | Path, names: Sequence[str] | None = None) -> None:
        """Write folder/optimizer.safetensors page by page. names: of the parameters, by default their numbers."""
        names = self._names(names)
        stepped = [i for i, steps in enumerate(self.steps) if steps]
        tensors = {
            f"{names[i]}.{name}": (dtype, shape) for i in stepped for name, dtype, shape in self._empty_shapes(i)
        }
        steps = {f"{names[i]}.step": (torch.float32, ()) for i in stepped}
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        metadata = {"param_groups": json.dumps(groups), "state_bits": str(self.state_bits)}
        Path(folder).mkdir(parents=True, exist_ok=True)
        with write_state_file(Path(folder) / STATE_FILE, tensors | steps, metadata) as file:
            for i in stepped:
                file.write(f"{names[i]}.step", 0, torch.tensor([self.steps[i]], dtype=torch.float32))
            for span, values in self._walk(set(stepped), write=False):
                for field, value in zip(self.items[span.item].fields, values, strict=True):
                    file.write(f"{names[span.item]}.{field.name}", span.start // field.per, value)

    def load_state(self, folder: str | Path, names: Sequence[str] | None = None) -> None:
        """Read what save_state wrote, page by page. Rates and other options of the groups stay as they are here.

        Raises ValueError, naming the file and the tensor, when it is corrupt or of other parameters.
        """
        names, path = self._names(names), Path(folder) / STATE_FILE
        self._paged()
        with StateFile(path) as file:
            known = {f"{names[i]}.{name}": i for i in range(len(names)) for name, _, _ in self._empty_shapes(i)}
            known |= {f"{name}.step": i for i, name in enumerate(names)}
            foreign = sorted(set(file.tensors) - set(known))
            _require(not foreign, f"{path} holds {(foreign or [''])[0]}, which is no state of the parameters here")
            found = {known[key] for key in file.tensors}
            for i in found:
                for name, dtype, shape in (*self._empty_shapes(i), ("step", torch.float32, ())):
                    file.check(f"{names[i]}.{name}", dtype, shape)
            steps = {i: file.read(f"{names[i]}.step", 0, torch.empty(1)) for i in found}
            self.steps = [int(steps[i]) if i in found else 0 for i in range(len(names))]
            for span, values in self._walk(found):
                for field, value in zip(self.items[span.item].fields, values, strict=True):
                    file.read(f"{names[span.item]}.{field.name}", span.start // field.per, value)

    def _names(self, names: Sequence[str] | None) -> Sequence[str]:
        names = [str(i) for i in range(len(self.parameters))] if names is None else names
        _require(
            len(names) == len(self.parameters), f"{len(self.parameters)} parameters need as many names: {len(names)}"
        )
        return names

    def _empty_shapes(self, i: int) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """(name, dtype, shape) of the fields of parameter i."""
        parameter = self.parameters[i]
        return [
            (field.name, field.dtype, tuple(parameter.shape) if field.per == 1 else (field.values(parameter.numel()),))
            for field in self.items[i].fields
        ]

    def _empty_state(self, i: int) -> dict[str, Tensor]:
        device = self.parameters[i].device
        shapes = self._empty_shapes(i)
        fields = {name: torch.empty(shape, dtype=dtype, device=device) for name, dtype, shape in shapes}
        return {"step": torch.tensor(float(self.steps[i])), **fields}

    def _span_of(self, state: dict[str, Tensor], span: Span) -> list[Tensor]:
        """The span's part of each field of a parameter's whole state."""
        return [
            state[field.name].reshape(-1)[span.start // field.per :][: field.values(span.stop - span.start)]
            for field in self.items[span.item].fields
        ]

    def _check_field(self, i: int, found: Any, name: str, dtype: torch.dtype | None, shape: tuple[int, ...]) -> None:
        fits = isinstance(found, Tensor) and tuple(found.shape) == shape
        fits = fits and (dtype is None or found.is_floating_point() == dtype.is_floating_point)
        what = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)
        wanted = f"a number or a {shape} tensor" if name == "step" else f"{dtype} {shape}"
        fits = fits or (name == "step" and isinstance(found, int))
        _require(fits, f"state of parameter {i}: {name} must be {wanted}, found {what}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
