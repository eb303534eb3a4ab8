"""What a run leaves behind: results.json, ranks.json, and the tables that eval.py and train.py print."""
from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import resource
from pathlib import Path

import torch
from torch import Tensor

from minipeso.runs import checkpoint, disk
from minipeso.config import MAY_CHANGE, Config, UsageError, flag
from minipeso.metrics import CUTOFFS, average, hits, paired_interval, summary

HASHES = {"data": "the data has", "items": "the items' texts or IDs have", "base": "the base's files have"}
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
    disk.write_file(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def settings(cfg: Config, free: tuple[str, ...] = ("resume",)) -> dict:
    """The settings as JSON has them, without the `free` ones."""
    return {name: value for name, value in json.loads(json.dumps(dataclasses.asdict(cfg))).items() if name not in free}


def digest(cfg: Config) -> str:
    """A hash of the settings that decide what is computed."""
    return hashlib.sha256(json.dumps(settings(cfg, MAY_CHANGE)).encode()).hexdigest()[:16]


def begin(out: Path, cfg: Config, hashes: dict[str, str]) -> None:
    """A new run in `out` on what has these hashes: config.json is written, and what an older run left
    there is void. With --resume the older run goes on, if it has the same settings and data."""
    out.mkdir(parents=True, exist_ok=True)
    if goes_on(out, cfg):
        agree(out, cfg, hashes)
        checkpoint.check(out / "checkpoints")
    else:
        disk.remove(out / "checkpoints")
        for old in (out / "results.json", *out.glob("*/results.json")):
            if old.parent == out or not (old.parent / "config.json").is_file():  # else: a run of its own, not a method's
                old.unlink(missing_ok=True)
        write_json(out / "config.json", settings(cfg) | {"hashes": hashes | {"settings": digest(cfg)}, "versions": versions()})
    disk.write_file(out / "metrics.jsonl", "")  # what is gone on with says again what it had said


def remember(out: Path, name: str, found: str) -> None:
    """A further hash in config.json, of what the run itself has made."""
    about = disk.read_json(out / "config.json", "start anew, without --resume")
    write_json(out / "config.json", about | {"hashes": about["hashes"] | {name: found}})


def goes_on(out: Path, cfg: Config) -> bool:
    return cfg.resume and (out / "config.json").is_file()


def agree(out: Path, cfg: Config, hashes: dict[str, str] | None = None) -> None:
    """The settings (and the hashes of what it stands on) must be those that the run in `out` began with: UsageError
    names what differs. A newer torch is let pass, and told."""
    file = out / "config.json"
    before, now = disk.read_json(file, "start anew, without --resume"), settings(cfg, MAY_CHANGE)
    began = {name: value for name, value in before.items() if name not in ("hashes", "versions", *MAY_CHANGE)}
    differ = [f"{flag(name)} {began.get(name)} there, {now.get(name)} now" for name in sorted(began.keys() | now.keys())
              if began.get(name) != now.get(name)]
    then = before["hashes"] if isinstance(before.get("hashes"), dict) else {}
    differ += [f"{HASHES[name]} another hash" for name in hashes or () if then.get(name) != hashes[name]]
    if differ:
        raise UsageError(f"{out} was begun with other settings\n{'; '.join(differ)}\n"
                         "use the same, start anew without --resume, or name another --out")
    if hashes and before.get("versions") != versions():
        print(f"note: begun with {before.get('versions')}, going on with {versions()}", end="\n\n")


def again(out: Path, cfg: Config) -> bool:
    """Prints the tables of a run that has come to its end; False if this one has not, or has more to say."""
    if cfg.explain:
        return False
    agree(out, cfg)
    folders = {name: folder_of(out, cfg, name) for name in cfg.methods}
    if not all((folder / "results.json").is_file() for folder in folders.values()):
        return False
    loaded = {name: load(folder) for name, folder in folders.items()}
    runs, ranks = ({name: pair[part] for name, pair in loaded.items()} for part in (0, 1))
    print(tables(runs, ranks))
    print(f"\nfinished before; {out / 'results.json'}")
    return True


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
        own = settings(dataclasses.replace(cfg, method=name))
        runs[name], folder = results(own, found, references, seconds), folder_of(out, cfg, name)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "ranks.json", {t: r.tolist() for t, r in found.items()})
        write_json(folder / "results.json", runs[name])
    print(tables(runs, ranks))
    print(f"\n{sum(seconds.values()):.0f} s, peak {peak_memory() / 2**20:,.0f} MiB; {out / 'results.json'}")


def load(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """(results, ranks) of a run folder; FileNotFoundError says what a run folder is. The metrics must be
    those of the ranks beside them (ValueError): no number is shown that somebody else put there."""
    for name in ("results.json", "ranks.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not a finished run\nit has no {name}\n"
                                    "give the --out folder of a train.py run that ended")
    remedy = "delete results.json and run train.py again with --resume"
    found, ranks = (disk.read_json(folder / name, remedy) for name in ("results.json", "ranks.json"))
    try:
        ranks = {t: torch.tensor(r, dtype=torch.long) for t, r in ranks.items()}
        again = results(found["config"], ranks, found["references"], found["seconds"])
        wrong = [part for part in ("stages", "average") if not same(found[part], again[part])]
        wrong += [f"stage {t} of references" for t in ranks if set(found["references"][t]) != {"random", "popularity", "cold"}]
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        wrong = [f"{type(error).__name__}: {error}"]
    if wrong:
        raise ValueError(f"{folder / 'results.json'} is not what ranks.json beside it gives\n{wrong[0]} differs\n"
                         f"{remedy}")
    return found | {part: again[part] for part in ("stages", "average")}, ranks  # a digit within the rounding: not shown


def same(a, b) -> bool:
    """Equal, numbers up to rounding."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-7)
    return type(a) is type(b) and a == b


# -- tables -----------------------------------------------------------------------------------------

def tables(runs: dict[str, dict], ranks: dict[str, dict[str, Tensor]]) -> str:
    """Everything there is to say of some runs over the same stages."""
    reference = "single" if "single" in runs else next(iter(runs))
    return "\n\n".join(filter(None, [stage_table(runs), summary_table(runs), differences(ranks, reference)]))


def stage_table(runs: dict[str, dict]) -> str:
    """Hit@10 per stage, each with its standard error over users; random and popularity beside it,
    and the share of test items that nobody takes in what can be learnt."""
    first = next(iter(runs.values()))
    stages, references = first["stages"], first["references"]
    table = [["Hit@10 ± s.e.", *(f"D{t}" for t in stages)],
             ["test users", *(f"{row['users']:,}" for row in stages.values())]]
    table += [[name, *(_number(references[t][key]) for t in stages)]
              for key, name in (("cold", "their items cold"), ("random", "random"), ("popularity", "popularity"))]
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
