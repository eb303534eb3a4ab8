"""From the cells of an experiment to its table: means, spread over seeds, and which differences are noise.

A metric is averaged over users within a stage, then over stages, then over seeds; "sd" is over seeds. A
difference to the reference is paired: the same user under two methods, averaged over seeds, with a 95 %
bootstrap interval over users within stages. Stages without test users are in no average.
"""
from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from minipeso.experiments.cells import Cell, Result
from minipeso.config import UsageError
from minipeso.metrics import bootstrap_interval, gains, hits
from minipeso.runs.report import markdown, spans

Filled = dict[Cell, list[Result]]
Values = Callable[[Tensor], Tensor]  # ranks (n,) -> a metric a user (n,)
VALUES: dict[str, Values] = {"H@5": partial(hits, k=5), "H@10": partial(hits, k=10),
                             "N@5": partial(gains, k=5), "N@10": partial(gains, k=10)}
NOISE = "**bold**: the interval of the difference does not hold 0"


def of_four(ranks: Tensor) -> Tensor:
    """The paper's "average performance": the mean of the four metrics, a user."""
    return sum(value(ranks) for value in VALUES.values()) / len(VALUES)


# -- one cell ---------------------------------------------------------------------------------------

def per_seed(results: list[Result], value: Values, stages: list[str]) -> list[float]:
    """The average over stages, a seed each."""
    return [statistics.fmean(value(result.ranks[t]).mean().item() for t in stages) for result in results]


def per_user(results: list[Result], value: Values, stages: list[str]) -> list[Tensor]:
    """A stage each: every user's mean over seeds, (users,)."""
    return [torch.stack([value(result.ranks[t]) for result in results]).mean(0) for t in stages]


def difference(results: list[Result], reference: list[Result], value: Values, stages: list[str]) -> dict:
    """{"difference", "low", "high"}; None each if the reference diverged."""
    if any(result.diverged for result in reference):
        return dict.fromkeys(("difference", "low", "high"))
    strata = [a - b for a, b in zip(per_user(results, value, stages), per_user(reference, value, stages), strict=True)]
    low, high = bootstrap_interval(strata)
    return {"difference": statistics.fmean(d.mean().item() for d in strata), "low": low, "high": high}


def summary(results: list[Result], reference: list[Result], value: Values, stages: list[str]) -> dict[str, float]:
    seeds = per_seed(results, value, stages)
    spread = statistics.stdev(seeds) if len(seeds) > 1 else None
    return {"mean": statistics.fmean(seeds), "sd": spread, "seeds": seeds, **difference(results, reference, value, stages)}


def validation(results: list[Result]) -> float:
    """The mean over seeds and stages of the best validation cross-entropy: what lambda is chosen by."""
    losses = [said["valid_ce"] for result in results for said in result.training.values()]
    return statistics.fmean(losses) if losses and not any(result.diverged for result in results) else float("inf")


def averaged(filled: Filled) -> dict[str, list[str]]:
    """{"D2-D4": ["2", "3", "4"], ...}: the paper's two averages, less the stages without test users."""
    ranks = next((r.ranks for results in filled.values() for r in results if not r.diverged), None)
    if ranks is None:
        raise FloatingPointError("no cell of the table is left\nevery one of them diverged\nlower --lr")
    if not any(len(ranks[t]) for t in ranks if t != "1"):
        raise UsageError("no stage after D1 has test users\nthere is nothing to average\ngive more --users")
    return {span: some for span, stages in spans(list(ranks)).items() if (some := [t for t in stages if len(ranks[t])])}


def notes(filled: Filled) -> list[str]:
    """What a reader must know of these cells: stages left out, runs that diverged."""
    ranks = next(r.ranks for results in filled.values() for r in results if not r.diverged)
    said = [f"D{t} has no test users: it is in no average." for t, r in ranks.items() if not len(r)]
    return said + [f"{cell.label} diverged on {sum(bool(r.diverged) for r in results)} of {len(results)} seeds: "
                   f"{next(r.diverged for r in results if r.diverged).splitlines()[0]}"
                   for cell, results in filled.items() if any(r.diverged for r in results)]


# -- tables -----------------------------------------------------------------------------------------

def method_table(filled: Filled, cells: dict[str, Cell], reference: Cell, published: dict) -> tuple[str, dict]:
    """Table 2's form, once for each of the paper's two averages; the paper's own numbers on the right."""
    texts, values = [], {}
    for span, stages in averaged(filled).items():
        rows = [["mean over " + span, *VALUES, f"H@10 - {reference.method} [95 %]", f"N@10 - {reference.method} [95 %]",
                 "paper: H@10", "N@10"]]
        values[span] = {}
        for label, cell in cells.items():
            paper = [f"{published[label][i]:.4f}" if label in published else "-" for i in (1, 3)]
            if any(result.diverged for result in filled[cell]):
                values[span][label] = {"diverged": True}
                rows.append([label, *["diverged"] * 6, *paper])
                continue
            found = {name: summary(filled[cell], filled[reference], value, stages) for name, value in VALUES.items()}
            values[span][label] = found | {"paper": published.get(label)}
            rows.append([label, *(mean_sd(found[name]) for name in VALUES),
                         *("" if cell == reference else interval(found[name]) for name in ("H@10", "N@10")), *paper])
        texts.append(markdown(rows))
    legend = f"mean ± sd over seeds; {NOISE}; the paper's columns are its Instruments with Llama-3.2-1B, over D2-D4."
    return "\n\n".join([*texts, legend, *notes(filled)]), values


def gain_table(filled: Filled, cells: dict[tuple[str, str], Cell], published: dict) -> tuple[str, dict]:
    """Table 1's form: gain over single in NDCG@5, per cent of single's, on both splits."""
    splits = ("user-disjoint", "natural")
    rows = [["NDCG@5 against single, %", *(f"{split} [95 %]" for split in splits), "difference",
             *(f"paper: {split}" for split in splits)]]
    values = {}
    for method in dict.fromkeys(name for name, _ in cells if name != "single"):
        gains_of = {}
        for split in splits:
            single, results = filled[cells["single", split]], filled[cells[method, split]]
            if any(result.diverged for result in (*single, *results)):
                continue
            stages = list(averaged({cells["single", split]: single}).values())[-1]
            found = summary(results, single, VALUES["N@5"], stages)
            whole = statistics.fmean(per_seed(single, VALUES["N@5"], stages)) / 100
            gains_of[split] = {key: found[key] / whole for key in ("difference", "low", "high")}
        values[method] = gains_of | {"paper": published.get(method)}
        shown = [interval(gains_of[split], ".1f") if split in gains_of else "diverged" for split in splits]
        apart = f"{gains_of[splits[0]]['difference'] - gains_of[splits[1]]['difference']:+.1f}" if len(gains_of) == 2 else "-"
        rows.append([method, *shown, apart, *(f"{gain:+.2f}" for gain in published.get(method, ()))])
    return "\n\n".join([markdown(rows), f"mean over {list(averaged(filled))[-1]}; {NOISE}", *notes(filled)]), values


def mean_table(filled: Filled, cells: dict[str, Cell], reference: Cell, what: str) -> tuple[str, dict]:
    """A figure's numbers: the mean of the four metrics over D2-D5, beside the validation loss."""
    span, stages = list(averaged(filled).items())[-1]
    name = next(label for label, cell in cells.items() if cell == reference)
    rows, values = [[what, "mean of four", f"- {name} [95 %]", "H@10", f"- {name} [95 %]", "validation CE"]], {}
    for label, cell in cells.items():
        if any(result.diverged for result in filled[cell]):
            values[label] = {"diverged": True}
            rows.append([label, *["diverged"] * 5])
            continue
        four, hit = (summary(filled[cell], filled[reference], value, stages) for value in (of_four, VALUES["H@10"]))
        loss = validation(filled[cell])
        values[label] = {"mean of four": four, "H@10": hit, "validation CE": loss if loss < float("inf") else None}
        differ = ["", ""] if cell == reference else [interval(four), interval(hit)]
        rows.append([label, mean_sd(four), differ[0], mean_sd(hit), differ[1], f"{loss:.4f}" if loss < float("inf") else "-"])
    return "\n\n".join([markdown(rows), f"mean ± sd over seeds, over {span}; {NOISE}", *notes(filled)]), values


def audit_table(filled: Filled, cells: dict[tuple[str, float], Cell], zero: Cell) -> tuple[str, dict]:
    """What lambda does, against lambda 0 from the same seed and D_1: medians over steps, means over seeds.

    ratio: || lam d prox/dv || / || d CE/dv ||. moved: ||v_t - v_{t-1}||. held: 1 - moved / moved(lam = 0), the share
    of the movement that the term explains. lam at 10 %: from the ratio, which grows with lam on a given path.
    """
    stages = [t for t in list(averaged(filled).values())[-1]  # a stage with test users may have nothing to learn from
              if all(t in result.training for cell in cells.values() for result in filled[cell] if not result.diverged)]

    def said(cell: Cell, t: str, name: str) -> float:
        return statistics.fmean(result.training[t][name] for result in filled[cell])
    rows = [["form", "lambda", "ratio D2 .. D5, %", "lam at 1 % and 10 %", "moved D2 .. D5", "held, %", "validation CE",
             "H@10 - lambda 0 [95 %]"]]
    values = {}
    for (form, lam), cell in cells.items():
        if any(result.diverged for result in filled[cell]):
            rows.append([form, f"{lam:g}", *["diverged"] * 6])
            continue
        ratio, moved = ([said(cell, t, name) for t in stages] for name in ("prox_ce_ratio", "moved"))
        lost = any(result.diverged for result in filled[zero])  # then there is nothing to compare with
        held = None if lost else [1 - a / said(zero, t, "moved") for t, a in zip(stages, moved)]
        at = [share * lam / statistics.fmean(ratio) for share in (0.01, 0.1)] if any(ratio) else None
        hit = summary(filled[cell], filled[zero], VALUES["H@10"], stages)
        values[f"{form}, {lam:g}"] = {"ratio": ratio, "moved": moved, "held": held, "lambda at 1 %, 10 %": at,
                                      "validation CE": validation(filled[cell]), "H@10": hit}
        rows.append([form, f"{lam:g}", series(ratio, 100, ".2g"), " and ".join(f"{x:,.3g}" for x in at) if at else "-",
                     series(moved, 1, ".2f"), "-" if lost else series(held, 100, ".1f"), f"{validation(filled[cell]):.4f}",
                     "" if cell == zero else interval(hit)])
    return "\n\n".join([markdown(rows), NOISE, *notes(filled)]), values


def split_table(filled: Filled, cells: dict[str, Cell], active: dict[str, int]) -> tuple[str, dict]:
    """Who pays for adaptation: Hit@10 and NDCG@10 of the stage's own users, U_A, of earlier stages' users who are
    not in it, U_I, each with its last known test question, and of both, U. Differences to single."""
    parts = {"U_A": lambda t, r: r[:active[t]], "U_I": lambda t, r: r[active[t]:], "U": lambda t, r: r}
    rows = [[f"mean over {list(averaged(filled))[-1]}", "users", "H@10", "N@10", "N@10 - single [95 %]", "adapter touched",
             "seconds a stage"]]
    values: dict[str, dict] = {}
    for name, cell in cells.items():
        if any(result.diverged for result in filled[cell]):
            values[name] = {"diverged": True}
            rows.append([name, *["diverged"] * 6])
            continue
        touched = [1.0 if said["touched"] is None else said["touched"] for result in filled[cell] for said in result.training.values()]
        stages = len(filled[cell][0].ranks) - 1
        cost = statistics.fmean(result.seconds for result in filled[cell]) / stages
        values[name] = {"touched": statistics.fmean(touched), "seconds": cost}
        for part, cut in parts.items():
            mine, single = ([r._replace(ranks={t: cut(t, ranks) for t, ranks in r.ranks.items()}) for r in filled[c]]
                            for c in (cell, cells["single"]))
            kept = [t for t in mine[0].ranks if t != "1" and len(mine[0].ranks[t])]
            hit, gain = (summary(mine, single, VALUES[metric], kept) for metric in ("H@10", "N@10"))
            values[name][part] = {"H@10": hit, "N@10": gain, "by stage": {
                t: statistics.fmean(hits(r.ranks[t], 10).mean().item() for r in mine) for t in kept}}
            count = statistics.fmean(len(mine[0].ranks[t]) for t in kept)
            rows.append([name if part == "U_A" else "", f"{part}, {count:,.0f} a stage", mean_sd(hit), mean_sd(gain),
                         "" if name == "single" else interval(gain),
                         f"{statistics.fmean(touched):.0%}" if part == "U_A" else "", f"{cost:.0f}" if part == "U_A" else ""])
    return "\n\n".join([markdown(rows), f"mean ± sd over seeds; {NOISE}", *notes(filled)]), values


def mean_sd(found: dict) -> str:
    return f"{found['mean']:.4f}" + ("" if found["sd"] is None else f" ± {found['sd']:.4f}")


def interval(found: dict, form: str = ".4f") -> str:
    if found["difference"] is None:
        return "-"
    text = f"{found['difference']:+{form}} [{found['low']:+{form}}, {found['high']:+{form}}]"
    return f"**{text}**" if found["low"] > 0 or found["high"] < 0 else text


def series(values: list[float], times: float, form: str) -> str:
    return ", ".join(f"{times * v:{form}}" for v in values)


# -- figures ----------------------------------------------------------------------------------------

def draw(path: Path, name: str, values: dict) -> None:
    """Figure 2 as bars, Figures 3 and 4 as lines: the mean of the four metrics, with the 95 % interval of the
    difference to the first one around it."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UsageError(f"--plot needs matplotlib\n{error}\npip install -e '.[plot]'") from error
    if not name.startswith("figure"):
        raise UsageError(f"--plot draws figures\nfound {name}\nask for figure2, figure3 or figure4")
    shown = {label: row["mean of four"] for label, row in values.items() if "diverged" not in row}
    means = [row["mean"] for row in shown.values()]
    errors = [[abs(row[end] - row["difference"]) for row in shown.values()] for end in ("low", "high")]
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    first = next(iter(shown)).replace("0", "λ = 0") if name == "figure3" else next(iter(shown))
    if name == "figure2":
        labels = [label.replace(", lambda ", "\nλ = ") for label in shown]
        axes.bar(labels, means, yerr=errors, capsize=4, color="tab:blue", alpha=0.75)
    else:
        skipped = name == "figure4"  # its first row, pretrain, is a level and no rate
        axes.errorbar(list(shown)[skipped:], means[skipped:], [side[skipped:] for side in errors], marker="o", capsize=4)
        axes.axhline(means[0], color="grey", linestyle="--", label="no adaptation" if skipped else "λ = 0")
    spread = shown[next(iter(shown))]["sd"]
    if spread:  # none of one seed
        axes.axhspan(means[0] - spread, means[0] + spread, color="grey", alpha=0.15, lw=0, label="± sd over seeds")
    low, high = axes.get_ylim()  # what is small beside the level should look small, and the legend find room
    axes.set_ylim(min(low, 0.9 * means[0]), max(high, 1.1 * means[0]) * (1.15 if name == "figure2" else 1))
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, loc="upper right" if name == "figure3" else "upper left")
    axes.set_xlabel({"figure2": "", "figure3": "λ", "figure4": "learning rate of D2.., as a share of D1's"}[name])
    axes.set_ylabel("mean of four metrics, D2-D5")
    axes.set_title(f"whiskers: 95 % interval of the difference to {first}", fontsize=9)
    figure.savefig(path, dpi=150)
