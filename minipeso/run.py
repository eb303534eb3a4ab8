"""One run, piece by piece: what train.py tells as a story, and what the experiments repeat."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minipeso import continual, prepare, report
from minipeso.checkpoint import Snapshot, restore, snapshot
from minipeso.config import Config
from minipeso.evaluate import Ranker
from minipeso.evorec import EvoRec, inactive
from minipeso.journal import Clock, Journal, counter
from minipeso.llama import Llama
from minipeso.lora import adapter_parameters, inject, save_peft
from minipeso.semantic_ids import SemanticIDs
from minipeso.stages import Example, Stage, examples, statistics, statistics_table
from minipeso.tokens import Template
from minipeso.twotower import TwoTowers


SEARCH = 4  # ranking a user costs about as much as training on four pairs: for bars that count both


class Run(NamedTuple):
    cfg: Config
    out: Path
    clock: Clock
    data: prepare.Dataset
    ids: SemanticIDs
    template: Template
    model: Llama
    towers: TwoTowers  # beside the LLM, for those who ask for a two-tower method
    tick: Callable[[int], None] | None = None  # takes the place of bars: pairs trained, SEARCH a user ranked

    def journal(self, name: str) -> Journal:
        return Journal(self.out / "metrics.jsonl", name, self.tick)


class First(NamedTuple):
    """What all methods share: the base with a new adapter, the model of D_1, and D_1's ranks."""

    base: Snapshot
    model: Snapshot
    ranks: Tensor


def load(cfg: Config) -> tuple[prepare.Dataset, str]:
    """Interactions -> stages D1 .. D5, and their Table 4; the run folder begins."""
    out = Path(cfg.out)
    data = prepare.load_dataset(cfg, out / "world")
    report.begin(out, cfg, prepare.fingerprint(data.stages))
    stats = "\n".join([statistics_table(statistics(data.stages)), "", *data.notes])
    print(stats, end="\n\n")
    (out / "stats.md").write_text(stats + "\n")
    return data, stats


def two_towers(cfg: Config) -> tuple[prepare.Dataset, dict[str, dict[str, Tensor]], Clock]:
    """A run of two-tower methods alone: they share the data with the LLM, and need no base."""
    data, clock, ranks = load(cfg)[0], Clock(), {}
    towers = TwoTowers(data.stages, data.known, len(data.keys), cfg)
    for name in cfg.methods:
        ranks[name] = towers.learn(name)
        clock(name)
    return data, ranks, clock


def set_up(cfg: Config, tick: Callable[[int], None] | None = None) -> Run:
    """Data, semantic IDs, prompts, and the base model with a new adapter."""
    out, clock = Path(cfg.out), Clock()
    data, stats = load(cfg)
    clock("data")

    # semantic IDs: text -> vector -> RQ-VAE -> L codes an item
    model, tokenizer = prepare.load_model(cfg), prepare.load_tokenizer(cfg)
    epochs = (lambda n: None) if tick else counter("RQ-VAE", cfg.rqvae_epochs, "epoch")
    ids = prepare.semantic_ids(cfg, data, model, tokenizer, lambda epoch, loss: epochs(1))
    template = prepare.make_template(cfg, ids, tokenizer)
    print(ids.table(), end="\n\n")
    ids.save(out / "semantic_ids.json")
    (out / "stats.md").write_text(f"{stats}\n\n{ids.table()}\n")
    clock("semantic IDs")

    # the base: pretrained, or learnt here on D0; then LoRA around every projection
    towers = TwoTowers(data.stages, data.known, len(data.keys), cfg)
    run = Run(cfg, out, clock, data, ids, template, model, towers, tick)
    generator = torch.Generator().manual_seed(cfg.seed)
    model.grow(ids.codes.shape[1] * ids.n_codes, generator, cfg.init)
    if prepare.from_scratch(cfg):
        continual.learn_base(model, data.stages[0], template, cfg, run.journal("base"))
    inject(model, cfg.rank, cfg.alpha, cfg.dropout, generator=generator)
    lora, total = (sum(p.numel() for p in ps) for ps in (adapter_parameters(model), model.parameters()))
    print(f"{total:,} parameters, {lora:,} of them in the adapter\n")
    clock("base")
    return run


def learn_first(run: Run) -> First:
    """D_1 by a new adapter, once for all methods."""
    tables = "tables" in (run.cfg.first_trains, run.cfg.later_trains)
    base = snapshot(run.model, tables)
    continual.learn_first(run.model, run.data.stages[:1], run.template, run.cfg, run.journal("LoRA"))
    save_peft(run.model, run.out / "adapters" / "stage-1", run.cfg.base)
    first = First(base, snapshot(run.model, tables), rank_users(run, 1))
    run.clock("D1")
    return first


def learn_later(run: Run, name: str, first: First, folder: Path | None = None,
                everyone: bool = False) -> dict[str, Tensor]:
    """Method `name` from the model of D_1 through D_2 .. D_T: learn the stage, save the adapter (into
    `folder`), rank every test user's next item. -> {stage: ranks (users,)}; with `everyone`, the inactive
    users' ranks follow those of the stage's users."""
    cfg, method, journal, stages = run.cfg, continual.method_named(name), run.journal(name), run.data.stages
    if method.system == "two-tower":
        return run.towers.learn(name)
    restore(run.model, first.model)
    evorec, ranks = EvoRec(len(run.data.keys), cfg) if method.system == "evorec" else None, {"1": first.ranks}
    for t in range(2, len(stages) + 1):
        shown = stages[t - 1]
        if evorec:
            shown = evorec.learn_stage(run.model, stages[:t], run.template, journal)
        else:
            continual.learn_stage(run.model, method, stages[:t], run.template, cfg, first.base, journal)
        run.clock(name)
        if folder:
            save_peft(run.model, folder / "adapters" / f"stage-{t}", cfg.base)
        ranks[str(t)] = rank_users(run, t, shown, inactive(stages[:t]) if everyone else [])
        run.clock(f"{name}: test")
    return ranks


def rank_users(run: Run, t: int, shown: Stage | None = None, besides: Sequence[Example] = ()) -> Tensor:
    """The rank of every test item of D_t (as `shown`, if its histories were shortened) among what the model now
    recommends, 0 if it is not there; then those of the questions `besides`."""
    test = [*examples(shown or run.data.stages[t - 1], "test", run.cfg.window), *besides]
    ranker = Ranker(run.ids, run.data.known[t - 1], run.template, run.cfg.beams, run.cfg.hit)
    bar = (lambda n: run.tick(SEARCH * n)) if run.tick else counter(f"test D{t}", len(test), "user")
    return ranker.ranks(run.model, test, run.cfg.eval_batch, bar)
