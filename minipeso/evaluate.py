"""Leave-one-out evaluation: every test user's ten items by beam search, and the rank of the truth."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from minipeso import parallel
from minipeso.beam import beam_search, computed
from minipeso.llama import Llama
from minipeso.semantic_ids import SemanticIDs
from minipeso.stages import Example, Stage
from minipeso.tokens import Template
from minipeso.trie import Trie


class Ranker:
    """Beam search over the items known at a stage, and where the target stands in what it finds."""

    def __init__(self, ids: SemanticIDs, known: list[int], template: Template, beams: int = 10,
                 hit: str = "item"):
        self.template, self.beams, self.hit = template, beams, hit
        codes = ids.codes[known]  # (known, L)
        if ids.n_codes ** codes.shape[1] > 2**63:
            raise ValueError(f"semantic IDs too long to be numbered\n{ids.n_codes} codes on {codes.shape[1]} levels "
                             "are more IDs than 63 bits count\nuse fewer --levels or --codes")
        self.trie = Trie(codes, ids.n_codes)
        key, order = self._key(codes).sort(stable=True)  # items that share an ID: by item number
        self.keys, self.key_of = key, dict(zip(known, self._key(codes).tolist()))
        self.place = dict(zip(torch.tensor(known)[order].tolist(), range(len(known))))

    def _key(self, codes: Tensor) -> Tensor:
        """One integer an ID, (..., L) -> (...); -1 for what is no item."""
        weights = self.trie.n_codes ** torch.arange(codes.shape[-1])
        return torch.where((codes >= 0).all(-1), (codes * weights).sum(-1), -1)

    def ranks(self, model: Llama, examples: list[Example], batch: int = 64,
              progress: Callable[[int], None] = lambda n: None) -> Tensor:
        """(n,) int64: the 1-based rank of every example's target, 0 if it is not found.

        hit "item": items that share an ID take their places one after another, by item number, so
        a shared ID is no free hit. hit "id" (Release): the ID's place, whoever shares it.
        Every example counts, and is ranked by one process; those of like length are searched together.
        """
        model.eval()
        trie, preamble = self.trie.to(model.device), computed(model, self.template.preamble)
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].history))
        ranks = torch.zeros(len(examples), dtype=torch.long)
        for start in parallel.share(range(0, len(order), batch)):
            some = order[start:start + batch]
            prompts = [self.template.prompt(examples[i].history).to(model.device) for i in some]
            codes, _ = beam_search(model, prompts, trie, self.template.first_token, self.beams, preamble)
            ranks[some] = self._ranks(self._key(codes.cpu()), [examples[i].target for i in some])
            progress(len(some) * parallel.size())
        return parallel.total(ranks)

    def _ranks(self, found: Tensor, targets: list[int]) -> Tensor:
        """found (n, beams) keys, best first -> ranks (n,)."""
        own = torch.tensor([self.key_of.get(t, -2) for t in targets])[:, None]  # (n, 1); -2: not known
        match = found == own  # (n, beams)
        if self.hit == "id":
            before = match.long().argmax(1)
        else:
            size = torch.searchsorted(self.keys, found, right=True) - torch.searchsorted(self.keys, found)
            size = size.masked_fill(found < 0, 0)  # (n, beams): items of each ID
            ahead = (size.cumsum(1) - size).gather(1, match.long().argmax(1)[:, None])[:, 0]
            place = torch.tensor([self.place.get(t, 0) for t in targets])
            before = ahead + place - torch.searchsorted(self.keys, own)[:, 0]
        return torch.where(match.any(1), before + 1, 0)


def reference_hits(stages: list[Stage], known: list[list[int]], top: int = 10) -> dict[str, dict]:
    """Per stage, Hit@10 of two recommenders that know no user: ten items at random among the known
    ones, and the ten most taken in D_1 .. D_t, less each stage's validation and test items; and the share of
    targets that are cold, for nobody takes them in what can be learnt."""
    counts, found = Counter(), {}
    for stage, items in zip(stages, known, strict=True):
        counts.update(i for taken in stage.current.values() for i in taken[:-2])
        best = set(sorted(counts, key=lambda i: (-counts[i], i))[:top])
        targets = [taken[-1] for taken in stage.current.values()]
        popular, cold = (sum(map(test, targets)) / len(targets) if targets else None
                         for test in (best.__contains__, lambda t: not counts[t]))
        found[str(stage.number)] = {"random": min(1.0, top / len(items)), "popularity": popular, "cold": cold}
    return found
