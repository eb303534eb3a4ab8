"""The table of finished runs, side by side.

    python eval.py RUN [RUN ...]            Hit@10 per stage, all metrics averaged, differences with intervals
    python eval.py RUN RUN --json F --csv F the same numbers for a program
    python eval.py RUN RUN --plot F.png     Hit@10 over the stages (needs matplotlib: pip install -e '.[plot]')
    python eval.py RUN --recommend USER     a user's history, and ten titles with scores; --recommend-all F.jsonl: everybody's
    python eval.py RUN --export-merged DIR  a plain Hugging Face folder; --export-peft DIR: the adapter for peft

A run folder is what train.py --out left; the methods it was compared with lie inside it and are shown too.
"""
from __future__ import annotations

import argparse
import csv
import io
from functools import partial
from pathlib import Path

from minipeso import parallel
from minipeso.runs import disk, report
from minipeso.config import UsageError
from minipeso.runs.guard import guard
from minipeso.files.export import export_merged, export_peft
from minipeso.runs.journal import counter
from minipeso.runs.recommend import histories, recommend, recommend_all
from minipeso.runs.reopen import reopen


def main() -> None:
    parallel.alone("python eval.py")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    for kind in ("json", "csv", "plot", "recommend-all"):
        parser.add_argument(f"--{kind}", type=Path, metavar="FILE")
    for kind in ("export-peft", "export-merged"):
        parser.add_argument(f"--{kind}", type=Path, metavar="DIR")
    parser.add_argument("--recommend", metavar="USER")
    parser.add_argument("--stage", type=int, default=0, help="whose adapter to use; the last if not given")
    args = parser.parse_args()
    if args.recommend is not None or args.recommend_all or args.export_peft or args.export_merged:
        return use(args)
    if args.stage:
        raise UsageError(f"--stage chooses an adapter\nfound --stage {args.stage} alone\nuse it with --recommend or --export-...")
    loaded = collect(args.runs)
    runs = {name: result for name, (result, _) in loaded.items()}
    print(report.tables(runs, {name: ranks for name, (_, ranks) in loaded.items()}))
    if args.json:
        report.write_json(args.json, runs)
    if args.csv:
        write_csv(args.csv, runs)
    if args.plot:
        plot(args.plot, runs)


def use(args: argparse.Namespace) -> None:
    """One run's model at one stage: recommendations and exports."""
    if len(args.runs) > 1:
        raise UsageError(f"one run at a time\nfound {len(args.runs)}\npass the one whose model is to be used")
    run = reopen(args.runs[0], args.stage)
    if args.recommend is not None:
        print(recommend(run, args.recommend))
    if args.recommend_all:
        bar = counter("recommend", len(histories(run)), "user")
        print(f"{recommend_all(run, args.recommend_all, bar):,} users, {args.recommend_all}")
    for write, target in ((partial(export_peft, run, args.runs[0]), args.export_peft),
                          (partial(export_merged, run), args.export_merged)):
        if target:
            write(target)
            print(f"{run.cfg.method} after D{run.stage}: {target}")


def collect(folders: list[Path]) -> dict[str, tuple[dict, dict]]:
    """{name: (results, ranks)}: the method's name, with the folder's where two runs share a method.
    Runs over other stages or users cannot be compared, and are refused."""
    inner = [run.parent for folder in folders for run in sorted(folder.glob("*/results.json"))]
    found = [(folder, report.load(folder)) for folder in [*inner, *folders]]
    methods = [result["config"]["method"] for _, (result, _) in found]
    named = {}
    for (folder, run), method in zip(found, methods):
        named[method if methods.count(method) == 1 else f"{method} {folder}"] = run
    sizes = {name: [row["users"] for row in result["stages"].values()] for name, (result, _) in named.items()}
    (first, users), *others = sizes.items()
    for name, other in others:
        if other != users:
            raise UsageError(f"these runs have other test users\n{first}: {users}; {name}: {other}\n"
                             "compare runs of one data set, split and --users")
    return named


def write_csv(path: Path, runs: dict[str, dict]) -> None:
    """One row a method and stage (or average)."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["run", "stage", *report.METRICS, "se_hit@10"])
    for name, run in runs.items():
        for stage, row in [*run["stages"].items(), *run["average"].items()]:
            table.writerow([name, stage, *(row[metric] for metric in report.METRICS), row["se_hit@10"]])
    disk.write_file(path, text.getvalue())


def plot(path: Path, runs: dict[str, dict]) -> None:
    """Hit@10 over the stages, with bars of one standard error."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UsageError(f"--plot needs matplotlib\n{error}\npip install -e '.[plot]'") from error
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for i, (name, run) in enumerate(runs.items()):
        rows = [(int(t) + 0.05 * i, row) for t, row in run["stages"].items() if row["users"]]
        axes.errorbar([t for t, _ in rows], [row["hit@10"] for _, row in rows],
                      [row["se_hit@10"] for _, row in rows], label=name, marker="o", capsize=3)
    axes.set(xlabel="stage", ylabel="Hit@10 (± 1 s.e.)", xticks=[int(t) for t in run["stages"]], ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    guard(main)
