"""Reading files, each contender in processes of its own. Ratings in the Hub's CSV form, to stages: beside reading and
sorting the same with pandas and polars, which do less (no line is checked, no key is renumbered in sorted order, no
stage is cut). A checkpoint: beside transformers."""
from __future__ import annotations

import hashlib
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn

from minipeso.files.hub import load_llama
from minipeso.files.reviews import read_reviews
from minipeso.llama import LlamaConfig
from minipeso.stages import cut
from tests.bench import race
from tests.bench.llama import SHAPES

KEYS = ["timestamp", "user_id", "parent_asin"]
DTYPE = torch.bfloat16


def write_ratings(path: Path, n: int) -> None:
    """n random ratings, some 55 bytes each, in no order: few users and items have most of them."""
    rng = np.random.default_rng(0)
    user = rng.zipf(1.3, n) % max(n // 3, 2) * 40503 % 10**9
    item = rng.zipf(1.2, n) % max(n // 8, 2) * 69069 % 10**9
    ms = rng.integers(830_000_000_000, 1_694_000_000_000, n)
    with open(path, "w") as file:
        file.write("user_id,parent_asin,rating,timestamp\n")
        file.writelines(f"AE{u:026d},B{i:09d},{t % 5 + 1}.0,{t}\n" for u, i, t in zip(user, item, ms))


def ours(path: Path) -> tuple[int, Iterator]:
    events = read_reviews(path)
    cut(events)
    return len(events.time), zip(events.time, map(events.users.__getitem__, events.user),
                                 map(events.items.__getitem__, events.item))


def pandas(path: Path) -> tuple[int, Iterator]:
    table = race.peers("pandas")[0].read_csv(path, usecols=KEYS).sort_values(KEYS).drop_duplicates(KEYS[1:])
    return len(table), zip(*(table[key] for key in KEYS))


def polars(path: Path) -> tuple[int, Iterator]:
    table = race.peers("polars")[0].read_csv(path, columns=KEYS).sort(KEYS)
    table = table.unique(KEYS[1:], keep="first", maintain_order=True)
    return len(table), zip(*(table[key] for key in KEYS))


def reading(contender: Callable, path: Path) -> tuple[Callable, Callable]:
    """The digest: the number of events, and a hash of the first 100,000."""
    if contender is not ours:
        race.peers(contender.__name__)  # imports are not what is timed

    def digest(made: tuple[int, Iterator]) -> tuple[int, str]:
        text = "".join(f"{ms} {user} {item}\n" for ms, user, item in islice(made[1], 100_000))
        return made[0], hashlib.sha256(text.encode()).hexdigest()
    return partial(contender, path), digest


def data(args: Namespace) -> None:
    print(race.machine(*race.peers("pandas", "polars")))
    with TemporaryDirectory() as folder:
        write_ratings(path := Path(folder) / "C.csv", args.lines)
        jobs = {side.__name__: (reading, side, path) for side in (ours, pandas, polars)}
        took = race.compare(jobs, args.rounds, race.child)
    events, _ = race.same("read", took)
    print(f"{args.lines:,} ratings as CSV to the earliest of every (user, item), sorted by time; polars on all cores\n"
          f"equal: {events:,} events, the first 100,000 compared")
    print(race.table(took, args.lines, "lines", lambda some: f"   peak {some[0].peak / 2**20:,.0f} MiB"))


def write_base(shape: LlamaConfig, folder: Path) -> Path:
    """Random weights in the Hub's layout; the file."""
    transformers, = race.peers("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**asdict(shape))).to(DTYPE).save_pretrained(folder)
    return folder / "model.safetensors"


def loading(name: str, folder: Path) -> tuple[Callable, Callable]:
    """From a warm page cache: dropping the file from it would not reach a virtual machine's host."""
    transformers, _ = race.peers("transformers", "transformers.models.llama.modeling_llama")
    transformers.utils.logging.disable_progress_bar()

    def run() -> nn.Module:
        load = load_llama if name == "ours" else transformers.LlamaForCausalLM.from_pretrained
        model = load(folder, dtype=DTYPE)
        for p in model.parameters():  # a number of every page is read: nothing is put off until later
            p.detach().flatten()[::1024].max()
        return model
    return run, checksum


def checksum(model: nn.Module) -> tuple[int, int]:
    """The number of tensors, and a CRC-32 of their names and bytes."""
    crc, tensors = 0, sorted(model.named_parameters())
    for name, p in tensors:
        crc = zlib.crc32(p.detach().flatten().view(torch.uint8).numpy(), zlib.crc32(name.encode(), crc))
    return len(tensors), crc


def load(args: Namespace) -> None:
    print(race.machine(*race.peers("transformers")))
    with TemporaryDirectory() as name:
        size = write_base(SHAPES[args.shape], Path(name)).stat().st_size
        jobs = {side: (loading, side, Path(name)) for side in ("ours", "transformers")}
        took = race.compare(jobs, args.rounds, race.child)
    print(f"{size:,} bytes of bfloat16\nequal: {race.same('load', took)[0]} tensors, byte for byte")
    print(race.table(took, size / 1e9, "GB", lambda some: f"   memory {some[0].above / size:.2f} x the file"))
