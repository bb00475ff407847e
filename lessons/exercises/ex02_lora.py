"""Exercise 2: the forward of a LoRA layer, and its merge. Notebook: 02_lora.ipynb. Grade: qlora grade 2"""

from torch import Tensor


def lora_forward(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, alpha: float) -> Tensor:
    """h = x · Wᵀ + scaling · (x · Aᵀ) · Bᵀ, with scaling = alpha / r.

    x (…, K), weight W (N, K), lora_A (r, K), lora_B (N, r), all of one dtype → (…, N).

    Not to be used: this repository's packages.
    """
    # the exercise: this part is the reader's to write, and `qlora grade 2` says so until it is
    raise NotImplementedError("x through W, and x through A and B, scaled by alpha / r")


def merge(weight: Tensor, lora_A: Tensor, lora_B: Tensor, alpha: float) -> Tensor:
    """The one weight (N, K) that does what the layer and its adapter do together, in weight's dtype.

    weight (N, K) in any float dtype, lora_A (r, K) and lora_B (N, r) fp32. Add in fp32, and round once, at the end.

    Not to be used: this repository's packages.
    """
    # the exercise: this part is the reader's to write, and `qlora grade 2` says so until it is
    raise NotImplementedError("W plus the scaled product of B and A, added in fp32")
