"""The paper's tables and figures, one command each, with error bars.

    python -m minipeso.experiments table1    gain over single on the user-disjoint and the natural split
    python -m minipeso.experiments table2    all 15 rows
    python -m minipeso.experiments table3    two-tower models beside the LLM; table5: all of them
    python -m minipeso.experiments table4    statistics of the data
    python -m minipeso.experiments figure2   regularisers, each at the lambda that validation chose
    python -m minipeso.experiments figure3   lambda; figure4: the learning rate of later stages
    python -m minipeso.experiments tradeoff  by lambda: who gains from the anchor; --world-alpha A for other worlds
    python -m minipeso.experiments evorec    who pays for adaptation: present and absent users

    --seeds K (5)   --workers N (a core each)   --plot F.png   --resume (finished cells stay)   all flags of train.py

An experiment is a few train.py commands, shown as they start, and a table of what they leave in --out: NAME.md and
NAME.json. All experiments of one --out share D1 and every cell."""
import argparse
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from minipeso.config import MAY_CHANGE, RECIPES, Config, UsageError, changed, unknown
from minipeso.experiments import paper, scores
from minipeso.experiments.cells import agree, fill
from minipeso.runs import report, setup
from minipeso.runs.command import from_args
from minipeso.runs.guard import guard
from minipeso.stages import statistics

LAMBDAS = (0, 2, 10, 50, 200, 1000)  # Figure 3 and the trade-off; Section 5.1 searched 0.5 .. 8
RATES = (0.01, 0.05, 0.1, 0.2, 0.5, 1)  # Figure 4
GRID = {  # Figure 2: the paper's are unknown but for kl; chosen by the validation loss of seed 0
    "kl": (0.5, 1, 2, 5, 8), "output-kl": (0.01, 0.1, 1), "rank-kl": (0.5, 2, 8), "l2": (1e-3, 1e-2, 1e-1),
    "orthogonal": (1e-6, 1e-4, 1e-2)}
COUNTS = ("popularity", "popularity-decayed", "transitions")  # in every table of methods


def table4(cfg: Config, done: Callable) -> tuple[str, dict]:
    data = setup.load_dataset(cfg, Path(cfg.out) / "world")
    rows = statistics(data.stages)
    return "\n".join([report.statistics_table(rows), "", *data.notes]), {"rows": rows}


def figure2(cfg: Config, done: Callable) -> tuple[str, dict]:
    """Each regulariser's lambda is chosen on validation (seed 0), then all seeds are run with it."""
    grid = {p: {f"{p}, lambda {lam:g}": f"peso@proximal={p}@lambda={lam}" for lam in lams} for p, lams in GRID.items()}
    tried = done({row: cell for rows in grid.values() for row, cell in rows.items()}, seeds=1)
    best = [min(rows.items(), key=lambda item: scores.validation(tried[item[0]])) for rows in grid.values()]
    return scores.mean_table(done({"single": "single"} | dict(best)), "single", "regulariser")


EXPERIMENTS = {  # (cfg, done) -> (markdown, values); done(cells or {row: cell}) gives results, learnt if not there
    "table1": lambda cfg, done: scores.gain_table(
        {s: done(["single", *paper.TABLE_1], split=s) for s in ("user-disjoint", "natural")}, paper.TABLE_1),
    "table2": lambda cfg, done: scores.method_table(done([*COUNTS, *paper.TABLE_2]), paper.TABLE_2),
    "table3": lambda cfg, done: scores.mean_table(done([*COUNTS, *paper.TABLE_3]), "single", "method"),
    "table4": table4,
    "table5": lambda cfg, done: scores.mean_table(done([*COUNTS, *paper.TABLE_5]), "single", "method"),
    "figure2": figure2,
    "figure3": lambda cfg, done: scores.mean_table(done({f"{x}": f"peso@lambda={x}" for x in LAMBDAS}), "0", "lambda"),
    "figure4": lambda cfg, done: scores.mean_table(
        done({"pretrain": "pretrain"} | {f"{rate}": f"single@later-lr={rate}" for rate in RATES}), "pretrain", "lr*"),
    "tradeoff": lambda cfg, done: scores.tradeoff_table(
        done({f"{x}": f"peso@lambda={x}" for x in LAMBDAS} | {"pretrain": "pretrain"})),
    "evorec": lambda cfg, done: scores.split_table(done(["pretrain", "single", "peso", "retrain", "evorec"])),
}


def run(name: str, cfg: Config, flags: list[str], seeds: int, workers: int, picture: Path | None = None) -> str:
    """One experiment: learns what is missing, writes NAME.md and NAME.json, draws, -> the markdown."""
    def done(cells: list[str] | dict[str, str], seeds: int = seeds, **kind) -> scores.Filled:
        rows = cells if isinstance(cells, dict) else dict(zip(cells, cells))
        results = fill(cfg, flags, list(rows.values()), seeds, workers, **kind)  # {cell: a result per seed}
        return {row: results[cell] for row, cell in rows.items()}
    if name != "table4":  # which has no cells
        agree(cfg)
    text, values = EXPERIMENTS[name](cfg, done)
    dataset, base = (path.rstrip("/").split("/")[-1] for path in (cfg.dataset, cfg.base))
    text += f"\n\n`{name}`, {dataset}, --base {base}, {seeds} seeds, {f'{cfg.users:,}' if cfg.users else 'all'} users, "
    # what ran, not what the recipe is called: the base and flags may have set other values
    said = {key: getattr(cfg, key) for key in ("recipe", "dataset", "base", "users", "seed", "method", *MAY_CHANGE)}
    own = changed(cfg, Config(**RECIPES[cfg.recipe] | said)).splitlines()
    text += " ".join([f"--recipe {cfg.recipe}", *own])
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    report.write_json(Path(cfg.out) / f"{name}.json", values)
    (Path(cfg.out) / f"{name}.md").write_text(text + "\n")
    if picture:
        scores.draw(picture, values)
    return text


def main() -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"this command is one process\ntorchrun started {os.environ['WORLD_SIZE']}\n"
                         "use python -m minipeso.experiments, whose --workers are processes")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, prog="python -m minipeso.experiments")
    parser.add_argument("name", metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, default=5, metavar="K")
    parser.add_argument("--workers", type=int, default=0, metavar="N")
    parser.add_argument("--plot", type=Path, metavar="F.png")
    args, flags = parser.parse_known_args()  # what is not ours is train.py's
    if args.name not in EXPERIMENTS:
        raise UsageError(unknown("experiment", args.name, EXPERIMENTS))
    if args.plot and args.name != "tradeoff":
        raise UsageError(f"--plot draws the trade-off\nfound --plot with {args.name}\nleave it out, or ask for that")
    if args.seeds < 1 or args.workers < 0:
        raise UsageError(f"a number is out of range\nfound --seeds {args.seeds} --workers {args.workers}\n"
                         "give one seed or more; --workers 0 chooses by itself")
    cfg = from_args(flags)  # a wrong flag is told before anything starts
    if not any(flag.split("=")[0] == "--out" for flag in flags):
        cfg = dataclasses.replace(cfg, out=cfg.out.replace(f"-{cfg.method}-s{cfg.seed}", "-experiments"))
    whole = cfg.threads != 1 or setup.device_of(cfg) == "cuda"  # one process takes the whole machine
    workers = args.workers or (1 if whole else len(os.sched_getaffinity(0)))
    print(run(args.name, cfg, flags, args.seeds, workers, args.plot))


if __name__ == "__main__":
    guard(main)
