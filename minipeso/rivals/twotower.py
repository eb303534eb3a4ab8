"""The two-tower rows of Tables 3 and 5: LightGCN under the same stages, test items and metrics as the LLM.

At stage t a model starts from that of t - 1 and learns D_t on the graph of D_t alone (the PISA authors' protocol);
`pretrain` stays the model of D_1. Ranking is over the items known at the stage, less those the user has had.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minipeso.config import Config
from minipeso.rivals.lightgcn import Neighbours, Questions, Tower, adjacency, fit, full_ranks, propagate
from minipeso.rivals.pisa import PISA, PIW, Contrastive
from minipeso.stages import Stage


class Universe(NamedTuple):
    """Rows of E: user number -> row, and how many users and items there are in all stages."""

    row: dict[int, int]
    n_items: int

    def pairs(self, taken: dict[int, list[int]]) -> tuple[Tensor, Tensor]:
        """{user: items} -> rows (m,), items (m,)."""
        rows = np.repeat([self.row[u] for u in taken], [len(items) for items in taken.values()])
        items = [item for some in taken.values() for item in some]
        return torch.from_numpy(rows.astype(np.int64)), torch.tensor(items, dtype=torch.long)

    def ask(self, stage: Stage, last: int) -> Questions:
        """The item `last` places from the end of each user's stage (1: test, 2: validation), and all before it."""
        users = [u for u, taken in stage.current.items() if len(taken) >= last]
        before = [stage.history[u] + stage.current[u][:-last] for u in users]
        at = np.repeat(np.arange(len(users)), [len(items) for items in before]).astype(np.int64)
        seen = torch.tensor([item for items in before for item in items], dtype=torch.long)
        return Questions(torch.tensor([self.row[u] for u in users], dtype=torch.long), torch.tensor(
            [stage.current[u][-last] for u in users], dtype=torch.long), torch.stack([torch.from_numpy(at), seen]))


class TwoTowers:
    """The two-tower methods on one data set and seed; the model of D_1 is learnt once for all of them."""

    def __init__(self, stages: Sequence[Stage], known: list[list[int]], n_items: int, cfg: Config):
        self.stages, self.known, self.cfg = stages, [torch.tensor(items) for items in known], cfg
        users = sorted(set().union(*(stage.current for stage in stages)))
        self.universe = Universe({user: row for row, user in enumerate(users)}, n_items)
        self.n_users = len(users)
        self.tower = Tower(cfg.tower_layers, cfg.tower_negatives, cfg.tower_lr, cfg.tower_weight_decay, cfg.tower_batch,
                           cfg.tower_epochs, cfg.tower_patience)

    def learn(self, method: str) -> dict[str, Tensor]:
        """Method `lightgcn-...` through all stages -> {stage: ranks (users,)}, as run.learn_later's."""
        (E, A, state), draw, ranks = self.first, torch.Generator(), {}
        draw.set_state(state)
        for t, stage in enumerate(self.stages, start=1):
            if t > 1 and method != "lightgcn-pretrain" and any(len(taken) > 2 for taken in stage.current.values()):
                edges, A = self.graph(stage)
                E = self.fit(E, A, edges, t, draw, self.regulariser(method, E, A, edges, t, draw))
            H = propagate(E, A, self.tower.layers)
            ranks[str(stage.number)] = full_ranks(H, self.n_users, self.known[t - 1], self.universe.ask(stage, 1))
        return ranks

    @cached_property
    def first(self) -> tuple[Tensor, Tensor, Tensor]:
        """(E, graph, state of the generator) after D_1."""
        draw = torch.Generator().manual_seed(self.cfg.seed)
        rows = self.n_users + self.universe.n_items
        E = self.cfg.tower_init * torch.randn(rows, self.cfg.tower_width, generator=draw)
        edges, A = self.graph(self.stages[0])
        return self.fit(E, A, edges, 1, draw), A, draw.get_state()

    def graph(self, stage: Stage) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The stage's training pairs (rows, items), and the graph of them alone."""
        edges = self.universe.pairs({u: taken[:-2] for u, taken in stage.current.items()})
        return edges, adjacency(*edges, self.n_users, self.universe.n_items)

    def fit(self, E: Tensor, A: Tensor, edges: tuple[Tensor, Tensor], t: int, draw: torch.Generator,
            regulariser: Contrastive | None = None) -> Tensor:
        stage = self.stages[t - 1]
        taken = (self.universe.pairs(stage.history), edges)
        had = torch.unique(torch.cat([user * self.universe.n_items + item for user, item in taken]))
        return fit(E, edges, A, self.n_users, self.known[t - 1], had, self.universe.ask(stage, 2),
                   (self.tower, draw, regulariser))

    def regulariser(self, method: str, E: Tensor, A: Tensor, edges: tuple[Tensor, Tensor], t: int,
                    draw: torch.Generator) -> Contrastive | None:
        """What holds stage t >= 2 to the model of t - 1; for PISA also to a first, free fine-tuning on D_t."""
        cfg = self.cfg
        if method == "lightgcn-finetune":
            return None
        past = self.universe.pairs(_merge(self.stages[:t - 1]))
        old = torch.zeros(len(E), dtype=torch.bool)
        old[torch.cat([past[0], self.n_users + past[1]])] = True
        strength = cfg.pisa_alpha if method == "lightgcn-pisa" else cfg.contrast
        shared = (propagate(E, A, self.tower.layers), self.links(past), old, self.n_users, strength, cfg.tower_tau,
                  cfg.tower_neighbours, draw)
        if method == "lightgcn-contrastive":
            return Contrastive(*shared)
        if method == "lightgcn-piw":
            return PIW(*shared, clusters=cfg.tower_clusters)
        ahead = propagate(self.fit(E, A, edges, t, draw), A, self.tower.layers)
        return PISA(*shared, next_model=ahead, next_links=self.links(edges)[0], clusters=cfg.tower_clusters,
                    share=cfg.tower_share)

    def links(self, pairs: tuple[Tensor, Tensor]) -> tuple[Neighbours, Neighbours]:
        """(the items of every user, the users of every item), as rows of E."""
        user, item, n = pairs[0].numpy(), self.n_users + pairs[1].numpy(), self.n_users + self.universe.n_items
        return Neighbours(user, item, n), Neighbours(item, user, n)


def _merge(stages: Sequence[Stage]) -> dict[int, list[int]]:
    """What each user took in these stages to learn from: less validation and test items."""
    taken: dict[int, list[int]] = {}
    for stage in stages:
        for user, items in stage.current.items():
            taken.setdefault(user, []).extend(items[:-2])
    return taken
