"""Leave-one-out evaluation: every test user's ten items by beam search, and the rank of the truth."""
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from minipeso import parallel
from minipeso.beam import beam_search
from minipeso.llama import Llama
from minipeso.metrics import ranks_of
from minipeso.semantic_ids import SemanticIDs
from minipeso.objective import answer_loss
from minipeso.stages import Example
from minipeso.tokens import Template, collate, sequences
from minipeso.trie import Trie

USERS = 64  # searched at once: changes speed, not results


class Ranker:
    """Beam search over the items known at a stage, and where the target stands in what it finds."""
    def __init__(self, ids: SemanticIDs, known: list[int], template: Template, beams: int = 10, hit: str = "item"):
        self.template, self.beams, self.hit, self.w = template, beams, hit, 0.0  # w: of a memory
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
            left = left.recalling(self.memory(histories, own, some), self.w) if self.w else left
            found = beam_search(model, prompts, left, template.first_token, self.beams, len(template.preamble))
            for i, codes, scores in zip(some, *(t.tolist() for t in found)):  # (beams, L), (beams,)
                yield i, list(map(tuple, codes)), scores

    def found(self, model: Llama, examples: Sequence[Example], own: Sequence[set[int]] = (), batch: int = USERS,
              progress: Callable[[int], None] = lambda n: None) -> Tensor:
        """(n, >= 10) int64: the items recommended to every example's user, best first, -1 behind them."""
        found = torch.zeros(len(examples), max(self.beams, 10), dtype=torch.long)
        for i, best, _ in self.search(model, [e.history for e in examples], own, batch):
            some = self.items_of(best, examples[i].target, own[i] if own else ())[:found.shape[1]]
            found[i, :len(some)] = torch.tensor(some, dtype=torch.long) + 1
            progress(parallel.size())
        return parallel.total(found) - 1

    def ranks(self, model: Llama, examples: Sequence[Example], *how, **also) -> Tensor:
        """(n,) int64: the 1-based rank of every example's target, 0 if it is not found. how, also: as of `found`."""
        target = torch.tensor([e.target for e in examples], dtype=torch.long)
        return ranks_of(self.found(model, examples, *how, **also), target)

    @torch.no_grad()
    def weigh(self, model: Llama, memory: Callable, asked: Sequence[Example], own: Sequence[set[int]] = ()) -> float:
        """Mixes a memory into the search -> its weight, argmax_w of mean log((1 - w) p + w p_memory) of the targets, by
        EM: w <- mean of w p_memory / ((1 - w) p + w p_memory), what the memory explains of them. Nobody asked: 0."""
        if not asked:
            return 0.0
        p, told = torch.zeros(2, len(asked)).double(), torch.tensor([self.leaf[e.target] for e in asked])
        for some in parallel.share(torch.arange(len(asked)).split(USERS)):
            answers = collate(sequences([asked[i] for i in some], self.template, share=False), model.eval().device)
            ce = answer_loss(model, answers, reduction="none").view(len(some), -1)  # (b, L), and an end
            p[0, some] = (-ce[:, :self.trie.levels].sum(1)).double().exp().cpu()
            p[1, some] = memory([e.history for e in asked], own, some).gather(1, told[some, None])[:, 0].double()
        (lm, counted), self.memory, self.w = parallel.total(p), memory, 0.5
        for _ in range(1000):
            self.w = (self.w * counted / ((1 - self.w) * lm + self.w * counted)).mean().item()
        return self.w

    def taken(self, own: Sequence[set[int]]) -> Tensor:
        """The leaves all of whose items a user has, as Trie.without wants them: (n, m)."""
        gone = [sorted({self.leaf[i] for i in items if i in self.leaf and items.issuperset(self.items[self.code[i]])})
                for items in own]
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(some, dtype=torch.long) for some in gone], True,
                                               self.trie.leaves)

    def items_of(self, best: list[tuple[int, ...]], target: int, own=()) -> list[int]:
        """The items with these IDs, in order. hit "item": those that share an ID take a place each, by number, so it is
        no free hit; the user's own take none. hit "id" (Release): an ID takes one place, the target's if it is that."""
        if self.hit == "item":
            return [i for ID in best for i in self.items.get(ID, ()) if i not in own]
        return [target if self.code.get(target) == ID else self.items[ID][0] for ID in best if ID in self.items]
