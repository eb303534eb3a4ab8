"""How fast is this, beside what one would otherwise use for the same work?

    python -m tests.bench train       LoRA steps on the sliding-window pairs of whole users; transformers + peft
    python -m tests.bench generate    the ten best items of 64 users, over a trie of 26,000; transformers
    python -m tests.bench trie        building the trie of --items; nested dictionaries
    python -m tests.bench load        a checkpoint of --shape (1b: Llama 3.2) into memory; transformers
    python -m tests.bench data        --lines ratings as CSV, to stages; pandas, polars
    python -m tests.bench rqvae       an epoch of the RQ-VAE, and the IDs of 50,000 items; the released procedure
    python -m tests.bench towers      an epoch of LightGCN; its sparse products only
    python -m tests.bench growth      ours only: seconds as items, history, beams, users, stages grow

Both sides get the same data, are held to the same results, and take turns, in this process or each in new ones.
On a busy machine trust the ratios, not the ms. The peers are test extras.
"""
from __future__ import annotations

import argparse

from minipeso.config import UsageError
from minipeso.runs.guard import guard
from tests.bench import files, growth, llama, small, trie

TASKS = {"train": llama.run, "generate": llama.run, "trie": trie.run, "load": files.load, "data": files.data,
         "rqvae": small.rqvae, "towers": small.towers, "growth": growth.run}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shape", choices=llama.SHAPES, default="tiny")
    parser.add_argument("--users", type=int, help="per batch of training and of decoding")
    parser.add_argument("--steps", type=int, help="of training, each on another batch")
    parser.add_argument("--one-pair", action="store_true", help="of training: one pair per user, which share nothing")
    parser.add_argument("--memory", action="store_true", help="of training and decoding: peak memory, not time (Linux)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--items", type=int, default=1_000_000, help="of the trie")
    parser.add_argument("--lines", type=int, default=2_000_000, help="of the rating file")
    args = parser.parse_args()
    for flag in ("rounds", "users", "steps", "items", "lines"):
        if (value := getattr(args, flag)) is not None and value < 1:
            raise UsageError(f"--{flag} is out of range\nfound {value}\ngive a number >= 1")
    TASKS[args.task](args)


if __name__ == "__main__":
    guard(main)
