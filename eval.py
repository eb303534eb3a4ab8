"""The tables of finished runs, side by side; and what one run's model recommends.

    python eval.py RUN [RUN ...]            Hit@10 per stage, all metrics averaged, differences with intervals
    python eval.py RUN RUN --json F --csv F the same numbers for a program
    python eval.py RUN --report F.html      one run to look at: data, losses, tables, modules, five users; no network
    python eval.py RUN --interpolate 0,0.5,1 between the adapters of two stages, v_(t-1) + w (v_t - v_(t-1)) [--plot F]
    python eval.py RUN --recommend USER     a user's history, and ten titles with scores; --recommend-all F.jsonl
    python eval.py RUN --export-merged DIR  a plain Hugging Face folder; --export-peft DIR: the adapter for peft
    python eval.py RUN --export-blocks DIR  the stages and semantic IDs as the authors' code reads them

RUN is what train.py --out left; the methods it was compared with lie inside it and are shown too."""
import argparse
import csv
import io
import json
import re
from collections import defaultdict
from html import escape
from pathlib import Path
from string import Template

import torch
from safetensors.torch import load_file

from minipeso.config import UsageError, changed
from minipeso.files.export import export_merged, export_peft, whole
from minipeso.files.release import write_release
from minipeso.metrics import hit_at, ndcg_at
from minipeso.runs import checkpoints, report
from minipeso.runs.guard import guard
from minipeso.runs.identity import read_settings
from minipeso.runs.recommend import answers, histories, recommend, top_items
from minipeso.runs.reopen import reopen
from minipeso.stages import examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    for kind in ("json", "csv", "report", "plot", "recommend-all", "export-peft", "export-merged", "export-blocks"):
        parser.add_argument(f"--{kind}", type=Path, metavar="DIR" if kind.startswith("export") else "FILE")
    parser.add_argument("--recommend", metavar="USER")
    parser.add_argument("--interpolate", metavar="W,W,...")
    parser.add_argument("--stage", type=int, default=0, help="whose adapter to use; the last if not given")
    args = parser.parse_args()
    wanted = args.recommend_all, args.export_peft, args.export_merged, args.export_blocks
    if args.recommend is not None or any(wanted):
        return use_model(args)
    if args.interpolate is not None:
        print(report.markdown(table := interpolate(only(args.runs), args.stage, args.interpolate)))
        return draw(args.plot, table) if args.plot else None
    if args.plot:
        raise UsageError(f"--plot draws an interpolation\nfound only --plot {args.plot}\nadd --interpolate 0,0.5,1")
    if args.stage:
        raise UsageError(f"--stage chooses an adapter\nfound only --stage {args.stage}\nadd --recommend or an export")
    runs, *ranks = collect(args.runs)
    print(text := report.tables(runs, *ranks))
    if args.report:
        write_page(args.report, only(args.runs), text)
    for write, path in ((report.write_json, args.json), (write_csv, args.csv)):
        if path:
            write(path, runs)


def collect(folders: list[Path]) -> tuple[dict[str, dict], dict[str, dict], dict[str, dict]]:
    """{name: results}, {name: ranks}, {name: absent users' ranks} by method, and folder if two share one; UsageError if
    their users differ."""
    folders = [*(file.parent for folder in folders for file in sorted(folder.glob("*/results.json"))), *folders]
    methods = [report.load(folder)[0]["config"]["method"] for folder in folders]
    names = [method if methods.count(method) == 1 else f"{method} {folder}" for method, folder in zip(methods, folders)]
    found = report.side_by_side(dict(zip(names, folders)))
    users = [[stage["users"] for stage in result["stages"].values()] for result in found[0].values()]
    other = next((i for i, some in enumerate(users) if some != users[0]), None)
    if other:
        raise UsageError(f"these runs have other test users\n{names[0]}: {users[0]}; {names[other]}: {users[other]}\n"
                         "compare runs of one data set, split and --users")
    return found


def write_csv(path: Path, runs: dict[str, dict]) -> None:
    """One line per method and stage (or average)."""
    text, columns = io.StringIO(), [*report.METRICS, "se_hit@10"]
    lines = [[name, stage, *map(row.get, columns)] for name, run in runs.items()
             for stage, row in (run["stages"] | run["average"]).items()]
    csv.writer(text).writerows([["run", "stage", *columns], *lines])
    checkpoints.write_file(path, text.getvalue())


def only(runs: list[Path]) -> Path:
    if len(runs) > 1:
        raise UsageError(f"one run at a time\n{len(runs)} were given\npass the one that is meant")
    return runs[0]


def recommend_all(run, path: Path) -> int:
    """One JSON line per user, in a file that is there whole or not at all. -> users"""
    lines = [json.dumps(answer, ensure_ascii=False, allow_nan=False) + "\n" for answer in answers(run, histories(run))]
    checkpoints.write_file(path, "".join(lines))
    return len(lines)


@torch.no_grad()
def interpolate(folder: Path, stage: int, weights: str) -> list[list[str]]:
    """The trade-off after the fact: metrics at v_(t-1) + w (v_t - v_(t-1)), t the stage (or the last), untrained; of
    the stage's users, U_A, and of absent ones, U_I. w = 0 is the anchor, 1 the stage's adapter; token tables that were
    trained go the same way. By Corollary 2 an l2 anchor leaves w = rho / (rho + lambda) where the loss has
    curvature rho: lambda / rho is told."""
    run = reopen(folder, stage)
    try:
        tried = [float(w) for w in weights.split(",")]
        before = dict(reopen(folder, run.stage - 1).model.named_parameters())
        same = {name: p for name, p in run.model.named_parameters() if name in before and p.shape == before[name].shape}
        moved = [(p, p.clone(), before[name]) for name, p in same.items() if not torch.equal(p, before[name])]
    except ValueError as error:
        raise UsageError(f"--interpolate needs numbers\nfound {weights!r}: {error}\nwrite 0,0.5,1") from error
    if run.stage == 1 or len(same) < len([*run.model.parameters()]):
        raise UsageError(f"nothing to interpolate between\nD{run.stage} of {run.cfg.method} goes on from no adapter of "
                         "the same rank\nchoose a later --stage of single or peso")
    (asked, own), n = run.questions(run.stage), len(run.stages[run.stage - 1].users)
    kind = ", expected" if run.truth else ""
    table = [[f"D{run.stage}{kind}, w", "lambda / rho", "U_A Hit@10", "U_A NDCG@10", "U_I Hit@10", "U_I NDCG@10"]]
    for w in tried:
        for p, new, old in moved:
            p.copy_(old + w * (new - old))
        found = run.ranker(run.stage).found(run.model, asked, own)[:, :10]
        of = run.expected(run.stage, found) if run.truth else run.ranks({str(run.stage): found})[str(run.stage)]
        cells = [metric(some, 10) for some in (of[:n], of[n:]) for metric in (hit_at, ndcg_at)]
        odds = f"{(1 - w) / w:.2f}" if 0 < w <= 1 else "-"
        table.append([f"{w:g}", odds, *("-" if cell.isnan() else f"{cell:.4f}" for cell in cells)])
    return table


def draw(path: Path, table: list[list[str]]) -> None:
    """The NDCG@10 of U_A and U_I by w."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UsageError(f"--plot needs matplotlib\n{error}\npip install -e '.[plot]'") from error
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    rows = sorted([float("nan" if cell == "-" else cell) for cell in row] for row in table[1:])
    for column, color in ((3, "#d95f02"), (5, "#1f77b4")):
        axes.plot([row[0] for row in rows], [row[column] for row in rows], "o-", color=color, label=table[0][column])
    axes.set(xlabel="w: 0 the anchor, 1 the stage's own adapter", ylabel=table[0][0].split(",")[0])
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def use_model(args: argparse.Namespace) -> None:
    """One run's model after one stage: recommendations and exports."""
    run = reopen(only(args.runs), args.stage)
    if args.recommend is not None:
        print(recommend(run, args.recommend))
    if args.recommend_all:
        print(f"{recommend_all(run, args.recommend_all):,} users, {args.recommend_all}")
    if args.export_peft:
        export_peft(run, run.adapter, args.export_peft)
    if args.export_merged:
        export_merged(run, args.export_merged)
    if args.export_blocks:
        with whole(args.export_blocks) as folder:
            write_release(folder, args.export_blocks.name, run.stages, run.ids)
    for target in filter(None, (args.export_peft, args.export_merged, args.export_blocks)):
        print(f"{run.cfg.method} after D{run.stage}: {target}")


# -- a page --------------------------------------------------------------------------------------------

def write_page(path: Path, folder: Path, tables: str) -> None:
    """A run to look at: one HTML file with all inside, without scripts. What the run lacks is said in its place."""
    root, cfg = read_settings(folder)
    frame = Template(Path(report.__file__).with_name("page.html").read_text(encoding="utf-8"))
    title = f"{cfg.method} on {Path(cfg.dataset).name}, seed {cfg.seed}"
    checkpoints.write_file(path, frame.substitute(
        title=escape(title), results=html(tables), settings=html(changed(cfg)),
        data=html((root / "stats.md").read_text(encoding="utf-8")), curves=curves((root / "metrics.jsonl").read_text()),
        moved=moved(root, folder), users=users(folder)))


def html(text: str) -> str:
    """Our own markdown: tables, and lines."""
    parts = []
    for part in escape(text).strip().split("\n\n"):
        rows = [[cell.strip(" _") for cell in line[1:-1].split("|")] for line in part.splitlines()]
        whole = table(rows[0], rows[2:]) if part.startswith("|") else f"<pre>{part}</pre>"
        parts.append(re.sub(r"\*\*(.*?)\*\*", r"<b>\1</b>", whole))
    return "\n".join(parts)


def table(header: list[str], rows: list[list[str]], kind: str = "") -> str:
    """Cells are HTML; a cell that begins with "<t" is one already."""
    lines = ["".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row) for row in rows]
    head, body = "".join(f"<th>{cell}</th>" for cell in header), "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table class="{kind}"><tr>{head}</tr>{body}</table></div>'


def curves(log: str) -> str:
    """One drawing per stage, one colour per method; training thin, validation thick."""
    stages = defaultdict(lambda: defaultdict(list))
    for line in map(json.loads, log.splitlines()):
        for kind in line.keys() & {"ce", "valid_ce"}:
            stages[line["stage"]][line["name"], kind].append((line["step"], line[kind]))
    names = list(dict.fromkeys(name for lines in stages.values() for name, _ in lines))
    color = {name: f"var(--c{i % 8})" for i, name in enumerate(names)}
    keys = " ".join(f'<span class="key" style="color:{color[name]}">{escape(name)}</span>' for name in names)
    return keys + f'<div class="flow">{"".join(drawing(t, lines, color) for t, lines in stages.items())}</div>'


def drawing(t: int, lines: dict, color: dict[str, str]) -> str:
    steps, losses = zip(*(point for points in lines.values() for point in points))
    low, high, last = min(losses), max(losses), max(steps)
    drawn = []
    for (name, kind), points in lines.items():
        path = " ".join(f"{300 * x / last:.1f},{8 + 124 * (high - y) / max(high - low, 1e-9):.1f}" for x, y in points)
        drawn.append(f'<polyline class="{kind}" stroke="{color[name]}" points="{path}"/>')
    return (f'<figure><svg viewBox="0 0 304 140" role="img" aria-label="loss of D{t}">{"".join(drawn)}</svg>'
            f"<figcaption>D{t}: {last:,} steps, {low:.2f} to {high:.2f}</figcaption></figure>")


def moved(root: Path, folder: Path) -> str:
    """A heat map per later stage."""
    places = {1: root / "adapters/stage-1"}
    places |= {int(place.name.removeprefix("stage-")): place for place in folder.glob("adapters/stage-*")}
    weights = {t: products(place) for t, place in sorted(places.items()) if place.is_dir()}
    far = {t: {key: ((BA - weights[t - 1][key]).norm() / weights[t - 1][key].norm().clamp(min=1e-12)).item()
               for key, BA in some.items()} for t, some in weights.items() if t - 1 in weights}
    if not far:
        return html("No adapter of two stages in a row is here.")
    most = max(max(some.values()) for some in far.values()) or 1.0
    return f'<div class="flow">{"".join(heat(t, some, most) for t, some in far.items())}</div>'


def products(place: Path) -> dict[tuple[str, str], torch.Tensor]:
    """{(layer, projection): B A} of an adapter's file: the same for any rank, and however A and B share it out."""
    tensors = load_file(place / "adapter_model.safetensors")
    pairs = {key: (A, tensors[key.replace("lora_A", "lora_B")]) for key, A in tensors.items() if "lora_A" in key}
    return {(key.split(".layers.")[1].split(".")[0], key.split(".")[-3]): B.float() @ A.float()
            for key, (A, B) in pairs.items()}


def heat(t: int, far: dict[tuple[str, str], float], most: float) -> str:
    layers, kinds = (list(dict.fromkeys(some)) for some in zip(*far))
    def cell(value: float) -> str:
        return f'<td style="--v:{0.85 * value / most:.3f}">{value:.3f}</td>'
    rows = [[layer, *(cell(far[layer, kind]) for kind in kinds)] for layer in layers]
    header = ["layer", *(kind.removesuffix("_proj") for kind in kinds)]
    return f"<figure>{table(header, rows, 'heat')}<figcaption>D{t}</figcaption></figure>"


def users(folder: Path) -> str:
    """Five test questions of the last stage, three with a hit if there are any: history, ten items, the one taken."""
    try:
        run = reopen(folder)
    except (UsageError, OSError) as error:
        return html(f"No model to ask.\n{error}")
    asked = examples(run.data.stages[run.stage - 1], "test", run.cfg.window)[:64]
    both = list(zip(asked, top_items(run, [list(e.history) for e in asked])))
    both.sort(key=lambda pair: pair[0].target not in dict(pair[1]))
    return "".join(one_user(run, *pair) for pair in both[:3] + both[-2:]) or html("The stage has no test user.")


def one_user(run, example, best: list[tuple[int, float]]) -> str:
    def shown(item: int) -> list[str]:
        return [escape(run.data.described(run.ids, item)[key].split(" | ")[0]) for key in ("title", "id")]
    name = run.data.users[example.user] if run.data.users else example.user
    past = "<br>".join(shown(item)[0] for item in example.history) or "nothing yet"
    rows = [[f"{i}", *shown(item), f"{score:.2f}"] for i, (item, score) in enumerate(best, 1)]
    text = table(["", "title", "ID", "log p"], rows, "users")
    for i, (item, _) in enumerate(best):
        if item == example.target:
            text = text.replace(f"<tr><td>{i + 1}</td>", f'<tr class="hit"><td>{i + 1} ✓</td>')
    return (f"<h3>User {escape(str(name))}</h3>"
            f"<details><summary>{len(example.history)} items before</summary>{past}</details>"
            f"<p>Took then: {shown(example.target)[0]}</p>{text}")


if __name__ == "__main__":
    guard(main)
