"""What a run leaves behind, results.json and ranks.json per method, and the tables that train.py and eval.py print."""
import json
import resource
import statistics
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from minipeso.config import Config
from minipeso.evaluate import reference_hits
from minipeso.metrics import CUTOFFS, average, hits, paired_interval, summary
from minipeso.runs import identity
from minipeso.runs.checkpoints import write_file
from minipeso.stages import Stage

METRICS = [f"{name}@{k}" for name in ("hit", "ndcg") for k in CUTOFFS]
PICKS = {"valid_ce": min, "prox_ce_ratio": statistics.median, "moved": max, "anchor": max, "touched": max}
Ranks = dict[str, Tensor]  # {stage: (users,)}


def spans(stages: list[str]) -> dict[str, list[str]]:
    """The two averages of the paper, which contradict each other: "D2-D4" (the text) and "t = 2..5"."""
    last = int(stages[-1])
    return {f"D2-D{end}": [t for t in stages if 2 <= int(t) <= end] for end in (last - 1, last) if end > 1}


def results(ranks: Ranks) -> dict:
    """Metrics per stage and their averages. A stage without users has null metrics and is in no average."""
    rows = {t: summary(r) for t, r in ranks.items()}
    means = {name: average([rows[t] for t in span]) for name, span in spans([*rows]).items()}
    return {"stages": rows, "average": means}


def write(folder: Path, cfg: Config, stages: list[Stage], known: list[list[int]], ranks: Ranks, log: str,
          seconds: dict) -> None:
    """results.json and ranks.json of one method; with --inactive absent.json, the ranks of who is not in the stage."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {str(stage.number): len(stage.users) for stage in stages}
    own = {t: r[:sizes[t]] for t, r in ranks.items()}
    whole = {"config": identity.settings(cfg), **results(own), "references": reference_hits(stages, known),
             "training": what_training_said(log), "seconds": seconds, "peak_memory_bytes": peak_memory()}
    if cfg.inactive:
        write_json(folder / "absent.json", {t: r[sizes[t]:].tolist() for t, r in ranks.items() if t != "1"})
    write_json(folder / "ranks.json", {t: r.tolist() for t, r in own.items()})
    write_json(folder / "results.json", whole)


def write_json(path: Path, value) -> None:
    write_file(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def what_training_said(log: str) -> dict[str, dict]:
    """{stage: the best validation loss, the median of the logged prox/ce ratios, how far the adapter moved, the norm of
    its anchor, EvoRec's share of it} from a method's lines of metrics.jsonl."""
    said = defaultdict(lambda: {name: [] for name in PICKS})
    for line in map(json.loads, log.splitlines()):
        for name in PICKS.keys() & line.keys():
            said[str(line["stage"])][name].append(line[name])
    return {t: {name: PICKS[name](some) if some else None for name, some in row.items()} for t, row in said.items()}


def peak_memory() -> int:
    """The process's peak resident bytes; on a GPU the card's peak of allocated bytes."""
    return torch.cuda.max_memory_allocated() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def load(folder: Path) -> tuple[dict, Ranks]:
    """(results, ranks) of a run folder; FileNotFoundError says what a run folder is. No number is shown that the ranks
    do not give: stages and averages are computed from them, and ValueError tells where results.json has others."""
    paths = folder / "results.json", folder / "ranks.json"
    remedy = "delete results.json and run train.py again with --resume"
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is not a finished run\nit has no {path.name}\n"
                                    "give the --out folder of a train.py run that ended")
    whole, lists = (identity.read_json(path, remedy) for path in paths)
    try:
        ranks = {t: torch.tensor(r, dtype=torch.long) for t, r in lists.items()}
        computed = results(ranks)
        wrong = [part for part, value in computed.items() if rounded(whole[part]) != rounded(value)]
        wrong += ["references"] * any(whole["references"][t].keys() != {"random", "popularity", "cold"} for t in ranks)
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        wrong = [repr(error)]
    if wrong:
        raise ValueError(f"{paths[0]} is not what ranks.json beside it gives\nwrong: {wrong[0]}\n{remedy}")
    return whole | computed, ranks


def rounded(value) -> dict:
    """What JSON keeps of it, to seven digits: sums may end in other digits on another machine."""
    return json.loads(json.dumps(value), parse_float=lambda number: round(float(number), 7))


# -- tables --------------------------------------------------------------------------------------------

def tables(runs: dict[str, dict], ranks: dict[str, Ranks]) -> str:
    """Everything there is to say of some runs over the same stages."""
    reference = "single" if "single" in runs else next(iter(runs))
    return "\n\n".join(filter(None, [stage_table(runs), summary_table(runs), differences(ranks, reference)]))


def stage_table(runs: dict[str, dict]) -> str:
    """Hit@10 per stage, each with its standard error over users; random and popularity beside it, and the share of test
    items that nobody takes in what can be learnt."""
    first = next(iter(runs.values()))
    stages, references = first["stages"], first["references"]
    table = [["Hit@10 ± s.e.", *(f"D{t}" for t in stages)]]
    table.append(["test users", *(f"{row['users']:,}" for row in stages.values())])
    for key, name in (("cold", "their items cold"), ("random", "random"), ("popularity", "popularity")):
        table.append([name, *(_number(references[t][key]) for t in stages)])
    for name, run in runs.items():
        rows = run["stages"].values()
        table.append([name, *(f"{_number(row['hit@10'])} ± {_number(row['se_hit@10'])}" for row in rows)])
    return markdown(table)


def summary_table(runs: dict[str, dict]) -> str:
    """The paper's Table 2 form: metrics averaged over D2-D4 and over D2-D5, best **bold**, second best _underlined_."""
    columns = [(span, metric) for span in next(iter(runs.values()))["average"] for metric in METRICS]
    values = [[run["average"][span][metric] for span, metric in columns] for run in runs.values()]
    marked = zip(*(_marked(column) for column in zip(*values)))
    header = ["mean over", *(f"{metric[0].upper()}@{metric.partition('@')[2]} {span}" for span, metric in columns)]
    return markdown([header, *([name, *cells] for name, cells in zip(runs, marked))])


def _marked(column: tuple[float | None, ...]) -> list[str]:
    """Numbers as text, the best two marked; nothing to mark where there is no rival."""
    best = sorted({v for v in column if v is not None}, reverse=True)[:2]
    marks = dict(zip(best, ("**", "_"))) if len(column) > 1 else {}
    return [f"{marks.get(v, '')}{_number(v)}{marks.get(v, '')}" for v in column]


def markdown(table: list[list[str]]) -> str:
    """Lines of cells as an aligned markdown table; the first line is the header."""
    first, *others = [max(map(len, column)) for column in zip(*table)]
    rule = ["-" * first, *("-" * (width - 1) + ":" for width in others)]
    lines = [[name.ljust(first), *map(str.rjust, cells, others)] for name, *cells in (table[0], rule, *table[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def differences(ranks: dict[str, Ranks], to: str) -> str:
    """Each method's mean difference to method `to` in Hit@10 over the users of D2 and later, with the paired
    bootstrap's 95 % interval: an interval that holds 0 is a difference within the noise."""
    later = {name: torch.cat([hits(r, 10) for t, r in run.items() if t != "1"]) for name, run in ranks.items()}
    lines = []
    for name, some in later.items():
        if name != to and len(some):
            mean, (low, high) = (some - later[to]).mean(), paired_interval(some, later[to])
            word = "within the noise" if low <= 0 <= high else "beyond the noise"
            lines.append(f"{name} - {to}: Hit@10 {mean:+.4f}, 95 % interval {low:+.4f} .. {high:+.4f}, {word}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
