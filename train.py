"""PESO from raw reviews to the results table, in the order of the paper.

    python train.py                                         a drifting toy world: offline, CPU, two minutes
    python train.py --dataset DIR --users 2000              your reviews (the Hub's schema), or the authors' blocks
    python train.py --dataset instruments --lambda 2.0      the paper: Llama-3.2-1B on one GPU
    python train.py --compare single,peso@lambda=200        several settings from one D1 model, side by side
    torchrun --nproc_per_node 8 train.py ...                the same on eight GPUs
    python train.py ... --resume                            goes on after Ctrl-C, kill or power cut, to the same bytes

Every number is a flag: --help lists them with their sources. A run ends with RUN/results.json.
"""
from dataclasses import replace

import torch

from minipeso import config, parallel
from minipeso.config import Config
from minipeso.continual import choose_trainable, stage_data, train_stage
from minipeso.lora import adapter_parameters, advance, inject
from minipeso.methods import method_named
from minipeso.runs.command import from_args
from minipeso.runs.explain import dry_run, explain
from minipeso.runs.guard import guard
from minipeso.runs.run import FIRST, Run, begun
from minipeso.runs.setup import device_of
from minipeso.snapshot import restore, snapshot


def main(cfg: Config) -> None:
    methods = {name: method_named(name) for name in cfg.methods}
    later = {name: method.settings(cfg.of(name)) for name, method in methods.items()}  # what is wrong fails now
    print(config.changed(cfg), end="\n\n")
    if cfg.dry_run:
        return dry_run(cfg)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    language = any(method.language for method in methods.values())  # two-tower models and counts need none
    with parallel.joined(device_of(cfg)), begun(cfg) as run:  # --resume: what is finished is in its folder
        if not run.finished_before():

            # reviews -> stages D1 .. D5: a large first one, then equal parts in the order of time
            run.load_data(language)
            if language:
                make_base(run, cfg)
                learn_first(run, cfg)

            # every method from the model of D1 through D2 .. D5
            for name, method in methods.items():
                if method.learn:  # a reference, or a rival with a loop of its own (methods.py)
                    run.found[name] = run.found.get(name) or method.learn(run, name)  # some counts came with the data
                else:
                    learn_later(run, name, method, later[name])
                run.finish(name)
        run.tables()
        if cfg.explain and language:
            explain(run)


def make_base(run: Run, cfg: Config) -> None:
    """Items as tokens, and a frozen base with an adapter around every projection."""
    # an item's text -> a vector -> RQ-VAE -> four codes; a user's history -> a prompt of codes; the base is pretrained,
    # or trained here on D1's training pairs
    run.load_base()
    inject(run.model, cfg.rank, cfg.alpha, cfg.dropout, generator=run.generator)  # Eq. 3
    run.base_state = snapshot(run.model, run.whole_tables(2))
    total, lora = (sum(p.numel() for p in some) for some in (run.model.parameters(), adapter_parameters(run.model)))
    print(f"{total:,} parameters, {lora:,} of them in the adapter\n")


def learn_first(run: Run, cfg: Config) -> None:
    """D1, once for all methods: a new adapter and the new tokens' rows at the full rate, nothing to hold it to."""
    if not run.done(FIRST, 1):
        choose_trainable(run.model, cfg.first_trains)
        train_stage(run.model, stage_data(run.stages[:1], run.template, cfg.window), 1, replace(cfg, proximal="none"),
                    run.log(FIRST), run.epochs(f"{FIRST}-stage-1"))
        run.save(FIRST, 1, run.recommend(1))
    run.first = snapshot(run.model, run.whole_tables(2))


def learn_later(run: Run, name: str, method, cfg: Config) -> None:
    """The project's loop: one adapter goes from stage to stage, held near its previous state."""
    model = run.model
    for t in run.left(name):  # 2 .. T, less what an earlier start has finished
        data = stage_data([run.stages[t - 1]], run.template, cfg.window)
        if data[0]:  # somebody has something to learn from
            method.begin(model, run.stages[:t], run.template, cfg)  # layers of the method's own kind
            advance(model, torch.Generator().manual_seed(cfg.seed * 1009 + t))  # v_{t-1} <- v_t: the anchor moves up
            choose_trainable(model, cfg.later_trains)  # LoRA alone (Assumption 1); tiny: the new rows too
            if isinstance(cfg.lam, tuple) and cfg.proximal != "none":
                choose_lambda(run, name, data, t, cfg)
            else:
                train_stage(model, data, t, cfg, run.log(name), run.epochs(f"{name}-stage-{t}"))  # Eq. 12
        run.save(name, t, run.recommend(t))  # leave-one-out: ten items per user, by beam search over the trie


def choose_lambda(run: Run, name: str, data, t: int, cfg: Config) -> None:
    """--lambda auto: the stage from one start with every lambda, each a whole training; validation's best is kept."""
    start, tried, log = snapshot(run.model, run.whole_tables(2)), {}, run.log(name)
    for lam in cfg.lam:
        restore(run.model, start)
        loss = train_stage(run.model, data, t, replace(cfg, lam=lam), lambda record: log(record | {"lambda": lam}),
                           run.epochs(f"{name}-stage-{t}@{lam}"))
        tried[lam] = loss, snapshot(run.model, run.whole_tables(2))
    best = min(tried, key=lambda lam: tried[lam][0])
    restore(run.model, tried[best][1])
    log({"stage": t, "lambda": best, "tried": {f"{lam}": loss for lam, (loss, _) in tried.items()}})
    print(f"{name}, D{t}: validation chooses lambda {best:g} of {', '.join(f'{lam:g}' for lam in tried)}")


if __name__ == "__main__":
    guard(lambda: main(from_args(description=__doc__)))
