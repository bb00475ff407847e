"""Exercise 7: one AdamW step, against kernels.adamw."""

import torch
from torch import Tensor

from kernels.adamw import AdamWStep, adamw_reference
from lessons.grading import Case, Forbidden, Mistake

TITLE = "one step of AdamW"
VERSION = 1
MUST_NOT_USE = tuple(
    Forbidden(name, "it is what you are writing") for name in ("kernels", "optim", ".AdamW", ".Adam", ".optim")
)
RTOL = 64 * torch.finfo(torch.float64).eps

UNCORRECTED = (
    "no bias correction: m and v began at 0. Divide m by 1 - beta1^t and v by 1 - beta2^t before they are used"
)
M_ALONE = "v is not corrected for its start at 0: divide it by 1 - beta2^t, before the root"
V_ALONE = "m is not corrected for its start at 0: divide it by 1 - beta1^t"
T_FROM_0 = "the correction is that of step t - 1, or t + 1: at the first step t is 1, and 1 - beta^t is 1 - beta"
RETURNED_CORRECTED = "the moments that you return are the corrected ones: the next step needs them as they were"
EPS_INSIDE = "eps is inside the root: √(v̂ + eps) is 1e-4 where v̂ is 0, not 1e-8. Add it after the root"
EPS_EARLY = "eps is added to √v before the bias correction: add it to √v̂"
NO_EPS = "eps is missing: 0 / 0 is NaN where the gradient has always been 0"
NO_ROOT = "the root is missing: m̂ / v̂ has the unit 1 / gradient"
L2 = "L2 regularisation: weight_decay · p went into the gradient, and so into the moments. It shrinks p alone"
DECAY_AFTER = "the decay comes after the update, and shrinks that too: shrink p first"
DECAY_WITHOUT_LR = "the decay is 1 - weight_decay: it is 1 - lr · weight_decay"
NO_DECAY = "p does not decay: shrink it by 1 - lr · weight_decay"
UPHILL = "p moves up the gradient: subtract the update"

Answer = tuple[Tensor, Tensor, Tensor]


def expected(p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, *numbers: float) -> Answer:
    """By the repository's step, which works in place."""
    p, m, v = p.clone(), m.clone(), v.clone()
    lr, beta1, beta2, eps, weight_decay = numbers
    adamw_reference(p, g, m, v, AdamWStep(lr, beta1, beta2, eps, weight_decay, t))
    return p, m, v


def wrong(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, lr: float, beta1: float, beta2: float, eps: float, decay: float
) -> list[Mistake]:
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    shrunk, c1, c2 = p * (1 - lr * decay), 1 - beta1**t, 1 - beta2**t
    m_hat, v_hat = m / c1, v / c2
    update = lr * m_hat / (v_hat.sqrt() + eps)
    before, after = t - 1, t + 1
    g_l2 = g + decay * p
    first = expected(
        p, g_l2, (m - (1 - beta1) * g) / beta1, (v - (1 - beta2) * g**2) / beta2, t, lr, beta1, beta2, eps, 0
    )
    ps = [
        (UNCORRECTED, shrunk - lr * m / (v.sqrt() + eps)),
        (M_ALONE, shrunk - lr * m_hat / (v.sqrt() + eps)),
        (V_ALONE, shrunk - lr * m / (v_hat.sqrt() + eps)),
        (T_FROM_0, shrunk - lr * m / (1 - beta1**after) / ((v / (1 - beta2**after)).sqrt() + eps)),
        (EPS_INSIDE, shrunk - lr * m_hat / (v_hat + eps).sqrt()),
        (EPS_EARLY, shrunk - lr * m_hat * c2**0.5 / (v.sqrt() + eps)),
        (NO_EPS, shrunk - lr * m_hat / v_hat.sqrt()),
        (NO_ROOT, shrunk - lr * m_hat / (v_hat + eps)),
        (DECAY_AFTER, (p - update) * (1 - lr * decay)),
        (DECAY_WITHOUT_LR, p * (1 - decay) - update),
        (NO_DECAY, p - update),
        (UPHILL, shrunk + update),
    ]
    if before:
        ps.append((T_FROM_0, shrunk - lr * m / (1 - beta1**before) / ((v / (1 - beta2**before)).sqrt() + eps)))
    return [
        *(Mistake(hint, (value, m, v)) for hint, value in ps),
        Mistake(L2, first),
        Mistake(RETURNED_CORRECTED, (shrunk - update, m_hat, v_hat)),
    ]


def cases() -> list[Case]:
    generator = torch.Generator().manual_seed(7)

    def random(n: int = 64) -> Tensor:
        return torch.randn(n, generator=generator, dtype=torch.float64)

    zero, usual = torch.zeros(64, dtype=torch.float64), (0.01, 0.9, 0.999, 1e-8)
    often_zero = random() * (random() > 0)
    inputs = {
        "the first step": (random(), random(), zero, zero, 1, *usual, 0.0),
        "step 5": (random(), random(), 0.1 * random(), 0.1 * random() ** 2, 5, *usual, 0.0),
        "gradients of 1e-8": (random(), 1e-8 * random(), zero, zero, 1, *usual, 0.0),
        "gradients that are 0": (random(), often_zero, zero, zero, 1, *usual, 0.0),
        "weight decay": (random(), random(), 0.1 * random(), 0.1 * random() ** 2, 3, *usual, 0.5),
    }
    return [
        Case(
            name,
            lambda student, call=call: student("adamw_step", *call),
            expected(*call),
            wrong(*call),
            rtol=RTOL,
            atol=RTOL,
        )
        for name, call in inputs.items()
    ]
