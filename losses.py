"""The four objectives of LoFi and their total (Sec. 2.0.1, Eq. 1 to 3), each a pure function.

B images  D shared width  R rows of the LLM (image, prompt, target)  H its width
N target tokens of all rows
With several processes each function gives its own process's share, and the shares add up.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CAPTIONING, GROUNDING, DENSE_CAPTIONING = range(3)     # tau: the order of data.TASKS


class Gather(torch.autograd.Function):
    """Rows of every process in the order of their ranks; the gradient comes back from all."""

    @staticmethod
    def forward(ctx, x):
        counts = [torch.zeros(1, dtype=torch.long, device=x.device)
                  for _ in range(dist.get_world_size())]
        dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
        counts, rank = [int(n) for n in counts], dist.get_rank()
        parts = [x.new_empty(max(counts), *x.shape[1:]) for _ in counts]
        padding = x.new_zeros(max(counts) - len(x), *x.shape[1:])
        dist.all_gather(parts, torch.cat([x, padding]))
        ctx.own = slice(sum(counts[:rank]), sum(counts[:rank + 1]))
        return torch.cat([part[:n] for part, n in zip(parts, counts)]), ctx.own.start

    @staticmethod
    def backward(ctx, gradient, _):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient[ctx.own]


def gather(x):
    """Rows of all processes (any number each) and the place of one's own first row among them."""
    return Gather.apply(x) if dist.is_initialized() else (x, 0)


def sigmoid_loss(image_emb, text_emb, t, b, first=0):
    """Eq. 1: L_s = -1/B sum_ij log sigmoid(delta_ij (t I_i.T_j + b)), delta = 1 if i == j, else -1.

    image_emb: (B, D), text_emb: (B, D), unit length; t = exp(t') and b: scalars, SigLIP's learned
    temperature and bias, which Eq. 1 leaves out. Returns a scalar. Equal texts in a batch count as
    negatives. With several processes: own images, the texts of all, and the place of the first own
    text among them."""
    logits = t * image_emb @ text_emb.T + b                                        # (B, B)
    place = torch.arange(text_emb.shape[0], device=logits.device)
    delta = 2.0 * (place[:len(logits), None] + first == place) - 1
    return -F.logsigmoid(delta * logits).sum() / len(text_emb)


def token_nll(hidden, head, targets, at_once=2 ** 25):
    """-log p_LLM of each target token: hidden (N, H), head H -> vocab, targets (N,) ids -> (N,).

    The logits, N x 262,144 for Gemma, would be the largest thing in memory, several times over: at
    most at_once of them exist, and the backward pass computes them again."""
    nll = lambda h, t: F.cross_entropy(head(h).float(), t, reduction="none")
    n = max(1, at_once // head.weight.shape[0])
    if len(hidden) <= n:
        return nll(hidden, targets)
    return torch.cat([checkpoint(nll, h, t, use_reentrant=False)
                      for h, t in zip(hidden.split(n), targets.split(n))])


def autoregressive_nll(hidden, head, ids, is_target):
    """-log p_LLM(target | visual tokens, prompt) of each row, averaged over its target tokens.

    hidden: (N, H) where a target token is predicted; head: the LLM's, to its vocabulary; ids and
    is_target: (R, L). Returns (R,), 0 for a row without a target. The mean over tokens makes a box
    of numbers count as much as a report."""
    nll = token_nll(hidden, head, ids[is_target])                                  # (N,)
    row_of_target, _ = is_target.nonzero(as_tuple=True)                            # (N,)
    total = nll.new_zeros(len(ids)).index_add(0, row_of_target, nll)               # (R,)
    return total / is_target.sum(1).clamp(min=1)


def mean_of(nll, chosen):
    """Mean of nll (R,) over the chosen rows; NaN, which says "not drawn", where there is none."""
    return (nll * chosen).sum() / chosen.sum()


def captioning_loss(nll, task):
    """Eq. 2: L_c = -E log p_LLM(T | E_I(I), P_c): the report. nll, task: (R,). Returns a scalar."""
    return mean_of(nll, task == CAPTIONING)


def grounding_loss(nll, task):
    """Eq. 3: L_g = -E log p_LLM(b | E_I(I), P_g, s): the boxes of a sentence. nll, task: (R,)."""
    return mean_of(nll, task == GROUNDING)


def dense_captioning_loss(nll, task):
    """After Eq. 3: L_d = -E log p_LLM(s | E_I(I), P_d, b): the boxes' sentence. nll, task: (R,)."""
    return mean_of(nll, task == DENSE_CAPTIONING)


def total_loss(l_s, nll, lam=5.0, n_rows=None):
    """L_t = L_s + lambda L_tau, tau in {c, g, d}. nll: (R,), L_tau of rows that each drew a tau.

    n_rows: R, or with several processes the rows of all."""
    return l_s + lam * nll.sum() / max(1, n_rows or len(nll))
