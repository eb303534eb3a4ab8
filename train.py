"""PESO from raw reviews to the results table, in the order of the paper.

    python train.py                                         a drifting toy world: offline, CPU, two minutes
    python train.py --dataset DIR --users 2000              your reviews (the Hub's schema), or the authors' blocks
    python train.py --dataset instruments --lambda 2.0      the paper: Llama-3.2-1B on one GPU
    python train.py --method single --compare "" --seed 1   one baseline alone
    torchrun --nproc_per_node 8 train.py ...                the same on eight GPUs
    python train.py ... --resume                            goes on after Ctrl-C, kill or power cut, to the same bytes

Every number is a flag: --help lists them with their sources. A run ends with RUN/results.json.
"""
from __future__ import annotations

from pathlib import Path

import torch

from minipeso import config, continual, parallel
from minipeso.runs import disk, prepare, report, signals
from minipeso.config import Config
from minipeso.evaluate import reference_hits
from minipeso.runs.explain import dry_run, explain
from minipeso.runs.guard import guard
from minipeso.runs.run import learn_first, learn_later, set_up, two_towers


def main(cfg: Config) -> None:
    with parallel.joined(prepare.device_of(cfg)):
        start(cfg)


def start(cfg: Config) -> None:
    # knobs
    methods = [continual.method_named(name) for name in cfg.methods]
    for method in methods:
        continual.penalty_named(cfg, method)  # fails now rather than at D2
    print(config.changed(cfg), end="\n\n")
    if cfg.dry_run:
        return dry_run(cfg)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    with disk.alone(Path(cfg.out)), signals.heard():
        learn(cfg, all(method.system == "two-tower" for method in methods))


def learn(cfg: Config, towers_alone: bool) -> None:
    # with --resume: everything that an earlier start finished is taken from RUN/checkpoints
    if report.goes_on(Path(cfg.out), cfg) and report.again(Path(cfg.out), cfg):
        return

    if towers_alone:  # baselines that need no language model
        data, ranks, clock = two_towers(cfg)
        return report.finish(Path(cfg.out), cfg, ranks, reference_hits(data.stages, data.known), clock.seconds)

    # reviews -> stages D1 .. D5 -> semantic IDs -> the base model, with LoRA around every projection
    run = set_up(cfg)

    # D1 by a new adapter; then each method goes on from there, stage by stage: v_t starts at v_{t-1}
    first = learn_first(run)
    ranks = {name: learn_later(run, name, first, report.folder_of(run.out, cfg, name)) for name in cfg.methods}

    # every test user's rank -> Hit@k, NDCG@k, intervals
    report.finish(run.out, cfg, ranks, reference_hits(run.data.stages, run.data.known), run.clock.seconds)
    if cfg.explain:
        explain(run.model, run.data, run.ids, run.template, cfg)


if __name__ == "__main__":
    guard(lambda: main(config.from_args(description=__doc__)))
