"""The numbers of the tables, worked by hand; files whole or not at all."""
import json
import math
import re

import pytest
import torch

from minipeso.runs import identity, report
from minipeso.config import resolve
from minipeso.metrics import hits
from minipeso.stages import Stage

RANKS = {t: torch.tensor(r) for t, r in {
    "1": [1, 1, 0, 0], "2": [1, 0, 3, 0], "3": [6, 0], "4": [0, 0, 0, 2, 11], "5": [10]}.items()}
REFERENCES = {t: {"random": 0.125, "cold": 0.5} for t in RANKS}


def run(ranks=RANKS, **config) -> dict:
    return {"config": {"method": "peso", **config}, **report.results(ranks), "references": REFERENCES, "premiums": {}}


def cells(table: str) -> list[list[str]]:
    """The cells of a markdown table, without its rule."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [row for row in rows if not set(row[0]) <= set("-: ")]


def test_averages_are_over_stages_not_users():
    """Both spans of the paper, by hand: the mean over D2-D4 and over D2-D5 of the stages' own means."""
    found = run()
    hit10 = {"2": 2 / 4, "3": 1 / 2, "4": 1 / 5, "5": 1.0}
    ndcg5 = {"2": (1 + 1 / 2) / 4, "3": 0.0, "4": 1 / math.log2(3) / 5, "5": 0.0}
    for span, stages in (("D2-D4", "234"), ("D2-D5", "2345")):
        row = found["average"][span]
        assert row["hit@10"] == pytest.approx(sum(hit10[t] for t in stages) / len(stages))
        assert row["ndcg@5"] == pytest.approx(sum(ndcg5[t] for t in stages) / len(stages))
    assert list(found["average"]) == ["D2-D4", "D2-D5"] and found["stages"]["4"]["users"] == 5
    assert found["stages"]["1"]["hit@5"] == 0.5, "D1 is shown, and in no average"
    for n, names in ((2, ["D2-D2"]), (3, ["D2-D2", "D2-D3"])):  # of two stages one
        assert list(run({t: RANKS[t] for t in "123"[:n]})["average"]) == names


def test_the_table_shows_every_number_once():
    """Stages, users, references and Hit@10 of every method are in the first table, averages in the second."""
    runs = {"single": run(), "peso": run(RANKS | {"5": torch.tensor([0])})}
    text = report.tables(runs, {"single": RANKS, "peso": RANKS | {"5": torch.tensor([0])}}, {"single": {}, "peso": {}})
    stage_rows = {row[0]: row[1:] for row in cells(text.split("\n\n")[0])}
    assert stage_rows["test users"] == ["4", "4", "2", "5", "1"]
    assert all(cell.startswith("0.1250") for cell in stage_rows["random"])
    for name, last in (("single", "1.0000"), ("peso", "0.0000")):
        values = [cell.split()[0] for cell in stage_rows[name]]
        assert values == ["0.5000", "0.5000", "0.5000", "0.2000", last], values
    spread = hits(RANKS["4"], 10).numpy().std(ddof=1) / math.sqrt(5)
    assert f"{spread:.4f}" in stage_rows["peso"][3], "the standard error over users"
    widths = {len(line) for line in text.split("\n\n")[0].splitlines()}
    assert len(widths) == 1, f"the table is not aligned: {widths}"


def test_the_best_is_bold_and_the_second_underlined():
    """Per column: the best **bold**, also where two share it; the second _underlined_; a third, or no rival, bare."""
    def with_stage_2(*ranks):
        return {**RANKS, **{t: torch.tensor(ranks) for t in "2345"}}
    found = {"a": with_stage_2(1, 1, 1, 0), "b": with_stage_2(1, 1, 0, 0), "c": with_stage_2(1, 0, 0, 0),
             "d": with_stage_2(1, 1, 1, 0)}
    rows = {row[0]: row[1:] for row in cells(report.summary_table({name: run(r) for name, r in found.items()}))}
    assert set(rows["a"]) == set(rows["d"]) == {"**0.7500**"} and set(rows["b"]) == {"_0.5000_"}
    assert set(rows["c"]) == {"0.2500"}
    alone = cells(report.summary_table({"a": run(found["a"])}))[1]
    assert set(alone[1:]) == {"0.7500"}, "one run alone has nothing to be better than"


def test_differences_give_the_mean_and_its_interval():
    """By hand: the mean over D2 and D3, which weigh the same, in its interval; bold unless that holds 0. U_A has Hit@10
    and NDCG@10, U_I, here the same users, NDCG@10; who ranks no absent users has none."""
    single = {"1": torch.ones(50), "2": torch.zeros(100), "3": torch.ones(300), "4": torch.ones(0)}
    better = {"1": torch.zeros(50), "2": torch.ones(100), "3": torch.ones(300), "4": torch.ones(0)}
    noisy = {"1": torch.ones(50), "2": torch.tensor([1] + [0] * 99), "3": torch.tensor([0] + [1] * 299)}
    half = single | {"2": torch.tensor([0, 1] * 50)}
    ranks = {"single": single, "better": better, "noisy": noisy, "same": single, "half": half}
    rows = cells(report.differences(ranks, ranks | {"half": {}}, "single").partition("\n\n")[0])[1:]
    assert rows[0] == ["single", "0.5000", "", "0.5000", "", "0.5000", ""] and rows[4][5:] == ["-", "-"]
    for row, (name, mean, bold) in zip(rows[1:], [("better", 0.5, True), ("noisy", 0.0033, False), ("same", 0.0, False),
                                                  ("half", 0.25, True)], strict=True):
        assert row[0] == name and row[2].startswith("**") == bold and row[1] == f"{0.5 + mean:.4f}"
        assert row[1:3] == row[3:5] == row[5:][:2 if name != "half" else 0] or name == "half", row
        shown, low, high = map(float, re.findall(r"[+-]\d\.\d{4}", row[2]))
        assert shown == mean and low <= mean <= high, row
    low, high = map(float, re.findall(r"[+-]\d\.\d{4}", rows[4][2])[1:])
    assert abs(high - low - 2 * 1.96 * math.sqrt(0.25 / 100) / 2) < 0.01, "the width of 100 coin flips, halved"


def test_a_new_run_voids_what_the_old_one_left(tmp_path):
    """void removes the results of the folder and of the methods inside it, also of ones not compared now, but not those
    of another run that happens to lie below; begin writes the new config.json."""
    for place in (".", "retrain", "other"):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "results.json").write_text("{}")
    (tmp_path / "other" / "config.json").write_text("{}")
    (tmp_path / "peso" / "adapters" / "stage-2").mkdir(parents=True)
    cfg = resolve({"out": str(tmp_path), "seed": 9, "method": "single", "compare": "peso"})
    identity.void(tmp_path, cfg)
    identity.begin(tmp_path, cfg, {"data": "", "items": ""})
    assert not (tmp_path / "peso" / "adapters").exists()
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("results.json")] == ["other/results.json"]
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["seed"] == 9
    assert set(written["versions"]) >= {"torch", "numpy", "safetensors", "tokenizers", "minipeso"}


def test_load_reads_what_write_wrote_and_names_what_is_missing(tmp_path):
    """write -> load is the identity on results and ranks, those of absent users apart; each missing file is named."""
    stages = [Stage(int(t), {}, {u: [1, 2, 3] for u in range(len(r))}) for t, r in RANKS.items()]
    ranks = {t: r if t == "1" else torch.cat([r, torch.tensor([7, 0])]) for t, r in RANKS.items()}
    log = [{"stage": 2, "ce": 1.0, "prox_ce_ratio": r} for r in (0.1, 0.5, 0.2)]
    log += [{"stage": 2, "valid_ce": 3.0}, {"stage": 2, "valid_ce": 2.0}, {"stage": 2, "moved": 0.25, "anchor": 4.0}]
    cfg = resolve({"out": str(tmp_path), "method": "single"})
    more = {"references": REFERENCES, "premiums": {}, "seconds": {"data": 1.5}}
    report.write(tmp_path, cfg, stages, ranks, "\n".join(map(json.dumps, log)), more)
    found, read = report.load(tmp_path)
    assert found["config"]["method"] == "single" and found["stages"] == run()["stages"]
    assert found["seconds"] == {"data": 1.5} and found["peak_memory_bytes"] > 2**20
    assert found["training"] == {
        "2": {"valid_ce": 2.0, "prox_ce_ratio": 0.2, "moved": 0.25, "touched": None, "memory": None}}
    assert all(read[t].equal(RANKS[t]) for t in RANKS)
    assert json.loads((tmp_path / "absent.json").read_text()) == {t: [7, 0] for t in "2345"}
    (tmp_path / "ranks.json").unlink()
    with pytest.raises(FileNotFoundError, match="ranks.json"):
        report.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="results.json"):
        report.load(tmp_path / "nowhere")
