"""Leave-one-out evaluation: every test user's ten items by beam search, and the rank of the truth."""
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from minipeso import parallel
from minipeso.beam import beam_search
from minipeso.llama import Llama
from minipeso.semantic_ids import SemanticIDs
from minipeso.stages import Example, Stage
from minipeso.tokens import Template
from minipeso.trie import Trie


class Ranker:
    """Beam search over the items known at a stage, and where the target stands in what it finds."""

    def __init__(self, ids: SemanticIDs, known: list[int], template: Template, beams: int = 10, hit: str = "item"):
        self.template, self.beams, self.hit = template, beams, hit
        codes = ids.codes[known]  # (known, L)
        self.trie, self.items = Trie(codes, ids.n_codes), Counter()  # how many items have an ID
        self.place = {}  # of each known item: its ID, and how many items before it have the same
        for item, code in zip(known, map(tuple, codes.tolist()), strict=True):
            self.place[item] = code, self.items[code]
            self.items[code] += 1

    def ranks(self, model: Llama, examples: list[Example], batch: int = 64,
              progress: Callable[[int], None] = lambda n: None) -> Tensor:
        """(n,) int64: the 1-based rank of every example's target, 0 if the beams do not have it. Every example is
        ranked by one process; those of like length are searched together."""
        model.eval()
        trie, template = self.trie.to(model.device), self.template
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].history))
        ranks = torch.zeros(len(examples), dtype=torch.long)
        for start in parallel.share(range(0, len(order), batch)):
            some = order[start:start + batch]
            prompts = [template.prompt(examples[i].history).to(model.device) for i in some]
            codes, _ = beam_search(model, prompts, trie, template.first_token, self.beams, len(template.preamble))
            for i, best in zip(some, codes.tolist()):  # best (beams, L)
                ranks[i] = self.rank(list(map(tuple, best)), examples[i].target)
            progress(len(some) * parallel.size())
        return parallel.total(ranks)

    def rank(self, best: list[tuple[int, ...]], target: int) -> int:
        """The target's rank among the IDs `best`. hit "item": items that share an ID take one place each, by item
        number, so a shared ID is no free hit. hit "id" (Release): all of them take the ID's one place."""
        code, before = self.place.get(target, (None, 0))
        if code not in best:
            return 0
        better = best[:best.index(code)]
        return 1 + (len(better) if self.hit == "id" else sum(self.items[other] for other in better) + before)


def reference_hits(stages: list[Stage], known: list[list[int]], top: int = 10) -> dict[str, dict]:
    """Per stage, Hit@10 of two recommenders that know no user: ten of the known items at random, and the ten most
    taken in D_1 .. D_t, less each stage's validation and test items; and the share of cold targets, which nobody
    takes in that data."""
    counts, hits = Counter(), {}
    for stage, items in zip(stages, known, strict=True):
        counts.update(i for user in stage.current for i in stage.training(user))
        best = set(sorted(counts, key=lambda i: (-counts[i], i))[:top])
        targets = [taken[-1] for taken in stage.current.values()]
        popular, cold = (sum(map(test, targets)) / len(targets) if targets else None
                         for test in (best.__contains__, lambda t: not counts[t]))
        hits[str(stage.number)] = {"random": min(1.0, top / len(items)), "popularity": popular, "cold": cold}
    return hits
