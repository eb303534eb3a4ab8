"""The paper's tables and figures, one command each, with error bars.

    python -m minipeso.experiments table1    gain over single on the user-disjoint and the natural split
    python -m minipeso.experiments table2    all 15 rows
    python -m minipeso.experiments table3    two-tower models beside the LLM; table5: all of them
    python -m minipeso.experiments table4    statistics of the data
    python -m minipeso.experiments figure2   regularisers, each at the lambda that validation chose
    python -m minipeso.experiments figure3   lambda
    python -m minipeso.experiments figure4   the learning rate of later stages
    python -m minipeso.experiments evorec    who pays for adaptation: active and inactive users
    python -m minipeso.experiments audit     what lambda does: ratios of gradients, how far the adapter moves

    --seeds K (3)   --workers N (a core each)   --plot F.png   and every flag of train.py
    --resume: go on in --out, whose finished cells stay

Into --out go NAME.md and NAME.json. The experiments of one --out share stage 1 and all cells.
"""
from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from minipeso import config, parallel
from minipeso.experiments import paper, scores
from minipeso.runs import prepare, report
from minipeso.experiments.cells import Cell, fill
from minipeso.config import Config, UsageError, unknown
from minipeso.rivals.cumulative import VARIANTS
from minipeso.runs.guard import guard
from minipeso.experiments.scores import Filled
from minipeso.stages import statistics, statistics_table

LAMBDAS = (0.0, 0.5, 1.0, 2.0, 5.0, 8.0)  # Figure 3; Section 5.1 searched 0.5 .. 8
RATES = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)  # Figure 4
GRID = {  # Figure 2: the paper's are unknown but for kl; chosen by the validation loss of seed 0
    "kl": (0.5, 1.0, 2.0, 5.0, 8.0), "output-kl": (0.01, 0.1, 1.0), "rank-kl": (0.5, 2.0, 8.0),
    "l2": (1e-3, 1e-2, 1e-1), "orthogonal": (1e-6, 1e-4, 1e-2)}
SINGLE, PRETRAIN, PESO = Cell("single"), Cell("pretrain"), Cell("peso")
FAMILIES = [f"{family}-{variant}" for family in ("inflora", "sumlora", "sdlora") for variant in VARIANTS]
DIVERSE = [*(f"sumlora-{variant}" for variant in VARIANTS), "sdlora-latest-inherit"]  # Table 1's rows


def penalised(**later) -> Cell:
    return Cell("peso", tuple(later.items()))


SCALES = {  # the audit: Eq. 12 as it stands, larger, as the release has it, and a scaling of ours
    "Eq. 12": [penalised(lam=lam) for lam in (0.0, 2.0, 20.0, 200.0, 2000.0, 20000.0)],
    "release: A and B apart, mean": [penalised(lam=2.0, groups="matrix", reduction="mean")],
    "ours: times the group's size": [penalised(lam=1.0, prox_scale="size")],
}


def table2(cfg: Config, done: Callable[..., Filled]) -> tuple[str, dict]:
    cells = {"pretrain": PRETRAIN, "single": SINGLE, **{name: Cell(name) for name in FAMILIES}, "peso": PESO}
    return scores.method_table(done(cells.values()), cells, SINGLE, paper.TABLE_2)


def table1(cfg: Config, done) -> tuple[str, dict]:
    cells = {(name, split): Cell(name, split=split) for name in ("single", *DIVERSE)
             for split in ("user-disjoint", "natural")}
    return scores.gain_table(done(cells.values()), cells, paper.TABLE_1)


def table4(cfg: Config, done) -> tuple[str, dict]:
    data = prepare.load_dataset(cfg, Path(cfg.out) / "world")
    rows = statistics(data.stages)
    return "\n".join([statistics_table(rows), "", *data.notes]), {"rows": rows}


def table3(cfg: Config, done) -> tuple[str, dict]:
    return table5(cfg, done, paper.TABLE_3)


def table5(cfg: Config, done, rows=tuple(paper.TABLE_5)) -> tuple[str, dict]:
    cells = {name: Cell(name) for name in rows}
    return scores.mean_table(done(cells.values()), cells, SINGLE, "method")


def evorec(cfg: Config, done) -> tuple[str, dict]:
    cells = {name: Cell(name, everyone=True) for name in ("single", "peso", "retrain", "evorec")}
    data = prepare.load_dataset(cfg, Path(cfg.out) / "world")
    active = {str(stage.number): len(stage.users) for stage in data.stages}
    return scores.split_table(done(cells.values()), cells, active)


def figure2(cfg: Config, done) -> tuple[str, dict]:
    """Each regulariser's lambda is chosen on validation (seed 0), then all seeds are run with it."""
    grid = {name: [Cell("peso", (("proximal", name), ("lam", lam))) for lam in lams] for name, lams in GRID.items()}
    tried = done([cell for cells in grid.values() for cell in cells], seeds=1)
    best = {name: min(cells, key=lambda c: scores.validation(tried[c])) for name, cells in grid.items()}
    cells = {"single": SINGLE, **{f"{name}, lambda {dict(cell.later)['lam']:g}": cell for name, cell in best.items()}}
    return scores.mean_table(done(cells.values()), cells, SINGLE, "regulariser")


def figure3(cfg: Config, done) -> tuple[str, dict]:
    cells = {f"{lam:g}": penalised(lam=lam) for lam in LAMBDAS}
    return scores.mean_table(done(cells.values()), cells, cells["0"], "lambda")


def figure4(cfg: Config, done) -> tuple[str, dict]:
    cells = {"pretrain": PRETRAIN, **{f"{rate:g}": Cell("single", (("later_lr", rate),)) for rate in RATES}}
    return scores.mean_table(done(cells.values()), cells, PRETRAIN, "lr*")


def audit(cfg: Config, done) -> tuple[str, dict]:
    cells = {(how, dict(cell.later)["lam"]): cell for how, some in SCALES.items() for cell in some}
    return scores.audit_table(done(cells.values()), cells, SCALES["Eq. 12"][0])


EXPERIMENTS = {f.__name__: f for f in (table1, table2, table3, table4, table5, figure2, figure3, figure4, audit, evorec)}


def run(name: str, cfg: Config, seeds: int, workers: int, picture: Path | None = None) -> str:
    """One experiment: computes what is missing, writes NAME.md and NAME.json, draws, -> the markdown."""
    resume = iter([cfg.resume])

    def done(cells, seeds=seeds) -> Filled:
        return fill(cfg, cells, seeds, next(resume, True), workers)  # a second call goes on from the first's cells
    text, values = EXPERIMENTS[name](cfg, done)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    text += f"\n\n`{name}`, {cfg.dataset.rstrip('/').split('/')[-1]}, --base {cfg.base.rstrip('/').split('/')[-1]}, " \
            f"{seeds} seeds, {f'{cfg.users:,}' if cfg.users else 'all'} users"
    report.write_json(out / f"{name}.json", values)
    (out / f"{name}.md").write_text(text + "\n")
    if picture:
        scores.draw(picture, name, values)
    return text


def main() -> None:
    parallel.alone("python -m minipeso.experiments, whose --workers are processes")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, prog="python -m minipeso.experiments")
    parser.add_argument("name", metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, default=3, metavar="K")
    parser.add_argument("--workers", type=int, default=0, metavar="N")
    parser.add_argument("--plot", type=Path, metavar="F.png")
    args, rest = parser.parse_known_args()
    if args.name not in EXPERIMENTS:
        raise UsageError(unknown("experiment", args.name, EXPERIMENTS))
    if args.seeds < 1:
        raise UsageError(f"--seeds is out of range\nfound {args.seeds}\ngive a number >= 1")
    cfg = config.from_args(rest)
    if not any(flag.split("=")[0] == "--out" for flag in rest):
        cfg = dataclasses.replace(cfg, out=cfg.out.replace(f"-{cfg.method}-s{cfg.seed}", "-experiments"))
    alone = cfg.threads != 1 or prepare.device_of(cfg) == "cuda"  # then one process already takes the whole machine
    workers = args.workers or (1 if alone else len(os.sched_getaffinity(0)))
    print(run(args.name, cfg, args.seeds, workers, args.plot))


if __name__ == "__main__":
    guard(main)
