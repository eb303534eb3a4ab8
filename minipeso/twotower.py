"""The two-tower rows of Tables 3 and 5: LightGCN under the same stages, test items and metrics as the LLM.

At stage t a model starts from that of t - 1 and learns D_t on the graph of D_t alone (the PISA authors' protocol);
`pretrain` stays the model of D_1. Ranking is over the items known at the stage, less those the user has had.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minipeso.config import Config
from minipeso.lightgcn import Neighbours, Questions, Tower, adjacency, fit, full_ranks, propagate
from minipeso.pisa import PISA, PIW, Contrastive
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


def learn(stages: Sequence[Stage], known: list[list[int]], n_items: int, cfg: Config, method: str,
          progress: Callable[[str], None] = lambda text: None) -> dict[str, Tensor]:
    """Method `lightgcn-...` through all stages -> {stage: ranks (users,)}, as run.learn_later's."""
    universe = Universe({u: k for k, u in enumerate(sorted(set().union(*(s.current for s in stages))))}, n_items)
    n_users = len(universe.row)
    draw = torch.Generator().manual_seed(cfg.seed)
    E = 0.01 * torch.randn(n_users + n_items, cfg.tower_width, generator=draw)  # PISA's code: N(0, 0.01^2)
    ranks, A = {}, None
    for stage, items in zip(stages, known, strict=True):
        candidates = torch.tensor(items)
        train = {u: taken[:-2] for u, taken in stage.current.items() if len(taken) > 2}
        if stage.number == 1 or (method != "lightgcn-pretrain" and train):
            progress(f"{method} D{stage.number}")
            user, item = universe.pairs(train)
            A = adjacency(user, item, n_users, n_items)
            E = _learn_stage(E, A, (user, item), stages[:stage.number], candidates, universe, (cfg, method, draw))
        H = propagate(E, A, cfg.tower_layers)
        ranks[str(stage.number)] = full_ranks(H, n_users, candidates, universe.ask(stage, 1))
    return ranks


def _learn_stage(E: Tensor, A: Tensor, edges: tuple[Tensor, Tensor], stages: Sequence[Stage], known: Tensor,
                 universe: Universe, how: tuple[Config, str, torch.Generator]) -> Tensor:
    cfg, method, draw = how
    stage, n_users = stages[-1], len(universe.row)
    tower = Tower(cfg.tower_layers, cfg.tower_negatives, cfg.tower_lr, cfg.tower_weight_decay, cfg.tower_batch,
                  cfg.tower_epochs, cfg.tower_patience)
    had = torch.unique(torch.cat([u * universe.n_items + i for u, i in (universe.pairs(stage.history), edges)]))
    check = universe.ask(stage, 2)

    def train(start: Tensor, regulariser=None) -> Tensor:
        return fit(start, edges, A, n_users, known, had, check, (tower, draw, regulariser))
    if stage.number == 1 or method in ("lightgcn-pretrain", "lightgcn-finetune"):
        return train(E)
    past = universe.pairs(_merge(stages[:-1]))
    links = _links(past, n_users, universe.n_items)
    old = torch.zeros(len(E), dtype=torch.bool)
    old[torch.cat([past[0], n_users + past[1]])] = True
    strength = cfg.pisa_alpha if method == "lightgcn-pisa" else cfg.contrast
    shared = (propagate(E, A, tower.layers), links, old, n_users, strength, cfg.tower_tau, cfg.tower_neighbours, draw)
    if method == "lightgcn-contrastive":
        return train(E, Contrastive(*shared))
    if method == "lightgcn-piw":
        return train(E, PIW(*shared, clusters=cfg.tower_clusters))
    ahead = propagate(train(E), A, tower.layers)  # the forward model: plain fine-tuning on D_t
    now = _links(edges, n_users, universe.n_items)[0]
    return train(E, PISA(*shared, next_model=ahead, next_links=now, clusters=cfg.tower_clusters,
                         share=cfg.tower_share))


def _merge(stages: Sequence[Stage]) -> dict[int, list[int]]:
    """What each user took in these stages to learn from: less validation and test items."""
    taken: dict[int, list[int]] = {}
    for stage in stages:
        for user, items in stage.current.items():
            taken.setdefault(user, []).extend(items[:-2])
    return taken


def _links(pairs: tuple[Tensor, Tensor], n_users: int, n_items: int) -> tuple[Neighbours, Neighbours]:
    """(the items of every user, the users of every item), as rows of E."""
    user, item = pairs[0].numpy(), n_users + pairs[1].numpy()
    return Neighbours(user, item, n_users + n_items), Neighbours(item, user, n_users + n_items)
