"""Beam search over the trie: the ten best items of every user, with their log-probabilities.

Release: transformers' generate(), one user at a time, with the prompt computed once per beam.
Here: a batch of users; the preamble is computed once for all of them, the rest of a prompt once per user."""
import torch
import torch.nn.functional as F
from torch import Tensor

from minipeso.llama import KVCache, Llama
from minipeso.trie import Trie


@torch.no_grad()
def beam_search(model: Llama, prompts: list[Tensor], trie: Trie, first_token: int, beams: int = 10,
                preamble: int = 0) -> tuple[Tensor, Tensor]:
    """codes (n, beams, L) and scores (n, beams), best first, of prompts (l,) that share their first `preamble` tokens.

    An item's score is sum_l log p(code_l | prompt, code_<l) under the softmax over the *whole* vocabulary: forbidden
    codes are left out, the others not renormalised (Paper, Release, here). A tail without items is code -1, score -inf.

    The beams of a user are branches of one sequence: each level appends their tokens to the cache, and a mask says
    which of the cached tokens are a beam's own. When beams are re-ranked, only the mask moves."""
    n, device = len(prompts), prompts[0].device
    lengths = torch.tensor([len(p) for p in prompts], device=device)[:, None]  # (n, 1)
    cache = _read(model, prompts, preamble)
    tokens = torch.stack([p[-1:] for p in prompts])  # (n, 1): one beam, the root
    sees = (torch.arange(cache.length, device=device) < lengths - 1)[:, None]  # (n, 1, cached)
    score = torch.zeros(n, 1, device=device)
    state, codes = tokens.new_zeros(n, 1), tokens.new_zeros(n, 1, 0)
    for level in range(trie.levels):
        k, first = tokens.shape[1], first_token + level * trie.n_codes
        itself = torch.eye(k, dtype=torch.bool, device=device).expand(n, k, k)
        sees = torch.cat([sees, itself], -1)  # (n, k, cached)
        hidden = model.model(tokens, (lengths + level - 1).expand(n, k), sees[:, None], cache)  # (n, k, d)
        log_p = model.lm_head.log_p(hidden, first, trie.n_codes)  # (n, k, n_codes)
        child, child_state = trie.step(state, level)  # (n, k, width) each
        gain = log_p.gather(-1, child.clamp(min=0)).masked_fill(child < 0, -torch.inf)
        total = (score[..., None] + gain).flatten(1)  # (n, k * width)
        mixed = total if trie.upto is None else mixture(total, trie, child_state.flatten(1), level)
        found, pick = mixed.topk(min(beams, total.shape[1]))  # (n, k') each, sorted
        score = total.gather(1, pick)  # the model's own
        code, state = (t.flatten(1).gather(1, pick) for t in (child, child_state))  # (n, k')
        parent = pick[..., None] // child.shape[-1]  # (n, k', 1)
        sees, codes = (t.take_along_dim(parent, 1) for t in (sees, codes))  # (n, k', cached), (n, k', level)
        codes = torch.cat([codes, code[..., None]], -1)  # (n, k', level + 1)
        tokens = first + code.clamp(min=0)
    missing = (0, beams - codes.shape[1])
    codes = codes.masked_fill(found[..., None] == -torch.inf, -1)  # a dead end on the way
    return F.pad(codes, (0, 0, *missing), value=-1), F.pad(found, missing, value=-torch.inf)


def mixture(log_p: Tensor, trie: Trie, node: Tensor, level: int) -> Tensor:
    """log((1 - w) p + w sum of the memory's p over the leaves below) of nodes (n, m) that the model gives log_p (n, m),
    as kNN-LM (Khandelwal et al. 2020) mixes the next word's; what is forbidden, -inf, stays so."""
    start, end = (trie.upto.gather(1, trie.below[level][edge]) for edge in (node, node + 1))  # (n, m)
    mixed = torch.logaddexp(log_p + (1 - trie.w).log(), (trie.w * (end - start)).log())
    return mixed.masked_fill(log_p == -torch.inf, -torch.inf)


def _read(model: Llama, prompts: list[Tensor], preamble: int) -> KVCache:
    """Keys and values of all prompts but for their last tokens, padded on the right, which no prompt sees."""
    cache, shared = KVCache(), min(preamble, min(map(len, prompts)) - 1)
    if shared:
        model.model(prompts[0][None, :shared], cache=cache, states=False)
    rest = torch.nn.utils.rnn.pad_sequence([p[shared:-1] for p in prompts], True)  # (n, longest - shared - 1)
    if rest.shape[1]:
        model.model(rest, cache=cache, states=False)
    return cache
