"""How cost grows: seconds and bytes at three sizes of everything that a user can make larger, on the tiny base."""
from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from tests.bench import race
from minipeso.beam import beam_search
from minipeso.cache import KVCache
from minipeso.continual import METHODS, choose_trainable
from minipeso.llama import Llama
from minipeso.lora import adapters, inject, rewrap
from minipeso.objective import stage_loss
from tests.bench.llama import ALPHA, BEAMS, LEVELS, RANK, WINDOW, distinct_codes, draw_pairs, shape_of, trainable
from minipeso.tokens import Template, batches, collate, sequences
from minipeso.trie import Trie

N_CODES, USERS, ITEMS = 256, 64, 26_000


def make_model() -> Llama:
    generator = torch.Generator().manual_seed(0)
    model = Llama(shape_of("tiny")).initialise(generator, 0.05)
    model.grow(LEVELS * N_CODES, generator, 0.05)
    inject(model, RANK, ALPHA, generator=generator)
    choose_trainable(model, "adapter")
    return model


def search(model: Llama, trie: Trie, history: int, beams: int) -> tuple[Callable, int]:
    """(ranking USERS users, bytes of keys and values a user)."""
    prompts = [torch.randint(1, 1 + LEVELS * N_CODES, (1 + LEVELS * history,)) for _ in range(USERS)]
    cache = KVCache(model.config, 1, len(prompts[0]) + beams * (LEVELS - 1), model.model.norm.weight)
    size = sum(t.nbytes for pair in cache.layers for t in pair)
    return partial(beam_search, model.eval(), prompts, trie, 1, beams), size


def epoch(model: Llama, users: int, penalty: str = "none") -> Callable:
    """AdamW over all pairs of `users` users once."""
    template = Template.short(distinct_codes(ITEMS), N_CODES)
    data = sequences(draw_pairs(ITEMS, users, 0), template)
    optimiser = torch.optim.AdamW(trainable(model), lr=1e-4, fused=True)

    def run() -> None:
        model.train()
        for some in batches(data, 128, torch.Generator().manual_seed(0)):
            optimiser.zero_grad()
            stage_loss(model, collate(some), penalty, 2.0).total.backward()
            optimiser.step()
    return run


def after(method: str, t: int) -> Llama:
    """The model of `method` at stage t."""
    model = make_model()
    rewrap(model, METHODS[method].adapter)
    generator = torch.Generator().manual_seed(0)
    for _, layer in adapters(model):
        for _ in range(t - 1):
            layer.B.data.normal_(0, 0.02, generator=generator)
            layer.advance(generator)
    choose_trainable(model, "adapter")
    return model


def built(items: int) -> tuple[float, int]:
    codes = torch.from_numpy(distinct_codes(items))
    began = time.perf_counter()
    trie = Trie(codes, N_CODES)
    return time.perf_counter() - began, sum(t.nbytes for t in trie.first + trie.code)


def stored(model: Llama) -> int:
    """The bytes of all adapters, those of the past included."""
    return sum(t.nbytes for _, layer in adapters(model) for t in layer.factors())


def line(what: str, sizes: tuple, runs: dict, count: int, unit: str, notes: list[str], rounds: int) -> str:
    """Median ms a unit at every size, the sizes taking turns."""
    seconds = race.compare(runs, rounds)
    cells = [f"{size:>9,}: {np.median(s) / count * 1e3:9.3f} ms {note}"
             for size, s, note in zip(sizes, seconds.values(), notes, strict=True)]
    return f"{what:28}{unit:12}" + "  ".join(cells)


def table(rounds: int) -> list[str]:
    model, found = make_model(), []
    sizes = (10_000, 100_000, 1_000_000)
    made = [built(n) for n in sizes]
    found.append(f"{'items, building the trie':28}{'all':12}" + "  ".join(
        f"{n:>9,}: {s * 1e3:9.1f} ms {b / 2**20:,.1f} MiB" for n, (s, b) in zip(sizes, made)))
    runs = {str(n): search(model, Trie(distinct_codes(n), N_CODES), WINDOW, BEAMS)[0] for n in sizes}
    found.append(line("items, ten beams", sizes, runs, USERS, "a user", 3 * [""], rounds))
    trie = Trie(distinct_codes(ITEMS), N_CODES)
    for what, sizes, make in (("items of history", (5, 10, 20), lambda n: search(model, trie, n, BEAMS)),
                              ("beams", (5, 10, 20), lambda n: search(model, trie, WINDOW, n))):
        pairs = {str(n): make(n) for n in sizes}
        found.append(line(what, sizes, {n: run for n, (run, _) in pairs.items()}, USERS, "a user",
                          [f"{b / 2**10:,.0f} KiB" for _, b in pairs.values()], rounds))
    sizes = (100, 200, 400)
    found.append(line("users, training", sizes, {str(n): epoch(model, n) for n in sizes}, 1, "an epoch", 3 * [""], rounds))
    for method, penalty in (("peso", "kl"), ("sumlora-all", "none")):
        sizes = (2, 5, 9)
        models = [after(method, t) for t in sizes]
        runs = {str(t): epoch(m, 100, penalty) for t, m in zip(sizes, models)}
        found.append(line(f"stages, {method}", sizes, runs, 1, "an epoch",
                          [f"{stored(m) / 2**10:,.0f} KiB of adapters" for m in models], rounds))
    return found
