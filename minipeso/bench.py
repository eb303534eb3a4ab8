"""How fast is this, beside what one would otherwise use for the same work?

    python -m minipeso.bench train       LoRA steps on the sliding-window pairs of whole users; transformers + peft
    python -m minipeso.bench generate    the ten best items of 64 users, over a trie of 26,000; transformers
    python -m minipeso.bench trie        building the trie, and a step of it, at --items; nested dictionaries
    python -m minipeso.bench load        a checkpoint of --shape (1b: Llama 3.2) into memory; transformers, bytes alone

Both sides get the same weights and data, are held to the same results first, and then take turns.
On a busy machine trust the ratios, not the ms. The peers are test extras.
"""
from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from minipeso import race, race_load, race_trie
from minipeso.config import UsageError, guard
from minipeso.race_llama import LEVELS, Case, generate_contest, libraries, make_case, shape_of, train_contest


def model(task: str, case: Case, rounds: int) -> None:
    """Prints what was found equal, and one line a contender; its ratio is of pairs of rounds."""
    print(race.machine(torch, *libraries()) + f"; {torch.get_num_threads()} threads")
    runs, count, unit, equal = {"train": train_contest, "generate": generate_contest}[task](case)
    shape, on_gpu = case.ours.config, case.ours.device.type == "cuda"
    print(f"{task} on {case.ours.device}: hidden {shape.hidden_size}, {shape.num_hidden_layers} layers, "
          f"vocabulary {shape.vocab_size} + {LEVELS * case.template.n_codes}, {count} {unit}\nequal: {equal}")
    seconds = race.compare(runs, rounds, torch.cuda.synchronize if on_gpu else lambda: None)
    print(*race.lines(seconds, count, unit), sep="\n")


def trie(args: argparse.Namespace) -> None:
    print(race.machine(torch))
    print(f"trie: {args.items:,} random items of {race_trie.LEVELS} x {race_trie.CODES} codes\n"
          f"equal: {race_trie.check(args.items)}")
    print(*race_trie.build_race(args.items, args.rounds), *race_trie.step_table(args.items, args.rounds), sep="\n")


def load(args: argparse.Namespace) -> None:
    """Warm: the file is in the page cache. Cold: it was dropped from there, though a virtual machine's host may have it."""
    print(race.machine(torch, libraries()[0]))
    with TemporaryDirectory() as name:
        file = race_load.write_base(shape_of(args.shape), Path(name))
        print(f"load: {file.stat().st_size:,} bytes, {args.shape}, bfloat16\nequal: {race_load.check(file.parent)}")
        for cache in ("warm", "cold"):
            print(f"{cache} cache", *race_load.load_race(file, args.rounds, cache), sep="\n")
        count, size = race_load.state_bytes(shape_of(args.shape), Path(name))
        print(f"training state of the adapter, rank {race_load.RANK}: {count:,} numbers, {size / 1e6:,.1f} MB on the disk")


def case(args: argparse.Namespace) -> None:
    model(args.task, make_case(shape_of(args.shape), device=args.device), args.rounds)


TASKS = {"train": case, "generate": case, "trie": trie, "load": load}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--shape", choices=("tiny", "small", "small-bigvocab", "1b"), default="tiny")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--items", type=int, default=1_000_000)
    args = parser.parse_args()
    for flag in ("rounds", "items"):
        if getattr(args, flag) < 1:
            raise UsageError(f"--{flag} is out of range\nfound {getattr(args, flag)}\ngive a number >= 1")
    TASKS[args.task](args)


if __name__ == "__main__":
    guard(main)
