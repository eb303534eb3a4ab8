"""From the cells of an experiment to its table: means, spread over seeds, and which differences are noise.

A metric is averaged over users within a stage, then over stages, then over seeds; "sd" is over seeds. A difference is
paired: the same user and seed under two methods. Its 95 % interval is over users and seeds together
(metrics.bootstrap_interval), of one seed over users alone. Stages without test users are in no average."""
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from minipeso.config import UsageError
from minipeso.experiments.cells import Result
from minipeso.metrics import gains, hits
from minipeso.runs.report import gained, interval, markdown, spans

Filled = dict[str, list[Result]]  # {a row's name: its results, one per seed}
Beside = dict[str, tuple[str, Sequence[float]]]  # further columns of a row: {column: (format, numbers)}
OVER = ("single", "sumlora-latest-inherit", "sdlora-latest-inherit")  # what Table 2 gives PESO's gains over
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
    return of | gained([torch.stack([METRICS[key](a.ranks[t]) - METRICS[key](b.ranks[t])
                                     for a, b in zip(results, reference, strict=True)]) for t in stages])


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
    """(markdown, values) of all rows. Column "H@10": mean, "- H@10": difference to row `to`; then beside(name)."""
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
    """The parts of a text, and what one must know: when a difference is bold, stages left out, runs that diverged."""
    seeds = max(map(len, filled.values()))
    said = ["**bold**: the interval of the difference does not hold 0; it is over " + (
        f"{seeds} seeds and their users." if seeds > 1 else "the users of one seed: another may give another.")]
    said += [f"D{t} has no test users: it is in no average." for t, r in any_ranks(filled).items() if not len(r)]
    for name, results in filled.items():
        why = [result.diverged for result in results if result.diverged]
        said += [f"{what}{name} diverged on {len(why)} of {len(results)} seeds: {why[0]}"] if why else []
    return "\n\n".join([*texts, *said])


def mean_sd(of: dict) -> str:
    return f"{of['mean']:.4f}" + ("" if of["sd"] is None else f" ± {of['sd']:.4f}")


def method_table(filled: Filled, published: dict) -> tuple[str, dict]:
    """Table 2's form for each of the paper's two averages, its own numbers on the right, PESO's gains below."""
    columns = ["H@5", "H@10", "N@5", "N@10", "- H@10", "- N@10"]
    texts, values = [], {}
    for span, stages in averaged(filled):
        text, values[span] = table(filled, "single", f"mean over {span}", columns, stages, lambda name: {
            f"paper: {key}": (".4f", published.get(name, ())[i:i + 1]) for key, i in (("H@10", 1), ("N@10", 3))})
        gains = [[f"over {name}", *(interval(gain(filled["peso"], filled[name], key, stages), ".1f")
                                    for key in columns[:4])] for name in OVER if {name, "peso"} <= {*filled}]
        texts += [text, markdown([["gain of peso, %", *(f"{key} [95 %]" for key in columns[:4])], *gains])]
    legend = "mean ± sd over seeds; the paper's columns are its Instruments with Llama-3.2-1B, over D2-D4."
    return told([*texts, legend], filled), values


def gain_table(splits: dict[str, Filled], published: dict) -> tuple[str, dict]:
    """Table 1's form: gains over single in NDCG@5, per cent, on two splits, and the first's less the second's."""
    lines, values = [], {}
    for name in [name for name in next(iter(splits.values())) if name != "single"]:
        of = {split: gain(filled[name], filled["single"], "N@5", averaged(filled)[-1][1])
              for split, filled in splits.items()}  # paired within a split
        apart = [one["difference"] for one in of.values() if one]
        cells = [interval(one, ".1f") for one in of.values()]
        cells += [f"{apart[0] - apart[1]:+.1f}" if len(apart) == 2 else "-"]
        lines.append([name, *cells, *(f"{x:+.2f}" for x in published[name])])
        values[name] = of | {"paper": published[name]}
    header = ["NDCG@5 against single, %", *(f"{split} [95 %]" for split in splits), "difference",
              *(f"paper: {split}" for split in splits)]
    rows = {f"{name}, {split}": results for split, filled in splits.items() for name, results in filled.items()}
    return told([markdown([header, *lines]), f"mean over {averaged(rows)[-1][0]}"], rows), values


def gain(results: list[Result], other: list[Result], key: str, stages: list[str]) -> dict[str, float]:
    """The difference in a metric and its interval, per cent of the other's mean as it came; {} if there is none."""
    if lost(results + other):
        return {}
    of = summary(results, other, key, stages)
    base = of["mean"] - of["difference"]
    return {name: 100 * of[name] / base for name in ("difference", "low", "high")} if base else {}


def mean_table(filled: Filled, to: str, what: str) -> tuple[str, dict]:
    """A figure's numbers: the mean of the four metrics over D2-D5, beside the validation loss."""
    span, stages = averaged(filled)[-1]
    text, values = table(filled, to, what, [FOUR, f"- {FOUR}", "H@10", "- H@10"], stages, lambda name: {
        "validation CE": (".4f", [ce for ce in [validation(filled[name])] if ce < float("inf")])})
    return told([text, f"mean ± sd over seeds, over {span}"], filled, f"{what} "), values


def split_table(filled: Filled) -> tuple[str, dict]:
    """Who pays for adaptation: the stage's own users, U_A, or the absent ones, U_I (stages.questions); U: both."""
    def cost(name: str) -> Beside:
        shares = [said["touched"] for result in filled[name] for said in result.training.values()]
        touched = statistics.fmean([1.0 if share is None else share for share in shares] or [0.0])  # None: all of it
        seconds = statistics.fmean(result.seconds / len(result.absent) for result in filled[name])
        return {"adapter touched": (".0%", [touched]), "seconds per stage": (".0f", [seconds])}
    texts, values = [], {}
    for part in ("U_A", "U_I", "U"):
        rows = {name: [users_of(part, result) for result in results] for name, results in filled.items()}
        users = {t: len(ranks) for t, ranks in any_ranks(rows).items() if len(ranks)}  # per stage
        corner = f"{part}, {statistics.fmean(users.values()):,.0f} users per stage"
        text, values[part] = table(rows, "single", corner, ["H@10", "N@10", "- N@10"], list(users), cost)
        texts.append(text)
    return told([*texts, f"mean ± sd over seeds, over {averaged(filled)[-1][0]}"], filled), values


def tradeoff_table(filled: Filled) -> tuple[str, dict]:
    """By lambda, and without adaptation: what is gained over lambda 0 by U_A and by U_I, the lambda that validation
    chooses, and the data's premiums."""
    parts = {part: {name: [users_of(part, result) for result in results] for name, results in filled.items()}
             for part in ("U_A", "U_I")}
    rows = {name: {f"{part} {key}": summary(parts[part][name], parts[part]["0"], key, averaged(parts[part])[-1][1])
                   for part, key in (("U_A", "H@10"), ("U_A", "N@10"), ("U_I", "N@10"))}
            for name in filled if not lost(filled[name])}
    chosen, earn = min(rows, key=lambda name: validation(filled[name])), filled["0"][0].premiums
    lines = []
    for name, row in rows.items():
        pull = [said["prox_ce_ratio"] for result in filled[name] for said in result.training.values()]
        lines.append([name + " *" * (name == chosen), f"{validation(filled[name]):.4f}" if pull else "-",
                      f"{100 * statistics.fmean(pull):.2g} %" if pull else "-", *(
            text for of in row.values() for text in (mean_sd(of), "" if name == "0" else interval(of)))])
    header = ["lambda", "validation CE", "pull", *(title for of in rows["0"] for title in (of, "- lambda 0 [95 %]"))]
    legend = "*: the lambda with the lowest validation loss; pull: the norm of the term's gradient by cross-entropy's"
    said = "counts say what can be earned, Hit@10: " + ", ".join(
        f"{what} {mean:+.3f} [{low:+.3f}, {high:+.3f}]" for what, (mean, low, high) in earn.items())
    return told([markdown([header, *lines]), legend, said], filled), {"rows": rows, "chosen": chosen, "premiums": earn}


def users_of(part: str, result: Result) -> Result:
    """With the ranks of D_2 .. D_T of U_A, of U_I or, one behind the other, of both."""
    some = {"U_A": [result.ranks], "U_I": [result.absent], "U": [result.ranks, result.absent]}[part]
    return result._replace(ranks={t: torch.cat([ranks[t] for ranks in some]) for t in result.absent})


def draw(path: Path, values: dict) -> None:
    """The trade-off: the gain over lambda 0 of U_A and U_I; dotted: what validation chooses."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UsageError(f"--plot needs matplotlib\n{error}\npip install -e '.[plot]'") from error
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    lams = [float(name) for name in values["rows"] if name != "pretrain"]
    names = {"U_A": "the stage's users", "U_I": "users who stay away"}
    for part, color in (("U_A", "#d95f02"), ("U_I", "#1f77b4")):
        rows = [row[f"{part} N@10"] for name, row in values["rows"].items() if name != "pretrain"]
        axes.plot(lams, [of["difference"] for of in rows], "o-", color=color, label=f"{names[part]}, {part}")
        axes.fill_between(lams, *([of[end] for of in rows] for end in ("low", "high")), color=color, alpha=0.2, lw=0)
    axes.axhline(0, color="grey", lw=0.8)
    axes.axvline(float(values["chosen"]), color="black", linestyle=":", label="chosen by validation")
    axes.set_xscale("symlog", linthresh=2)
    axes.set(xlabel="λ", ylabel="NDCG@10 less that of λ = 0", xlim=(-0.3, 1.3 * max(lams)),
             xticks=lams, xticklabels=[f"{lam:g}" for lam in lams])
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.05, 0.02))
    figure.savefig(path, dpi=150)
