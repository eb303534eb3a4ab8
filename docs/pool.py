"""Runs of several seeds as one table: the rows of results.md that are no experiment, and any difference of two rows.

    python docs/pool.py RUN_0,RUN_1,RUN_2 --to single
    python docs/pool.py plain=RUN_0,RUN_1 memory=MEM_0,MEM_1 --to "plain single"
    python docs/pool.py OUT/seed-0,OUT/seed-1,OUT/seed-2 --to "peso@proximal=kl@lambda=19"

A RUN is what train.py --out left (or a seed of an experiment); a row is a method that all of a group have, under the
group's name if it has one. Intervals are over seeds and their users, as in the experiments. --sampled: by the item that
each user took, also where the truth is known."""
import argparse
from pathlib import Path

from minipeso.experiments import scores
from minipeso.experiments.cells import Result
from minipeso.runs import report
from minipeso.runs.guard import guard


def rows(group: str, sampled: bool) -> scores.Filled:
    """{"name method": a result per seed} of "name=RUN,RUN" or "RUN,RUN"."""
    name, folders = group.split("=", 1) if "=" in group else ("", group)
    seeds = [places(Path(folder)) for folder in folders.split(",")]
    methods = [method for method in seeds[0] if all(method in seed for seed in seeds)]
    return {f"{name} {method}".strip(): [result(seed[method], sampled) for seed in seeds] for method in methods}


def places(run: Path) -> dict[str, Path]:
    """{method: its folder} of a run."""
    main = report.load(run)[0]["config"]["method"]
    return {file.parent.name: file.parent for file in sorted(run.glob("*/results.json"))} | {main: run}


def result(place: Path, sampled: bool) -> Result:
    found, ranks = report.load(place)
    own, absent = report.per_user(place, ranks, sampled)
    return Result(ranks, found["training"], own=own, absent=absent, premiums=found["premiums"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="+", metavar="[NAME=]RUN,RUN,...")
    parser.add_argument("--to", required=True, metavar="ROW")
    parser.add_argument("--sampled", action="store_true")
    args = parser.parse_args()
    filled = {name: some for group in args.groups for name, some in rows(group, args.sampled).items()}
    if args.to not in filled:
        raise ValueError(f"no row is called {args.to!r}\nthere are {', '.join(filled)}\ngive one of them to --to")
    columns = [*scores.PAPER[:2], *scores.GROUPS]
    print(scores.mean_table(filled, args.to, "method", columns, ("validation CE", "pull", "movement"))[0])


if __name__ == "__main__":
    guard(main)
