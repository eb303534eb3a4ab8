"""Makes docs/walk.md, its pictures and docs/walk.json from a run of the demo: python docs/walk.py [flags of train.py]

It needs the plot extra and a few minutes. The page is walk.txt with the run's numbers filled in; the numbers are kept
in walk.json, so that a test can say whether page, text and the demo's settings still belong together.
"""
import dataclasses
import importlib.util
import json
import math
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from minipeso import config, semantic_ids  # noqa: E402
from minipeso.continual import choose_trainable, mean_loss, stage_data, train_stage  # noqa: E402
from minipeso.lora import adapter_parameters, adapters, advance  # noqa: E402
from minipeso.methods import method_named  # noqa: E402
from minipeso.metrics import gains  # noqa: E402
from minipeso.objective import answer_loss  # noqa: E402
from minipeso.rqvae import quantise_residuals  # noqa: E402
from minipeso.runs import setup  # noqa: E402
from minipeso.runs.command import from_args  # noqa: E402
from minipeso.runs.recommend import top_items  # noqa: E402
from minipeso.runs.reopen import reopen  # noqa: E402
from minipeso.snapshot import restore, snapshot  # noqa: E402
from minipeso.stages import examples, questions  # noqa: E402
from minipeso.theory import interpolation  # noqa: E402
from minipeso.tokens import collate, sequences  # noqa: E402

LAMBDAS = (0, 2, 20, 200, 2000, 20000)
INK, BLUE, ORANGE, GREEN, GREY = "#222222", "#1f77b4", "#d95f02", "#1b9e77", "#b0b0b0"


def stored(cfg: config.Config) -> dict:
    """What the numbers depend on: everything but where and how fast it runs."""
    free = {"out", "device", "threads", "resume", "dry_run", "explain"}
    return json.loads(json.dumps({k: v for k, v in dataclasses.asdict(cfg).items() if k not in free}))


def main(flags: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fitted = {}
        learn = semantic_ids.train

        def watched(model, x, *rest, **how):  # the RQ-VAE itself is not kept by a run
            learn(model, x, *rest, **how)
            fitted.update(model=model, x=x)
        semantic_ids.train = watched
        train.main(dataclasses.replace(from_args(flags), out=folder))
        last, first = reopen(Path(folder)), reopen(Path(folder), 1)
        facts = {"flags": flags, "settings": stored(from_args(flags)), "data": setup.fingerprints(last.data)["data"]}
        facts |= {"table": table(Path(folder), last.cfg.methods), "trained": ", ".join(last.cfg.methods)}
        example, facts["user"] = one_user(last)
        facts |= item(last, example, fitted) | model(last, example) | beams(last, example) | anchor(first)
    tradeoff(facts["sweep"])
    (ROOT / "docs/walk.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    (ROOT / "docs/walk.md").write_text(render(facts))


def table(folder: Path, methods: list[str]) -> list[list[str]]:
    """Hit@10 per method and stage."""
    results = {name: json.loads((folder / (name if name != methods[-1] else "") / "results.json").read_text())
               for name in methods}
    stages = results[methods[-1]]["stages"]
    rows = [[name, *(f"{row['hit@10']:.4f} ± {row['se_hit@10']:.4f}" for row in result["stages"].values())]
            for name, result in results.items()]
    return [["Hit@10 ± s.e.", *(f"D{t}, {row['users']:,} users" for t, row in stages.items())], *rows]


def told(run, i: int) -> dict[str, str]:
    """The item's name, ID and title, without the store and categories that an embedded text goes on with."""
    return {key: value.split(" | ")[0] for key, value in run.data.described(run.ids, i).items()}


def one_user(run):
    """A test question of the last stage whose answer is found, but not first."""
    test = examples(run.data.stages[-1], "test", run.cfg.window)[:100]
    ranks = [[item for item, _ in best].index(e.target) + 1 if e.target in {i for i, _ in best} else 0
             for e, best in zip(test, top_items(run, [list(e.history) for e in test]))]
    order = [(not rank, rank < 2, rank > 5, len(e.history)) for e, rank in zip(test, ranks)]
    example, rank = (some[order.index(min(order))] for some in (test, ranks))
    if not rank:
        raise SystemExit("no test user is hit in this world\nof the first 100\nmake the page from a larger one")
    return example, {"name": run.data.users[example.user], "rank": rank, "target": told(run, example.target),
                     "window": run.cfg.window, "history": [told(run, i) for i in example.history],
                     "ndcg": gains(torch.tensor([rank]), 10).item()}


def item(run, example, fitted: dict) -> dict:
    """The target's vector, its codes, and what each level leaves of all items' vectors."""
    vectors = setup.item_vectors(run.cfg, run.data, run.model, run.tokenizer)  # (n_items, d_in)
    rqvae, x = fitted["model"], fitted["x"]
    codes, residuals = quantise_residuals(rqvae.encode(x).cpu(), rqvae.codebooks.detach().cpu())
    left = residuals.square().sum(-1)  # (L + 1, n)
    same = (codes == run.ids.codes[example.target]).sum(1)  # (n,): where the item stands in the RQ-VAE's order
    draw_residuals(residuals, int(same.argmax()), (left / left[:1]).mean(1).tolist())
    tokens = run.template.prompt(example.history).tolist()
    return {"width": vectors.shape[1], "latent": rqvae.codebooks.shape[-1], "levels": run.ids.codes.shape[1],
            "codes": run.ids.n_codes, "items": len(run.ids.codes),
            "vector": [round(v, 3) for v in vectors[example.target].tolist()[:4]],
            "left": [round(share, 3) for share in (left / left[:1]).mean(1).tolist()],
            "moved": run.ids.collisions_before, "prompt": tokens, "answer": run.template.answer(example.target)}


def model(run, example) -> dict:
    """Shapes and counts, and the answer's log-probabilities, one code at a time."""
    llama, prompt, answer = run.model, run.template.prompt(example.history), run.template.answer(example.target)
    name, layer = next(iter(adapters(llama)))
    with torch.no_grad():
        log_p = llama(torch.tensor([prompt.tolist() + answer[:-1]]))[0].log_softmax(-1)  # (l, V)
        loss = answer_loss(llama, collate(sequences([example], run.template)), run.cfg.temperature).item()
    each = [log_p[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer)]
    assert abs(-sum(each) / len(each) - loss) < 1e-4 or run.cfg.temperature != 1
    return {"parameters": sum(p.numel() for p in llama.parameters()), "base": run.cfg.base, "adapter_of": name,
            "lora": sum(p.numel() for p in adapter_parameters(llama)), "modules": sum(1 for _ in adapters(llama)),
            "A": list(layer.A.shape), "B": list(layer.B.shape), "scale": layer.scale, "layers": len(llama.model.layers),
            "hidden": llama.config.hidden_size, "mlp": llama.config.intermediate_size,
            "heads": [llama.config.num_attention_heads, llama.config.num_key_value_heads, llama.config.head_dim],
            "vocabulary": llama.config.vocab_size + run.ids.n_codes * run.ids.codes.shape[1],
            "each": [round(p, 3) for p in each], "loss": round(loss, 4)}


def beams(run, example) -> dict:
    """The ten items of the search; their scores once more, by one forward pass over all ten answers."""
    best = top_items(run, [list(example.history)])[0]
    prompt = run.template.prompt(example.history).tolist()
    answers = torch.tensor([run.template.items[i].tolist() for i, _ in best])  # (10, L)
    ids = torch.cat([torch.tensor([prompt]).expand(len(best), -1), answers], 1)
    with torch.no_grad():
        log_p = run.model(ids).log_softmax(-1)[:, len(prompt) - 1:-1].gather(-1, answers[..., None])[..., 0]  # (10, L)
    apart = max(abs(a - b) for a, b in zip(log_p.sum(1).tolist(), (score for _, score in best)))
    assert apart < 1e-3, f"beam search and a plain forward pass are {apart} apart"
    rows = [{**told(run, i), "p": math.exp(score), "hit": i == example.target} for i, score in best]
    draw_tree(rows, run.ids.codes[[i for i, _ in best]].tolist(), log_p.cumsum(1).exp().tolist())
    return {"ten": rows, "all_ten": sum(row["p"] for row in rows), "known": len(run.known)}


def anchor(run) -> dict:
    """Stage 2 learnt once per lambda from D1's model: the pull, the way gone, and the loss of both groups."""
    start, (one, two) = snapshot(run.model, run.whole_tables(2)), run.data.stages[:2]
    data = stage_data([two], run.template, run.cfg.window)
    asked, n = questions([one, two], run.cfg.window), len(two.users)
    groups = asked[n:], asked[:n]
    away, present = (sequences(some, run.template) for some in groups)
    rows = []
    for lam in LAMBDAS:
        cfg, said = method_named("peso").settings(run.cfg.of(f"peso@lambda={lam}")), []
        restore(run.model, start)
        advance(run.model)
        choose_trainable(run.model, cfg.later_trains)
        train_stage(run.model, data, 2, cfg, said.append)
        ratios = sorted(line["prox_ce_ratio"] for line in said if "ce" in line)
        rows.append({"lambda": lam, "pull": ratios[len(ratios) // 2], "moved": said[-1]["moved"],
                     "norm": said[-1]["anchor"], "present": mean_loss(run.model, present, 1.0),
                     "away": mean_loss(run.model, away, 1.0)})
    draw_anchor(rows)
    return {"sweep": rows, "present_users": len(groups[1]), "away_users": len(groups[0])}


def canvas(columns: int = 1, height: float = 3.2, ratios=None):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False,
                         "text.color": INK, "savefig.facecolor": "white"})  # its own paper: readable on a dark page too
    return plt.subplots(1, columns, figsize=(7.6, height), layout="constrained", width_ratios=ratios)


def save(figure, name: str) -> None:
    figure.savefig(ROOT / f"docs/figures/walk-{name}.png", dpi=110, pil_kwargs={"optimize": True})


def draw_residuals(residuals, row: int, left: list[float]) -> None:
    """All items' vectors in the plane of one item's first two codewords, and its way from 0 to itself; what is left."""
    figure, (a, b) = canvas(2, ratios=(1.5, 1))
    steps = residuals[:-1, row] - residuals[1:, row]  # (L, d): the codewords chosen
    plane = torch.linalg.qr(torch.stack([steps[0], steps[1]], 1)).Q  # (d, 2)
    a.scatter(*(residuals[0] @ plane).T, s=7, color=GREY, alpha=0.6, label="all items", linewidths=0)
    points = torch.cat([torch.zeros(1, 2), steps.cumsum(0) @ plane])  # (L + 1, 2)
    for k, (p, q) in enumerate(zip(points[:-1].tolist(), points[1:].tolist())):
        color = (BLUE, ORANGE, GREEN, INK)[k % 4]
        a.annotate("", q, p, arrowprops={"arrowstyle": "-|>", "color": color, "lw": 2})
        a.annotate("abcdefgh"[k], [(u + v) / 2 for u, v in zip(p, q)], (4, 5), textcoords="offset points", color=color,
                   weight="bold")
    a.plot(*(residuals[0, row] @ plane).tolist(), "*", color=INK, markersize=13, label="this item")
    a.set(xticks=[], yticks=[], title="codeword after codeword")
    a.legend(frameon=False, loc="best", fontsize=9)
    b.bar(range(len(left)), left, color=[GREY, BLUE, ORANGE, GREEN, INK][:len(left)])
    for k, share in enumerate(left):
        b.text(k, share, f"{share:.0%}", ha="center", va="bottom")
    b.set(xticks=range(len(left)), xticklabels=["z", *(f"- {letter}" for letter in "abcdefgh"[:len(left) - 1])],
          yticks=[], title="what is left of |z|², mean")
    save(figure, "residuals")


def draw_tree(rows: list[dict], codes: list[list[int]], p: list[list[float]]) -> None:
    """The ten items as leaves of the trie; a line is as wide as its prefix is probable."""
    figure, axes = canvas(1, 4.4)
    order = sorted(range(len(rows)), key=lambda i: codes[i])
    place = {i: -k for k, i in enumerate(order)}
    prefixes = {tuple(code[:k]): [] for code in codes for k in range(len(code) + 1)}
    for i, code in enumerate(codes):
        for k in range(len(code) + 1):
            prefixes[tuple(code[:k])].append(place[i])
    y = {prefix: sum(some) / len(some) for prefix, some in prefixes.items()}
    drawn = set()
    for i, code in enumerate(codes):
        for k in range(1, len(code) + 1):
            child = tuple(code[:k])
            if child not in drawn:
                drawn.add(child)
                color = ORANGE if rows[i]["hit"] and k == len(code) else BLUE
                axes.plot([k - 1, k], [y[child[:-1]], y[child]], color=color, lw=0.8 + 9 * p[i][k - 1],
                          solid_capstyle="round")
                axes.text(k - 0.45, (y[child[:-1]] + y[child]) / 2, f"{'abcdefgh'[k - 1]}{code[k - 1]}", fontsize=8.5,
                          bbox={"color": "white", "pad": 0.5}, va="center")
        hit = rows[i]["hit"]
        text = f"{rows[i]['p']:.1%}  {rows[i]['title'][:44]}" + ("  ← taken" if hit else "")
        axes.text(len(code) + 0.06, place[i], text, va="center", fontsize=9,
                  weight="bold" if hit else "normal", color=ORANGE if hit else INK)
    axes.text(-0.05, y[()], "prompt", ha="right", va="center")
    axes.set(xlim=(-0.6, len(codes[0]) + 3.2), ylim=(-len(rows) + 0.4, 0.6))
    axes.axis("off")
    save(figure, "beams")


def draw_anchor(rows: list[dict]) -> None:
    figure, (a, b) = canvas(2)
    some = rows[1:]
    lams = [row["lambda"] for row in some]
    a.loglog(lams, [row["pull"] for row in some], marker="o", color=BLUE, label="pull: |λ ∇KL| / |∇CE|")
    gone = [row["moved"] / rows[0]["moved"] for row in some]
    a.loglog(lams, gone, marker="s", color=ORANGE, label="way gone, of λ = 0's")
    a.axhline(1, color=GREY, lw=1)
    a.set(xlabel="λ", title="measured in stage 2")
    b.set(xlabel="λ", title="Corollary 2: ρ / (ρ + λ)")
    grid = torch.logspace(-1, 4, 100, dtype=torch.float64)
    for rho, color in ((1, BLUE), (30, GREEN), (1000, ORANGE)):
        weights = [interpolation(torch.tensor(float(rho)), lam).item() for lam in grid.tolist()]
        b.semilogx(grid, weights, color=color, label=f"ρ = {rho}")
    for axes in (a, b):
        axes.legend(frameon=False, fontsize=9)
    save(figure, "anchor")


def tradeoff(sweep: list[dict]) -> None:
    """The demo's stage 2 and the one-file program's world: who gains and who loses as lambda grows."""
    spec = importlib.util.spec_from_file_location("one", ROOT / "docs/peso_in_one_file.py")
    one = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(one)
    figure, (a, b) = canvas(2)
    for key, color in (("present", BLUE), ("away", ORANGE)):
        a.plot([f"{row['lambda']:g}" for row in sweep], [row[key] - sweep[0][key] for row in sweep], marker="o",
               color=color, label=key)
    runs = torch.stack([one.live(seed, 0.5) for seed in range(6)])[..., :2]  # (seeds, lambdas, 2)
    for j, (key, color) in enumerate((("present", BLUE), ("away", ORANGE))):
        mean, error = runs[..., j].mean(0), runs[..., j].std(0) / len(runs) ** 0.5
        b.errorbar([one.name(lam) for lam in one.LAMBDAS], mean, error, marker="o", color=color, capsize=2, label=key)
    b.plot(runs.mean((0, 2)), color=GREEN, ls="--", label="both")
    a.axhline(0, color=GREY, lw=1)
    a.set(xlabel="λ", title="demo, D2: test loss against λ = 0's, in nats")
    b.set(xlabel="λ", title="one-file world: regret in nats", ylim=(0, None))
    b.tick_params(axis="x", labelsize=8)
    for axes in (a, b):
        axes.legend(frameon=False, fontsize=9)
    save(figure, "tradeoff")


def render(facts: dict) -> str:
    """walk.txt with the numbers of walk.json."""
    user, sweep, levels = facts["user"], facts["sweep"], facts["levels"]
    ten = "\n".join(f"| {k} | {row['p']:.2%} | `{row['id']}` | {row['title']}{' **taken**' * row['hit']} |"
                    for k, row in enumerate(facts["ten"], 1))
    history = "\n".join(f"| `{row['id']}` | {row['title']} |" for row in user["history"])
    header, *rows = facts["table"]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---", *["---:"] * (len(header) - 1)], *rows))
    lams = "\n".join(f"| {row['lambda']:,} | {row['pull']:.2%} | {row['moved']:.3f} | {row['present']:.4f} | "
                     f"{row['away']:.4f} |" for row in sweep)
    best = {key: min(sweep, key=lambda row: row[key])["lambda"] for key in ("present", "away")}
    left = ", ".join(f"{share:.0%}" for share in facts["left"][1:])
    each = " + ".join(f"{-p:.3f}" for p in facts["each"])
    h, g, e = facts["heads"]
    text, r = (ROOT / "docs/walk.txt").read_text(), facts["A"][0]
    return text.format(
        **facts, with_flags="".join(f" {word}" for word in facts["flags"]), ten_rows=ten, history_rows=history,
        table_rows=table, sweep_rows=lams, best=best, each_sum=each,
        left_text=left, tokens=len(facts["prompt"]), title=user["target"]["title"], id=user["target"]["id"],
        rank=user["rank"], ndcg=user["ndcg"], name=user["name"], window=user["window"], n=len(user["history"]),
        first_token=facts["prompt"][1:1 + levels], q=h * e, kv=g * e, norm=sweep[0]["norm"],
        share=facts["lora"] / facts["parameters"], entries=r * (facts["A"][1] + facts["B"][0]))


if __name__ == "__main__":
    main(sys.argv[1:])
