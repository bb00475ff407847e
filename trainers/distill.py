"""Distillation."""

import torch
from torch import Tensor

from kernels import TopK
from kernels.divergence import check_mix, divergence, student_outcomes, teacher_outcomes


def distill_loss(
    student_logits: Tensor, teacher_logits: Tensor | TopK, *, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """Generalised Jensen-Shannon divergence of each row, fp32 (M,): β 0 is KL(T ‖ S), 1 is KL(S ‖ T).

    student_logits (M, V), differentiable. teacher_logits (M, V), or the teacher's TopK at this temperature (an
    (ids, logps) pair will do). A logit may be -inf: such a token has no probability.
    Raises ValueError for shapes that do not fit, beta outside [0, 1] and a temperature that is not positive.
    """
    check_mix(beta, temperature)
    s = _log_softmax(student_logits, temperature)
    if isinstance(teacher_logits, Tensor):
        if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
            shapes = f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
            raise ValueError(f"distill_loss needs student and teacher logits of one shape (M, V), got {shapes}")
        return divergence(s, _log_softmax(teacher_logits.detach(), temperature), beta)
    ids, logps = teacher_logits
    if ids.ndim != 2 or ids.shape != logps.shape or len(ids) != len(s):
        shapes = f"{tuple(ids.shape)} and {tuple(logps.shape)}"
        raise ValueError(f"distill_loss needs the teacher's ids and logps ({len(s)}, k), got {shapes}")
    t = teacher_outcomes(_finite(logps.to(s.dtype)), s.shape[1])
    return divergence(student_outcomes(s, ids.long()), t, beta)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return _finite(torch.log_softmax(logits.to(wide) / temperature, dim=1))


def _finite(logps: Tensor) -> Tensor:
    """-inf → a number whose exp is 0: 0 · (-inf) is no number."""
    return logps.clamp(min=torch.finfo(logps.dtype).min / 4)
