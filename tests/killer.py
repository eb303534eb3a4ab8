"""Kills a run again and again: python -m tests.killer FOLDER KILLS SEED -> one line of JSON.

One import of torch serves all starts: each is a fork that trains in FOLDER/run with --resume until SIGKILL comes at a
random moment. A run that ends before is compared with an uninterrupted one, byte for byte, and begun anew."""
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
from minipeso.config import MAY_CHANGE
from minipeso.runs import checkpoints
from tests.micro import fingerprint, micro

CHANGES = dict(epochs=2, compare="pretrain,inflora-all-inherit", lam=1e4)


def start(out: Path) -> int:
    """The pid of a process that trains in `out`."""
    if pid := os.fork():
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
    settings = json.loads((out / "config.json").read_text())
    return fingerprint(out) | {"stats.md": (out / "stats.md").read_bytes(),
                               "config.json": {k: v for k, v in settings.items() if k not in MAY_CHANGE}}


def main(folder: Path, kills: int, seed: int) -> dict:
    """At least `kills` kills; more, up to three times as many, until they have come in three phases."""
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1)])  # imports for a second what every start would import anew
    checkpoints.SHARE = 0.3  # more saves, so that more kills come while saving
    draw, out, began = random.Random(seed), folder / "run", time.monotonic()
    assert os.waitpid(start(folder / "whole"), 0)[1] == 0
    length, whole, seen, runs, killed = time.monotonic() - began, content(folder / "whole"), set(), 0, 0
    while (more := killed < kills or len(seen) < 3 and killed < 3 * kills) or not runs:
        pid = start(out)
        if more:
            time.sleep(draw.uniform(0.02, 0.9 * length))
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            killed += 1
            seen |= {max(out.glob("checkpoints/[!.]*"), key=lambda p: p.stat().st_mtime, default=out).name}
            continue
        wrong = [f"status {status}"] if status else [k for k, v in content(out).items() if whole.get(k) != v]
        if wrong or list(out.rglob(".*.part-*")):
            return {"wrong": wrong, "seen": sorted(seen), "parts": [str(p) for p in out.rglob(".*.part-*")]}
        shutil.rmtree(out)
        runs += 1
    return {"kills": killed, "runs": runs, "seen": sorted(seen)}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
