"""The paper's tables and figures, one command each, with error bars.

    python -m minipeso.experiments table1    gain over single on the user-disjoint and the natural split
    python -m minipeso.experiments table2    all 15 rows
    python -m minipeso.experiments table3    two-tower models beside the LLM; table5: all of them
    python -m minipeso.experiments table4    statistics of the data
    python -m minipeso.experiments figure2   regularisers, each at the lambda at which it lets the adapter move as far
    python -m minipeso.experiments figure3   lambda; figure4: the learning rate of later stages
    python -m minipeso.experiments tradeoff  by lambda: who gains from the anchor, in worlds that drift more or less
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
WORLDS = (0.3, 0.5, 0.7, 0.9)  # alpha of the demo's worlds: how much of a taste survives a stage
RATES = (0.01, 0.05, 0.1, 0.2, 0.5, 1)  # Figure 4
REGULARISERS = {  # Figure 2: where the search for each's lambda begins; the paper's are unknown but for kl
    "kl": 20, "quadratic": 20, "rank-kl": 3, "l2": 0.01, "output-kl": 0.5, "orthogonal": 1e-3, "fisher": 3,
    "fisher-product": 1.5}
MOVEMENT, TRIES = 0.7, 4  # Figure 2: each moves the adapter by this share of what single does, found in so many tries
COUNTS = ("popularity", "popularity-decayed", "transitions")  # in every table of methods


def table4(cfg: Config, done: Callable) -> tuple[str, dict]:
    data = setup.load_dataset(cfg, Path(cfg.out) / "world")
    rows = statistics(data.stages)
    return "\n".join([report.statistics_table(rows), "", *data.notes]), {"rows": rows}


def figure2(cfg: Config, done: Callable) -> tuple[str, dict]:
    """Regularisers at equal movement: lambda is searched (seed 0) until || v_t - v_{t-1} || is MOVEMENT times single's,
    as if a share m of it went with the odds m / (1 - m) ~ 1 / lambda; then all seeds are run with it."""
    free, lams, tried = done(["single"], seeds=1)["single"], dict(REGULARISERS), {p: {} for p in REGULARISERS}
    for _ in range(TRIES):
        cells = {p: f"peso@proximal={p}@lambda={lam:.3g}" for p, lam in lams.items()}
        for p, results in done(cells, seeds=1).items():
            share = scores.COSTS["movement"][1](results, free)[0] if not scores.lost(results) else 0.01
            tried[p][cells[p]] = abs(share - MOVEMENT)
            odds = min(share, 0.99) / (1 - min(share, 0.99))
            lams[p] = float(f"{lams[p]:.3g}") * min(max(odds * (1 - MOVEMENT) / MOVEMENT, 0.05), 20)
    best = {cell[5:].replace("@", ", "): cell for some in tried.values() for cell in [min(some, key=some.get)]}
    return scores.mean_table(done({"single": "single"} | best), "single", "regulariser",
                             costs=("movement", "pull", "validation CE", "seconds per stage"))


def tradeoff(cfg: Config, done: Callable) -> tuple[str, dict]:
    """By lambda, who gains from the anchor: in the demo's worlds, or in one data set."""
    rows = {f"{x}": f"peso@lambda={x}" for x in LAMBDAS} | {"pretrain": "pretrain"}
    worlds = {f"alpha {a}": {"world_alpha": a} for a in WORLDS} if cfg.dataset == "demo" else {cfg.dataset: {}}
    parts = {world: scores.mean_table(done(rows, **kind), "0", "lambda", costs=("validation CE", "pull", "movement"))
             for world, kind in worlds.items()}
    text = "\n\n".join(f"### {world}\n{text}" for world, (text, _) in parts.items())
    return text, {world: of for world, (_, of) in parts.items()}


EXPERIMENTS = {  # (cfg, done) -> (markdown, values); done(cells or {row: cell}) gives results, learnt if not there
    "table1": lambda cfg, done: scores.gain_table(
        {s: done(["single", *paper.TABLE_1], split=s) for s in ("user-disjoint", "natural")}, paper.TABLE_1),
    "table2": lambda cfg, done: scores.method_table(done([*COUNTS, *paper.TABLE_2]), paper.TABLE_2),
    "table3": lambda cfg, done: scores.mean_table(done([*COUNTS, *paper.TABLE_3]), "single", "method", scores.PAPER),
    "table4": table4,
    "table5": lambda cfg, done: scores.mean_table(done([*COUNTS, *paper.TABLE_5]), "single", "method", scores.PAPER),
    "figure2": figure2,
    "figure3": lambda cfg, done: scores.mean_table(
        done({f"{x}": f"peso@lambda={x}" for x in LAMBDAS}), "0", "lambda", scores.PAPER),
    "figure4": lambda cfg, done: scores.mean_table(done({"pretrain": "pretrain"} | {
        f"{x}": f"single@later-lr={x}" for x in RATES}), "pretrain", "lr*", scores.PAPER),
    "tradeoff": tradeoff,
    "evorec": lambda cfg, done: scores.mean_table(
        done(["pretrain", "single", "peso", "retrain", "evorec"]), "single", "method",
        [*scores.GROUPS, "U N@10", "- U N@10"], ("validation CE", "touched", "seconds per stage")),
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
