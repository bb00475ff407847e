from torch import Tensor

from . import Wrong

Answer = tuple[Tensor, Tensor, Tensor]


def step(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    t: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    spoil: str = "",
) -> Answer:
    """One right answer, spoilt on request; not the check's code."""
    if spoil == "l2":
        g = g + decay * p
    elif spoil not in ("decay after", "no decay"):
        p = p - p * decay * (1 if spoil == "no lr" else lr)
    m = m + (1 - beta1) * (g - m)
    v = v + (1 - beta2) * (g * g - v)
    t += {"t - 1": -1, "t + 1": 1}.get(spoil, 0)
    m_hat = m if spoil in ("uncorrected", "v alone") else m / (1 - beta1**t)
    v_hat = v if spoil in ("uncorrected", "m alone") else v / (1 - beta2**t)
    if spoil == "eps inside":
        divisor = (v_hat + eps) ** 0.5
    elif spoil == "eps early":
        divisor = (v**0.5 + eps) / (1 - beta2**t) ** 0.5
    elif spoil == "no root":
        divisor = v_hat + eps
    else:
        divisor = v_hat**0.5 + (0 if spoil == "no eps" else eps)
    p = p - lr * m_hat / divisor * (-1 if spoil == "uphill" else 1)
    if spoil == "decay after":
        p = p * (1 - lr * decay)
    return (p, m_hat, v_hat) if spoil == "returned" else (p, m, v)


def spoilt(how: str) -> Wrong:
    def answer(*arguments: object) -> Answer:
        return step(*arguments, spoil=how)  # type: ignore[arg-type]

    answer.__name__ = how.replace(" ", "_")
    return Wrong(HINTS[how], {"adamw_step": answer})


HINTS = {
    "uncorrected": "no bias correction",
    "m alone": "v is not corrected",
    "v alone": "m is not corrected",
    "t + 1": "the correction is that of step t - 1, or t + 1",
    "returned": "the moments that you return",
    "eps inside": "eps is inside the root",
    "eps early": "before the bias correction",
    "no eps": "eps is missing",
    "no root": "the root is missing",
    "l2": "L2 regularisation",
    "decay after": "the decay comes after the update",
    "no lr": "the decay is 1 - weight_decay",
    "no decay": "p does not decay",
    "uphill": "p moves up the gradient",
}


def only_p(*arguments: object) -> Tensor:
    return step(*arguments)[0]  # type: ignore[arg-type]


WRONG = [*map(spoilt, HINTS), Wrong("must be 3 values", {"adamw_step": only_p})]
