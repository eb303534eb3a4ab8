"""The tables of finished runs, side by side; and what one run's model recommends.

    python eval.py RUN [RUN ...]            Hit@10 per stage, all metrics averaged, differences with intervals
    python eval.py RUN RUN --json F --csv F the same numbers for a program; --plot F.png (pip install -e '.[plot]')
    python eval.py RUN --recommend USER     a user's history, and ten titles with scores; --recommend-all F.jsonl
    python eval.py RUN --export-merged DIR  a plain Hugging Face folder; --export-peft DIR: the adapter for peft

RUN is what train.py --out left; the methods it was compared with lie inside it and are shown too."""
import argparse
import csv
import io
from pathlib import Path

from minipeso.config import UsageError
from minipeso.files.export import export_merged, export_peft
from minipeso.runs import checkpoints, report
from minipeso.runs.guard import guard
from minipeso.runs.recommend import recommend, recommend_all
from minipeso.runs.reopen import reopen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    for kind in ("json", "csv", "plot", "recommend-all", "export-peft", "export-merged"):
        parser.add_argument(f"--{kind}", type=Path, metavar="DIR" if kind.startswith("export") else "FILE")
    parser.add_argument("--recommend", metavar="USER")
    parser.add_argument("--stage", type=int, default=0, help="whose adapter to use; the last if not given")
    args = parser.parse_args()
    if args.recommend is not None or args.recommend_all or args.export_peft or args.export_merged:
        return use_model(args)
    if args.stage:
        raise UsageError(f"--stage chooses an adapter\nfound only --stage {args.stage}\nadd --recommend or an export")
    runs, ranks = collect(args.runs)
    print(report.tables(runs, ranks))
    for write, path in ((report.write_json, args.json), (write_csv, args.csv), (plot, args.plot)):
        if path:
            write(path, runs)


def collect(folders: list[Path]) -> tuple[dict[str, dict], dict[str, dict]]:
    """{name: results}, {name: ranks} by method, and folder if two share one; UsageError if their users differ."""
    folders = [*(file.parent for folder in folders for file in sorted(folder.glob("*/results.json"))), *folders]
    results, ranks = zip(*map(report.load, folders))
    methods = [result["config"]["method"] for result in results]
    names = [method if methods.count(method) == 1 else f"{method} {folder}" for method, folder in zip(methods, folders)]
    users = [[stage["users"] for stage in result["stages"].values()] for result in results]
    other = next((i for i, some in enumerate(users) if some != users[0]), None)
    if other:
        raise UsageError(f"these runs have other test users\n{names[0]}: {users[0]}; {names[other]}: {users[other]}\n"
                         "compare runs of one data set, split and --users")
    return dict(zip(names, results)), dict(zip(names, ranks))


def write_csv(path: Path, runs: dict[str, dict]) -> None:
    """One line per method and stage (or average)."""
    text, columns = io.StringIO(), [*report.METRICS, "se_hit@10"]
    lines = [[name, stage, *map(row.get, columns)] for name, run in runs.items()
             for stage, row in (run["stages"] | run["average"]).items()]
    csv.writer(text).writerows([["run", "stage", *columns], *lines])
    checkpoints.write_file(path, text.getvalue())


def plot(path: Path, runs: dict[str, dict]) -> None:
    """Hit@10 over the stages, with bars of one standard error."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UsageError(f"--plot needs matplotlib\n{error}\npip install -e '.[plot]'") from error
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for i, (name, run) in enumerate(runs.items()):
        rows = {int(t): row for t, row in run["stages"].items() if row["users"]}
        points = [(t + 0.05 * i, row["hit@10"], row["se_hit@10"]) for t, row in rows.items()]  # x, y, error
        axes.errorbar(*zip(*points), label=name, marker="o", capsize=3)
    axes.set(xlabel="stage", ylabel="Hit@10 (± 1 s.e.)", xticks=[int(t) for t in run["stages"]], ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def use_model(args: argparse.Namespace) -> None:
    """One run's model after one stage: recommendations and exports."""
    if len(args.runs) > 1:
        raise UsageError(f"one run at a time\n{len(args.runs)} were given\npass the one whose model is to be used")
    run = reopen(args.runs[0], args.stage)
    if args.recommend is not None:
        print(recommend(run, args.recommend))
    if args.recommend_all:
        print(f"{recommend_all(run, args.recommend_all):,} users, {args.recommend_all}")
    if args.export_peft:
        export_peft(run, run.adapter, args.export_peft)
    if args.export_merged:
        export_merged(run, args.export_merged)
    for target in filter(None, (args.export_peft, args.export_merged)):
        print(f"{run.cfg.method} after D{run.stage}: {target}")


if __name__ == "__main__":
    guard(main)
