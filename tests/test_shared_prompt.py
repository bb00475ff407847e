"""trainers/shared_prompt: one row for a group gives the log-probabilities, entropies and gradients of a row each."""

import pytest
import torch

from kernels import use_backend
from tests import reference
from tests.small_llama import small_decoder
from trainers.shared_prompt import completion_logps, share_prompts

EPS = torch.finfo(torch.float32).eps
PROMPTS = [[5, 6, 7], [5, 6, 7], [8, 9], [8, 9], [5, 6, 7]]
COMPLETIONS = [[1, 2, 3, 4], [1], [3, 3, 3], [4, 2], [9, 9]]


def test_the_layout():
    row = share_prompts(PROMPTS, COMPLETIONS, 4)
    assert row.input_ids.tolist() == [[5, 6, 7, 1, 2, 3, 8, 9, 3, 3, 4, 5, 6, 7, 9]]
    assert row.segment_ids.tolist() == [[1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5, 6, 6, 6, 7]]
    assert row.prefix_ids.tolist() == [[0, 0, 0, 1, 1, 1, 0, 0, 3, 3, 3, 0, 0, 0, 6]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 2, 0, 1, 2, 3]]
    assert row.predictors.tolist() == [[2, 3, 4, 5], [2, 0, 0, 0], [7, 8, 9, 0], [7, 10, 0, 0], [13, 14, 0, 0]]


def test_one_token_behind_one_prompt_is_a_plain_row():
    assert share_prompts([[1, 2]], [[3]], 1).prefix_ids is None


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_log_probabilities_entropies_and_gradients_are_those_of_separate_rows(temperature, backend):
    torch.manual_seed(0)
    model = small_decoder()
    T = 4
    ids = torch.tensor([c + [0] * (T - len(c)) for c in COMPLETIONS])
    mask = (torch.arange(T) < torch.tensor([len(c) for c in COMPLETIONS])[:, None]).long()
    mask[4] = 0  # left out of the loss
    weights = torch.randn(5, T)
    with use_backend(backend):
        logps, entropy = completion_logps(
            model, share_prompts(PROMPTS, COMPLETIONS, T), ids, mask, temperature=temperature
        )
        together = torch.autograd.grad((logps * weights).sum(), list(model.parameters()))
    total = 0.0
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        logits = model(torch.tensor([prompt + completion]))[0, len(prompt) - 1 : -1]
        for t, token in enumerate(completion):
            wanted = reference.token_cross_entropy(logits[t].tolist(), token, temperature=temperature)
            counted = float(mask[i, t])
            assert logps[i, t].item() == pytest.approx(-wanted.nll * counted, abs=64 * EPS * 10)
            assert entropy[i, t].item() == pytest.approx(wanted.entropy * counted, abs=64 * EPS * 10)
            total = total + counted * weights[i, t] * torch.log_softmax(logits[t] / temperature, 0)[token]
    for a, b in zip(together, torch.autograd.grad(total, list(model.parameters())), strict=True):
        assert (a - b).norm() <= 128 * EPS * b.norm()
    assert not logps[mask == 0].any()
    assert not entropy[mask == 0].any()
