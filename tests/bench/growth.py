"""How cost grows: ours at three sizes of what a user can make larger, on the tiny base; sizes take turns."""
from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch

from minipeso.beam import beam_search
from minipeso.continual import choose_trainable
from minipeso.llama import Llama
from minipeso.lora import adapters, rewrap
from minipeso.methods import METHODS
from minipeso.objective import stage_loss
from minipeso.tokens import Template, batches, collate, sequences
from minipeso.trie import Trie
from tests.bench import race
from tests.bench.llama import BEAMS, LEVELS, SHAPES, WINDOW, adapted, draw_pairs, train
from tests.bench.trie import catalogue

USERS, ITEMS = 64, 26_000


def search(model: Llama, items: int = ITEMS, history: int = WINDOW, beams: int = BEAMS) -> Callable:
    """Ranks USERS users with `history` items each."""
    prompts = [torch.randint(1, 1 + LEVELS * 256, (1 + LEVELS * history,)) for _ in range(USERS)]
    return partial(beam_search, model.eval(), prompts, Trie(catalogue(items)), 1, beams)


def epoch(model: Llama, users: int, penalty: str = "none") -> Callable:
    """AdamW over all pairs of `users` users once."""
    data = sequences(draw_pairs(ITEMS, users, 0), Template.short(catalogue(ITEMS), 256))
    some = batches(data, 128, torch.Generator().manual_seed(0))
    return partial(train, lambda batch: stage_loss(model, collate(batch), penalty, 2.0).total, some,
                   torch.optim.AdamW(race.trainable(model.train()), lr=1e-4, fused=True))


def after(method: str, t: int) -> Llama:
    """The model of `method` at stage t."""
    model, generator = adapted(SHAPES["tiny"]), torch.Generator().manual_seed(0)
    rewrap(model, METHODS[method].adapter)
    for _, layer in adapters(model):
        for _ in range(t - 1):
            layer.B.data.normal_(0, 0.02, generator=generator)
            layer.advance(generator)
    choose_trainable(model, "adapter")
    return model


def run(args: Namespace) -> None:
    model, tiny = adapted(SHAPES["tiny"]), partial(adapted, SHAPES["tiny"])
    print(race.machine())
    for title, count, unit, runs in (
            ("items, ranking", USERS, "users", {f"{n:,}": search(model, items=n) for n in (10**4, 10**5, 10**6)}),
            ("items of history", USERS, "users", {str(n): search(model, history=n) for n in (5, 10, 20)}),
            ("beams", USERS, "users", {str(n): search(model, beams=n) for n in (5, 10, 20)}),
            ("users, training", 1, "epochs", {str(n): epoch(tiny(), n) for n in (100, 200, 400)}),
            ("stages of peso", 1, "epochs", {str(t): epoch(after("peso", t), 100, "kl") for t in (2, 5, 9)}),
            ("stages of sumlora-all", 1, "epochs", {str(t): epoch(after("sumlora-all", t), 100) for t in (2, 5, 9)})):
        print(f"{title}\n{race.table(race.compare(runs, args.rounds), count, unit)}")
