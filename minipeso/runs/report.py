"""What a run leaves behind, results.json and ranks.json per method, and the tables that train.py and eval.py print."""
import json
import resource
import statistics
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from minipeso.config import Config, UsageError
from minipeso.metrics import METRICS, average, bootstrap_interval, gains, hits, known, summary
from minipeso.runs import identity
from minipeso.runs.checkpoints import write_file
from minipeso.stages import Stage

PICKS = {"valid_ce": min, "prox_ce_ratio": statistics.median, **dict.fromkeys(("moved", "touched", "memory"), max)}
PREMIUMS = {"adapting": "transitions-first", "remembering": "transitions-last"}  # against what `transitions` gains
Ranks = dict[str, Tensor]  # {stage: (users,)}
REMEDY = "delete results.json and run train.py again with --resume"


def spans(stages: list[str]) -> dict[str, list[str]]:
    """The two averages of the paper, which contradict each other: "D2-D4" (the text) and "t = 2..5"."""
    last = int(stages[-1])
    return {f"D2-D{end}": [t for t in stages if 2 <= int(t) <= end] for end in (last - 1, last) if end > 1}


def results(ranks: Ranks) -> dict:
    """Metrics per stage and their averages. A stage without users has null metrics and is in no average."""
    rows = {t: summary(r) for t, r in ranks.items()}
    means = {name: average([rows[t] for t in span]) for name, span in spans([*rows]).items()}
    return {"stages": rows, "average": means}


def write(folder: Path, cfg: Config, stages: list[Stage], ranks: Ranks, log: str, more: dict) -> None:
    """results.json and ranks.json of one method; absent.json, the ranks of who is not in the stage."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {str(stage.number): len(stage.users) for stage in stages}
    own = {t: r[:sizes[t]] for t, r in ranks.items()}
    more = {"training": what_training_said(log), "peak_memory_bytes": peak_memory()} | more
    write_json(folder / "absent.json", {t: r[sizes[t]:].tolist() for t, r in ranks.items() if t != "1"})
    write_json(folder / "ranks.json", {t: r.tolist() for t, r in own.items()})
    write_json(folder / "results.json", {"config": identity.settings(cfg), **results(own), **more})


def references(stages: list[Stage], known: list[list[int]]) -> dict[str, dict]:
    """Per stage Hit@10 of ten random items, and the share of cold targets, which no training item of D_1 .. D_t is."""
    counted, of = set(), {}
    for stage, items in zip(stages, known, strict=True):
        counted.update(i for user in stage.current for i in stage.training(user))
        targets = [taken[-1] for taken in stage.current.values()]
        cold = sum(t not in counted for t in targets) / len(targets) if targets else None
        of[str(stage.number)] = {"random": min(1.0, 10 / len(items)), "cold": cold}
    return of


def premiums(ranks: dict[str, Ranks], users: dict[str, int]) -> dict[str, tuple[float, float, float]]:
    """{"adapting", "remembering"}: what transition counts of D_1 .. D_t gain in Hit@10 over those of D_1 or D_t alone,
    (mean, low, high) over D_2 .. D_T. users: how many a stage has; behind them are the absent ones."""
    later = [(t, n) for t, n in users.items() if t != "1" and n]
    return {what: tuple(gained([(hits(ranks["transitions"][t][:n], 10) - hits(ranks[other][t][:n], 10))[None]
                                for t, n in later]).values()) for what, other in PREMIUMS.items() if later}


def gained(strata: list[Tensor]) -> dict[str, float]:
    """Of differences (seeds, users), a stage each: their mean over stages, and its 95 % interval."""
    low, high = bootstrap_interval(strata)
    return {"difference": statistics.fmean(d.mean().item() for d in strata), "low": low, "high": high}


def interval(of: dict, form: str = ".4f") -> str:
    """What `gained` says, as text: bold if the interval does not hold 0."""
    if of.get("difference") is None:
        return "-"
    text = f"{of['difference']:+{form}} [{of['low']:+{form}}, {of['high']:+{form}}]"
    return f"**{text}**" if of["low"] > 0 or of["high"] < 0 else text


def premium_lines(of: dict[str, tuple[float, float, float]]) -> str:
    """What can be gained here at all, in words; before any training."""
    lines = [f"what {what} can earn, counts of D1..Dt less counts of {less}: Hit@10 {mean:+.4f}, 95 % interval "
             f"{low:+.4f} .. {high:+.4f}" for less, (what, (mean, low, high)) in zip(("D1", "Dt"), of.items())]
    return "\n".join(lines) or "no stage after D1 has test users: nobody can gain from adapting or remembering"


def write_json(path: Path, value) -> None:
    write_file(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def what_training_said(log: str) -> dict[str, dict]:
    """{stage: {name: the best validation loss, the median prox/ce ratio, ...}} of PICKS from lines of metrics.jsonl."""
    said = defaultdict(lambda: {name: [] for name in PICKS})
    lines = [*map(json.loads, log.splitlines())]
    chosen = {line["stage"]: line["lambda"] for line in lines if "tried" in line}  # by --lambda auto
    for line in [line for line in lines if line.get("lambda", of := chosen.get(line["stage"])) == of]:
        for name in PICKS.keys() & line.keys():
            said[str(line["stage"])][name].append(line[name])
    return {t: {name: PICKS[name](some) if some else None for name, some in row.items()} for t, row in said.items()}


def peak_memory() -> int:
    """The process's peak resident bytes; on a GPU the card's peak of allocated bytes."""
    return torch.cuda.max_memory_allocated() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def load(folder: Path) -> tuple[dict, Ranks]:
    """(results, ranks) of a run folder. Stages and averages are computed from the ranks, which give all shown."""
    for path in (folder / "results.json", folder / "ranks.json"):
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is not a finished run\nit has no {path.name}\n"
                                    "give the --out folder of a train.py run that ended")
    whole, ranks = identity.read_json(folder / "results.json", REMEDY), read_lists(folder / "ranks.json")
    if lacks := {"config", "references", "premiums", "training", "seconds"} - whole.keys():
        raise UsageError(f"{folder / 'results.json'} is not whole\nit lacks {', '.join(sorted(lacks))}\n{REMEDY}")
    return whole | results(ranks), ranks


def read_lists(path: Path) -> Ranks:
    """{stage: tensor} of a file; UsageError if it holds anything else."""
    lists = identity.read_json(path, REMEDY)
    try:
        return {t: torch.tensor(rows) for t, rows in lists.items()}
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path} does not hold numbers per stage\n{error}\n{REMEDY}") from error


def side_by_side(folders: dict[str, Path]) -> tuple[dict[str, dict], dict[str, Ranks], dict[str, Ranks]]:
    """What `tables` shows of the runs in these folders, by their names: results, and `per_user` of U_A and of U_I."""
    results, ranks = zip(*map(load, folders.values()))
    own, away = zip(*map(per_user, folders.values(), ranks))
    return dict(zip(folders, results)), dict(zip(folders, own)), dict(zip(folders, away))


def per_user(folder: Path, ranks: Ranks, sampled: bool = False) -> tuple[Ranks, Ranks]:
    """What the metrics take, of the stages' users, U_A, and of users of earlier stages who are not in them, U_I:
    p (users, 10) where the truth is known, unless `sampled`, else ranks (users,)."""
    absent = {t: r for t, r in read_lists(folder / "absent.json").items() if len(r)}
    if sampled or not (folder / "expected.json").is_file():
        return ranks, absent
    p = read_lists(folder / "expected.json")
    return {t: p[t][:len(r)] for t, r in ranks.items()}, {t: p[t][len(ranks[t]):] for t in absent}


def tables(runs: dict[str, dict], ranks: dict[str, Ranks], absents: dict[str, Ranks]) -> str:
    """Everything there is to say of some runs over the same stages."""
    reference = "single" if "single" in runs else next(iter(runs))
    return "\n\n".join([stage_table(runs), summary_table(runs), differences(ranks, absents, reference),
                        premium_lines(next(iter(runs.values()))["premiums"])])


def statistics_table(rows: list[dict]) -> str:
    """Rows of stages.statistics, rounded as in the paper's Table 4."""
    formats = {"stage": "{}", "avg_length": "{:.2f}", "sparsity": "{:.4f}"}
    header = "|Total Users|New Users|Total Items|New Items|Total Interactions|Avg Seq Len|Sparsity".split("|")
    return markdown([header, *(["NA" if x is None else formats.get(name, "{:,}").format(x) for name, x in row.items()]
                               for row in rows)])


def stage_table(runs: dict[str, dict]) -> str:
    """Hit@10 per stage, each with its standard error over users, below `references`."""
    stages, references = (next(iter(runs.values()))[key] for key in ("stages", "references"))
    table = [["Hit@10 ± s.e.", *(f"D{t}" for t in stages)]]
    table.append(["test users", *(f"{row['users']:,}" for row in stages.values())])
    table += [[name, *(_number(references[t][key]) for t in stages)]
              for key, name in (("cold", "their items cold"), ("random", "random"))]
    return markdown(table + [[name, *(f"{_number(row['hit@10'])} ± {_number(row['se_hit@10'])}" for row in
                                      run["stages"].values())] for name, run in runs.items()])


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


def differences(ranks: dict[str, Ranks], absents: dict[str, Ranks], to: str) -> str:
    """Who gains: means over the later stages of the stage's own users, U_A, and of those who stay away, U_I, and what
    they are less those of method `to`, with a 95 % interval over the users of this seed: bold if it does not hold 0."""
    kinds = ("U_A Hit@10", ranks, hits), ("U_A NDCG@10", ranks, gains), ("U_I NDCG@10", absents, gains)
    sure = any(known(r) for some in ranks.values() for r in some.values())
    table = [["expected, D2 and later" if sure else "D2 and later",
              *(title for kind, *_ in kinds for title in (kind, f"- {to} [95 %]"))]]
    for name in ranks:
        pairs = [[(metric(some[name][t], 10)[None], metric(some[to][t], 10)[None])  # (1, users) each
                  for t in sorted(some[name].keys() & some[to].keys() - {"1"}) if len(some[to][t])]
                 for _, some, metric in kinds]
        table.append([name, *(cell for strata in pairs for cell in (
            f"{statistics.fmean(a.mean().item() for a, _ in strata):.4f}" if strata else "-",
            "-" if not strata else interval(gained([a - b for a, b in strata])) if name != to else ""))])
    said = "expected: over all that the world may let a user take next, not the one item drawn; " * sure
    return markdown(table) + (f"\n\n{said}U_A: the stage's users; U_I: those of earlier stages who are not in it; "
                              "**bold**: beyond the noise between this seed's users, which says nothing of other seeds")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
