"""What a run leaves behind: results.json, ranks.json, and the tables that eval.py and train.py print."""
from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import resource
from pathlib import Path

import torch
from torch import Tensor

from minipeso.config import Config
from minipeso.metrics import CUTOFFS, average, hits, paired_interval, summary

METRICS = [f"{name}@{k}" for name in ("hit", "ndcg") for k in CUTOFFS]


def spans(stages: list[str]) -> dict[str, list[str]]:
    """The two averages of the paper, which contradict each other: "D2-D4" (the text) and "t = 2..5"."""
    later = [t for t in stages if int(t) > 1]
    return {f"D2-D{last}": [t for t in later if int(t) <= last] for last in range(int(later[-1]) - 1, int(later[-1]) + 1)
            if last > 1}


def results(config: dict, ranks: dict[str, Tensor], references: dict, seconds: dict) -> dict:
    """The content of results.json. A stage without users has null metrics and is in no average."""
    stages = {t: summary(r) for t, r in ranks.items()}
    return {"config": config, "stages": stages,
            "average": {name: average([stages[t] for t in part]) for name, part in spans(list(stages)).items()},
            "references": references, "seconds": seconds, "peak_memory_bytes": peak_memory()}


def peak_memory() -> int:
    """The process's peak resident bytes; on a GPU the card's peak of allocated bytes."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_json(path: Path, value) -> None:
    """Whole or not at all: a reader never sees half a file."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    os.replace(part, path)


def begin(out: Path, cfg: Config, data: str) -> None:
    """A new run in `out` on the data of this hash: config.json is written, and what an older run
    left there is void."""
    out.mkdir(parents=True, exist_ok=True)
    for old in (out / "results.json", *out.glob("*/results.json")):
        if old.parent == out or not (old.parent / "config.json").is_file():  # else: a run of its own, not a method's
            old.unlink(missing_ok=True)
    (out / "metrics.jsonl").write_text("")
    write_json(out / "config.json", dataclasses.asdict(cfg) | {"data": data, "versions": versions()})


def folder_of(out: Path, cfg: Config, method: str) -> Path:
    """The run folder is the main method's; one it is compared with has a folder inside."""
    return out if method == cfg.method else out / method


def versions() -> dict[str, str]:
    names = ("minipeso", "torch", "numpy", "safetensors", "tokenizers")
    return {name: importlib.metadata.version(name) for name in names}


def finish(out: Path, cfg: Config, ranks: dict[str, dict[str, Tensor]], references: dict, seconds: dict) -> None:
    """Writes results.json and ranks.json of every method and prints the tables."""
    runs = {}
    for name, found in ranks.items():
        settings = dataclasses.asdict(dataclasses.replace(cfg, method=name))
        runs[name], folder = results(settings, found, references, seconds), folder_of(out, cfg, name)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "ranks.json", {t: r.tolist() for t, r in found.items()})
        write_json(folder / "results.json", runs[name])
    print(tables(runs, ranks))
    print(f"\n{sum(seconds.values()):.0f} s, peak {peak_memory() / 2**20:,.0f} MiB; {out / 'results.json'}")


def load(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """(results, ranks) of a run folder; FileNotFoundError says what a run folder is."""
    for name in ("results.json", "ranks.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not a finished run\nit has no {name}\n"
                                    "give the --out folder of a train.py run that ended")
    ranks = json.loads((folder / "ranks.json").read_text())
    return json.loads((folder / "results.json").read_text()), {t: torch.tensor(r) for t, r in ranks.items()}


# -- tables -----------------------------------------------------------------------------------------

def tables(runs: dict[str, dict], ranks: dict[str, dict[str, Tensor]]) -> str:
    """Everything there is to say of some runs over the same stages."""
    reference = "single" if "single" in runs else next(iter(runs))
    return "\n\n".join(filter(None, [stage_table(runs), summary_table(runs), differences(ranks, reference)]))


def stage_table(runs: dict[str, dict]) -> str:
    """Hit@10 per stage, each with its standard error over users; random and popularity beside it."""
    first = next(iter(runs.values()))
    stages, references = first["stages"], first["references"]
    table = [["Hit@10 ± s.e.", *(f"D{t}" for t in stages)],
             ["test users", *(f"{row['users']:,}" for row in stages.values())]]
    table += [[name, *(_number(references[t][name]) for t in stages)] for name in ("random", "popularity")]
    table += [[name, *(f"{_number(row['hit@10'])} ± {_number(row['se_hit@10'])}" for row in run["stages"].values())]
              for name, run in runs.items()]
    return markdown(table)


def summary_table(runs: dict[str, dict]) -> str:
    """The paper's Table 2 form: every metric averaged over D2-D4 and over D2-D5, best **bold**,
    second best _underlined_."""
    columns = [(span, metric) for span in next(iter(runs.values()))["average"] for metric in METRICS]
    values = [[run["average"][span][metric] for span, metric in columns] for run in runs.values()]
    marked = zip(*(_marked(column) for column in zip(*values)))
    head = ["mean over", *(f"{metric[0].upper()}@{metric.partition('@')[2]} {span}" for span, metric in columns)]
    return markdown([head, *([name, *cells] for name, cells in zip(runs, marked))])


def _marked(column: tuple[float | None, ...]) -> list[str]:
    """Numbers as text, the best two marked; nothing to mark where there is no rival."""
    best = sorted({v for v in column if v is not None}, reverse=True)[:2]
    marks = dict(zip(best, ("**", "_"))) if len(column) > 1 else {}
    return [f"{marks.get(v, '')}{_number(v)}{marks.get(v, '')}" for v in column]


def markdown(table: list[list[str]]) -> str:
    """Rows of cells as an aligned markdown table; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["| " + " | ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))) + " |"
             for row in table]
    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def differences(ranks: dict[str, dict[str, Tensor]], to: str) -> str:
    """Each method's mean difference to method `to` in Hit@10 over the users of D2 and later, with the
    paired bootstrap's 95 % interval: an interval that holds 0 is a difference within the noise."""
    def later(run):
        return torch.cat([hits(r, 10) for t, r in run.items() if int(t) > 1])
    lines = []
    for name, run in ranks.items():
        a, b = later(run), later(ranks[to])
        if name != to and len(a):
            low, high = paired_interval(a, b)
            word = "within the noise" if low <= 0 <= high else "beyond the noise"
            lines.append(f"{name} - {to}: Hit@10 {(a - b).mean():+.4f}, 95 % interval {low:+.4f} .. {high:+.4f}, {word}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
