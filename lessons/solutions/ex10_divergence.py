"""Solution 10: generalised Jensen-Shannon divergence. Notebook: 10_distillation.ipynb. Grade: qlora grade 10"""

import torch
from torch import Tensor


def divergence(student_logits: Tensor, teacher_logits: Tensor, beta: float, temperature: float) -> Tensor:
    """How far S is from T in each row, in nats: (M, V) and (M, V), float64 → (M,).

    S and T are softmax(logits / temperature), and KL(P ‖ Q) = Σ_v P_v (log P_v - log Q_v).

    - beta 0: KL(T ‖ S), forward. beta 1: KL(S ‖ T), reverse.
    - else beta · KL(T ‖ M) + (1 - beta) · KL(S ‖ M), with the mixture M = beta · T + (1 - beta) · S.
    - A teacher's logit may be -inf where beta is not 1: T is 0 there, and 0 · log 0 is 0.
    - Nothing is multiplied by temperature².

    Not to be used: this repository's packages.
    """
    s = torch.log_softmax(student_logits / temperature, dim=1)
    t = torch.log_softmax(teacher_logits / temperature, dim=1).clamp(min=-1e300)  # 0 · -1e300 is 0, 0 · -inf is NaN
    if beta == 0:
        return (t.exp() * (t - s)).sum(dim=1)
    if beta == 1:
        return (s.exp() * (s - t)).sum(dim=1)
    m = torch.log(beta * t.exp() + (1 - beta) * s.exp())
    return beta * (t.exp() * (t - m)).sum(dim=1) + (1 - beta) * (s.exp() * (s - m)).sum(dim=1)
