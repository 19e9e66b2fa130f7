"""The four objectives of LoFi and their total (Sec. 2.0.1, Eq. 1 to 4), each a pure function.

B images  D shared width  N target tokens of all rows  R rows of the LLM (image, prompt, target)
"""

import torch
import torch.nn.functional as F

CAPTIONING, GROUNDING, DENSE_CAPTIONING = range(3)     # tau: the order of data.TASKS


def sigmoid_loss(image_emb, text_emb, t, b):
    """Eq. 1: L_s = -1/B sum_ij log sigmoid(delta_ij (t I_i.T_j + b)), delta = 1 if i == j, else -1.

    image_emb, text_emb: (B, D), unit length; t = exp(t') and b: scalars, SigLIP's learned
    temperature and bias, which Eq. 1 leaves out. Returns a scalar. Equal texts in a batch count as
    negatives."""
    logits = t * image_emb @ text_emb.T + b                                        # (B, B)
    delta = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -F.logsigmoid(delta * logits).sum() / len(logits)


def autoregressive_nll(logits, targets, row_of_target, n_rows):
    """-log p_LLM(target | visual tokens, prompt) of each row, averaged over its target tokens.

    logits: (N, vocab) where a target token is predicted; targets: (N,) ids; row_of_target: (N,) in
    [0, R). Returns (R,). The mean over tokens makes a box of numbers count as much as a report."""
    nll = F.cross_entropy(logits.float(), targets, reduction="none")               # (N,)
    total = nll.new_zeros(n_rows).index_add(0, row_of_target, nll)
    return total / torch.bincount(row_of_target, minlength=n_rows).clamp(min=1)


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


def total_loss(l_s, nll, lam=5.0):
    """L_t = L_s + lambda L_tau, tau in {c, g, d}. nll: (R,), L_tau of rows that each drew a tau."""
    return l_s + lam * nll.sum() / max(1, len(nll))
