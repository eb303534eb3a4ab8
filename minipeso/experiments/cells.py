"""The cells of a table: one method with one setting on one seed, computed once and kept.

    OUT/settings.json                       what all cells have in common; another run of OUT must agree
    OUT/seed-<s>[-disjoint]/                stage 1, learnt once for all the seed's cells
    OUT/seed-<s>[-disjoint]/<cell>/cell.json   ranks and what training said; a finished cell is never recomputed
"""
from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import queue
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, multiprocessing
from tqdm import tqdm

from minipeso import continual
from minipeso.runs import disk, prepare, report
from minipeso.config import MAY_CHANGE, Config, UsageError, flag
from minipeso.rivals.evorec import inactive
from minipeso.runs.journal import Clock
from minipeso.runs.run import SEARCH, learn_first, learn_later, set_up

FREE = {"method", "compare", "seed", "split", *MAY_CHANGE}


class Cell(NamedTuple):
    """A method, the settings in which it differs from the table's, and the split."""

    method: str
    later: tuple[tuple[str, object], ...] = ()  # act from D_2 on, so that all share stage 1
    split: str = "natural"
    everyone: bool = False  # rank inactive users too, behind each stage's own

    @property
    def label(self) -> str:
        return " ".join([self.method, *(f"{flag(name)} {value}" for name, value in self.later)])

    @property
    def folder(self) -> str:
        return "_".join([self.method, *(f"{name}-{value}" for name, value in self.later), *["everyone"] * self.everyone])


class Result(NamedTuple):
    """What one seed of a cell gave; without ranks it diverged."""

    ranks: dict[str, Tensor]  # {stage: (users,)}
    training: dict[str, dict]  # {stage: {"valid_ce", "prox_ce_ratio", "moved", "anchor", "touched"}}
    diverged: str = ""
    seconds: float = 0.0  # of learning D_2 .. D_T, without ranking


def fill(cfg: Config, cells: Iterable[Cell], seeds: int, resume: bool, workers: int = 1) -> dict[Cell, list[Result]]:
    """Every cell's results for seeds 0 .. seeds - 1, by `workers` processes: each has a share of the cells of one
    seed and split. One bar for the whole, with the time that is left. ValueError while another fill works in cfg.out."""
    with disk.alone(Path(cfg.out)):
        return _fill(cfg, list(dict.fromkeys(cells)), seeds, resume, workers)


def _fill(cfg: Config, cells: list[Cell], seeds: int, resume: bool, workers: int) -> dict[Cell, list[Result]]:
    out = Path(cfg.out)
    splits = {split: prepare.load_dataset(dataclasses.replace(cfg, split=split), out / "world")
              for split in dict.fromkeys(cell.split for cell in cells)}
    agree(out, cfg, {split: prepare.fingerprint(data.stages) for split, data in splits.items()}, resume)
    groups = [(seed, split, [c for c in cells if c.split == split and not _file(out, seed, c).is_file()])
              for seed in range(seeds) for split in splits]
    busy = sum(bool(some) for *_, some in groups)
    pieces = workers // math.gcd(busy, workers)  # of each group, so that all processes have as much to do
    tasks = [(seed, split, some[i::pieces]) for i in range(pieces) for seed, split, some in groups if some[i::pieces]]
    total = sum(work(cfg, splits[split].stages, some) for _, split, some in tasks)
    with tqdm(total=total, unit="pair", unit_scale=True, desc="cells", dynamic_ncols=True) as bar:
        _compute_all([(cfg, *task) for task in tasks], workers, bar)
    return {cell: [read(_file(out, seed, cell)) for seed in range(seeds)] for cell in cells}


def agree(out: Path, cfg: Config, data: dict[str, str], resume: bool) -> None:
    """Writes settings.json, or compares with the one there: cells of other settings are not mixed."""
    now = {k: v for k, v in json.loads(json.dumps(dataclasses.asdict(cfg))).items() if k not in FREE}
    file = out / "settings.json"
    if file.is_file():
        before = json.loads(file.read_text())
        data = before.pop("data") | data
        if not resume:
            raise UsageError(f"{out} already holds cells\n{file} is there\nadd --resume to go on from them, or name "
                             "another --out")
        differ = [f"{flag(k)} {before.get(k)} there, {now.get(k)} now" for k in sorted(before.keys() | now.keys())
                  if before.get(k) != now.get(k)]
        differ += [f"the {split} data's hash" for split, seen in json.loads(file.read_text())["data"].items()
                   if seen != data[split]]
        if differ:
            raise UsageError(f"{out} holds cells of other settings\n{'; '.join(differ)}\nuse the same, or another --out")
    out.mkdir(parents=True, exist_ok=True)
    report.write_json(file, now | {"data": data})


def work(cfg: Config, stages: list, cells: list[Cell]) -> int:
    """The pairs to train on and the users to rank, in pairs, for one seed and split."""
    pairs = [sum(max(len(taken) - 2, 0) for taken in stage.current.values()) for stage in stages]
    users = [len(stage.current) * SEARCH for stage in stages]
    if not cells:
        return 0
    base = cfg.base_epochs * int(cfg.base_share * pairs[0]) if prepare.from_scratch(cfg) else 0
    total = base + cfg.epochs * pairs[0] + users[0]
    for cell in cells:
        data = continual.method_named(cell.method).data
        if continual.method_named(cell.method).system == "two-tower":
            continue  # counts no pairs
        seen = [sum(pairs[stage.number - 1] for stage in data(stages[:t])) for t in range(2, len(stages) + 1)]
        total += cfg.epochs * sum(seen) + sum(users[1:])
        if cell.everyone:
            total += SEARCH * sum(len(inactive(stages[:t])) for t in range(2, len(stages) + 1))
    return total


def _file(out: Path, seed: int, cell: Cell) -> Path:
    return _folder(out, seed, cell.split) / cell.folder / "cell.json"


def _folder(out: Path, seed: int, split: str) -> Path:
    return out / (f"seed-{seed}" + "-disjoint" * (split != "natural"))


def _compute_all(tasks: list[tuple], workers: int, bar: tqdm) -> None:
    if workers == 1 or len(tasks) < 2:
        for task in tasks:
            _compute(*task, contextlib.nullcontext(), bar.update)
        return
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(workers, context) as pool:
        done = manager.Queue()  # the pairs that any process has trained on
        first = {(seed, split): manager.Lock() for _, seed, split, _ in tasks}  # one learns stage 1, the others read it
        futures = [pool.submit(_compute, *task, first[task[1:3]], done.put) for task in tasks]
        while wait(futures, timeout=0.2).not_done or not done.empty():
            with contextlib.suppress(queue.Empty):
                while True:
                    bar.update(done.get_nowait())
        for future in futures:
            future.result()  # what failed there fails here


def _compute(cfg: Config, seed: int, split: str, cells: list[Cell], first_alone: AbstractContextManager,
             tick: Callable[[int], None]) -> None:
    """Stage 1, then these cells from there. A diverged one is noted, and the others go on."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    folder = _folder(Path(cfg.out), seed, split)
    mine = dataclasses.replace(cfg, seed=seed, split=split, out=str(folder), resume=True)
    try:
        with first_alone, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # the table speaks, not its parts
            run = set_up(mine, tick)
            first = learn_first(run)
    except FloatingPointError as error:  # then no method of this seed has anything to go on from
        for cell in cells:
            _keep(folder / cell.folder, {}, str(error), 0.0)
        return
    for cell in cells:
        place = folder / cell.folder
        place.mkdir(parents=True, exist_ok=True)
        part = run._replace(cfg=dataclasses.replace(mine, **dict(cell.later)), out=place, clock=Clock())
        (place / "metrics.jsonl").write_text("")
        try:
            ranks, diverged = learn_later(part, cell.method, first, everyone=cell.everyone), ""
        except FloatingPointError as error:
            ranks, diverged = {}, str(error)
        _keep(place, ranks, diverged, part.clock.seconds.get(cell.method, 0.0))


def _keep(place: Path, ranks: dict[str, Tensor], diverged: str, seconds: float) -> None:
    """The cell is finished: its result takes the place of its checkpoints."""
    place.mkdir(parents=True, exist_ok=True)
    report.write_json(place / "cell.json", {
        "ranks": {t: r.tolist() for t, r in ranks.items()}, "diverged": diverged,
        "training": what_training_said(place / "metrics.jsonl"), "seconds": seconds})
    disk.remove(place / "checkpoints")


def what_training_said(file: Path) -> dict[str, dict]:
    """{stage: the best validation loss, the median prox/ce gradient ratio, how far the adapter moved and
    the norm of its anchor} from a cell's metrics.jsonl."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    said = {}
    for stage in dict.fromkeys(line["stage"] for line in lines):
        mine = [line for line in lines if line["stage"] == stage]

        def all_of(name: str, pick: Callable) -> float | None:
            values = [line[name] for line in mine if name in line]
            return pick(values) if values else None
        said[str(stage)] = {"valid_ce": all_of("valid_ce", min), "prox_ce_ratio": all_of("prox_ce_ratio", statistics.median),
                            "moved": all_of("moved", max), "anchor": all_of("anchor", max),
                            "touched": all_of("touched", max)}
    return said


def read(file: Path) -> Result:
    found = json.loads(file.read_text())
    return Result({t: torch.tensor(r) for t, r in found["ranks"].items()}, found["training"], found["diverged"],
                  found["seconds"])
