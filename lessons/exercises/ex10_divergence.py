"""Exercise 10: generalised Jensen-Shannon divergence. Notebook: 10_distillation.ipynb. Grade: qlora grade 10"""

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
    # the exercise: this part is the reader's to write, and `qlora grade 10` says so until it is
    raise NotImplementedError("log_softmax both, then the formula of this beta, summed over the vocabulary")
