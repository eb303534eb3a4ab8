"""What a run says while it works: bars, metrics.jsonl, and how long each part took."""
from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from minipeso import parallel

EVERY = 10  # training steps between two lines of metrics.jsonl


class Journal:
    """journal(record) moves the bar of the record's stage; every tenth step, and each epoch's
    validation, becomes a line of metrics.jsonl. With `tick`, no bar of its own: tick(pairs) a step, and
    every step becomes a line, for what is computed from them.

    `text` holds all the lines: it is saved with the training state, and after an interruption `replay`
    says it again, so the file is what an uninterrupted run writes whatever had reached it."""

    def __init__(self, path: Path, name: str, tick: Callable[[int], None] | None = None):
        self.path, self.name, self.tick, self.bar = path, name, tick, None
        self.text, self.earlier, self.began = "", 0.0, time.perf_counter()

    def __call__(self, record: dict) -> None:
        if "step" in record:
            self.show(record)
        if self.tick or record.get("step", 1) % EVERY == 1 or "valid_ce" in record:
            self.say(json.dumps({"name": self.name, **record}, allow_nan=False) + "\n")

    def say(self, lines: str) -> None:
        if not parallel.rank():
            with open(self.path, "a") as file:
                file.write(lines)
        self.text += lines

    def replay(self, text: str, seconds: float) -> None:
        """Says what `text` has beyond what was said already; `seconds` is how long that had taken."""
        new = text.removeprefix(self.text)
        self.say(new)
        self.earlier, self.began = seconds, time.perf_counter()
        if self.tick:
            self.tick(sum(json.loads(line).get("pairs", 0) for line in new.splitlines()))

    def seconds(self) -> float:
        """Since the first of these lines, without the time between an interruption and going on."""
        return self.earlier + time.perf_counter() - self.began

    def show(self, record: dict) -> None:
        if self.tick:
            return self.tick(record.get("pairs", 0))
        if self.bar is None:
            self.bar = tqdm(total=record["steps"], desc=f"{self.name} D{record['stage']}", unit="step", leave=False,
                            initial=record["step"] - 1, disable=parallel.rank() > 0)
            self.shown, self.tokens = time.perf_counter(), -record.get("tokens", 0)  # from the end of the first step on
        if record.get("last"):
            self.bar.close()
            self.bar = None
        elif "ce" in record:
            self.bar.update(record["step"] - self.bar.n)
            self.tokens += record["tokens"]
            rate = self.tokens / (time.perf_counter() - self.shown)
            self.bar.set_postfix_str(f"ce {record['ce']:.3f}, prox {record['prox']:.1e}, prox/ce "
                                     f"{record['prox_ce_ratio']:.1e}, lr {record['lr']:.1e}, {rate:,.0f} tok/s", False)


def counter(name: str, total: int, unit: str) -> Callable[[int], None]:
    """A bar as a function of how many are done since the last call; it appears with the first and
    goes when all are done."""
    bar = None

    def advance(n: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, desc=name, unit=unit, leave=False, disable=parallel.rank() > 0)
        bar.update(n)
        if bar.n >= total:
            bar.close()
    return advance


class Clock:
    """clock(part) books the seconds since the last call on `part`, and those of an `earlier` start."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def __call__(self, part: str, earlier: float = 0.0) -> None:
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last + earlier
        self.last = now
