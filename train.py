"""PESO from raw reviews to the results table, in the order of the paper.

    python train.py                                         a drifting toy world: offline, CPU, two minutes
    python train.py --dataset DIR --users 2000              your reviews (the Hub's schema), or the authors' blocks
    python train.py --dataset instruments --lambda 2.0      the paper: Llama-3.2-1B on one GPU
    python train.py --method single --compare "" --seed 1   one baseline alone

Every number is a flag: --help lists them with their sources. A run ends with RUN/results.json.
"""
from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minipeso import config, continual, prepare, report
from minipeso.config import Config
from minipeso.evaluate import Ranker, reference_hits
from minipeso.explain import dry_run, explain
from minipeso.journal import Clock, Journal, counter
from minipeso.llama import Llama
from minipeso.lora import adapter_parameters, inject, save_peft
from minipeso.semantic_ids import SemanticIDs
from minipeso.stages import examples, statistics, statistics_table
from minipeso.tokens import Template


class Run(NamedTuple):
    cfg: Config
    out: Path
    clock: Clock
    data: prepare.Dataset
    ids: SemanticIDs
    template: Template
    model: Llama


def main(cfg: Config) -> None:
    methods = {name: continual.method_named(name) for name in cfg.methods}
    for method in methods.values():
        continual.penalty_named(cfg, method)  # fails now rather than at D2
    print(config.changed(cfg), end="\n\n")
    if cfg.dry_run:
        return dry_run(cfg)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    run = set_up(cfg)
    ranks = learn(run, methods)
    report.finish(run.out, cfg, ranks, reference_hits(run.data.stages, run.data.known), run.clock.seconds)
    if cfg.explain:
        explain(run.model, run.data, run.ids, run.template, cfg)


def set_up(cfg: Config) -> Run:
    """Data, semantic IDs, prompts, and the base model with a new adapter."""
    out, clock = Path(cfg.out), Clock()

    # data: interactions -> stages D1 .. D5
    data = prepare.load_dataset(cfg, out / "world")
    report.begin(out, cfg, prepare.fingerprint(data.stages))
    stats = "\n".join([statistics_table(statistics(data.stages)), "", *data.notes])
    print(stats, end="\n\n")
    clock("data")

    # semantic IDs: text -> vector -> RQ-VAE -> L codes an item
    model, tokenizer = prepare.load_model(cfg), prepare.load_tokenizer(cfg)
    epochs = counter("RQ-VAE", cfg.rqvae_epochs, "epoch")
    ids = prepare.semantic_ids(cfg, data, model, tokenizer, lambda epoch, loss: epochs(1))
    template = prepare.make_template(cfg, ids, tokenizer)
    print(ids.table(), end="\n\n")
    ids.save(out / "semantic_ids.json")
    (out / "stats.md").write_text(f"{stats}\n\n{ids.table()}\n")
    clock("semantic IDs")

    # the base: pretrained, or learnt here on D0; then LoRA around every projection
    generator = torch.Generator().manual_seed(cfg.seed)
    model.grow(ids.codes.shape[1] * ids.n_codes, generator, cfg.init)
    if prepare.from_scratch(cfg):
        continual.learn_base(model, data.stages[0], template, cfg, Journal(out / "metrics.jsonl", "base"))
    inject(model, cfg.rank, cfg.alpha, cfg.dropout, generator=generator)
    lora, total = (sum(p.numel() for p in ps) for ps in (adapter_parameters(model), model.parameters()))
    print(f"{total:,} parameters, {lora:,} of them in the adapter\n")
    clock("base")
    return Run(cfg, out, clock, data, ids, template, model)


def learn(run: Run, methods: dict[str, continual.Method]) -> dict[str, dict[str, Tensor]]:
    """Stage by stage: learn D_t, move the anchor, rank every test user's next item.
    All methods go on from one D1 model. -> {method: {stage: ranks (users,)}}"""
    cfg, model, stages = run.cfg, run.model, run.data.stages
    base = continual.snapshot(model, cfg)
    continual.learn_first(model, stages[:1], run.template, cfg, Journal(run.out / "metrics.jsonl", "LoRA"))
    save_peft(model, run.out / "adapters" / "stage-1", cfg.base)
    first, first_ranks, ranks = continual.snapshot(model, cfg), rank_users(run, 1), {}
    run.clock("D1")
    for name, method in methods.items():
        journal, folder = Journal(run.out / "metrics.jsonl", name), report.folder_of(run.out, cfg, name)
        continual.restore(model, first)
        ranks[name] = {"1": first_ranks}
        for t in range(2, len(stages) + 1):
            continual.learn_stage(model, method, stages[:t], run.template, cfg, base, journal)
            save_peft(model, folder / "adapters" / f"stage-{t}", cfg.base)
            ranks[name][str(t)] = rank_users(run, t)
        run.clock(name)
    return ranks


def rank_users(run: Run, t: int) -> Tensor:
    test = examples(run.data.stages[t - 1], "test", run.cfg.window)
    ranker = Ranker(run.ids, run.data.known[t - 1], run.template, run.cfg.beams, run.cfg.hit)
    return ranker.ranks(run.model, test, run.cfg.eval_batch, counter(f"test D{t}", len(test), "user"))


if __name__ == "__main__":
    config.guard(lambda: main(config.from_args(description=__doc__)))
