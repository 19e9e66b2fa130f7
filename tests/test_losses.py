"""The objectives against independent oracles, in value and gradient."""

import math

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import losses


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def double_loop(images, texts, t, b):
    """Eq. 1 as it is printed, pair by pair."""
    total = 0
    for i in range(len(images)):
        for j in range(len(texts)):
            delta = 1 if i == j else -1
            logit = t * sum(x * y for x, y in zip(images[i], texts[j])) + b
            total = total - torch.log(torch.sigmoid(delta * logit))
    return total / len(images)


def test_sigmoid_loss_is_eq_1():
    """Guards: a mean over B x B pairs (B times smaller), a sign, a transposed text matrix."""
    torch.manual_seed(0)
    ours = [unit(5, 7).requires_grad_(), unit(5, 7).requires_grad_(),
            torch.tensor(9.0, dtype=torch.float64, requires_grad=True),
            torch.tensor(-4.0, dtype=torch.float64, requires_grad=True)]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    a, b = losses.sigmoid_loss(*ours), double_loop(*theirs)
    assert torch.allclose(a, b)
    for x, y in zip(torch.autograd.grad(a, ours), torch.autograd.grad(b, theirs)):
        assert torch.allclose(x, y)


def test_sigmoid_loss_at_siglips_start():
    """Guards: a changed scale; B = 16, all cosines 0, t = 10, b = -10 is 10.0007 by hand."""
    zero = torch.zeros(16, 4)
    value = losses.sigmoid_loss(zero, zero, torch.tensor(10.0), torch.tensor(-10.0)).item()
    by_hand = math.log1p(math.exp(10)) + 15 * math.log1p(math.exp(-10))
    assert value == pytest.approx(by_hand, abs=1e-4)
    assert value == pytest.approx(10.0007, abs=1e-3)


def test_autoregressive_losses_are_gemmas_labels_loss():
    """Guards: targets off by one, prompt tokens in the loss, a mean over tokens of all rows
    together."""
    torch.manual_seed(0)
    llm = Gemma3ForCausalLM(Gemma3TextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, head_dim=16, num_key_value_heads=1, sliding_window=16)).double()
    prompts, targets = (3, 5, 2, 4), (6, 2, 9, 1)              # lengths; L is the longest row
    task = torch.tensor([0, 1, 2, 1])
    ids = torch.randint(3, 50, (4, 11))
    labels = torch.full_like(ids, -100)
    for r, (p, t) in enumerate(zip(prompts, targets)):
        labels[r, p:p + t] = ids[r, p:p + t]
    by_row = torch.stack([llm(input_ids=ids[r:r + 1, :p + t], labels=labels[r:r + 1, :p + t]).loss
                          for r, (p, t) in enumerate(zip(prompts, targets))])
    by_row = by_row.double()
    is_target = labels != -100
    hidden = llm.model(ids).last_hidden_state[:, :-1][is_target[:, 1:]]
    nll = losses.autoregressive_nll(hidden, llm.lm_head, ids, is_target).double()
    assert torch.allclose(nll, by_row, atol=1e-6)
    assert torch.allclose(losses.captioning_loss(nll, task), by_row[0] / 4)     # of R = 4 rows
    assert torch.allclose(losses.grounding_loss(nll, task), (by_row[1] + by_row[3]) / 4)
    assert torch.allclose(losses.dense_captioning_loss(nll, task), by_row[2] / 4)
    ours = torch.autograd.grad(nll.sum(), llm.lm_head.weight, retain_graph=True)[0]
    theirs = torch.autograd.grad(by_row.sum(), llm.lm_head.weight)[0]
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_autoregressive_nll_by_double_loop():
    """Guards: a row's mean taken over another row's tokens; value and gradient by plain loops."""
    torch.manual_seed(1)
    head, hidden = torch.nn.Linear(3, 5, bias=False), torch.randn(6, 3)
    logits = head(hidden)
    targets, row = torch.tensor([0, 4, 2, 2, 1, 3]), torch.tensor([0, 0, 0, 1, 2, 2])
    expected = torch.zeros(4)
    for r in range(4):
        tokens = [n for n in range(6) if row[n] == r]
        for n in tokens:
            p = logits[n].exp()[targets[n]] / logits[n].exp().sum()
            expected[r] = expected[r] - torch.log(p) / len(tokens)
    is_target = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]).bool()
    ids = torch.zeros(4, 4, dtype=torch.long).masked_scatter(is_target, targets)
    nll = losses.autoregressive_nll(hidden, head, ids, is_target)        # row 3 has no target: 0
    assert torch.allclose(nll, expected)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    ours = torch.autograd.grad((nll * weight).sum(), head.weight)[0]
    theirs = torch.autograd.grad((expected * weight).sum(), head.weight)[0]
    assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("at_once", [1, 10, 15, 1000])
def test_logits_in_chunks_change_nothing(at_once, monkeypatch):
    """Guards: a chunk left out or counted twice, a gradient lost in the recomputation. Oracle: all
    logits at once, in double precision."""
    torch.manual_seed(2)
    head, hidden = torch.nn.Linear(3, 5).double(), torch.randn(7, 3).double().requires_grad_()
    targets = torch.tensor([0, 4, 2, 2, 1, 3, 0])
    seen = []
    head.register_forward_hook(lambda _, __, logits: seen.append(logits.numel()))
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", at_once)
    ours = losses.token_nll(hidden, head, targets)
    assert max(seen) <= max(5, at_once)
    expected = -head(hidden).float().log_softmax(1)[range(7), targets]
    assert torch.allclose(ours, expected)
    weight = torch.arange(7.0)
    for of in (hidden, head.weight):
        a, b = (torch.autograd.grad((nll * weight).sum(), of, retain_graph=True)[0]
                for nll in (ours, expected))
        assert torch.allclose(a, b, atol=1e-6)


def test_the_three_losses_are_shares_of_one_mean():
    """Guards: tasks that do not add up to E[L_tau], lambda on a part of them, NaN from a task that
    no row drew."""
    nll, task = torch.tensor([1.0, 3.0, 5.0, 3.0]), torch.tensor([0, 1, 1, 0])
    l_c, l_g, l_d = (loss(nll, task) for loss in (
        losses.captioning_loss, losses.grounding_loss, losses.dense_captioning_loss))
    assert (l_c.item(), l_g.item(), l_d.item()) == (1.0, 2.0, 0.0)
    assert l_c + l_g + l_d == nll.mean()
    assert losses.total_loss(torch.tensor(2.0), l_c, l_g, l_d, 5.0).item() == 2 + 5 * 3
    none = torch.zeros(0)
    assert losses.grounding_loss(none, none).item() == 0
