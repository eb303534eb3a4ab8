"""From the cells of an experiment to its table: means, spread over seeds, and which differences are noise.

A metric is averaged over users within a stage, then over stages, then over seeds; "sd" is over seeds. A difference is
paired: the same user and seed under two methods. Its 95 % interval is over users and seeds together
(metrics.bootstrap_interval), of one seed over users alone. Stages without test users are in no average."""
import statistics
from collections.abc import Sequence
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
METRICS = {  # (whose of a Result, what the metrics take (n,) or (n, 10) -> a value per user (n,))
    "H@5": ("ranks", partial(hits, k=5)), "H@10": ("ranks", partial(hits, k=10)),
    "N@5": ("ranks", partial(gains, k=5)), "N@10": ("ranks", partial(gains, k=10)),
    FOUR: ("ranks", lambda r: (hits(r, 5) + hits(r, 10) + gains(r, 5) + gains(r, 10)) / 4),
    "U_A H@10": ("own", partial(hits, k=10)), "U_A N@10": ("own", partial(gains, k=10)),
    "U_I N@10": ("absent", partial(gains, k=10)), "U N@10": ("both", partial(gains, k=10))}
GROUPS = [column for key in ("U_A H@10", "U_A N@10", "U_I N@10") for column in (key, f"- {key}")]
PAPER = [FOUR, f"- {FOUR}", *GROUPS[:2], *GROUPS[4:]]  # what the paper averages, and who gains
COSTS = {  # of a row's results and of the reference's, for the columns behind the metrics: (format, numbers)
    "validation CE": (".4f", lambda some, to: [ce for ce in [validation(some)] if ce < float("inf")]),
    "pull": (".2%", lambda some, to: mean_of(some, "prox_ce_ratio")),
    "movement": (".2f", lambda some, to: [a / b for a, b in zip(mean_of(some, "moved"), mean_of(to, "moved"))]),
    "touched": (".0%", lambda some, to: mean_of(some, "touched")),
    "seconds per stage": (".0f", lambda some, to: [statistics.fmean(r.seconds / len(r.absent) for r in some)])}


def lost(results: list[Result]) -> bool:
    """Whether it diverged on some seed: then it has no mean."""
    return any(result.diverged for result in results)


def values(result: Result, key: str, stages: list[str]) -> list[Tensor]:
    """A metric per user (users,), of every stage whose group has users."""
    whose, metric = METRICS[key]
    return [metric(of[t]) for of in [getattr(result, whose)] for t in stages if len(of.get(t, ()))]


def summary(results: list[Result], reference: list[Result], key: str, stages: list[str]) -> dict:
    """{"mean", "sd", "seeds"}, and {"difference", "low", "high"} of results - reference, None each if that diverged."""
    mine, theirs = ([values(result, key, stages) for result in some] for some in (results, reference))
    if not mine[0]:
        return {}
    seeds = [statistics.fmean(v.mean().item() for v in of) for of in mine]
    of = {"mean": statistics.fmean(seeds), "sd": statistics.stdev(seeds) if len(seeds) > 1 else None, "seeds": seeds}
    if lost(reference):
        return of | dict.fromkeys(("difference", "low", "high"))
    pairs = zip(zip(*mine), zip(*theirs), strict=True)  # per stage, of all seeds
    return of | gained([torch.stack(a) - torch.stack(b) for a, b in pairs])


def mean_of(results: list[Result], what: str) -> list[float]:
    """[the mean over seeds and stages of what training said], [] of what learns nothing."""
    said = [of[what] for result in results for of in result.training.values() if of.get(what) is not None]
    return [statistics.fmean(said)] if said else []


def validation(results: list[Result]) -> float:
    """The mean over seeds and stages of the best validation cross-entropy; inf for what diverged or learns nothing."""
    return (mean_of(results, "valid_ce") or [float("inf")])[0] if not lost(results) else float("inf")


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
          costs: Sequence[str] = (), published: dict = {}) -> tuple[str, dict]:
    """(markdown, values) of all rows. Column "H@10": mean, "- H@10": difference to row `to`; then COSTS, and what the
    paper has. *: the lowest validation loss."""
    texts, of, best = {}, {}, min(map(validation, filled.values()))
    for name in [name for name in filled if not lost(filled[name])]:
        keys = dict.fromkeys(column.removeprefix("- ") for column in columns)
        of[name] = row = {key: summary(filled[name], filled[to], key, stages) for key in keys}
        texts[name] = [mean_sd(row[c]) if c in row else "" if name == to else interval(row[c[2:]]) for c in columns]
        for cost in costs:
            form, found = COSTS[cost][0], COSTS[cost][1](filled[name], filled[to])
            star = " *" * (cost == "validation CE" and validation(filled[name]) == best < float("inf"))
            texts[name].append(", ".join(f"{x:{form}}{star}" for x in found) or "-")
            row[cost] = found
        texts[name] += [f"{x:.4f}" for x in published.get(name, ())] or ["-"] * bool(published) * 2
    titles = [f"{column[2:]} - {to} [95 %]" if column.startswith("- ") else column for column in [*columns, *costs]]
    titles += ["paper: H@10", "paper: N@10"] * bool(published)
    lines = [[name, *texts.get(name, ["diverged"] * len(titles))] for name in filled]
    return markdown([[corner, *titles], *lines]), {name: of.get(name, {"diverged": True}) for name in filled}


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
    return "-" if not of else f"{of['mean']:.4f}" + ("" if of["sd"] is None else f" ± {of['sd']:.4f}")


def method_table(filled: Filled, published: dict) -> tuple[str, dict]:
    """Table 2's form for each of the paper's two averages, its own numbers on the right, PESO's gains below; then who
    gains."""
    columns, paper = ["H@5", "H@10", "N@5", "N@10", "- H@10", "- N@10"], {n: row[1::2] for n, row in published.items()}
    texts, of = [], {}
    for span, stages in averaged(filled):
        text, of[span] = table(filled, "single", f"mean over {span}", columns, stages, published=paper)
        gains = [[f"over {name}", *(interval(gain(filled["peso"], filled[name], key, stages), ".1f")
                                    for key in columns[:4])] for name in OVER if {name, "peso"} <= {*filled}]
        texts += [text, markdown([["gain of peso, %", *(f"{key} [95 %]" for key in columns[:4])], *gains])]
    text, of["groups"] = table(filled, "single", "who gains", GROUPS, stages, ["validation CE"])
    legend = "mean ± sd over seeds; the paper's columns are its Instruments with Llama-3.2-1B, over D2-D4."
    return told([*texts, text, legend], filled), of


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


def mean_table(filled: Filled, to: str, what: str, columns: Sequence[str] = GROUPS,
               costs: Sequence[str] = ("validation CE",)) -> tuple[str, dict]:
    """Everything else: means over D2-D5 and who gains, U_A and U_I (stages.questions), beside what it cost."""
    span, stages = averaged(filled)[-1]
    text, of = table(filled, to, what, [*columns], stages, costs)
    earn = next(results[0].premiums for results in filled.values() if not lost(results))
    said = "counts say what can be earned, Hit@10: " + ", ".join(
        f"{name} {mean:+.3f} [{low:+.3f}, {high:+.3f}]" for name, (mean, low, high) in earn.items())
    return told([text, said, f"mean ± sd over seeds, over {span}"], filled, f"{what} "), of | {"premiums": earn}


def draw(path: Path, values: dict) -> None:
    """The trade-off: the gain over lambda 0 of U_A and U_I, world beside world; dotted: what validation chooses."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UsageError(f"--plot needs matplotlib\n{error}\npip install -e '.[plot]'") from error
    figure, panels = plt.subplots(1, len(values), figsize=(2.6 + 2.4 * len(values), 3.4), layout="constrained",
                                  sharey=True, squeeze=False)
    names = {"U_A": "the stage's users, U_A", "U_I": "users who stay away, U_I"}
    for axes, (world, rows) in zip(panels[0], values.items()):
        earn, rows = rows["premiums"], {float(name): row for name, row in rows.items() if name[0].isdigit()}
        for part, color in (("U_A", "#d95f02"), ("U_I", "#1f77b4")):
            of = [row[f"{part} N@10"] for row in rows.values()]
            axes.plot([*rows], [row["difference"] for row in of], "o-", color=color, label=names[part])
            axes.fill_between([*rows], *([row[end] for row in of] for end in ("low", "high")), color=color, alpha=0.2)
        axes.axhline(0, color="grey", lw=0.8)
        axes.axvline(min(rows, key=lambda lam: rows[lam]["validation CE"]), color="black", linestyle=":",
                     label="chosen by validation")
        axes.set_xscale("symlog", linthresh=2)
        axes.set(xlabel="λ", xlim=(-0.3, 1.3 * max(rows)), xticks=[*rows], xticklabels=[f"{lam:g}" for lam in rows],
                 title="\n".join([world, *(f"{what} {mean:+.3f}" for what, (mean, *_) in earn.items())]))
        axes.title.set_fontsize(9)
    panels[0][0].set_ylabel("NDCG@10 less that of λ = 0")
    panels[0][-1].legend(frameon=False, loc="lower left", fontsize=8)
    figure.savefig(path, dpi=150)
