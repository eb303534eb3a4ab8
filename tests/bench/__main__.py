"""How fast is this, beside what one would otherwise use for the same work?

    python -m tests.bench.__main__ train       LoRA steps on the sliding-window pairs of whole users; transformers + peft
    python -m tests.bench.__main__ generate    the ten best items of 64 users, over a trie of 26,000; transformers
    python -m tests.bench.__main__ trie        building the trie of --items, and a step of it; nested dictionaries
    python -m tests.bench.__main__ load        a checkpoint of --shape (1b: Llama 3.2) into memory; transformers, bytes alone
    python -m tests.bench.__main__ data        --rows ratings as CSV, to stages; pandas, polars, lists and dictionaries
    python -m tests.bench.__main__ rqvae       an epoch of the RQ-VAE, and the IDs of 50,000 items; the released procedure
    python -m tests.bench.__main__ towers      an epoch of LightGCN; its sparse products alone
    python -m tests.bench.__main__ growth      ours alone: seconds and bytes as items, users, stages, history, beams grow

    train, generate: --memory for peak memory instead of time; train: --alone for one pair a user

Both sides get the same data, are held to the same results first, and then take turns, or run in
processes of their own. On a busy machine trust the ratios, not the ms. The peers are test extras.
"""
from __future__ import annotations

import argparse
import inspect
import json
import sys
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tests.bench import data as race_data, growth as race_growth, load as race_load, race, rqvae as race_rqvae, towers as race_towers, trie as race_trie
from minipeso.config import UsageError
from minipeso.runs.guard import guard
from tests.bench.llama import (LEVELS, SHAPES, Case, generate_contest, libraries, make_case, shape_of,
                                 train_contest)

CONTESTS = {"train": train_contest, "generate": generate_contest}


def model(task: str, case: Case, rounds: int, **how) -> None:
    """Prints what was found equal, and one line a contender; its ratio is of pairs of rounds."""
    print(race.machine(torch, *libraries()) + f"; {torch.get_num_threads()} threads")
    runs, count, unit, equal = CONTESTS[task](case, **how)
    shape, on_gpu = case.ours.config, case.ours.device.type == "cuda"
    print(f"{task} on {case.ours.device}: hidden {shape.hidden_size}, {shape.num_hidden_layers} layers, "
          f"vocabulary {shape.vocab_size} + {LEVELS * case.template.n_codes}, {count} {unit}\nequal: {equal}")
    seconds = race.compare(runs, rounds, torch.cuda.synchronize if on_gpu else lambda: None)
    print(*race.lines(seconds, count, unit), sep="\n")


def memory(task: str, names: list[str], argv: list[str]) -> None:
    """What each contender needs at most above the loaded models, in a process of its own."""
    print(f"peak memory of {task}, {' '.join(argv)}")
    peaks = {name: race.child("tests.bench.__main__", *argv, "--only", name).said["peak"] for name in names}
    for name, peak in peaks.items():
        print(f"{name:29}{peak / 2**20:10,.0f} MiB above the models {peak / peaks[names[0]]:6.2f} x ours")


def contest(args: Namespace) -> None:
    how = {name: value for name, value in vars(args).items() if name in ("users", "steps", "alone") and value}
    strange = how.keys() - inspect.signature(CONTESTS[args.task]).parameters.keys()
    if strange:
        raise UsageError(f"--{strange.pop()} is of training\nfound {args.task}\nleave it away")
    case = make_case(shape_of(args.shape), device=args.device)
    if not args.memory:
        return model(args.task, case, args.rounds, **how)
    runs = CONTESTS[args.task](case, checked=False, **how)[0]
    if args.only:  # the child of the line below
        return print(json.dumps({"peak": race.peak_of(runs[args.only])}))
    memory(args.task, list(runs), sys.argv[1:])


def trie(args: Namespace) -> None:
    print(race.machine(torch))
    print(f"trie: {args.items:,} random items of {race_trie.LEVELS} x {race_trie.CODES} codes\n"
          f"equal: {race_trie.check(args.items)}")
    print(*race_trie.build_race(args.items, args.rounds), *race_trie.step_table(args.items, args.rounds), sep="\n")


def load(args: Namespace) -> None:
    """Warm: the file is in the page cache. Cold: it was dropped from there, though a virtual machine's host may have it."""
    print(race.machine(torch, libraries()[0]))
    with TemporaryDirectory() as name:
        file = race_load.write_base(shape_of(args.shape), Path(name))
        print(f"load: {file.stat().st_size:,} bytes, {args.shape}, bfloat16\nequal: {race_load.check(file.parent)}")
        for cache in ("warm", "cold"):
            print(f"{cache} cache", *race_load.load_race(file, args.rounds, cache), sep="\n")
        count, size = race_load.state_bytes(shape_of(args.shape), Path(name))
        print(f"training state of the adapter, rank {race_load.RANK}: {count:,} numbers, {size / 1e6:,.1f} MB on the disk")


TASKS = {"train": contest, "generate": contest, "trie": trie, "load": load, "towers": lambda args: race_towers.run(args.rounds),
         "data": lambda args: race_data.run(args.rows, args.rounds), "rqvae": lambda args: race_rqvae.run(args.rounds),
         "growth": lambda args: print(race.machine(torch), *race_growth.table(args.rounds), sep="\n")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--users", type=int, help="in a batch")
    parser.add_argument("--steps", type=int, help="of training, each on another batch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--alone", action="store_true", help="training on one pair a user, which can share nothing")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time (Linux)")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--items", type=int, default=1_000_000, help="of the trie")
    parser.add_argument("--rows", type=int, default=2_000_000, help="of the rating file")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    for flag in ("rounds", "items", "rows"):
        if getattr(args, flag) < 1:
            raise UsageError(f"--{flag} is out of range\nfound {getattr(args, flag)}\ngive a number >= 1")
    TASKS[args.task](args)


if __name__ == "__main__":
    guard(main)
