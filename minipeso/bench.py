"""How fast is this, beside what one would otherwise use for the same work?

    python -m minipeso.bench train       LoRA steps on the sliding-window pairs of whole users; transformers + peft
    python -m minipeso.bench generate    the ten best items of 64 users, over a trie of 26,000; transformers

Both sides get the same weights and data, are held to the same results first, and then take turns.
On a busy machine trust the ratios, not the ms. The peers are test extras.
"""
from __future__ import annotations

import argparse

import torch

from minipeso import race
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("train", "generate"))
    parser.add_argument("--shape", choices=("tiny", "small", "small-bigvocab"), default="tiny")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.rounds < 1:
        raise UsageError(f"--rounds is out of range\nfound {args.rounds}\ngive a number >= 1")
    model(args.task, make_case(shape_of(args.shape), device=args.device), args.rounds)


if __name__ == "__main__":
    guard(main)
