"""The four objectives of LoFi and their total (Sec. 2.0.1, Eq. 1 to 3), each a pure function.

Letters: see model.py. nll: (R,) mean -log p_LLM of each row's target tokens, given image and prompt
task: (R,) the tau of each row, an index in TASKS
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data import TASKS

LOGITS_AT_ONCE = 2 ** 25            # 134 MB in float32


def sigmoid_loss(image_emb, text_emb, t, b):
    """Eq. 1: L_s = -1/B sum_ij log sigmoid(delta_ij (t I_i.T_j + b)), delta = 1 if i == j, else -1.

    image_emb: (B, D), text_emb: (B, D), unit length; t, b: scalars, SigLIP's learned temperature
    and bias, and the sum over pairs per image, as in SigLIP (Eq. 1 states neither). Returns a
    scalar. Equal texts in a batch count as negatives.
    """
    logits = t * image_emb @ text_emb.T + b                                        # (B, B)
    delta = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -F.logsigmoid(delta * logits).sum() / len(logits)


def captioning_loss(nll, task):
    """Eq. 2: L_c = -1/R sum over captioning rows of log p_LLM(T | E_I(I), P_c) per token, T the
    report.

    nll, task: (R,). Returns a scalar. L_c, L_g and L_d are each divided by all R rows, not by their
    own, so that their sum is the mean over rows, in which the draw of tau weighs the tasks."""
    return nll[task == TASKS.index("c")].sum() / max(1, len(nll))


def grounding_loss(nll, task):
    """Eq. 3: L_g = -1/R sum over grounding rows of log p_LLM(b | E_I(I), P_g, s), b the boxes."""
    return nll[task == TASKS.index("g")].sum() / max(1, len(nll))


def dense_captioning_loss(nll, task):
    """After Eq. 3: L_d = -1/R sum over the other rows of log p_LLM(s | E_I(I), P_d, b)."""
    return nll[task == TASKS.index("d")].sum() / max(1, len(nll))


def total_loss(l_s, l_c, l_g, l_d, lam):
    """L_t = L_s + lambda L_tau. Each row drew one tau, so l_c + l_g + l_d is the mean over rows."""
    return l_s + lam * (l_c + l_g + l_d)


# ---- -log p_LLM ---------------------------------------------------------------------------------

def autoregressive_nll(hidden, head, ids, is_target):
    """-log p_LLM(target | visual tokens, prompt) of each row, averaged over its target tokens.

    hidden: (N, H), states that predict the target tokens; head: H -> vocabulary; ids, is_target:
    (R, L). Returns (R,), 0 for a row without a target. The mean over tokens gives a box (four
    numbers) the weight of a long report (not stated in the paper)."""
    nll = token_nll(hidden, head, ids[is_target])                                  # (N,)
    row_of_target, _ = is_target.nonzero(as_tuple=True)                            # (N,)
    total = nll.new_zeros(len(ids)).index_add(0, row_of_target, nll)               # (R,)
    return total / is_target.sum(1).clamp(min=1)


def token_nll(hidden, head, targets):
    """-log p_LLM of each target token. hidden: (N, H), targets: (N,) ids. Returns (N,).

    N x 262,144 logits would be the largest tensor in memory, several times over. So they are
    computed in chunks, and computed again in the backward pass."""
    def chunk_nll(h, target):
        return F.cross_entropy(head(h).float(), target, reduction="none")
    n = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    if len(hidden) <= n:
        return chunk_nll(hidden, targets)
    return torch.cat([checkpoint(chunk_nll, h, target, use_reentrant=False)
                      for h, target in zip(hidden.split(n), targets.split(n))])
