"""The tables: every cell computed once, differences paired, noise named, and nothing mixed that does not belong together."""
from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from minipeso import continual
from minipeso.experiments import __main__ as experiments, cells, paper, scores
from minipeso.runs import disk, report
from minipeso.experiments.cells import Cell, Result, fill
from minipeso.config import UsageError
from minipeso.runs.guard import guard
from minipeso.metrics import bootstrap_interval, gains, hits
from tests.micro import MICRO, flags, micro, run

INFINITE = Cell("peso", (("lam", math.inf),))  # inf x 0 at the first step: diverges
SMALL = [Cell("single"), Cell("peso"), Cell("sumlora-all")]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """(config, what fill gave) of three cells with two seeds."""
    cfg = micro(tmp_path_factory.mktemp("table"))
    return cfg, fill(cfg, SMALL, 2, False)


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[t], b[t]) for t in a)


# -- cells ------------------------------------------------------------------------------------------

def test_a_cell_is_what_train_gives(table, tmp_path):
    """The ranks of a cell are those of train.py with the same settings and seed: stage 1 is shared, not changed, and
    the cells before it leave no trace."""
    cfg, found = table
    for seed, cell in itertools.product((0, 1), SMALL):
        out = tmp_path / f"{cell.method}-{seed}"
        run(micro(out, method=cell.method, compare="", seed=seed))
        assert equal(report.load(out)[1], found[cell][seed].ranks), cell


def test_a_later_setting_acts_from_stage_2_on(table, tmp_path):
    """A cell with another lambda is train.py's run with it."""
    cfg = micro(tmp_path / "cells")
    cell = Cell("peso", (("lam", 1e6),))
    found = fill(cfg, [cell], 1, False)
    run(micro(tmp_path / "run", compare="", lam=1e6))
    assert equal(report.load(tmp_path / "run")[1], found[cell][0].ranks)
    moved, free = (x[0].training["2"]["moved"] for x in (found[cell], table[1][Cell("peso")]))
    assert moved < free / 2, "a large lambda holds the adapter"


def test_finished_cells_are_never_recomputed(table, monkeypatch):
    """With --resume, what is there is read; only a new cell is computed, and stage 1 only if there is one."""
    cfg, found = table
    monkeypatch.setattr(cells, "set_up", lambda *rest: pytest.fail("stage 1 was computed again"))
    again = fill(cfg, SMALL, 2, True)
    assert all(equal(a.ranks, b.ranks) and a.training == b.training
               for cell in SMALL for a, b in zip(again[cell], found[cell], strict=True))


def test_an_interrupted_table_resumes(tmp_path, monkeypatch):
    """Killed in its third cell: the resumed table computes that one alone and equals the uninterrupted one."""
    def names(learn, seen):
        return lambda now, name, *rest, **more: (seen.append(name), learn(now, name, *rest, **more))[1]
    whole = fill(micro(tmp_path / "whole"), SMALL, 1, False)
    learn, cfg, seen = cells.learn_later, micro(tmp_path / "cut"), []

    def killed(now, name, *rest, **more):
        if name == "sumlora-all":
            raise KeyboardInterrupt
        return learn(now, name, *rest, **more)
    monkeypatch.setattr(cells, "learn_later", killed)
    with pytest.raises(KeyboardInterrupt):
        fill(cfg, SMALL, 1, False)
    monkeypatch.setattr(cells, "learn_later", names(learn, seen))
    resumed = fill(cfg, SMALL, 1, True)
    assert seen == ["sumlora-all"] and all(equal(resumed[cell][0].ranks, whole[cell][0].ranks) for cell in SMALL)


@pytest.mark.parametrize("changes, named", [
    ({"rank": 3}, "--rank 2 there, 3 now"), ({"world_users": 70}, "--world-users"), ({"lam": 5.0}, "--lambda 2.0 there"),
    ({"data_seed": 4}, "hash")], ids=str)
def test_cells_of_other_settings_are_not_mixed(table, changes, named):
    """Another setting or other data in one --out: exit 2, naming what differs; nothing is overwritten."""
    cfg, _ = table
    before = (Path(cfg.out) / "settings.json").read_text()
    with pytest.raises(UsageError, match=named):
        fill(micro(Path(cfg.out), **changes), SMALL, 2, True)
    assert (Path(cfg.out) / "settings.json").read_text() == before


def test_an_out_with_cells_needs_resume(table):
    """A second start without --resume says so instead of mixing or deleting."""
    cfg, _ = table
    with pytest.raises(UsageError, match="add --resume"):
        fill(cfg, SMALL, 2, False)


def test_a_diverged_cell_is_marked_and_the_table_finishes(tmp_path):
    """NaN in one method: its row says diverged and on how many seeds, every other row has numbers; a resumed table
    does not try again."""
    cfg = micro(tmp_path)
    rows = {"single": Cell("single"), "peso": INFINITE, "sumlora-all": Cell("sumlora-all")}
    found = fill(cfg, rows.values(), 1, False)
    assert found[INFINITE][0].diverged and not found[INFINITE][0].ranks
    text, values = scores.method_table(found, rows, rows["single"], paper.TABLE_2)
    line = next(line for line in text.splitlines() if line.startswith("| peso"))
    assert line.count("diverged") == 6 and f"{INFINITE.label} diverged on 1 of 1 seeds: the loss is no longer finite" in text
    assert values["D2-D3"]["peso"] == {"diverged": True} and values["D2-D3"]["sumlora-all"]["H@10"]["mean"] >= 0
    json.dumps(values, allow_nan=False)
    assert fill(cfg, [INFINITE], 1, True)[INFINITE][0] == found[INFINITE][0]


def test_a_seed_that_diverges_in_stage_1_is_marked(tmp_path, monkeypatch):
    """D_1 itself diverges on seed 1: all of that seed's cells are marked, seed 0's are computed, the table is made."""
    first = cells.learn_first

    def breaks(now):
        if now.cfg.seed == 1:
            raise FloatingPointError("the loss is no longer finite at stage 1")
        return first(now)
    monkeypatch.setattr(cells, "learn_first", breaks)
    rows = {"single": Cell("single"), "peso": Cell("peso")}
    found = fill(micro(tmp_path), rows.values(), 2, False)
    assert [bool(r.diverged) for results in found.values() for r in results] == [False, True] * 2
    text, values = scores.method_table(found, rows, rows["single"], paper.TABLE_2)
    assert values["D2-D3"]["peso"] == {"diverged": True} and "peso diverged on 1 of 2 seeds" in text


def test_a_reference_that_diverged_costs_the_differences_only():
    """Every table is still made: the others keep their means, a difference to nothing is shown as "-"."""
    lost, fine = [Result({}, {}, "nan")], [result([1], [1, 0], [1, 1])]
    said = {t: {"prox_ce_ratio": 0.1, "moved": 1.0, "valid_ce": 2.0, "touched": None} for t in "23"}
    fine = [fine[0]._replace(training=said)]
    rows = {"single": Cell("single"), "peso": Cell("peso")}
    filled = {rows["single"]: lost, rows["peso"]: fine}
    audited = {("Eq. 12", 0.0): rows["single"], ("Eq. 12", 2.0): rows["peso"]}
    for text, values in (scores.method_table(filled, rows, rows["single"], paper.TABLE_2),
                         scores.mean_table(filled, rows, rows["single"], "lambda"),
                         scores.split_table(filled, rows, {"1": 1, "2": 1, "3": 1}),
                         scores.audit_table(filled, audited, rows["single"])):
        line = [row for row in text.splitlines() if row.startswith(("| peso", "| Eq. 12"))][-1]
        assert " - |" in line and "diverged" not in line and "diverged on 1 of 1" in text
        json.dumps(values, allow_nan=False)


def test_a_stage_without_training_is_left_out_of_the_audit():
    """Test users but nobody with three items: the stage has ranks and no step, and the others are shown."""
    said = {"2": {"prox_ce_ratio": 0.1, "moved": 1.0, "valid_ce": 2.0, "touched": None}}
    zero, two = Cell("single"), Cell("peso")
    filled = {cell: [result([1], [1, 0], [1, 1])._replace(training=said)] for cell in (zero, two)}
    _, values = scores.audit_table(filled, {("Eq. 12", 0.0): zero, ("Eq. 12", 2.0): two}, zero)
    assert values["Eq. 12, 2"]["ratio"] == [0.1] and values["Eq. 12, 2"]["held"] == [0.0]


def test_what_training_said(table):
    """Per stage: the best validation loss, the median ratio, the distance moved - from the journal's own lines."""
    cfg, found = table
    said = found[Cell("peso")][1].training
    lines = [json.loads(line) for line in (Path(cfg.out) / "seed-1" / "peso" / "metrics.jsonl").read_text().splitlines()]
    for t in ("2", "3"):
        mine = [line for line in lines if line["stage"] == int(t)]
        assert said[t]["valid_ce"] == min(line["valid_ce"] for line in mine if "valid_ce" in line)
        assert said[t]["prox_ce_ratio"] == statistics.median(line["prox_ce_ratio"] for line in mine if "ce" in line)
        assert said[t]["moved"] == mine[-1]["moved"] > 0 and said[t]["anchor"] > 0


@pytest.mark.parametrize("seeds, workers", [(2, 1), (1, 2)])
def test_the_bar_reaches_its_end(seeds, workers, tmp_path, monkeypatch):
    """The work announced is the work done: the time that is left is an estimate of the whole."""
    bars = []

    class Bar(cells.tqdm):
        def __init__(self, *rest, **more):
            super().__init__(*rest, **more)
            bars.append(self)
    monkeypatch.setattr(cells, "tqdm", Bar)
    fill(micro(tmp_path), [Cell("single"), Cell("pretrain"), Cell("retrain")], seeds, False, workers)
    assert bars[0].n == pytest.approx(bars[0].total, rel=0.01) and bars[0].total > 1000


def test_processes_change_nothing_but_the_time(table, tmp_path):
    """Three processes for the three cells of two seeds, so that each seed's are shared out and its stage 1 is learnt once:
    the same in every cell, but for its seconds."""
    cfg, _ = table
    other = micro(tmp_path)
    fill(other, SMALL, 2, False, workers=3)
    files = [p.relative_to(tmp_path) for p in tmp_path.rglob("cell.json")]
    both = [[json.loads((out / f).read_text()) | {"seconds": 0} for f in files] for out in (tmp_path, Path(cfg.out))]
    assert len(files) == 6 and both[0] == both[1]


def test_two_tables_do_not_fill_one_folder(tmp_path):
    """While one process computes, another on the same --out is refused by name."""
    with disk.alone(tmp_path), pytest.raises(ValueError, match=f"another process works in .*\n.* pid {os.getpid()}\n"):
        fill(micro(tmp_path), SMALL, 1, False)
    assert not (tmp_path / "settings.json").exists()


# -- scores -----------------------------------------------------------------------------------------

def result(*ranks: list[int]) -> Result:
    return Result({str(t): torch.tensor(r, dtype=torch.long) for t, r in enumerate(ranks, start=1)}, {})


def test_means_and_differences_by_hand():
    """Users within a stage, stages, seeds: in this order; a difference pairs users after averaging over seeds."""
    a = [result([1], [1, 0, 0, 0], [1, 2]), result([1], [1, 1, 0, 0], [0, 0])]
    b = [result([1], [0, 0, 0, 0], [1, 1]), result([1], [0, 0, 0, 1], [0, 0])]
    assert scores.per_seed(a, scores.VALUES["H@5"], ["2", "3"]) == [(0.25 + 1) / 2, (0.5 + 0) / 2]
    found = scores.summary(a, b, scores.VALUES["H@5"], ["2", "3"])
    assert found["mean"] == pytest.approx((0.625 + 0.25) / 2) and found["sd"] == pytest.approx(statistics.stdev([0.625, 0.25]))
    users = [(1 + 1) / 2 - 0, (0 + 1) / 2 - 0, 0, 0 - 0.5], [0.0, 0.0]
    assert found["difference"] == pytest.approx((sum(users[0]) / 4 + sum(users[1]) / 2) / 2)
    assert found["low"] <= found["difference"] <= found["high"]


def test_the_interval_is_the_bootstraps():
    """Against resampling one by one with another generator: users within each stage, stages weighing the same."""
    draw = np.random.default_rng(1)
    strata = [torch.tensor(draw.choice([-1.0, 0, 0, 0.5], n)) for n in (40, 15)]
    means = [np.mean([draw.choice(s.numpy(), len(s)).mean() for s in strata]) for _ in range(4000)]
    low, high = np.quantile(means, [0.025, 0.975])
    got = bootstrap_interval(strata)
    assert got == pytest.approx((low, high), abs=0.02)


def test_the_interval_covers_the_truth_19_times_in_20():
    """Of 200 differences between equally good methods, about 5 % look significant."""
    wrong = 0
    for seed in range(200):
        draw = np.random.default_rng(seed)
        low, high = bootstrap_interval([torch.tensor(draw.normal(0.3, 1, n)) for n in (60, 90)], 1000, seed)
        wrong += not low <= 0.3 <= high
    assert 2 <= wrong <= 22, wrong


def test_of_four_is_the_papers_average():
    ranks = torch.tensor([1, 4, 7, 0])
    parts = [hits(ranks, 5), hits(ranks, 10), gains(ranks, 5), gains(ranks, 10)]
    assert torch.equal(scores.of_four(ranks), sum(parts) / 4)


def test_an_empty_stage_is_left_out_and_said():
    """No test users at D3: the averages are over the rest, and a line says so."""
    cell, other = Cell("peso"), Cell("single")
    filled = {other: [result([1], [1, 0], [], [0, 1])], cell: [result([1], [1, 1], [], [1, 1])]}
    assert scores.averaged(filled) == {"D2-D3": ["2"], "D2-D4": ["2", "4"]}
    assert scores.averaged({cell: [result([1], [], [], [1])]}) == {"D2-D4": ["4"]}
    with pytest.raises(UsageError, match="no stage after D1 has test users"):
        scores.averaged({cell: [result([1], [], [], [])]})
    text, values = scores.method_table(filled, {"single": other, "peso": cell}, other, paper.TABLE_2)
    assert "D3 has no test users: it is in no average." in text
    assert values["D2-D4"]["peso"]["H@10"]["mean"] == 1.0 and values["D2-D4"]["single"]["H@10"]["mean"] == 0.5


def test_bold_is_beyond_the_noise():
    """A difference is bold exactly if its interval does not hold 0; the paper's numbers stand beside it, as the paper's."""
    better, same, single = ([result([1], r, r)] for r in ([1] * 30, [1] * 9 + [0] * 21, [0] * 20 + [1] * 10))
    cells_of = {"single": Cell("single"), "peso": Cell("peso"), "sumlora-all": Cell("sumlora-all")}
    filled = dict(zip(cells_of.values(), (single, better, same)))
    lines = {line.split()[1]: line for line in
             scores.method_table(filled, cells_of, cells_of["single"], paper.TABLE_2)[0].splitlines() if line.startswith("| ")}
    assert lines["peso"].count("**") == 4 and "**" not in lines["sumlora-all"] and "**" not in lines["single"]
    assert "0.0268" in lines["peso"] and "0.0215" in lines["sumlora-all"]


def test_gains_are_per_cent_of_single():
    """Table 1: twice single's NDCG@5 is +100; the two splits' gains and their difference."""
    layout = {(name, split): Cell(name, split=split) for name in ("single", "sumlora-all")
              for split in ("user-disjoint", "natural")}
    half, full = [result([1], [1, 0] * 20)], [result([1], [1, 1] * 20)]
    filled = dict(zip(layout.values(), (half, half, full, half)))
    text, values = scores.gain_table(rename(filled), layout, paper.TABLE_1)
    assert values["sumlora-all"]["user-disjoint"]["difference"] == pytest.approx(100)
    assert values["sumlora-all"]["natural"]["difference"] == 0 and "+100.0" in text and "-8.13" in text


def test_active_and_inactive_users_are_told_apart():
    """The first of a stage's ranks are its own users', the rest the inactive ones'; U is both together."""
    cells_of = {"single": Cell("single", everyone=True), "evorec": Cell("evorec", everyone=True)}
    said = {"2": {"touched": 0.25}, "3": {"touched": 0.25}}
    filled = {cells_of["single"]: [result([1], [1, 1, 0, 0, 0, 0], [1, 0, 0])._replace(training={"2": {"touched": None}}, seconds=8.0)],
              cells_of["evorec"]: [result([1], [1, 0, 1, 1, 1, 1], [0, 1, 1])._replace(training=said, seconds=4.0)]}
    text, values = scores.split_table(filled, cells_of, {"1": 1, "2": 2, "3": 1})
    found = {(name, part): values[name][part]["H@10"]["mean"] for name in cells_of for part in ("U_A", "U_I", "U")}
    assert found["single", "U_A"] == 1.0 and found["single", "U_I"] == 0.0 and found["evorec", "U_I"] == 1.0
    assert found["evorec", "U_A"] == 0.25 and found["single", "U"] == pytest.approx((2 / 6 + 1 / 3) / 2)
    assert values["evorec"]["touched"] == 0.25 and values["evorec"]["seconds"] == 2.0 and "25%" in text


def rename(filled: dict) -> dict:
    """Five stages instead of two: the last four alike."""
    return {cell: [Result({str(t): r.ranks["1" if t == 1 else "2"] for t in range(1, 6)}, {}) for r in results]
            for cell, results in filled.items()}


# -- the command ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("experiments")


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_every_experiment_runs_and_leaves_its_table(name, shared, monkeypatch, capsys):
    """The command line, all in one --out: NAME.md is what was printed, NAME.json is strict JSON, a figure is a PNG."""
    monkeypatch.setattr(experiments, "GRID", {"kl": (1.0, 4.0), "output-kl": (1.0,), "l2": (0.1,)})
    monkeypatch.setattr(experiments, "FAMILIES", ["sdlora-all", "inflora-latest"])
    monkeypatch.setattr(experiments, "DIVERSE", ["sumlora-all"])
    picture = ["--plot", str(shared / f"{name}.png")] if name.startswith("figure") else []
    if picture:
        pytest.importorskip("matplotlib")
    resume = ["--resume"] if (shared / "out" / "settings.json").is_file() else []
    line = [name, "--seeds", "2", *resume, *picture, *flags(**MICRO | {"stages": 5, "world_users": 80}), "--out",
            str(shared / "out")]
    monkeypatch.setattr(sys, "argv", ["experiments", *line])
    experiments.main()
    printed = capsys.readouterr().out
    assert (shared / "out" / f"{name}.md").read_text() == printed and f"`{name}`" in printed
    json.loads((shared / "out" / f"{name}.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert not picture or (shared / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["figure2", "figure3", "figure4"])
def test_one_seed_has_a_picture_too(name, tmp_path):
    """Without a spread over seeds there is no band, and nothing else is missing."""
    pytest.importorskip("matplotlib")
    row = {"mean": 0.2, "sd": None, "difference": 0.0, "low": -0.01, "high": 0.01}
    scores.draw(tmp_path / "F.png", name, {"0": {"mean of four": row}, "1": {"mean of four": row}})
    assert (tmp_path / "F.png").read_bytes()[:4] == b"\x89PNG"


def test_figure_2_takes_lambda_from_validation(tmp_path, monkeypatch):
    """Of the grid, the lambda with the lowest validation loss of seed 0 - whatever it does to the test users."""
    tried = {}

    def done(cells_of, seeds=2):
        for cell in cells_of:
            lam = dict(cell.later).get("lam", 0.0)
            tried.setdefault(cell, [Result({str(t): torch.tensor([int(lam == 8.0)]) for t in range(1, 6)},
                                           {"2": {"valid_ce": abs(lam - 2.0)}}) for _ in range(seeds)])
        return tried
    monkeypatch.setattr(experiments, "GRID", {"kl": (0.5, 2.0, 8.0)})
    text, values = experiments.figure2(micro(tmp_path), done)
    assert set(values) == {"single", "kl, lambda 2"}


def test_an_unknown_experiment_lists_them(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["experiments", "tabel2"])
    with pytest.raises(SystemExit) as left:
        guard(experiments.main)
    assert left.value.code == 2 and "did you mean table2?" in capsys.readouterr().err


def test_table_2_has_the_papers_rows():
    """All 15, by the names of METHODS; every row of the paper's tables is a method here."""
    assert len(paper.TABLE_2) == 15 and set(paper.TABLE_2) == {"pretrain", "single", "peso", *experiments.FAMILIES}
    assert set(paper.TABLE_1) == set(experiments.DIVERSE) and set(paper.TABLE_2) <= set(continual.METHODS)


def test_free_settings_are_fields():
    """What may differ between two starts of one --out are settings that exist, and none that changes a cell."""
    fields = {field.name for field in dataclasses.fields(micro(Path("x")))} 
    assert cells.FREE <= fields and not cells.FREE & {"lam", "rank", "data_seed", "users", "dataset", "base"}
