"""Ratings from the Hub's CSV form to stages, beside reading and sorting the same file with pandas, polars, and the
usual lists and dictionaries. Each runs in a process of its own, as `python -m tests.bench.data NAME FILE`.

The peers do less: no row is checked, no key is renumbered in sorted order, no stage is cut.
"""
from __future__ import annotations

import csv
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from tests.bench import race
from minipeso.config import UsageError
from minipeso.files.reviews import read_items, read_reviews
from minipeso.stages import cut

HEADER = "user_id,parent_asin,rating,timestamp"


def write_ratings(path: Path, n: int, at_once: int = 1 << 20) -> None:
    """n random ratings, some 55 bytes each, in no order: few users and items have most of them."""
    rng = np.random.default_rng(0)
    with open(path, "w") as file:
        file.write(HEADER + "\n")
        for start in range(0, n, at_once):
            m = min(at_once, n - start)
            user, item = (rng.zipf(a, m) % max(n // part, 2) * odd % 10**9 for a, part, odd in ((1.3, 3, 40503), (1.2, 8, 69069)))
            ms = rng.integers(830_000_000_000, 1_694_000_000_000, m)
            file.writelines(f"AE{u:026d},B{i:09d},{k % 5 + 1}.0,{t}\n" for k, (u, i, t) in
                            enumerate(zip(user.tolist(), item.tolist(), ms.tolist())))


def write_metadata(path: Path, n: int) -> None:
    """n items with about a kilobyte of fields each."""
    with open(path, "w") as file:
        file.writelines(json.dumps({"parent_asin": f"B{i:09d}", "title": f"A title of item {i}", "store": f"Maker {i % 997}",
                                    "categories": ["Books", "Fiction"], "description": [f"Words about {i}. " * 20],
                                    "details": {"Publisher": "House", "Pages": i % 900}, "images": ["x" * 400]}) + "\n"
                        for i in range(n))


def ours(path: Path) -> tuple[int, Iterator]:
    events = read_reviews(path)
    cut(events)
    return len(events.time), zip(events.time, map(events.users.__getitem__, events.user),
                                 map(events.items.__getitem__, events.item))


def pandas(path: Path) -> tuple[int, Iterator]:
    import pandas as pd
    table = pd.read_csv(path, usecols=["user_id", "parent_asin", "timestamp"])
    table = table.sort_values(["timestamp", "user_id", "parent_asin"]).drop_duplicates(["user_id", "parent_asin"])
    return len(table), zip(table.timestamp, table.user_id, table.parent_asin)


def polars(path: Path) -> tuple[int, Iterator]:
    import polars as pl
    table = pl.read_csv(path, columns=["user_id", "parent_asin", "timestamp"])
    table = table.sort("timestamp", "user_id", "parent_asin").unique(["user_id", "parent_asin"], keep="first", maintain_order=True)
    return len(table), zip(table["timestamp"], table["user_id"], table["parent_asin"])


def dictionaries(path: Path) -> tuple[int, Iterator]:
    first: dict[tuple[str, str], int] = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            pair, ms = (row["user_id"], row["parent_asin"]), int(row["timestamp"])
            first[pair] = min(ms, first.get(pair, ms))
    rows = sorted((ms, user, item) for (user, item), ms in first.items())
    return len(rows), iter(rows)


CONTENDERS = {"ours": ours, "pandas": pandas, "polars": polars, "lists and dictionaries": dictionaries}


def alone(name: str, path: Path) -> dict:
    """One contender's work, timed without imports; then what it made, so that all can be compared."""
    if name in ("pandas", "polars"):
        __import__(name)
    began = time.perf_counter()
    count, rows = CONTENDERS[name](path)
    seconds, peak = time.perf_counter() - began, race.peak()
    content = hashlib.sha256("".join(f"{ms} {user} {item}\n" for ms, user, item in islice(rows, 100_000)).encode())
    return {"seconds": seconds, "peak": peak, "count": count, "content": content.hexdigest()}


def metadata(path: Path, wanted: int) -> dict:
    """Of every line of a metadata file only the surviving items are kept: here each `wanted`-th."""
    lines = sum(1 for _ in open(path, "rb"))
    began = time.perf_counter()
    kept = read_items(path, {f"B{i:09d}" for i in range(0, lines, wanted)})
    return {"seconds": time.perf_counter() - began, "peak": race.peak(), "count": len(kept), "lines": lines}


def same(found: dict[str, list[race.Child]]) -> None:
    """FloatingPointError if a contender has other events."""
    made = {name: {(c.said["count"], c.said["content"]) for c in children} for name, children in found.items()}
    if len(set().union(*made.values())) != 1:
        race.refuse("read", made)


def run(rows: int, rounds: int) -> None:
    """Prints a line for every contender, and the metadata's."""
    try:
        import pandas  # noqa: F401
        import polars  # noqa: F401
    except ImportError as error:
        raise UsageError(f"the benchmark's peers are missing\n{error}\npip install -e '.[test]'") from error
    print(f"{race.machine(pandas, polars)}, which takes all of them\n{rows:,} ratings as CSV: read, the first of every "
          "(user, item) kept, sorted by time; ours also checks every row, numbers the keys and cuts stages")
    with tempfile.TemporaryDirectory() as folder:
        ratings, meta = Path(folder) / "C.csv", Path(folder) / "meta_C.jsonl"
        write_ratings(ratings, rows)
        names = [name for name in CONTENDERS if name != "lists and dictionaries" or rows <= 5_000_000]
        found = race.compare_children("tests.bench.data", {name: (name, ratings) for name in names}, rounds)
        same(found)
        print(f"equal: {found['ours'][0].said['count']:,} events, the first 100,000 compared")
        seconds = {name: [c.seconds for c in children] for name, children in found.items()}
        for line, children in zip(race.lines(seconds, rows, "rows"), found.values(), strict=True):
            print(f"{line}  peak {max(c.peak for c in children) / 2**20:,.0f} MiB")
        write_metadata(meta, rows // 4)
        child = race.child("tests.bench.data", "metadata", meta)
        print(f"metadata: {child.said['lines']:,} lines, {meta.stat().st_size / 2**20:,.0f} MiB, {child.said['count']:,} items "
              f"kept in {child.seconds:.1f} s, peak {child.peak / 2**20:,.0f} MiB")


if __name__ == "__main__":
    name, file = sys.argv[1:]
    print(json.dumps(metadata(Path(file), 100) if name == "metadata" else alone(name, Path(file))))
