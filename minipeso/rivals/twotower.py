"""The two-tower rows of Tables 3 and 5: LightGCN under the same stages, test items and metrics as the LLM.

At stage t a model starts from that of t - 1 and learns D_t on the graph of D_t alone (the PISA authors' protocol);
`pretrain` stays the model of D_1. Ranking is over the items known at the stage, less those the user has had."""
from collections.abc import Sequence

import torch
from torch import Tensor

from minipeso.rivals.lightgcn import (Free, Lesson, Links, Questions, Settings, fit, inner, pairs, propagate,
                                      recommended)
from minipeso.rivals.pisa import PISA, PIW, Contrastive
from minipeso.stages import Stage


def learn(run, name: str) -> dict[str, Tensor]:
    """Method `lightgcn-...` on the run's stages -> {stage: found}. The model of D_1 is learnt once for all."""
    towers = TwoTowers(run)
    return towers.learn(name, run.once("towers-first", towers.first))


class TwoTowers:
    """The two-tower methods on one data set and seed. User u is node self.node[u], item i is node n_users + i."""
    def __init__(self, run):
        self.run, self.stages, self.n_items = run, run.stages, run.n_items
        self.seed, self.s, self.excluded = run.cfg.seed, Settings.of(run.cfg), run.cfg.seen == "exclude"
        users = sorted(set().union(*(stage.current for stage in self.stages)))
        self.node, self.n_users = {user: node for node, user in enumerate(users)}, len(users)

    def first(self) -> dict[str, Tensor]:
        """After D_1: E (U + I, d), and the state of the generator."""
        draw = torch.Generator().manual_seed(self.seed)
        E = self.s.tower_init * torch.randn(self.n_users + self.n_items, self.s.tower_width, generator=draw)
        return {"E": fit(E, self.lesson(1), self.s, draw), "generator": draw.get_state()}

    def learn(self, method: str, first: dict[str, Tensor]) -> dict[str, Tensor]:
        """Through all stages from the model of D_1 -> {stage: items (users, 10)}."""
        E, lesson, draw, found = first["E"], self.lesson(1), torch.Generator(), {}
        draw.set_state(first["generator"])
        for t, stage in enumerate(self.stages, start=1):
            if t > 1 and method != "lightgcn-pretrain" and any(map(stage.training, stage.current)):
                lesson = self.lesson(t)
                E = fit(E, lesson, self.s, draw, self.regulariser(method, E, lesson, t, draw))
            scores = inner(propagate(E, lesson.links.A, self.s.tower_layers), self.n_users)
            nodes = lambda asked: torch.tensor([self.node[e.user] for e in asked], dtype=torch.long)  # noqa: E731
            found[str(t)] = recommended(self.run, t, lambda asked: scores(nodes(asked)))  # noqa: B023
        return found

    def lesson(self, t: int) -> Lesson:
        """D_t's training pairs, and the graph of them alone."""
        stage = self.stages[t - 1]
        user, item = self.training_pairs([stage])  # (m,)
        whose, items = pairs((self.node[u], stage.history[u] + stage.training(u)) for u in stage.current)
        had = torch.unique(whose * self.n_items + items)
        links = Links(user, item, self.n_users, self.n_items)
        return Lesson(user, item, links, torch.tensor(self.run.known[t - 1]), had, self.ask(stage))

    def training_pairs(self, stages: Sequence[Stage]) -> Tensor:
        """(2, m): every (user, item) of these stages but the validation and test items."""
        return pairs((self.node[u], stage.training(u)) for stage in stages for u in stage.current)

    def ask(self, stage: Stage) -> Questions:
        """Each user's validation item, the last but one of its stage, and what it had before."""
        users = [u for u, taken in stage.current.items() if len(taken) >= 2]
        user, target = pairs((self.node[u], stage.current[u][-2:-1]) for u in users)
        before = [stage.history[u] + stage.current[u][:-2] if self.excluded else [] for u in users]
        return Questions(user, target, pairs(enumerate(before)))

    def regulariser(self, method: str, E: Tensor, lesson: Lesson, t: int, draw: torch.Generator) -> Free:
        """What holds stage t >= 2 to the model of t - 1; for PISA also to a first, free fine-tuning on D_t."""
        if method == "lightgcn-finetune":
            return Free()
        past = self.training_pairs(self.stages[:t - 1])  # (2, m)
        old = torch.zeros(len(E), dtype=torch.bool)  # (U + I,)
        old[torch.cat([past[0], self.n_users + past[1]])] = True
        links = Links(*past, self.n_users, self.n_items)
        held = propagate(E, lesson.links.A, self.s.tower_layers), links, old, self.s, draw
        if method != "lightgcn-pisa":
            return {"lightgcn-contrastive": Contrastive, "lightgcn-piw": PIW}[method](*held)
        ahead = propagate(fit(E, lesson, self.s, draw), lesson.links.A, self.s.tower_layers)
        return PISA(*held, next_model=ahead, next_links=lesson.links)
