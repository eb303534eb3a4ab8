"""From the cells of an experiment to its table: means, spread over seeds, and which differences are noise.

A metric is averaged over users within a stage, then over stages, then over seeds; "sd" is over seeds. A difference is
paired: the same user under two methods, averaged over seeds, with a 95 % bootstrap interval over users within stages.
Stages without test users are in no average.
"""
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from minipeso.config import UsageError
from minipeso.experiments.cells import Result
from minipeso.metrics import bootstrap_interval, gains, hits
from minipeso.runs.report import markdown, spans

Filled = dict[str, list[Result]]  # {a row's name: its results, one per seed}
Beside = dict[str, tuple[str, Sequence[float]]]  # further columns of a row: {column: (format, numbers)}
NOISE = "**bold**: the interval of the difference does not hold 0"
FOUR = "mean of four"  # the paper's "average performance"
METRICS = {  # ranks (n,) -> a value per user (n,)
    "H@5": partial(hits, k=5), "H@10": partial(hits, k=10), "N@5": partial(gains, k=5), "N@10": partial(gains, k=10),
    FOUR: lambda ranks: sum(METRICS[key](ranks) for key in ("H@5", "H@10", "N@5", "N@10")) / 4}


def lost(results: list[Result]) -> bool:
    """Whether it diverged on some seed: then it has no mean."""
    return any(result.diverged for result in results)


def summary(results: list[Result], reference: list[Result], key: str, stages: list[str]) -> dict:
    """{"mean", "sd", "seeds"}, and {"difference", "low", "high"} of results - reference, None each if that diverged."""
    seeds = [statistics.fmean(METRICS[key](result.ranks[t]).mean().item() for t in stages) for result in results]
    of = {"mean": statistics.fmean(seeds), "sd": statistics.stdev(seeds) if len(seeds) > 1 else None, "seeds": seeds}
    if lost(reference):
        return of | dict.fromkeys(("difference", "low", "high"))
    strata = [per_user(results, key, t) - per_user(reference, key, t) for t in stages]  # (users,) per stage
    low, high = bootstrap_interval(strata)
    return of | {"difference": statistics.fmean(d.mean().item() for d in strata), "low": low, "high": high}


def per_user(results: list[Result], key: str, t: str) -> Tensor:
    """Every user's mean over seeds at stage t, (users,)."""
    return torch.stack([METRICS[key](result.ranks[t]) for result in results]).mean(0)  # (seeds, users) -> (users,)


def validation(results: list[Result]) -> float:
    """The mean over seeds and stages of the best validation cross-entropy; inf for what diverged or learns nothing."""
    losses = [said["valid_ce"] for result in results for said in result.training.values()]
    return statistics.fmean(losses) if losses and not lost(results) else float("inf")


def averaged(filled: Filled) -> list[tuple[str, list[str]]]:
    """[("D2-D4", ["2", "3", "4"]), ...]: the paper's two averages, less the stages without test users."""
    ranks = any_ranks(filled)
    used = [(span, [t for t in stages if len(ranks[t])]) for span, stages in spans(list(ranks)).items()]
    if not used[-1][1]:  # the longest average has none
        raise UsageError("no stage after D1 has test users\nthere is nothing to average\ngive more --users")
    return [(span, stages) for span, stages in used if stages]  # D2-D4 may be empty where D2-D5 is not


def any_ranks(filled: Filled) -> dict[str, Tensor]:
    """Those of a row that did not diverge: all rows have the same stages and users."""
    for results in filled.values():
        if not lost(results):
            return results[0].ranks  # {stage: (users,)}
    raise FloatingPointError("no row of the table is left\nevery one of them diverged on some seed\nlower --lr")


def table(filled: Filled, to: str, corner: str, columns: list[str], stages: list[str],
          beside: Callable[[str], Beside]) -> tuple[str, dict]:
    """The markdown and the values of all rows. Column "H@10" is the mean, "- H@10" the difference to row `to`; further
    ones are beside(name). A row that diverged says that alone."""
    texts, values = {}, {}
    for name in [name for name in filled if not lost(filled[name])]:
        more = beside(name)  # in every row the same columns
        keys = dict.fromkeys(column.removeprefix("- ") for column in columns)
        of = {key: summary(filled[name], filled[to], key, stages) for key in keys}
        cells = [mean_sd(of[c]) if c in of else "" if name == to else interval(of[c[2:]]) for c in columns]
        texts[name] = cells + [", ".join(f"{x:{form}}" for x in numbers) or "-" for form, numbers in more.values()]
        values[name] = of | {column: list(numbers) for column, (_, numbers) in more.items()}
    titles = [f"{column[2:]} - {to} [95 %]" if column.startswith("- ") else column for column in [*columns, *more]]
    lines = [[name, *texts.get(name, ["diverged"] * len(titles))] for name in filled]
    return markdown([[corner, *titles], *lines]), {name: values.get(name, {"diverged": True}) for name in filled}


def told(texts: list[str], filled: Filled, what: str = "") -> str:
    """The parts of a text, and what a reader must know of the cells: stages left out, runs that diverged."""
    said = [f"D{t} has no test users: it is in no average." for t, ranks in any_ranks(filled).items() if not len(ranks)]
    for name, results in filled.items():
        why = [result.diverged for result in results if result.diverged]
        said += [f"{what}{name} diverged on {len(why)} of {len(results)} seeds: {why[0]}"] if why else []
    return "\n\n".join([*texts, *said])


def mean_sd(of: dict) -> str:
    return f"{of['mean']:.4f}" + ("" if of["sd"] is None else f" ± {of['sd']:.4f}")


def interval(of: dict, form: str = ".4f") -> str:
    if of["difference"] is None:
        return "-"
    text = f"{of['difference']:+{form}} [{of['low']:+{form}}, {of['high']:+{form}}]"
    return f"**{text}**" if of["low"] > 0 or of["high"] < 0 else text


def method_table(filled: Filled, published: dict) -> tuple[str, dict]:
    """Table 2's form, once for each of the paper's two averages; the paper's own numbers on the right."""
    columns = ["H@5", "H@10", "N@5", "N@10", "- H@10", "- N@10"]
    texts, values = [], {}
    for span, stages in averaged(filled):
        text, values[span] = table(filled, "single", f"mean over {span}", columns, stages, lambda name: {
            f"paper: {key}": (".4f", published.get(name, ())[i:i + 1]) for key, i in (("H@10", 1), ("N@10", 3))})
        texts.append(text)
    legend = f"mean ± sd over seeds; {NOISE}; the paper's columns are its Instruments with Llama-3.2-1B, over D2-D4."
    return told([*texts, legend], filled), values


def gain_table(splits: dict[str, Filled], published: dict) -> tuple[str, dict]:
    """Table 1's form: gains over single in NDCG@5, per cent, on two splits, and the first's less the second's."""
    lines, values = [], {}
    for name in [name for name in next(iter(splits.values())) if name != "single"]:
        of = {split: gain(filled[name], filled["single"]) for split, filled in splits.items()}  # paired within a split
        apart = [gained["difference"] for gained in of.values() if gained]
        shown = [interval(gained, ".1f") if gained else "diverged" for gained in of.values()]
        shown.append(f"{apart[0] - apart[1]:+.1f}" if len(apart) == 2 else "-")
        lines.append([name, *shown, *(f"{x:+.2f}" for x in published[name])])
        values[name] = of | {"paper": published[name]}
    header = ["NDCG@5 against single, %", *(f"{split} [95 %]" for split in splits), "difference",
              *(f"paper: {split}" for split in splits)]
    rows = {f"{name}, {split}": results for split, filled in splits.items() for name, results in filled.items()}
    return told([markdown([header, *lines]), f"mean over {averaged(rows)[-1][0]}; {NOISE}"], rows), values


def gain(results: list[Result], single: list[Result]) -> dict[str, float]:
    """The difference in NDCG@5 and its interval, per cent of single's NDCG@5; {} if one of them diverged."""
    if lost(results + single):
        return {}
    of = summary(results, single, "N@5", averaged({"single": single})[-1][1])
    return {key: 100 * of[key] / (of["mean"] - of["difference"]) for key in ("difference", "low", "high")}


def mean_table(filled: Filled, to: str, what: str) -> tuple[str, dict]:
    """A figure's numbers: the mean of the four metrics over D2-D5, beside the validation loss."""
    span, stages = averaged(filled)[-1]
    text, values = table(filled, to, what, [FOUR, f"- {FOUR}", "H@10", "- H@10"], stages, lambda name: {
        "validation CE": (".4f", [ce for ce in [validation(filled[name])] if ce < float("inf")])})
    return told([text, f"mean ± sd over seeds, over {span}; {NOISE}"], filled, f"{what} "), values


def audit_table(filled: Filled, zero: str) -> tuple[str, dict]:
    """What lambda does, against lambda 0 from the same seed and D_1: medians over steps, means over seeds. A row is
    called "form, lambda".
    ratio: || lam d prox/dv || / || d CE/dv ||. moved: ||v_t - v_{t-1}||. held: 1 - moved / moved(lam = 0), the share of
    the movement that the term explains. lam at 10 %: from the ratio, which grows with lam on a given path.
    """
    learnt = [result.training for results in filled.values() for result in results if not result.diverged]
    stages = [t for t in averaged(filled)[-1][1] if all(t in training for training in learnt)]  # else: only test users

    def said(name: str, key: str) -> list[float]:
        return [statistics.fmean(result.training[t][key] for result in filled[name]) for t in stages]

    def effects(name: str) -> Beside:
        ratio, moved, lam = said(name, "prox_ce_ratio"), said(name, "moved"), float(name.rpartition(", ")[2])
        free = [] if lost(filled[zero]) else said(zero, "moved")  # per stage, without the term
        return {"ratio D2 .. D5, %": (".2g", [100 * x for x in ratio]),
                "lam at 1 % and 10 %": (".3g", [x * lam / statistics.fmean(ratio) for x in (0.01, 0.1) if any(ratio)]),
                "moved D2 .. D5": (".2f", moved), "held, %": (".1f", [100 - 100 * a / b for a, b in zip(moved, free)]),
                "validation CE": (".4f", [validation(filled[name])])}
    text, values = table(filled, zero, "form, lambda", ["- H@10"], stages, effects)
    return told([text, NOISE], filled), values


def split_table(filled: Filled) -> tuple[str, dict]:
    """Who pays for adaptation: Hit@10 and NDCG@10 of the stage's own users, U_A, of earlier stages' users who are not
    in it, U_I, each with its last known test question, and of both, U."""
    def cost(name: str) -> Beside:
        shares = [said["touched"] for result in filled[name] for said in result.training.values()]
        touched = statistics.fmean(1.0 if share is None else share for share in shares)  # None: the whole adapter
        seconds = statistics.fmean(result.seconds / len(result.absent) for result in filled[name])
        return {"adapter touched": (".0%", [touched]), "seconds per stage": (".0f", [seconds])}
    texts, values = [], {}
    for part in ("U_A", "U_I", "U"):
        rows = {name: [users_of(part, result) for result in results] for name, results in filled.items()}
        users = {t: len(ranks) for t, ranks in any_ranks(rows).items() if len(ranks)}  # per stage
        corner = f"{part}, {statistics.fmean(users.values()):,.0f} users per stage"
        text, values[part] = table(rows, "single", corner, ["H@10", "N@10", "- N@10"], list(users), cost)
        texts.append(text)
    return told([*texts, f"mean ± sd over seeds, over {averaged(filled)[-1][0]}; {NOISE}"], filled), values


def users_of(part: str, result: Result) -> Result:
    """With the ranks of D_2 .. D_T of U_A, of U_I or, one behind the other, of both."""
    some = {"U_A": [result.ranks], "U_I": [result.absent], "U": [result.ranks, result.absent]}[part]
    return result._replace(ranks={t: torch.cat([ranks[t] for ranks in some]) for t in result.absent})


def draw(path: Path, name: str, values: dict) -> None:
    """Figures 2, 3 and 4: the mean of four with the 95 % interval of the difference to the first row, whose level and
    spread over seeds run across."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UsageError(f"--plot needs matplotlib\n{error}\npip install -e '.[plot]'") from error
    across = {"figure2": "", "figure3": "λ", "figure4": "learning rate of D2.., as a share of D1's"}
    if name not in across:
        raise UsageError(f"--plot draws figures\nfound {name}\nask for figure2, figure3 or figure4")
    (first, level), *others = [(row, of[FOUR]) for row, of in values.items() if "diverged" not in of]
    labels = [row.replace(", lambda ", "\nλ = ") for row, _ in others]
    errors = [[abs(of[end] - of["difference"]) for _, of in others] for end in ("low", "high")]  # (2, rows)
    mean, sd = level["mean"], level["sd"] or 0.0  # of one seed: none
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axes.errorbar(labels, [of["mean"] for _, of in others], errors, fmt="o" if name == "figure2" else "o-", capsize=4)
    axes.axhline(mean, color="grey", linestyle="--", label=first)
    axes.axhspan(mean - sd, mean + sd, color="grey", alpha=0.15, lw=0, label="± sd over seeds")
    axes.axhspan(0.9 * mean, 1.1 * mean, alpha=0)  # what is small beside the level should look small
    axes.set(xlabel=across[name], ylabel=f"{FOUR}, D2-D5")
    axes.legend(frameon=False, title=f"whiskers: 95 % interval of\nthe difference to {first}")
    figure.savefig(path, dpi=150)
