"""How fast is this, beside what one would otherwise use for the same work?

    python -m minipeso.bench train       LoRA steps on the sliding-window pairs of whole users; transformers + peft
                                         (--alone: on one pair a user; --memory: peak memory)
    python -m minipeso.bench generate    the ten best items of 64 users, over a trie of 26,000; transformers

Both sides get the same weights and data, are held to the same results first, and then take turns.
On a busy machine trust the ratios, not the ms. The peers are test extras.
"""
from __future__ import annotations

import argparse
import inspect
import json
import sys

import torch

from minipeso import race
from minipeso.config import UsageError, guard
from minipeso.race_llama import (LEVELS, SHAPES, Case, generate_contest, libraries, make_case, shape_of,
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
    peaks = {name: race.child("minipeso.bench", *argv, "--only", name).said["peak"] for name in names}
    for name, peak in peaks.items():
        print(f"{name:29}{peak / 2**20:10,.0f} MiB above the models {peak / peaks[names[0]]:6.2f} x ours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=tuple(CONTESTS))
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--users", type=int, help="in a batch")
    parser.add_argument("--steps", type=int, help="of training, each on another batch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--alone", action="store_true", help="training on one pair a user, which can share nothing")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time (Linux)")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.rounds < 1:
        raise UsageError(f"--rounds is out of range\nfound {args.rounds}\ngive a number >= 1")
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


if __name__ == "__main__":
    guard(main)
