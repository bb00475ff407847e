"""Before the first step of a distillation: its teacher, what must hold, what seldom works, what is said."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.dataset import Dataset
from data.encode import Encoded
from lora import count_parameters
from models import Decoder, Tokenizer, load_tokenizer

from . import world
from .distill_config import DistillConfig
from .fingerprint import fingerprints
from .metrics import ProgressLine
from .on_policy import prompt_of
from .teacher import LoadedTeacher, Split, Teacher, check_vocabularies, load_teacher
from .teacher_cache import CachedTeacher, TopKCache, description_of


def prepare_teacher(
    config: DistillConfig, tokenizer: Tokenizer, examples: Mapping[Split, Sequence[Encoded]], *, quiet: bool = False
) -> Teacher:
    """The teacher in memory; or, with --teacher-cache, its predictions, which are written first where they are missing.

    Raises ValueError for another vocabulary than the student's, and for a cache of something else.
    """
    if config.teacher_cache is None:
        _check_vocabulary(config, tokenizer)
        return load_teacher(config)
    vocabulary = tokenizer.vocabulary()
    how = {name: getattr(config, name) for name in ("teacher", "teacher_adapter", "teacher_quantize", "dtype")}
    how |= fingerprints({name: how[name] for name in ("teacher", "teacher_adapter")})
    caches: dict[Split, TopKCache] = {}
    for split, members in examples.items():
        temperature = config.temperature if split == "train" else 1.0
        description = description_of(members, vocabulary, top_k=config.teacher_top_k, temperature=temperature, **how)
        caches[split] = TopKCache(Path(config.teacher_cache), split, members, description)
    incomplete = any(cache.missing() for cache in caches.values())
    world.wait_for_all()  # every rank has looked before the first writes
    if incomplete:
        _check_vocabulary(config, tokenizer)
        if world.is_main():
            _complete(config, tokenizer, caches, quiet=quiet)
        world.wait_for_all()
    return CachedTeacher(caches)


def _complete(config: DistillConfig, tokenizer: Tokenizer, caches: Mapping[Split, TopKCache], *, quiet: bool) -> None:
    """Write what the caches lack. The teacher leaves memory at the end."""
    teacher, progress = load_teacher(config), ProgressLine(0, 0, quiet=quiet)
    try:
        for cache in caches.values():
            cache.complete(teacher, config.batch_size, tokenizer.pad_id, progress.say)
    finally:
        progress.close()


def _check_vocabulary(config: DistillConfig, tokenizer: Tokenizer) -> None:
    check_vocabularies(tokenizer, load_tokenizer(config.teacher), (config.model, config.teacher))


def check_prompts(config: DistillConfig, data: Dataset, examples: Sequence[Encoded], context: int) -> None:
    """Raises ValueError where answers are to be sampled, and there are no prompts or no room for an answer."""
    if not config.on_policy_fraction:
        return
    if data.schema.kind == "text":
        raise ValueError(f"{data.path}: --on-policy-fraction needs prompts, and plain text has none")
    longest = max(len(prompt_of(example)) for example in examples)
    if longest + config.max_new_tokens > context:
        raise ValueError(
            f"{data.path}: a prompt has {longest} tokens: with --max-new-tokens {config.max_new_tokens} the student "
            f"would leave its context of {context}"
        )


def distill_warnings(config: DistillConfig, student: Decoder, teacher: Teacher, longest: int) -> Iterator[str]:
    """What seldom works, one line each with its reason, beside the warnings of recipes.py."""
    if config.ce_weight == 1:
        yield "--ce-weight 1 learns nothing from the teacher, which is only measured: this is supervised fine-tuning"
    if config.temperature > 1 and 0 < config.ce_weight < 1:
        shrunk = config.temperature**2
        yield (
            f"--temperature {config.temperature:g} makes the divergence's gradient about {shrunk:.2g} times smaller "
            "beside the cross-entropy's: take a smaller --ce-weight (arXiv 1503.02531 multiplies by τ²)"
        )
    if isinstance(teacher, LoadedTeacher):
        ours, theirs = (count_parameters(model)[1] for model in (student, teacher.model))
        if ours > theirs:
            yield f"the student has {ours:,} parameters, its teacher {theirs:,}: it may know better than it is taught"
        context = teacher.model.config.max_position_embeddings
        if longest > context:
            yield f"an example has {longest:,} tokens, the teacher's context is {context:,}: lower --max-seq-length"
    if isinstance(teacher, CachedTeacher):
        rest = teacher.caches["train"].rest()
        if rest > 0.1:
            yield (
                f"the {config.teacher_top_k} cached tokens leave {rest:.0%} of the teacher's probability to the rest, "
                "of which nothing is learnt: raise --teacher-top-k"
            )


def unhealthy(config: DistillConfig, row: Mapping[str, Any], last_kl: float | None) -> Iterator[str]:
    """What a step's numbers say against the run, in words. last_kl: eval_kl of the evaluation before."""
    if last_kl is not None and row.get("eval_kl", 0.0) > 1.05 * last_kl:
        yield "the student is further from its teacher than at the last evaluation: lower --learning-rate"
    if row.get("sampled_length", 0.0) > 0.9 * config.max_new_tokens:
        yield (
            "nearly all sampled answers are cut at --max-new-tokens: the student never sees an end of its own; raise "
            "it, or lower --on-policy-fraction"
        )


def about_the_teacher(config: DistillConfig) -> str:
    """The teacher and the loss in words."""
    kind = {0.0: "KL(teacher ‖ student)", 1.0: "KL(student ‖ teacher)"}.get(config.beta)
    loss = f"{1 - config.ce_weight:g} · {kind or f'Jensen-Shannon with β = {config.beta:g}'}"
    loss += f" at temperature {config.temperature:g}"
    loss += f" + {config.ce_weight:g} · cross-entropy" if config.ce_weight else ""
    sampled = f"; {config.on_policy_fraction:.0%} of the answers sampled" if config.on_policy_fraction else ""
    worn = f" with {config.teacher_adapter}" if config.teacher_adapter else ""
    bits = "" if config.teacher_quantize == "none" else f" in {config.teacher_quantize}"
    where = f", top {config.teacher_top_k} from {config.teacher_cache}" if config.teacher_cache else ""
    return f"teacher: {config.teacher}{worn}{bits}{where}; loss: {loss}{sampled}"
