"""The definitions, a second time: loops over Python floats (float64), from the papers, importing nothing of ours.

Matrices are nested lists, so `tensor.tolist()` goes in and `torch.tensor(result)` comes out. Where a format prescribes
float32 (code books, scales), `f32` rounds after each operation: a product of two float32 numbers is exact in float64,
and a quotient rounded twice (53 bits, then 24) equals one rounded once, so these loops are exact to the bit.

    QLoRA     Dettmers et al. 2023, arXiv 2305.14314          LoRA   Hu et al. 2021, arXiv 2106.09685
    8-bit     Dettmers et al. 2021, arXiv 2110.02861          DoRA   Liu et al. 2024, arXiv 2402.09353
    AdamW     Loshchilov & Hutter 2019, arXiv 1711.05101      cosine Loshchilov & Hutter 2017, arXiv 1608.03983

Shapes: B batch, T tokens, V vocabulary, M rows, N out_features, K in_features, r rank.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from statistics import NormalDist
from typing import NamedTuple

Vector = list[float]
Matrix = list[list[float]]


def f32(value: float) -> float:
    """The float32 nearest to `value`, as a Python float."""
    return struct.unpack("f", struct.pack("f", value))[0]


# Code books


def linspace_f32(start: float, end: float, steps: int) -> Vector:
    """Evenly spaced float32 numbers: a float32 step, counted from the nearer end, each point rounded once."""
    step = f32(f32(f32(end) - f32(start)) / (steps - 1))
    first = [f32(f32(start) + step * i) for i in range(steps // 2)]
    last = [f32(f32(end) - step * (steps - 1 - i)) for i in range(steps // 2, steps)]
    return first + last


def nf_codebook(bits: int, offset: float) -> Vector:
    """NormalFloat: 2^(bits-1) positive quantiles of N(0, 1), zero, one negative quantile fewer; divided by the largest.

    `offset` is the outermost probability. NF4's is 1 − (1/32 + 1/30)/2, which the published table cuts to 0.9677083.
    """
    quantile = NormalDist().inv_cdf
    half = 2 ** (bits - 1)
    positive = [f32(quantile(p)) for p in linspace_f32(offset, 0.5, half + 1)[:-1]]
    negative = [f32(-quantile(p)) for p in linspace_f32(offset, 0.5, half)[:-1]]
    levels = sorted([*positive, 0.0, *negative])
    return [f32(level / levels[-1]) for level in levels]


def fp4_codebook() -> Vector:
    """Sign, then magnitudes /12 in the order of bitsandbytes' tree: 0, 1/16, 8, 12, 4, 6, 2, 3."""
    magnitudes = [f32(m / 12) for m in (0, 0.0625, 8, 12, 4, 6, 2, 3)]
    return magnitudes + [-m for m in magnitudes]


def dynamic_map(signed: bool) -> Vector:
    """The 8-bit dynamic tree, not rounded: decade i holds 2^i (unsigned 2^(i+1)) centres of [0.1, 1]·10^(i−6)."""
    levels = [0.0, 1.0]
    for i in range(7):
        count = 2 ** (i if signed else i + 1)
        for j in range(count):
            centre = (0.1 + 0.9 * (j + 0.5) / count) * 10.0 ** (i - 6)
            levels += [centre, -centre] if signed else [centre]
    return sorted(levels)


# Blockwise quantization (QLoRA §2, Eq. 1 and 2)


@lru_cache
def sorted_levels(code: tuple[float, ...]) -> tuple[list[int], Vector]:
    """The index of each distinct level, lowest level first, and the float32 midpoints between neighbours."""
    levels = sorted(set(code))
    midpoints = [f32(f32(low + high) / 2) for low, high in pairwise(levels)]
    return [code.index(level) for level in levels], midpoints


def nearest_code(value: float, code: Sequence[float]) -> int:
    """Index of the level nearest to `value`; a tie goes to the lower level, and of ±0 the first index is used."""
    index_of_level, midpoints = sorted_levels(tuple(code))
    return index_of_level[bisect_left(midpoints, value)]


def quantize_blocks(values: Sequence[float], code: Sequence[float], blocksize: int) -> tuple[list[int], Vector]:
    """One index per value and one absmax per block; a last, shorter block has an absmax of its own."""
    indices: list[int] = []
    absmax: Vector = []
    for start in range(0, len(values), blocksize):
        block = values[start : start + blocksize]
        largest = max(abs(v) for v in block)
        inverse = f32_reciprocal(largest)
        absmax.append(0.0 if inverse is None else largest)
        indices += [nearest_code(0.0 if inverse is None else f32(v * inverse), code) for v in block]
    return indices, absmax


def f32_reciprocal(value: float) -> float | None:
    """1/value in float32, or None where that is not finite."""
    if value == 0 or 1 / value > 3.4028235677973366e38:  # halfway to the first number that float32 cannot hold
        return None
    return f32(1 / value)


def dequantize_blocks(indices: Sequence[int], absmax: Sequence[float], code: Sequence[float], blocksize: int) -> Vector:
    """code[index] · absmax of the block, rounded once to float32."""
    return [f32(code[index] * absmax[i // blocksize]) for i, index in enumerate(indices)]


def pack(indices: Sequence[int], code: Sequence[float]) -> list[int]:
    """Two indices a byte, the first in the high nibble; an odd count is filled with the code of zero."""
    padded = [*indices, nearest_code(0.0, code)] if len(indices) % 2 else list(indices)
    return [high * 16 + low for high, low in zip(padded[::2], padded[1::2], strict=True)]


# Double quantization (QLoRA §3, "Double Quantization")


class DoubleQuantized(NamedTuple):
    codes: list[int]
    absmax2: Vector
    offset: float


def nearest_code_even(value: float, code: Sequence[float]) -> int:
    """Index of the level nearest to `value` by exact distance in a sorted code book; a tie goes to the even index."""
    right = min(bisect_left(code, value), len(code) - 1)
    left = max(right - 1, 0)
    twice, both = 2 * value, code[left] + code[right]  # both exact: neighbours are of like size
    if twice == both:
        return left if left % 2 == 0 else right
    return left if twice < both else right


def double_quantize(absmax: Sequence[float], code: Sequence[float], blocksize: int = 256) -> DoubleQuantized:
    """absmax − mean, in 8 bits. The mean is summed in float64 in index order and kept as float32."""
    total = 0.0
    for value in absmax:
        total += value
    offset = f32(total / len(absmax))
    centred = [f32(value - offset) for value in absmax]
    codes: list[int] = []
    absmax2: Vector = []
    for start in range(0, len(centred), blocksize):
        block = centred[start : start + blocksize]
        largest = max(abs(v) for v in block)
        inverse = f32_reciprocal(largest)
        absmax2.append(0.0 if inverse is None else largest)
        codes += [nearest_code_even(0.0 if inverse is None else f32(v * inverse), code) for v in block]
    return DoubleQuantized(codes, absmax2, offset)


def double_dequantize(state: DoubleQuantized, code: Sequence[float], blocksize: int = 256) -> Vector:
    """code[q] · absmax2 + offset, each operation in float32."""
    return [f32(f32(code[q] * state.absmax2[i // blocksize]) + state.offset) for i, q in enumerate(state.codes)]


# A linear layer with LoRA terms (LoRA Eq. 3; `row_scale` is DoRA's m/‖W + sBA‖, held constant)


class Term(NamedTuple):
    """x Aᵀ Bᵀ · scaling, with A (r, K), B (N, r); `x` is this term's own input (M, K), after its dropout."""

    A: Matrix
    B: Matrix
    scaling: float
    x: Matrix


def matmul_t(x: Matrix, w: Matrix) -> Matrix:
    """x (M, K) · wᵀ, w (N, K)."""
    return [[sum(a * b for a, b in zip(row, col, strict=True)) for col in w] for row in x]


def transpose(x: Matrix) -> Matrix:
    return [list(column) for column in zip(*x, strict=True)]


def lora_linear_unscaled(x: Matrix, weight: Matrix, terms: Sequence[Term]) -> Matrix:
    """x Wᵀ + Σ scaling · x Aᵀ Bᵀ."""
    out = matmul_t(x, weight)
    for term in terms:
        delta = matmul_t(matmul_t(term.x, term.A), term.B)
        out = [[o + term.scaling * d for o, d in zip(ro, rd, strict=True)] for ro, rd in zip(out, delta, strict=True)]
    return out


def lora_linear(x: Matrix, weight: Matrix, terms: Sequence[Term], bias: Vector, row_scale: Vector) -> Matrix:
    """row_scale ⊙ (x Wᵀ + Σ scaling · x Aᵀ Bᵀ) + bias."""
    out = lora_linear_unscaled(x, weight, terms)
    return [[o * s + b for o, s, b in zip(row, row_scale, bias, strict=True)] for row in out]


class LinearGradients(NamedTuple):
    x: Matrix
    terms: list[tuple[Matrix, Matrix, Matrix]]
    bias: Vector
    row_scale: Vector


def lora_linear_gradients(
    x: Matrix, weight: Matrix, terms: Sequence[Term], row_scale: Vector, dy: Matrix
) -> LinearGradients:
    """With g = dy ⊙ row_scale: dx = g W; per term dA = s Bᵀ gᵀ x, dB = s gᵀ (x Aᵀ), its dx = s g B A."""
    g = [[d * s for d, s in zip(row, row_scale, strict=True)] for row in dy]
    term_gradients = []
    for term in terms:
        sg = [[term.scaling * v for v in row] for row in g]
        to_rank = matmul_t(sg, transpose(term.B))
        d_a = matmul_t(transpose(to_rank), transpose(term.x))
        d_b = matmul_t(transpose(sg), transpose(matmul_t(term.x, term.A)))
        d_x = matmul_t(to_rank, transpose(term.A))
        term_gradients.append((d_a, d_b, d_x))
    before_scale = lora_linear_unscaled(x, weight, terms)
    return LinearGradients(
        x=matmul_t(g, transpose(weight)),
        terms=term_gradients,
        bias=[sum(column) for column in transpose(dy)],
        row_scale=[
            sum(d * p for d, p in zip(dcol, pcol, strict=True))
            for dcol, pcol in zip(transpose(dy), transpose(before_scale), strict=True)
        ],
    )


# Cross-entropy of softcap·tanh(z/softcap)/temperature, one number per token


def log_softmax(logits: Vector) -> Vector:
    largest = max(logits)
    log_sum = largest + math.log(sum(math.exp(z - largest) for z in logits))
    return [z - log_sum for z in logits]


def shape_logit(z: float, temperature: float, softcap: float | None) -> tuple[float, float]:
    """The logit that the softmax sees, and its derivative by z."""
    if softcap is None:
        return z / temperature, 1 / temperature
    t = math.tanh(z / softcap)
    return softcap * t / temperature, (1 - t * t) / temperature


class TokenLoss(NamedTuple):
    nll: float
    gradient: Vector
    """of nll, by each raw logit"""
    entropy: float


def token_cross_entropy(
    logits: Vector, target: int, *, temperature: float = 1.0, softcap: float | None = None, ignore_index: int = -100
) -> TokenLoss:
    """−log p(target), its gradient p − onehot(target), and H = −Σ p log p. An ignored target gives zeros throughout."""
    if target == ignore_index:
        return TokenLoss(0.0, [0.0] * len(logits), 0.0)
    shaped = [shape_logit(z, temperature, softcap) for z in logits]
    logps = log_softmax([z for z, _ in shaped])
    by_shaped = [math.exp(logp) - (v == target) for v, logp in enumerate(logps)]
    return TokenLoss(
        nll=-logps[target],
        gradient=[d * slope for d, (_, slope) in zip(by_shaped, shaped, strict=True)],
        entropy=-sum(math.exp(logp) * logp for logp in logps),
    )


def sft_loss(nll: Matrix, completion_mask: Matrix, num_items: float | None = None) -> float:
    """Σ nll over the learnt tokens / num_items; None: the number of learnt tokens here (0 tokens cost 0)."""
    total = sum(n * m for ns, ms in zip(nll, completion_mask, strict=True) for n, m in zip(ns, ms, strict=True) if m)
    items = sum(sum(row) for row in completion_mask) if num_items is None else num_items
    return total / items if items else 0.0


# Optimization


class AdamWState(NamedTuple):
    param: Vector
    exp_avg: Vector
    exp_avg_sq: Vector
    step: int


def adamw_step(
    state: AdamWState, grad: Vector, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> AdamWState:
    """Decoupled decay first, then Adam with both bias corrections; eps is added after the square root."""
    beta1, beta2 = betas
    step = state.step + 1
    params, averages, squares = [], [], []
    for p, m, v, g in zip(state.param, state.exp_avg, state.exp_avg_sq, grad, strict=True):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        corrected_m = m / (1 - beta1**step)
        corrected_v = v / (1 - beta2**step)
        params.append(p * (1 - lr * weight_decay) - lr * corrected_m / (math.sqrt(corrected_v) + eps))
        averages.append(m)
        squares.append(v)
    return AdamWState(params, averages, squares, step)


def clip_coefficient(gradients: Sequence[Vector], max_norm: float) -> float:
    """What every gradient is multiplied with so that their joint Euclidean norm is at most max_norm."""
    norm = math.sqrt(sum(g * g for vector in gradients for g in vector))
    return 1.0 if norm <= max_norm else max_norm / norm


def learning_rate_factor(schedule: str, step: int, *, warmup_steps: int, total_steps: int) -> float:
    """What the peak rate is multiplied with after `step` updates: linear from 0, then cosine, linear or constant."""
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "linear":
        return max(0.0, 1 - progress)
    return 1.0


# Distillation (GKD, arXiv 2306.13649, eq. 1): one row of student and teacher logits


class RowLoss(NamedTuple):
    value: float
    gradient: Vector
    """by each of the student's logits"""


def kl(p: Vector, q: Vector) -> float:
    """KL(P ‖ Q) of log-probabilities; an outcome of probability 0 in P adds nothing."""
    return sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True) if math.exp(a) > 0)


def log_sum(logps: Sequence[float]) -> float:
    largest = max(logps)
    return largest + math.log(sum(math.exp(a - largest) for a in logps))


def distillation(
    student: Vector, teacher: Vector, *, beta: float, temperature: float = 1.0, outcomes: list[list[int]] | None = None
) -> RowLoss:
    """β KL(T ‖ M) + (1-β) KL(S ‖ M), M = βT + (1-β)S; β = 0: KL(T ‖ S), β = 1: KL(S ‖ T). Softmax at `temperature`.

    outcomes: tokens that count as one, each token in one of them; by default each alone.
    The gradient goes by the chain rule: f = ∂D/∂ log S of each outcome, and ∂ log S_c/∂z_v = [v in c] S_v/S_c - S_v.
    """
    groups = outcomes or [[v] for v in range(len(student))]
    tokens = log_softmax([z / temperature for z in student])
    s = [log_sum([tokens[v] for v in group]) for group in groups]
    all_t = log_softmax([z / temperature for z in teacher])
    t = [log_sum([all_t[v] for v in group]) for group in groups]
    if beta == 0:
        value, f = kl(t, s), [-math.exp(b) for b in t]
    elif beta == 1:
        value, f = kl(s, t), [math.exp(a) * (a - b + 1) for a, b in zip(s, t, strict=True)]
    else:
        m = [log_sum([math.log(1 - beta) + a, math.log(beta) + b]) for a, b in zip(s, t, strict=True)]
        value = beta * kl(t, m) + (1 - beta) * kl(s, m)
        f = []
        for a, b, c in zip(s, t, m, strict=True):
            S, by_m = math.exp(a), (1 - beta) * math.exp(a - c)  # ∂M/∂ log S, over M
            f.append(-beta * math.exp(b) * by_m + (1 - beta) * (S * (a - c) + S - S * by_m))
    gradient = [-math.exp(tokens[v]) * sum(f) for v in range(len(student))]
    for group, slope, a in zip(groups, f, s, strict=True):
        for v in group:
            gradient[v] += slope * math.exp(tokens[v] - a)
    return RowLoss(value, [g / temperature for g in gradient])
