"""Exercise 10: generalised Jensen-Shannon divergence, against trainers.distill.distill_loss."""

import torch
from torch import Tensor

from lessons.grading import Case, Forbidden, Mistake
from trainers.distill import distill_loss

TITLE = "generalised Jensen-Shannon divergence"
VERSION = 1
MUST_NOT_USE = tuple(Forbidden(name, "it is what you are writing") for name in ("trainers", "kernels"))
RTOL = 1024 * torch.finfo(torch.float64).eps  # sums of 50 terms of both signs

DIRECTION = "the directions are swapped: beta 0 is KL(T ‖ S), whose sum is weighed by the teacher"
WEIGHTS_SWAPPED = "the two KLs have each other's weight: beta · KL(T ‖ M) + (1 - beta) · KL(S ‖ M)"
MIXTURE_SWAPPED = "the mixture is the wrong way round: M = beta · T + (1 - beta) · S"
MEAN_OF_LOGS = "log M is the mean of the logs: it is the log of the mean. Mix probabilities, then take the logarithm"
TO_MIXTURE = "KL(M ‖ T) and KL(M ‖ S): the mixture stands second, KL(T ‖ M) and KL(S ‖ M)"
LIMIT = "the formula between was used at beta 0 or 1, where it is 0: the ends are forward and reverse KL by definition"
MIX_OF_KLS = "a mix of forward and reverse KL: between the ends both are compared with the mixture M"
NO_TEMPERATURE = "the temperature is forgotten: divide the logits of both by it before the softmax"
ONE_TEMPERATURE = "only one of the two has the temperature: divide the logits of both by it"
TIMES = "the logits are multiplied by the temperature: divide"
SQUARED = "the result is multiplied by temperature²: Hinton does, this does not"
MEAN = "a mean over the vocabulary: KL is a sum"
CROSS_ENTROPY = "a cross-entropy, -Σ T log S: the teacher's own entropy is missing. Same gradient, another value"
ONE_NUMBER = "one number for all rows: return each row's divergence, (M,)"
NAN = "0 · (-inf) is NaN: where T is 0 its term is 0. Clamp log T to a number whose exp is 0"


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(1)


def wrong(student: Tensor, teacher: Tensor, beta: float, tau: float) -> list[Mistake]:
    s, t = (torch.log_softmax(z / tau, 1).clamp(min=-1e300) for z in (student, teacher))
    right = distill_loss(student, teacher, beta=beta, temperature=tau)

    def mixed(m: Tensor, weight: float = beta) -> Tensor:
        return weight * kl(t, m) + (1 - weight) * kl(s, m)

    m, other = (torch.log(b * t.exp() + (1 - b) * s.exp()) for b in (beta, 1 - beta))
    between = 0 < beta < 1
    values = [
        (DIRECTION, distill_loss(teacher, student, beta=beta, temperature=tau)),
        (DIRECTION, distill_loss(student, teacher, beta=1 - beta, temperature=tau)),
        (MIX_OF_KLS, (1 - beta) * kl(t, s) + beta * kl(s, t)),
        (MIX_OF_KLS, beta * kl(t, s) + (1 - beta) * kl(s, t)),
        (NO_TEMPERATURE, distill_loss(student, teacher, beta=beta)),
        (ONE_TEMPERATURE, distill_loss(student * tau, teacher, beta=beta, temperature=tau)),
        (ONE_TEMPERATURE, distill_loss(student, teacher * tau, beta=beta, temperature=tau)),
        (TIMES, distill_loss(student, teacher, beta=beta, temperature=1 / tau)),
        (SQUARED, right * tau**2),
        (MEAN, right / student.shape[1]),
        (ONE_NUMBER, right.sum()),
        (ONE_NUMBER, right.mean()),
    ]
    if between:
        values = [
            (WEIGHTS_SWAPPED, mixed(m, 1 - beta)),
            (MIXTURE_SWAPPED, mixed(other)),
            (MEAN_OF_LOGS, mixed(beta * t + (1 - beta) * s)),
            (TO_MIXTURE, beta * kl(m, t) + (1 - beta) * kl(m, s)),
            *values,
        ]
    else:
        values += [(LIMIT, torch.zeros_like(right)), (CROSS_ENTROPY, -(t.exp() * s).sum(1))]
    values.append((NAN, lambda got: not torch.isfinite(got).all()))
    return [Mistake(hint, value) for hint, value in values]


def cases() -> list[Case]:
    generator = torch.Generator().manual_seed(10)
    student, teacher = 2 * torch.randn(2, 6, 50, generator=generator, dtype=torch.float64)
    masked = teacher.clone()
    masked[:, 40:] = -torch.inf
    inputs = {
        "beta 0": (student, teacher, 0.0, 1.0),
        "beta 1": (student, teacher, 1.0, 1.0),
        "beta 0.3": (student, teacher, 0.3, 1.0),
        "beta 0.5, temperature 2": (student, teacher, 0.5, 2.0),
        "beta 0, a teacher that excludes ten tokens": (student, masked, 0.0, 1.0),
        "beta 0.5, the same": (student, masked, 0.5, 1.0),
    }
    return [
        Case(
            name,
            lambda ask, call=call: ask("divergence", *call),
            distill_loss(call[0], call[1], beta=call[2], temperature=call[3]),
            wrong(*call),
            rtol=RTOL,
            atol=torch.finfo(torch.float64).eps,
        )
        for name, call in inputs.items()
    ]
