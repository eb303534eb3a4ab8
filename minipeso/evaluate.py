"""Leave-one-out evaluation: every test user's ten items by beam search, and the rank of the truth."""
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from minipeso import parallel
from minipeso.beam import beam_search
from minipeso.llama import Llama
from minipeso.semantic_ids import SemanticIDs
from minipeso.stages import Example
from minipeso.tokens import Template
from minipeso.trie import Trie

USERS = 64  # searched at once: changes speed, not results


class Ranker:
    """Beam search over the items known at a stage, and where the target stands in what it finds."""
    def __init__(self, ids: SemanticIDs, known: list[int], template: Template, beams: int = 10, hit: str = "item"):
        self.template, self.beams, self.hit = template, beams, hit
        codes = ids.codes[known]  # (known, L)
        self.trie, self.items = Trie(codes, ids.n_codes), defaultdict(list)
        self.code, self.leaf = (dict(zip(known, of)) for of in (map(tuple, codes.tolist()), self.trie.leaf.tolist()))
        for item, code in self.code.items():
            self.items[code].append(item)  # those that share an ID

    def search(self, model: Llama, histories: Sequence[Sequence[int]], own: Sequence[set[int]] = (),
               batch: int = USERS) -> Iterator[tuple[int, list[tuple[int, ...]], list[float]]]:
        """(place in histories, IDs, scores), best first, of this process's share of the users; own: what each of them
        has, and is not shown again. Histories of like length are searched together."""
        model.eval()
        trie, template = self.trie.to(model.device), self.template
        order = sorted(range(len(histories)), key=lambda i: len(histories[i]))
        for start in parallel.share(range(0, len(order), batch)):
            some = order[start:start + batch]
            prompts = [template.prompt(histories[i]).to(model.device) for i in some]
            left = trie.without(self.taken([own[i] for i in some])) if own else trie
            found = beam_search(model, prompts, left, template.first_token, self.beams, len(template.preamble))
            for i, codes, scores in zip(some, *(t.tolist() for t in found)):  # (beams, L), (beams,)
                yield i, list(map(tuple, codes)), scores

    def ranks(self, model: Llama, examples: Sequence[Example], own: Sequence[set[int]] = (), batch: int = USERS,
              progress: Callable[[int], None] = lambda n: None) -> Tensor:
        """(n,) int64: the 1-based rank of every example's target, 0 if the beams do not have it."""
        ranks = torch.zeros(len(examples), dtype=torch.long)
        for i, best, _ in self.search(model, [e.history for e in examples], own, batch):
            ranks[i] = self.rank(best, examples[i].target, own[i] if own else ())
            progress(parallel.size())
        return parallel.total(ranks)

    def taken(self, own: Sequence[set[int]]) -> Tensor:
        """The leaves all of whose items a user has, as Trie.without wants them: (n, m)."""
        gone = [sorted({self.leaf[i] for i in items if i in self.leaf and items.issuperset(self.items[self.code[i]])})
                for items in own]
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(some, dtype=torch.long) for some in gone], True,
                                               self.trie.leaves)

    def rank(self, best: list[tuple[int, ...]], target: int, own=()) -> int:
        """The target's rank among the IDs `best`. hit "item": items that share an ID take a place each, by item number,
        so a shared ID is no free hit; the user's own take none. hit "id" (Release): all of them take one place."""
        code = self.code.get(target)
        if code not in best:
            return 0
        better = best[:best.index(code)]
        if self.hit == "id":
            return 1 + len(better)
        before = [i for i in self.items[code] if i < target] + [i for ID in better for i in self.items.get(ID, ())]
        return 1 + sum(i not in own for i in before)
