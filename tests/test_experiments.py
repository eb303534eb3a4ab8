"""The tables: every cell is train.py's and learnt once, differences are paired, noise is named, nothing is mixed."""
import contextlib
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from minipeso.config import UsageError
from minipeso.experiments import __main__ as experiments, cells, paper, scores
from minipeso.experiments.cells import Job, Result, agree, fill
from minipeso.methods import METHODS
from minipeso.metrics import gains, hits
from minipeso.rivals.cumulative import VARIANTS
from minipeso.runs import report
from minipeso.runs.checkpoints import CheckpointError, locked
from minipeso.runs.command import from_args
from minipeso.runs.guard import guard
from tests.micro import MICRO, flags, micro, run

POOL = Path(__file__).parents[1] / "docs/pool.py"
CELLS = ["single", "sumlora-all", "peso@lambda=1e6", "peso"]
INFINITE = "peso@lambda=1e30"  # its gradient's norm overflows
FLAGS = flags(**MICRO)
SAID = {"prox_ce_ratio": 0.1, "moved": 1.0, "valid_ce": 2.0, "touched": None}  # by the training of a stage


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """(config, results) of five cells, one of which diverges, on two seeds by two workers: train.py as it is."""
    cfg = micro(tmp_path_factory.mktemp("table"))
    return cfg, fill(cfg, FLAGS, [INFINITE, *CELLS], 2, workers=2)


class Inside:
    """What Popen starts, in this process: no start-up to wait for."""
    def __init__(self, command: list[str], stdout, **more):
        self.returncode = 0
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stdout):
            try:
                guard(lambda: train.main(from_args(command[2:])))
            except SystemExit as left:
                self.returncode = left.code

    def poll(self) -> int:
        return self.returncode


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[t], b[t]) for t in a)


def test_a_cell_is_what_train_gives(table, tmp_path):
    """Two workers' cells are those of one train.py, where the methods come in another order: none leaves a trace. One
    with another lambda is train.py's run with it, and its D1 is everybody's."""
    run(micro(tmp_path, compare="", lam=1e6))
    held, free = (table[1][cell][0] for cell in ("peso@lambda=1e6", "peso"))
    assert equal(report.load(tmp_path)[1], held.ranks) and torch.equal(held.ranks["1"], free.ranks["1"])
    assert held.training["2"]["moved"] < free.training["2"]["moved"] / 2
    for seed in (0, 1):
        run(micro(tmp_path / f"{seed}", compare="sumlora-all,single", seed=seed))
        for cell in ("peso", "single", "sumlora-all"):
            results, ranks = report.load(tmp_path / f"{seed}" / cell.removeprefix("peso"))
            of = table[1][cell][seed]
            assert equal(ranks, of.ranks) and results["training"] == of.training and of.seconds > 0
    pooled = runpy.run_path(POOL)["rows"](f"x={tmp_path / '0'},{tmp_path / '1'}", sampled=False)["x sumlora-all"]
    assert all(equal(a.own, b.own) for a, b in zip(pooled, table[1]["sumlora-all"], strict=True))


def test_cells_of_another_world_have_a_folder_of_their_own(tmp_path, monkeypatch):
    """What differs from the settings is in the folder's name and passed on behind the user's flags, so it wins."""
    asked, cfg = [], micro(tmp_path, world_alpha=0.5)
    monkeypatch.setattr(cells, "learn", lambda jobs, workers: asked.extend(jobs))
    for kind in ({}, {"world_alpha": 0.5}, {"world_alpha": 0.9}, {"world_alpha": 0.9, "split": "user-disjoint"}):
        fill(cfg, ["--rank", "2"], [], 2, **kind)
    names = ["", "", "-0.9", "-0.9-user-disjoint"]
    assert [job.folder for job in asked] == [tmp_path / f"seed-{seed}{name}" for name in names for seed in (0, 1)]
    kinds = [], ["--world-alpha", "0.5"], ["--world-alpha", "0.9"]
    assert [job.flags for job in asked[1:6:2]] == [["--rank", "2", *kind, "--seed", "1"] for kind in kinds]
    assert from_args(asked[7].flags).world_alpha == 0.9 and from_args(asked[7].flags).split == "user-disjoint"


def test_finished_cells_are_never_computed_again(table, monkeypatch):
    """Nor are those that diverged: with all there, nothing is started."""
    monkeypatch.setattr(cells.subprocess, "Popen", lambda *rest, **more: pytest.fail("a command was started"))
    again = fill(table[0], FLAGS, [INFINITE, *CELLS], 2)
    for cell, results in table[1].items():
        for a, b in zip(again[cell], results, strict=True):
            assert equal(a.ranks, b.ranks) and equal(a.absent, b.absent) and a[1:4] == b[1:4]


def test_an_interrupted_table_resumes(table, tmp_path, monkeypatch):
    """SIGTERM after the first cell: exit code 143, no process left; then that cell stays and the whole is the same."""
    done, sleep, cfg = tmp_path / "seed-0" / "single", time.sleep, micro(tmp_path)
    stage_3 = done / "adapters" / "stage-3" / "manifest.json"

    def interrupted(seconds: float) -> None:
        if (done / "results.json").is_file():
            os.kill(os.getpid(), signal.SIGTERM)
        sleep(seconds)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(cells.time, "sleep", interrupted)
        fill(cfg, FLAGS, CELLS, 1)
    with locked(tmp_path / "seed-0"):
        written = stage_3.stat().st_mtime_ns
    assert left.value.code == 143 and not (tmp_path / "seed-0" / "peso" / "results.json").exists()
    resumed = fill(cfg, FLAGS, CELLS, 1)
    assert all(equal(resumed[cell][0].ranks, table[1][cell][0].ranks) for cell in CELLS)
    assert stage_3.stat().st_mtime_ns == written


@pytest.mark.parametrize("changes, named", [
    ({"rank": 3}, "--rank 2 there, 3 now"), ({"lam": 5.0}, "--lambda 10.0 there"), ({"resume": False}, "add --resume"),
    ({"data_seed": 4}, "the data has another hash"), ({}, "\nthe data has another hash\n")], ids=str)
def test_cells_of_other_settings_are_not_mixed(table, tmp_path, changes, named):
    """Other settings in one --out, other data with the same ones, or no --resume: refused by name."""
    agree(micro(Path(table[0].out), resume=True, split="user-disjoint", seed=7, compare="peso"))
    began = (Path(table[0].out) / "seed-0" / "config.json").read_text()
    (tmp_path / "seed-0").mkdir()
    (tmp_path / "seed-0" / "config.json").write_text(began if changes else began.replace('"data": "', '"data": "0'))
    with pytest.raises(UsageError, match=named):
        agree(micro(tmp_path, **{"resume": True} | changes))


@pytest.mark.parametrize("code, kind", [(1, RuntimeError), (2, UsageError), (3, CheckpointError), (-9, OSError)])
def test_a_failed_command_fails_the_table(tmp_path, code, kind):
    """With the three lines of the last command, not of an earlier one; without any, with its last line."""
    for said, message in (("error: a\nb\nc", "^a\nb\nc$"), ("killed", f"code {code}\nkilled\nread")):
        (tmp_path / "log.txt").write_text(f"\n$ train.py\n\nerror: old\n\n\n$ train.py\nbar 99%\n{said}\n")
        with pytest.raises(kind, match=message):
            Job(tmp_path, CELLS, []).ended(code)


def test_a_diverged_cell_is_marked_and_the_table_finishes(table):
    """Its row says so, and on how many seeds; every other row has numbers."""
    text, values = scores.method_table(table[1], paper.TABLE_2)
    assert next(line for line in text.splitlines() if line.startswith(f"| {INFINITE}")).count("diverged") == 8
    assert f"{INFINITE} diverged on 2 of 2 seeds: the loss is no longer finite at stage 2" in text
    assert list(values["D2-D3"][INFINITE]) == ["diverged"] and all("H@10" in values["D2-D3"][cell] for cell in CELLS)


def test_a_seed_that_diverges_in_stage_1_is_marked(tmp_path, monkeypatch):
    """Then all its cells are, and the command is not started again; a table of nothing else is refused."""
    monkeypatch.setattr(cells.subprocess, "Popen", Inside)
    results = fill(micro(tmp_path), [*FLAGS, "--lr", "1e30"], ["pretrain", *CELLS], 1)
    assert all("at stage 1" in result.diverged for some in results.values() for result in some)
    with pytest.raises(FloatingPointError, match="no row of the table is left"):
        scores.mean_table(results, "single", "method")


def result(*ranks: list[int], training: dict = {}, absent: dict = {}, **more) -> Result:
    """Of stages 1, 2, ..."""
    ranks = {str(t): torch.tensor(r, dtype=torch.long) for t, r in enumerate(ranks, 1)}
    absent = absent or {t: torch.tensor([1]) for t in "23"}
    return Result(ranks, training, own=ranks, absent=absent, premiums={"adapting": [0.1, 0.0, 0.2]}, **more)


def test_means_and_differences_by_hand():
    """Users within a stage, stages, seeds: in this order; a difference pairs users and seeds; FOUR is a mean."""
    a = [result([1], [1, 0, 0, 0], [1, 2]), result([1], [1, 1, 0, 0], [0, 0])]
    b = [result([1], [0, 0, 0, 0], [1, 1]), result([1], [0, 0, 0, 1], [0, 0])]
    of = scores.summary(a, b, "H@5", ["2", "3"])
    assert of["seeds"] == [(0.25 + 1) / 2, (0.5 + 0) / 2] and of["mean"] == (0.625 + 0.25) / 2
    assert of["sd"] == pytest.approx((0.625 - 0.25) / 2**0.5)
    users = [(1 + 1) / 2 - 0, (0 + 1) / 2 - 0, 0, 0 - 0.5], [0.0, 0.0]
    assert of["difference"] == pytest.approx((sum(users[0]) / 4 + sum(users[1]) / 2) / 2)
    assert of["low"] < of["difference"] < of["high"]
    ranks = torch.tensor([1, 4, 7, 0])
    four = hits(ranks, 5) + hits(ranks, 10) + gains(ranks, 5) + gains(ranks, 10)
    assert torch.equal(scores.METRICS[scores.FOUR][1](ranks), four / 4)


def test_an_empty_stage_is_left_out_and_said():
    """No test users at D3: the averages are over the rest, and a line says so."""
    filled = {"single": [result([1], [1, 0], [], [0, 1])], "peso": [result([1], [1, 1], [], [1, 1])]}
    assert scores.averaged(filled) == [("D2-D3", ["2"]), ("D2-D4", ["2", "4"])]
    assert scores.averaged({"peso": [result([1], [], [], [1])]}) == [("D2-D4", ["4"])]
    with pytest.raises(UsageError, match="no stage after D1 has test users"):
        scores.averaged({"peso": [result([1], [], [], [])]})
    text, values = scores.method_table(filled, paper.TABLE_2)
    assert "D3 has no test users: it is in no average." in text
    assert values["D2-D4"]["peso"]["H@10"]["mean"] == 1.0 and values["D2-D4"]["single"]["H@10"]["mean"] == 0.5


def test_bold_is_beyond_the_noise():
    """A difference is bold exactly if its interval does not hold 0; the paper's numbers stand beside it."""
    ranks = {"single": [0] * 20 + [1] * 10, "peso": [1] * 30, "sumlora-all": [1] * 9 + [0] * 21}
    text, _ = scores.method_table({name: [result([1], r, r)] for name, r in ranks.items()}, paper.TABLE_2)
    table, gains = text.split("\n\n")[:2]
    lines = {line.split()[1]: line for line in f"{table}\n{gains}".splitlines() if line.startswith("| ")}
    assert lines["peso"].count("**") == 4 and "**" not in lines["sumlora-all"] and "**" not in lines["single"]
    assert "0.0268" in lines["peso"] and "0.0215" in lines["sumlora-all"]
    assert lines["over"].count("**+200.0 [") == 4 and "over the users of one seed" in text, "30 hits for 10"


def test_gains_are_per_cent_of_single():
    """Twice single's NDCG@5 is +100, none is -100; the difference is the user-disjoint gain less the natural."""
    half, none, full = ([result([1], *[r] * 4)] for r in ([1, 0] * 20, [0, 0] * 20, [1, 1] * 20))
    splits = {"user-disjoint": {"single": half, "sumlora-all": full}, "natural": {"single": half, "sumlora-all": none}}
    text, values = scores.gain_table(splits, paper.TABLE_1)
    assert [values["sumlora-all"][split]["difference"] for split in splits] == pytest.approx([100, -100])
    assert " +200.0 |" in text and "-8.13" in text and values["sumlora-all"]["natural"]["high"] < 0


def test_who_gains_and_at_what_cost_by_hand():
    """Differences of present and of absent users apart, where the truth is known expected ones; costs are means over
    seeds and stages, movement is a share of the reference's; the star is where validation's loss is lowest."""
    def results(rank: int, loss: float, moved: float) -> list[Result]:
        training = {t: SAID | {"valid_ce": loss, "prox_ce_ratio": 0.03, "moved": moved, "touched": 0.25} for t in "23"}
        absent = {t: torch.tensor([[rank / 2, 0, 0.25] + [0.0] * 7]) for t in "23"}
        return [result([1], [0, rank], [0, 0], training=training, seconds=8.0, absent=absent)]
    costs, two = [*scores.COSTS], {"0": results(0, 2.0, 4.0), "5": results(1, 1.0, 1.0)}
    text, values = scores.mean_table(two, "0", "lambda", costs=costs)
    row = values["5"]
    assert row["U_A H@10"]["difference"] == 0.25 and row["U_I N@10"]["difference"] == 0.5
    assert row["U_I N@10"]["mean"] == pytest.approx(0.5 + 0.25 / 2), "p_1 / log2(2) + p_3 / log2(4)"
    both = scores.summary([result([1], [1, 0], [0, 0])], [result([1], [0, 0], [0, 0])], "U N@10", ["2", "3"])
    assert [both["mean"], both["difference"]] == pytest.approx([(2 / 3 + 1 / 3) / 2, 1 / 6])
    assert [row[cost] for cost in costs] == [[1.0], [0.03], [0.25], [0.25], [4.0]]
    assert " 1.0000 * |" in text and "3.00%" in text and "adapting +0.100 [+0.000, +0.200]" in text


def test_a_reference_that_diverged_costs_the_differences_only():
    """Every table is still made: the others keep their means, a difference to nothing is shown as "-"."""
    fine = [result([1], [1, 0], [1, 1], training={"2": SAID, "3": SAID})]
    lost = [Result({}, {}, "nan")]
    filled = {"single": lost, "peso": fine}
    for text, values in (scores.method_table(filled, paper.TABLE_2), scores.mean_table(
            filled, "single", "lambda", scores.PAPER, list(scores.COSTS))):
        line = next(row for row in text.splitlines() if row.startswith("| peso"))
        assert " - |" in line and "diverged" not in line and "diverged on 1 of 1" in text
        json.dumps(values, allow_nan=False)


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_every_experiment_runs_and_leaves_its_table(name, tmp_path_factory, monkeypatch, capsys):
    """All in one --out: NAME.md is what was printed, NAME.json strict JSON, a figure a PNG, even of a single seed."""
    monkeypatch.setattr(cells.subprocess, "Popen", Inside)
    fast = dict(REGULARISERS={"kl": 4, "fisher": 1}, LAMBDAS=(0, 2), WORLDS=(0.4, 0.5), TRIES=2)
    for setting, value in fast.items():
        monkeypatch.setattr(experiments, setting, value)
    for published, kept in (("TABLE_1", ["sumlora-all"]), ("TABLE_2", ["pretrain", "single", "sdlora-all", "peso"])):
        monkeypatch.setattr(paper, published, {method: getattr(paper, published)[method] for method in kept})
    out = tmp_path_factory.getbasetemp() / "experiments"
    picture = ["--plot", str(out / f"{name}.png")] if name == "tradeoff" else []
    if picture:
        pytest.importorskip("matplotlib")
    quick = flags(**MICRO | {"stages": 5, "world_users": 80}, tower_epochs=3, out=out, resume=True)
    monkeypatch.setattr(sys, "argv", ["experiments", name, "--seeds", str(1 + (name == "figure3")), *picture, *quick])
    experiments.main()
    printed = capsys.readouterr().out
    assert (out / f"{name}.md").read_text() == printed and f"`{name}`" in printed
    assert "users, --recipe paper --lambda 10.0 --levels 2" in printed and "--rank 2 --dropout 0.0" in printed
    json.loads((out / f"{name}.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert not picture or (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_figure_2_compares_at_equal_movement(tmp_path, monkeypatch):
    """Where a share 1 / (1 + lambda / 7) of single's movement is left, lambda 3 is found from far away, in few tries
    and of seed 0 alone; the nearest tried is taken for all seeds."""
    asked = []
    def done(rows: dict, seeds: int = 2) -> dict:
        rows = rows if isinstance(rows, dict) else dict(zip(rows, rows))
        asked.append((seeds, list(rows.values())))
        lams = {row: float(cell.partition("@lambda=")[2] or 0) for row, cell in rows.items()}
        said = lambda lam: {"2": {"valid_ce": 1, "moved": 5 / (1 + lam / 7), "prox_ce_ratio": 0}}  # noqa: E731
        return {row: [result([1], [1], [1], training=said(lam))] * seeds for row, lam in lams.items()}
    monkeypatch.setattr(experiments, "REGULARISERS", {"kl": 100, "l2": 0.3})
    _, values = experiments.figure2(micro(tmp_path), done)
    assert set(values) == {"single", "proximal=kl, lambda=3", "proximal=l2, lambda=3", "premiums"}
    assert asked[-1] == (2, ["single", "peso@proximal=kl@lambda=3", "peso@proximal=l2@lambda=3"])
    assert all(seeds == 1 for seeds, _ in asked[:-1])
    losses = [result(training=said) for said in ({"2": {"valid_ce": 1}, "3": {"valid_ce": 2}}, {"2": {"valid_ce": 6}})]
    assert scores.validation(losses) == 3 and scores.validation([result()]) == float("inf")


def test_the_papers_rows_are_methods_and_an_unknown_experiment_lists_those_there_are(monkeypatch):
    """Table 2 has 15 rows: two references, PESO, three families in every variant; all by the names of METHODS."""
    monkeypatch.setattr(sys, "argv", ["experiments", "tabel2"])
    with pytest.raises(UsageError, match="table5.*\n.*did you mean table2?"):
        experiments.main()
    families = {f"{family}-{variant}" for family in ("inflora", "sumlora", "sdlora") for variant in VARIANTS}
    assert len(paper.TABLE_2) == 15 and set(paper.TABLE_2) == {"pretrain", "single", "peso", *families}
    assert {*paper.TABLE_1, *paper.TABLE_2, *paper.TABLE_3, *paper.TABLE_5} <= set(METHODS)
