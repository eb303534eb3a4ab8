"""The tables: every cell is train.py's and learnt once, differences are paired, noise is named, nothing is mixed."""
import contextlib
import json
import os
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
    """Two workers' cells are those of one train.py, where the methods come in another order: none leaves a trace."""
    for seed in (0, 1):
        run(micro(tmp_path / f"{seed}", compare="sumlora-all,single", seed=seed))
        for cell in ("peso", "single", "sumlora-all"):
            results, ranks = report.load(tmp_path / f"{seed}" / cell.removeprefix("peso"))
            of = table[1][cell][seed]
            assert equal(ranks, of.ranks) and results["training"] == of.training and of.seconds > 0


def test_a_later_setting_acts_from_stage_2_on(table, tmp_path):
    """A cell with another lambda is train.py's run with it, and its D1 is everybody's."""
    run(micro(tmp_path, compare="", lam=1e6))
    held, free = (table[1][cell][0] for cell in ("peso@lambda=1e6", "peso"))
    assert equal(report.load(tmp_path)[1], held.ranks) and torch.equal(held.ranks["1"], free.ranks["1"])
    assert held.training["2"]["moved"] < free.training["2"]["moved"] / 2


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


def test_two_tables_do_not_fill_one_folder(tmp_path):
    """While one process works there another is refused, in train.py's words."""
    with locked(tmp_path / "seed-0"), pytest.raises(UsageError, match=r"^another process works in .*\n.*\n.*--out$"):
        fill(micro(tmp_path), FLAGS, CELLS, 1)


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


def result(*ranks: list[int], training: dict = {}, **more) -> Result:
    """Of stages 1, 2, ..."""
    return Result({str(t): torch.tensor(r, dtype=torch.long) for t, r in enumerate(ranks, 1)}, training, **more)


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
    assert torch.equal(scores.METRICS[scores.FOUR](ranks), four / 4)


@pytest.mark.parametrize("key", scores.METRICS)
def test_a_difference_has_its_sign_and_averages_over_stages(key):
    """All of D2 better, all of D3's many users alike: half of it, without noise, and its negative the other way."""
    better, worse = [result([1], [1, 1], [0] * 6)], [result([1], [0, 0], [0] * 6)]
    for a, b, half in ((better, worse, 0.5), (worse, better, -0.5)):
        of = scores.summary(a, b, key, ["2", "3"])
        assert of["difference"] == of["low"] == of["high"] == half


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
    lines = {line.split()[1]: line for line in text.splitlines() if line.startswith("| ")}
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


def test_the_trade_off_by_hand():
    """Differences to lambda 0 of present and of absent users apart; the star is where validation's loss is lowest."""
    def results(rank: int, loss: float) -> list[Result]:
        training = {t: SAID | {"valid_ce": loss, "prox_ce_ratio": 0.03} for t in "23"}
        return [result([1], [0, rank], [0, 0], training=training, absent={t: torch.tensor([1 - rank]) for t in "23"},
                       premiums={"adapting": [0.1, 0.0, 0.2]})]
    text, values = scores.tradeoff_table({"0": results(0, 2.0), "5": results(1, 1.0)})
    row = values["rows"]["5"]
    assert row["U_A H@10"]["difference"] == 0.25 and row["U_I N@10"]["difference"] == -1 and values["chosen"] == "5"
    assert "| 5 * " in text and "3 %" in text and "adapting +0.100" in text


def test_a_reference_that_diverged_costs_the_differences_only():
    """Every table is still made: the others keep their means, a difference to nothing is shown as "-"."""
    fine = [result([1], [1, 0], [1, 1], training={"2": SAID, "3": SAID}, absent={t: torch.tensor([1]) for t in "23"})]
    lost = [Result({}, {}, "nan")]
    filled = {"single": lost, "peso": fine}
    for text, values in (scores.method_table(filled, paper.TABLE_2), scores.mean_table(filled, "single", "lambda"),
                         scores.split_table(filled)):
        line = next(row for row in text.splitlines() if row.startswith("| peso"))
        assert " - |" in line and "diverged" not in line and "diverged on 1 of 1" in text
        json.dumps(values, allow_nan=False)


def test_active_and_inactive_users_are_told_apart():
    """U_A are the stage's own users, U_I the absent ones, U both together; a cost is the mean over stages."""
    def row(active, inactive, touched, seconds):
        return [result([1], *active, absent={t: torch.tensor(r) for t, r in zip("23", inactive)}, seconds=seconds,
                       training={t: {"touched": touched} for t in "23"})]
    text, values = scores.split_table({"single": row(([1, 1], [1]), ([0] * 4, [0, 0]), None, 8.0),
                                       "evorec": row(([1, 0], [0]), ([1] * 4, [1, 1]), 0.25, 4.0)})
    means = {(part, name): of["H@10"]["mean"] for part, rows in values.items() for name, of in rows.items()}
    assert means["U_A", "single"] == 1 and means["U_A", "evorec"] == 0.25 and means["U_I", "evorec"] == 1
    assert means["U", "single"] == pytest.approx((2 / 6 + 1 / 3) / 2) and "U_I, 3 users per stage" in text
    of = values["U_I"]["evorec"]
    assert of["N@10"]["difference"] == 1 and of["adapter touched"] == [0.25] and of["seconds per stage"] == [2.0]


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_every_experiment_runs_and_leaves_its_table(name, tmp_path_factory, monkeypatch, capsys):
    """All in one --out: NAME.md is what was printed, NAME.json strict JSON, a figure a PNG, even of a single seed."""
    monkeypatch.setattr(cells.subprocess, "Popen", Inside)
    for setting, value in dict(GRID={"kl": (1, 4), "l2": (0.1,)}, LAMBDAS=(0, 2)).items():
        monkeypatch.setattr(experiments, setting, value)
    for published, kept in (("TABLE_1", ["sumlora-all"]), ("TABLE_2", ["pretrain", "single", "sdlora-all", "peso"])):
        monkeypatch.setattr(paper, published, {method: getattr(paper, published)[method] for method in kept})
    out = tmp_path_factory.getbasetemp() / "experiments"
    picture = ["--plot", str(out / f"{name}.png")] if name == "tradeoff" else []
    if picture:
        pytest.importorskip("matplotlib")
    quick = flags(**MICRO | {"stages": 5, "world_users": 80}, tower_epochs=3, filter_epochs=1, out=out, resume=True)
    monkeypatch.setattr(sys, "argv", ["experiments", name, "--seeds", str(1 + (name == "figure3")), *picture, *quick])
    experiments.main()
    printed = capsys.readouterr().out
    assert (out / f"{name}.md").read_text() == printed and f"`{name}`" in printed
    assert "users, --recipe paper --lambda 10.0 --levels 2" in printed and "--rank 2 --dropout 0.0" in printed
    json.loads((out / f"{name}.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert not picture or (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_figure_2_takes_lambda_from_validation(tmp_path, monkeypatch):
    """Of the grid, the lambda with the lowest validation loss of seed 0, a mean, whatever it does to the test users."""
    def done(rows: dict, seeds: int = 2) -> dict:
        lams = {row: float(cell.partition("@lambda=")[2] or 0) for row, cell in rows.items()}
        return {row: [result([1], *[[int(lam == 8)]] * 4, training={"2": {"valid_ce": abs(lam - 2)}})] * seeds
                for row, lam in lams.items()}
    monkeypatch.setattr(experiments, "GRID", {"kl": (0.5, 2.0, 8.0)})
    assert set(experiments.figure2(micro(tmp_path), done)[1]) == {"single", "kl, lambda 2"}
    losses = [result(training=said) for said in ({"2": {"valid_ce": 1}, "3": {"valid_ce": 2}}, {"2": {"valid_ce": 6}})]
    assert scores.validation(losses) == 3 and scores.validation([result()]) == float("inf")


def test_an_unknown_experiment_lists_them(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["experiments", "tabel2"])
    with pytest.raises(UsageError, match="table5.*\n.*did you mean table2?"):
        experiments.main()


def test_the_papers_rows_are_methods():
    """Table 2 has 15 rows: two references, PESO, three families in every variant; all by the names of METHODS."""
    families = {f"{family}-{variant}" for family in ("inflora", "sumlora", "sdlora") for variant in VARIANTS}
    assert len(paper.TABLE_2) == 15 and set(paper.TABLE_2) == {"pretrain", "single", "peso", *families}
    assert {*paper.TABLE_1, *paper.TABLE_2, *paper.TABLE_3, *paper.TABLE_5} <= set(METHODS)
