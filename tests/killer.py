"""Kills a run again and again: python -m tests.killer FOLDER KILLS SEED -> one line of JSON.

One import of torch serves all starts: each is a fork that trains in FOLDER/run with --resume until SIGKILL
comes at a random moment. A run that ends before is compared with an uninterrupted one, byte for byte, and begun
anew.
"""
from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

import train
from minipeso.runs import keeper
from tests.micro import fingerprint, micro

CHANGES = dict(epochs=2, compare="pretrain,inflora-all-inherit", method="peso", lam=1e4)
FILES = ("config.json", "stats.md", "metrics.jsonl", "semantic_ids.json", "tokens.json", "ranks.json")


def start(out: Path) -> int:
    """The pid of a process that trains in `out`."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            train.main(micro(out, resume=True, **CHANGES))
            code = 0
        finally:
            os._exit(code)


def content(out: Path) -> dict:
    """All that a run leaves but its checkpoints, which know the seconds."""
    found = {k: v for k, v in fingerprint(out).items() if "checkpoints" not in k}
    return found | {name: (out / name).read_bytes() for name in FILES if name != "config.json"} | {
        "config.json": {k: v for k, v in json.loads((out / "config.json").read_text()).items() if k != "out"}}


def phase(out: Path) -> str:
    """The newest checkpoint when a kill came."""
    made = [p for p in (out / "checkpoints").glob("[!.]*")]
    return max(made, key=lambda p: p.stat().st_mtime).name if made else "nothing yet"


def main(folder: Path, kills: int, seed: int) -> dict:
    """At least `kills` kills; more, up to three times as many, until they have come in three phases."""
    torch.set_num_threads(1)
    keeper.SHARE = 0.3  # more saves, so that more kills come while saving
    draw, out = random.Random(seed), folder / "run"
    began = time.monotonic()
    assert os.waitpid(start(folder / "whole"), 0)[1] == 0
    length = time.monotonic() - began
    whole, seen, runs, killed = content(folder / "whole"), [], 0, 0
    while (more := killed < kills or len(set(seen)) < 3 and killed < 3 * kills) or not runs:
        pid = start(out)
        if more:
            time.sleep(draw.uniform(0.02, 0.9 * length))
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            killed += 1
            seen.append(phase(out))
            continue
        if status or content(out) != whole or list(out.rglob(".*.part-*")):
            wrong = sorted(k for k, v in content(out).items() if whole.get(k) != v) if not status else []
            return {"status": status, "differ": wrong, "seen": seen, "parts": [str(p) for p in out.rglob(".*.part-*")]}
        shutil.rmtree(out)
        runs += 1
    return {"kills": killed, "runs": runs, "seen": sorted(set(seen))}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
