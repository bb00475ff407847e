from typing import Any

import torch
from torch import Tensor

from . import Wrong


def answer(student: Tensor, teacher: Tensor, beta: float, tau: float, how: str) -> Tensor:
    """One right answer, spoilt on request; not the check's code."""
    if how == "swapped":
        student, teacher = teacher, student
    by = {"no temperature": (1.0, 1.0), "one temperature": (1.0, tau), "times": (1 / tau, 1 / tau)}.get(how, (tau, tau))
    S, T = torch.softmax(student / by[0], -1), torch.softmax(teacher / by[1], -1)
    logs = {"S": S.log(), "T": T.log() if how == "nan" else T.clamp(min=1e-320).log()}

    def kl(P: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        terms = P * (log_p - log_q)
        return terms.mean(-1) if how == "mean" else terms.sum(-1)

    forward, reverse = kl(T, logs["T"], logs["S"]), kl(S, logs["S"], logs["T"])
    mixing = how == "limit"
    if how == "cross-entropy" and beta == 0:
        return -(T * logs["S"]).sum(-1)
    if how == "mix of kls":
        return (1 - beta) * forward + beta * reverse
    if beta in (0, 1) and not mixing:
        out = forward if beta == 0 else reverse
    else:
        b = 1 - beta if how == "mixture swapped" else beta
        M = b * T + (1 - b) * S
        log_m = b * logs["T"] + (1 - b) * logs["S"] if how == "mean of logs" else M.log()
        w = 1 - beta if how == "weights swapped" else beta
        if how == "to mixture":
            out = w * kl(M, log_m, logs["T"]) + (1 - w) * kl(M, log_m, logs["S"])
        else:
            out = w * kl(T, logs["T"], log_m) + (1 - w) * kl(S, logs["S"], log_m)
    out = out * (tau**2 if how == "squared" else 1)
    return out.sum() if how == "one number" else out


HINTS = {
    "swapped": "the directions are swapped",
    "weights swapped": "each other's weight",
    "mixture swapped": "the mixture is the wrong way round",
    "mean of logs": "it is the log of the mean",
    "to mixture": "the mixture stands second",
    "limit": "the ends are forward and reverse KL by definition",
    "mix of kls": "both are compared with the mixture",
    "no temperature": "the temperature is forgotten",
    "one temperature": "only one of the two has the temperature",
    "times": "multiplied by the temperature: divide",
    "squared": "multiplied by temperature²",
    "mean": "a mean over the vocabulary",
    "cross-entropy": "entropy is missing",
    "one number": "one number for all rows",
    "nan": "is NaN",
}


def spoilt(how: str) -> Wrong:
    def divergence(*arguments: Any) -> Tensor:
        return answer(*arguments, how)

    divergence.__name__ = how.replace(" ", "_")
    return Wrong(HINTS[how], {"divergence": divergence})


WRONG = list(map(spoilt, HINTS))
