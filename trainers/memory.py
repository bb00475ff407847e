"""The memory planner: what a run will hold, from a model's config.json and the flags, before anything is loaded.

    total = always held + the largest of what comes after one another
            weights, adapters, optimizer state      forward and backward | optimizer step | sampling (grpo)

What is always held is counted exactly (memory_exact.py). Activations, the chunk of logits and the workspace of a
backward are estimates: formulas of what this repository's layers keep (memory_estimates.py), with constants fixed by
reading the code and checked against the measured peak of live tensors in tests/test_memory_measured.py.

Left out: the process itself (Python and its libraries; a CUDA context takes 0.3 to 0.6 GB), what an allocator holds
in reserve, evaluation, and several processes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from models import Decoder, DecoderConfig

from .memory_estimates import activations, head_backward, head_chunk, layer_backward, sampling
from .memory_exact import Counts, adapter_tensors, count, dense_tensors, four_bits, optimizer_state
from .memory_setup import Setup

__all__ = ["Part", "Phase", "Plan", "Setup", "plan", "plan_of_model"]


class Part(NamedTuple):
    """Something that takes memory."""

    name: str
    nbytes: int
    exact: bool
    """counted; else estimated"""
    why: str


class Phase(NamedTuple):
    """A time of a step: what is held then, beside what is always held."""

    name: str
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class Plan:
    """What a run will hold."""

    setup: Setup
    counts: Counts
    trained: int
    """parameters that are trained"""
    always: tuple[Part, ...]
    phases: tuple[Phase, ...]
    spilled: int
    """bytes of optimizer state outside fast memory"""

    @property
    def peak(self) -> Phase:
        """The time of a step when most is held."""
        return max(self.phases, key=lambda phase: phase.nbytes)

    @property
    def parts(self) -> tuple[Part, ...]:
        """All that is held at the peak."""
        return tuple(part for part in (*self.always, *self.peak.parts) if part.nbytes)

    @property
    def total(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def exact(self) -> int:
        return sum(part.nbytes for part in self.parts if part.exact)


def plan(config: DecoderConfig, setup: Setup) -> Plan:
    """The plan of a run on a model of this shape. Raises ValueError for settings that no trainer takes."""
    setup.check(config)
    counts = count(config)
    tensors = dense_tensors(config) if setup.method == "full" else adapter_tensors(config, setup.r, setup.targets)
    state = optimizer_state(tensors, setup.optimizer, setup.optimizer_budget)
    always = (
        *_weights(config, setup, counts),
        *_second_model(config, setup),
        Part("optimizer state", state.fast, True, _of_the_state(setup, state.spilled)),
    )
    return Plan(setup, counts, sum(tensors), always, _phases(config, setup, tensors), state.spilled)


def plan_of_model(model: Decoder, setup: Setup) -> Plan:
    """The same, with the weights that a loaded model really holds counted in place of the formula's."""
    planned = plan(model.config, setup)
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    maps = {id(b): b.nbytes for name, b in model.named_buffers() if name.rpartition(".")[2] in ("code", "absmax_code")}
    held = sum(tensor.nbytes for tensor in tensors.values() if id(tensor) not in trained) - sum(maps.values())
    adapters = sum(tensor.nbytes for tensor in tensors.values() if id(tensor) in trained)
    if setup.method == "full":
        held, adapters = held + adapters, 0
    counted = (
        Part("weights of the model", held, True, "held by the model now"),
        Part("adapters", adapters, True, "trained in fp32"),
    )
    others = tuple(part for part in planned.always if part.name in ("optimizer state", "teacher", "reference model"))
    return replace(planned, always=(*counted, *others))


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest n in [1, limit] for which fits(n), 0 for none; fits must not come back once it is lost."""
    if not fits(1):
        return 0
    low, high = 1, 1
    while high < limit and fits(high):
        low, high = high, min(2 * high, limit)
    if fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def longest_sequence(config: DecoderConfig, setup: Setup, budget: int) -> int:
    """The most tokens a row whose plan stays within `budget` bytes, up to the context; 0 where one does not."""
    step = 64 if setup.trainer != "grpo" else 1

    def fits(n: int) -> bool:
        length = max(n * step, setup.max_completion_length + 1 if setup.trainer == "grpo" else 1)
        return plan(config, replace(setup, sequence_length=length)).total <= budget

    return step * largest(fits, max(1, config.max_position_embeddings // step))


def largest_batch(config: DecoderConfig, setup: Setup, budget: int) -> int:
    """The most rows in one forward (pairs for dpo and orpo) within `budget` bytes; 0 where one does not fit."""
    unit = setup.num_generations if setup.trainer == "grpo" else 1
    return unit * largest(lambda n: plan(config, replace(setup, batch_size=n * unit)).total <= budget, 4096)


def largest_model(models: dict[str, DecoderConfig], setup: Setup, budget: int) -> str | None:
    """The model of most parameters whose plan stays within `budget` bytes."""
    fitting = [
        (count(config).total, name)
        for name, config in models.items()
        if setup.sequence_length <= config.max_position_embeddings and plan(config, setup).total <= budget
    ]
    return max(fitting)[1] if fitting else None


def _weights(config: DecoderConfig, setup: Setup, counts: Counts) -> tuple[Part, ...]:
    size = 4 if setup.method == "full" else setup.itemsize
    others = (
        Part("embeddings and head", size * counts.embedding, True, f"{setup.held_dtype}, never in 4 bits"),
        Part("norms and biases", size * counts.rest, True, setup.held_dtype),
    )
    if setup.method != "qlora":
        dense = Part("linear weights", size * counts.linear, True, setup.held_dtype)
        weights: tuple[Part, ...] = (dense, *others)
    else:
        found = four_bits(config, setup.blocksize, setup.double_quant)
        how = "8 bits a block, and 4 bytes for 256 of them" if setup.double_quant else "4 bytes a block"
        weights = (
            Part("4-bit weights", found.codes, True, "two a byte"),
            Part("scales of the 4-bit weights", found.scales, True, f"blocks of {setup.blocksize}: {how}"),
            *others,
        )
    if setup.method == "full":
        return weights
    adapters = 4 * sum(adapter_tensors(config, setup.r, setup.targets))
    return (*weights, Part("adapters", adapters, True, f"r = {setup.r}, fp32"))


def _second_model(config: DecoderConfig, setup: Setup) -> tuple[Part, ...]:
    if setup.trainer == "distill" and setup.teacher is not None:
        nbytes = setup.itemsize * count(setup.teacher).total
        return (Part("teacher", nbytes, True, f"{setup.dtype}, frozen"),)
    needs_copy = setup.method == "full" and setup.live_reference
    copy = 4 * count(config).total if needs_copy else 0
    return (Part("reference model", copy, True, "a frozen copy: with adapters it is the same model"),)


def _of_the_state(setup: Setup, spilled: int) -> str:
    kind = {"adamw": "fp32", "paged_adamw": "fp32, in pages"}.get(setup.optimizer, "8 bits, in pages")
    return f"two moments, {kind}" + (f"; {spilled / 1e6:,.1f} MB more are spilled" if spilled else "")


def _phases(config: DecoderConfig, setup: Setup, tensors: Sequence[int]) -> tuple[Phase, ...]:
    gradients = Part("gradients", 4 * sum(tensors), True, "fp32, of what is trained")
    during = gradients if setup.accumulation > 1 else gradients._replace(nbytes=0)
    kept = Part("activations", activations(config, setup), False, setup.what_is_kept)
    first = during
    if setup.method == "full" and setup.accumulation == 1:  # backward begins at the head
        first = gradients._replace(nbytes=4 * config.vocab_size * config.hidden_size)
    rest = kept._replace(nbytes=kept.nbytes // config.num_hidden_layers)
    work = layer_backward(config, setup)
    ending = work + (4 * config.vocab_size * config.hidden_size if setup.method == "full" else 0)
    phases = [
        Phase("output layer", (during, kept, _logits(head_chunk(config, setup)))),
        Phase("backward of the output layer", (during, kept, _logits(head_backward(config, setup)))),
        Phase("backward of the last layer", (first, kept, _workspace(work, "SwiGLU's backward"))),
        Phase("backward of the first layer", (gradients, rest, _workspace(ending, "and the embeddings' gradient"))),
        Phase("optimizer step", (gradients, _workspace(_of_the_step(setup, tensors), "of AdamW"))),
    ]
    if setup.trainer == "grpo":
        cache, work = sampling(config, setup)
        held = (
            gradients,
            Part("KV cache", cache, True, "keys and values of every completion"),
            _workspace(work, "logits and scores of one token a completion"),
        )
        phases.append(Phase("sampling", held))
    return tuple(phases)


def _logits(nbytes: int) -> Part:
    return Part("logits", nbytes, False, "a chunk, and the gradient of the hidden states")


def _workspace(nbytes: int, of: str) -> Part:
    return Part("workspace", nbytes, False, of)


def _of_the_step(setup: Setup, tensors: Sequence[int]) -> int:
    """torch's AdamW on a CPU goes tensor by tensor, and makes the denominator and one more of its size."""
    return 4 * 2 * max(tensors) if setup.optimizer == "adamw" else 0
