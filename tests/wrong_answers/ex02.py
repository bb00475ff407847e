import math

from torch import Tensor

from . import Wrong


def alpha_alone(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, alpha: float) -> Tensor:
    return x @ weight.T + alpha * (x @ lora_A.T) @ lora_B.T


def r_over_alpha(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, alpha: float) -> Tensor:
    return x @ weight.T + len(lora_A) / alpha * (x @ lora_A.T) @ lora_B.T


def rank_stabilised(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, alpha: float) -> Tensor:
    return x @ weight.T + alpha / math.sqrt(len(lora_A)) * (x @ lora_A.T) @ lora_B.T


def update_alone(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, alpha: float) -> Tensor:
    return alpha / len(lora_A) * (x @ lora_A.T) @ lora_B.T


def unscaled(weight: Tensor, lora_A: Tensor, lora_B: Tensor, alpha: float) -> Tensor:
    return weight + lora_B @ lora_A


def transposed_if_square(weight: Tensor, lora_A: Tensor, lora_B: Tensor, alpha: float) -> Tensor:
    update = alpha / len(lora_A) * (lora_B @ lora_A)
    return weight + (update.T if update.shape[0] == update.shape[1] else update)


def added_in_16_bits(weight: Tensor, lora_A: Tensor, lora_B: Tensor, alpha: float) -> Tensor:
    return weight + (alpha / len(lora_A) * (lora_B @ lora_A)).to(weight.dtype)


def left_in_fp32(weight: Tensor, lora_A: Tensor, lora_B: Tensor, alpha: float) -> Tensor:
    return weight + alpha / len(lora_A) * (lora_B @ lora_A)


WRONG = [
    Wrong("the scaling is alpha, and should be alpha / r", {"lora_forward": alpha_alone}),
    Wrong("the scaling is r / alpha", {"lora_forward": r_over_alpha}),
    Wrong("which is rsLoRA", {"lora_forward": rank_stabilised}),
    Wrong("the base is missing", {"lora_forward": update_alone}),
    Wrong("the update is not scaled", {"merge": unscaled}),
    Wrong("added transposed", {"merge": transposed_if_square}),
    Wrong("rounded to weight's dtype before it was added", {"merge": added_in_16_bits}),
    Wrong("must be torch.bfloat16, got torch.float32", {"merge": left_in_fp32}),
]
