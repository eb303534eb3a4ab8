"""LightGCN beside the least that an epoch of it must do: per batch, two sparse products forward, two backward, and
Adam's pass over all vectors. And the time of a full ranking. At the size of Video Games' D_1."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from tests.bench import race
from minipeso.config import Config
from minipeso.rivals.lightgcn import Questions, Tower, adjacency, fit, full_ranks

USERS, ITEMS, EDGES, ASKED = 17_000, 26_000, 103_000, 2_000
HOW = Tower(Config.tower_layers, Config.tower_negatives, Config.tower_lr, Config.tower_weight_decay, Config.tower_batch, 1, 1)


def contest(users: int = USERS, items: int = ITEMS, edges: int = EDGES) -> tuple[dict[str, Callable], Callable]:
    """(an epoch and its bound by name, a ranking of ASKED users) on a random graph with few popular items."""
    rng = np.random.default_rng(0)
    user = torch.from_numpy(rng.integers(0, users, edges))
    item = torch.from_numpy(rng.zipf(1.3, edges) * 40503 % items)
    A, E = adjacency(user, item, users, items), 0.1 * torch.randn(users + items, Config.tower_width)
    had, first = torch.unique(user * items + item), torch.zeros(1, dtype=torch.long)
    check = Questions(first, first, torch.zeros(2, 0, dtype=torch.long))  # validation on all would be timed too

    def epoch() -> None:
        fit(E, (user, item), A, users, torch.arange(items), had, check, (HOW, torch.Generator().manual_seed(0), None))

    def bound() -> None:
        p = torch.nn.Parameter(E.clone())
        optimiser, p.grad = torch.optim.Adam([p], fused=True), torch.zeros_like(E)
        for _ in range(-(-edges // HOW.batch)):
            for _ in range(2 * HOW.layers):
                A @ E
            optimiser.step()
    asked = torch.arange(min(ASKED, users))
    seen = torch.stack([user, item])[:, user < len(asked)]
    questions = Questions(asked, torch.randint(items, asked.shape), seen)
    return {"ours": epoch, "sparse products and Adam": bound}, lambda: full_ranks(E, users, torch.arange(items), questions)


def run(rounds: int) -> None:
    runs, ranking = contest()
    print(f"{race.machine(torch)}; {torch.get_num_threads()} threads\nan epoch of LightGCN, {USERS:,} users, {ITEMS:,} items, "
          f"{EDGES:,} interactions")
    print(*race.lines(race.compare(runs, rounds), EDGES, "pairs"), sep="\n")
    seconds = race.compare({"": ranking}, rounds)[""]
    print(f"{ASKED:,} users ranked over {ITEMS:,} items: {np.median(seconds):.2f} s [{min(seconds):.2f}, {max(seconds):.2f}]")
