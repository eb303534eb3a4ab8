"""Beam search over the trie: the ten best items of every user, with their log-probabilities.

Release: transformers' generate(), which computes the prompt once per beam, one user at a time.
Here: a batch of users; the template's beginning once for all, the prompt once per user; its keys and values
shared by the beams; of the vocabulary's logits only the level's are kept.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minipeso.cache import Beginning, KVCache
from minipeso.llama import Llama
from minipeso.trie import Trie


@torch.no_grad()
def computed(model: Llama, preamble: Sequence[int]) -> Beginning | None:
    """Keys and values of the tokens with which all prompts begin, for `beam_search` to start from; None where
    that saves nothing. They hold until the model changes."""
    if len(preamble) < 2:
        return None
    start = Beginning()
    model.model(torch.tensor([preamble], device=model.device), cache=start)
    return start


@torch.no_grad()
def beam_search(model: Llama, prompts: list[Tensor], trie: Trie, first_token: int, beams: int = 10,
                preamble: Beginning | None = None) -> tuple[Tensor, Tensor]:
    """codes (n, beams, L) and scores (n, beams), best first, for prompts of any lengths >= 1. `preamble`: what was
    computed of their common beginning, which is shorter than any.

    The score of an item is sum_l log p(code_l | prompt, code_<l) under the softmax over the *whole*
    vocabulary; forbidden codes are left out without renormalising what remains (Paper, Release and
    here alike). Code c of level l is token first_token + l * n_codes + c. With fewer items than
    beams, the tail holds code -1 and score -inf.

    The beams of a user are positions of one sequence: each step appends its `beams` new keys to the
    cache, and a mask says which slots are a beam's own ancestors. Nothing in the cache ever moves;
    when beams are re-ranked, only the mask's rows are.
    """
    n, device = len(prompts), prompts[0].device
    longest = max(map(len, prompts))
    lengths = torch.tensor([len(p) for p in prompts], device=device)  # (n,)
    cache = KVCache(model.config, n, longest + beams * (trie.levels - 1), model.model.norm.weight)
    if preamble:
        cache.begin(preamble)
    past = cache.length
    rest = [p[past:] for p in prompts]
    ids = torch.nn.utils.rnn.pad_sequence(rest, batch_first=True)  # (n, longest - past), padded on the right
    # causal: a prompt never sees the padding behind it
    hidden = model.model(ids, cache=cache, at=lengths[:, None] - past - 1)  # (n, 1, d)

    score = hidden.new_zeros(n, 1, dtype=torch.float32)  # one beam, the root
    state = torch.zeros(n, 1, dtype=torch.long, device=device)
    codes = state.new_zeros(n, 1, 0)
    sees = (torch.arange(longest, device=device) < lengths[:, None])[:, None]  # (n, 1, slots so far)
    for level in range(trie.levels):
        if level:
            tokens = first_token + (level - 1) * trie.n_codes + codes[..., -1].clamp(min=0)  # (n, k)
            k = tokens.shape[1]
            itself = torch.eye(k, dtype=torch.bool, device=device).expand(n, k, k)
            sees = torch.cat([sees, itself], -1)  # (n, k, slots)
            positions = (lengths[:, None] + level - 1).expand(n, k)
            hidden = model.model(tokens, positions, sees[:, None], cache)  # (n, k, d)
        log_p = model.lm_head.log_p(hidden, first_token + level * trie.n_codes, trie.n_codes)  # (n, k, n_codes)
        child, child_state = trie.step(state, level)  # (n, k, width) each
        gain = log_p.gather(-1, child.clamp(min=0)).masked_fill(child < 0, -torch.inf)
        total = (score[..., None] + gain).flatten(1)  # (n, k * width)
        score, pick = total.topk(min(beams, total.shape[1]), dim=1)  # (n, k') each, sorted
        parent = pick // child.shape[-1]  # (n, k')
        state = child_state.flatten(1).gather(1, pick)
        new = child.flatten(1).gather(1, pick).masked_fill(score == -torch.inf, -1)
        codes = torch.cat([_rows(codes, parent), new[..., None]], -1)  # (n, k', level + 1)
        sees = _rows(sees, parent)
    return _fill(codes, score, beams)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x (n, k, m) -> (n, k', m): row index[i, j] of x[i]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def _fill(codes: Tensor, score: Tensor, beams: int) -> tuple[Tensor, Tensor]:
    """Pads (n, k, L) to (n, beams, L); a beam that died on the way is -1 in all its codes."""
    missing = beams - codes.shape[1]
    codes = codes.masked_fill((score == -torch.inf)[..., None], -1)
    codes = torch.nn.functional.pad(codes, (0, 0, 0, missing), value=-1)
    return codes, torch.nn.functional.pad(score, (0, missing), value=-torch.inf)
