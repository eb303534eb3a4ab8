"""--lambda auto, or several numbers: validation chooses at every stage, and what it chose is all that is left."""
import json
from pathlib import Path

import pytest

from minipeso.config import GRID
from minipeso.runs import checkpoints
from minipeso.runs.command import from_args
from tests.micro import micro, run
from tests.test_faults import kill_after_saving, until_done

SETTINGS = dict(lam=(1e6, 0.0, 1e3), compare="peso@lambda=0.0", epochs=2, lr=3e-3, later_lr=1.0, seed=1, memory=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """peso with one of three lambdas, and with the one in their middle alone, which is the best at either stage."""
    out = tmp_path_factory.mktemp("whole")
    run(micro(out, **SETTINGS))
    return out


def test_validation_chooses_and_the_stage_is_that_of_the_chosen_lambda(whole):
    """At either stage the lowest of the best losses of all that were tried, each from the same start. Where both
    stages choose alike the adapters are those of a run with that lambda, and results.json tells of nothing else."""
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    chosen = {line["stage"]: line for line in lines if "tried" in line}
    assert [*chosen] == [2, 3] and all(line["name"] == "peso" for line in chosen.values())
    for t, record in chosen.items():
        best = {lam: min(line["valid_ce"] for line in lines if line["stage"] == t and line["name"] == "peso"
                         and line.get("lambda") == lam and "valid_ce" in line) for lam in SETTINGS["lam"]}
        assert record["tried"] == {f"{lam}": loss for lam, loss in best.items()} and len({*best.values()}) == 3
        assert record["lambda"] == min(best, key=best.get)
    assert [record["lambda"] for record in chosen.values()] == [0.0, 0.0]
    alone = whole / "peso@lambda=0.0"
    for t in (2, 3):
        file = f"adapters/stage-{t}/adapter_model.safetensors"
        assert (whole / file).read_bytes() == (alone / file).read_bytes()
    own, others = (json.loads((folder / "results.json").read_text())["training"] for folder in (whole, alone))
    assert own == others and own["3"]["memory"] is not None


def test_killed_after_any_epoch_it_ends_in_the_same_bytes(whole, tmp_path, monkeypatch):
    """Of every lambda that is tried; and nothing is left of those when all is over."""
    monkeypatch.setattr(checkpoints, "SHARE", float("inf"))
    killed = kill_after_saving(monkeypatch, "peso-stage")
    until_done(tmp_path / "run", whole, **SETTINGS)
    assert killed == [(f"peso-stage-{t}@{lam}", n) for t in (2, 3) for lam in SETTINGS["lam"] for n in (1, 2)]
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert "peso-stage-3" in names and not [name for name in names if "@" in name.partition("-stage-")[2]]


def test_numbers_that_differ_in_the_seventh_digit_are_two(tmp_path):
    """Each is trained by itself, whatever is saved of the other; a number that is said twice is one."""
    run(micro(tmp_path, lam=(1e6, 1e6 + 1), compare="", stages=2, epochs=2))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["lambda"] for line in lines if line["stage"] == 2 and "valid_ce" in line] == 2 * [1e6] + 2 * [1e6 + 1]
    assert [*lines[-1]["tried"]] == ["1000000.0", "1000001.0"]
    assert from_args(["--lambda", "5,0,5"]).lam == (5.0, 0.0) and from_args(["--lambda", "5,5"]).lam == 5.0


def test_how_it_is_asked_for():
    """auto is the grid, for a run or for one method of it; test_config.py has what is refused."""
    cfg = from_args(["--lambda", "auto", "--compare", "peso@lambda=3"])
    assert cfg.lam == GRID and cfg.of("peso@lambda=3").lam == 3 and from_args(["--lambda", "0,50"]).lam == (0.0, 50.0)
    assert from_args([]).of("peso@lambda=auto").lam == GRID
