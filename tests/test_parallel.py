"""Two processes of torchrun compute what one does with the same batches: losses, adapters, ranks; one of them writes."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import eval as eval_script
from minipeso import parallel
from minipeso.experiments import __main__ as experiments
from minipeso.config import resolve
from tests.micro import MICRO, flags, run

ROOT = Path(__file__).parents[1]
SETTINGS = MICRO | dict(world_users=61, dropout=0.0, compare="single,inflora-latest,evorec", method="peso", lam=50.0,
                        epochs=2, eval_batch=3, threads=1)


def together(n: int, cwd: Path, *argv: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, str(ROOT / "train.py"), *argv], cwd=cwd, env=environment, capture_output=True,
                          text=True, timeout=300)


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[Path, Path, str]:
    """(folder of one process, folder of two, what the two printed)."""
    cwd = tmp_path_factory.mktemp("both")
    run(resolve(SETTINGS | {"out": str(cwd / "one")}))
    done = together(2, cwd, *flags(**SETTINGS, out="two"))
    assert done.returncode == 0, done.stderr
    return cwd / "one", cwd / "two", done.stdout


def test_two_processes_rank_as_one(both):
    """Every test user of every stage and method is ranked once, and the metrics are those of one process."""
    one, two, _ = both
    for name in ("", "single", "inflora-latest", "evorec"):
        ranks = [json.loads((folder / name / "ranks.json").read_text()) for folder in (one, two)]
        assert ranks[0] == ranks[1] and sum(map(len, ranks[0].values())) > 60, name
        results = [json.loads((folder / name / "results.json").read_text()) for folder in (one, two)]
        assert results[0]["stages"] == results[1]["stages"] and results[0]["average"] == results[1]["average"]


def test_two_processes_learn_as_one(both):
    """Step by step the same loss (a step's batch is cut into two parts of unlike size), in the end the same
    adapters: to rounding, because sums are taken in another order."""
    one, two, _ = both
    records = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (one, two)]
    assert len(records[0]) == len(records[1]) > 20
    for a, b in zip(*records):
        assert a.keys() == b.keys() and a["name"] == b["name"]
        for key in ("ce", "valid_ce", "prox", "moved"):
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), rel=2e-4, abs=1e-9), (a, b)
    for path in sorted(one.rglob("adapter_model.safetensors")):
        pair = load_file(path), load_file(two / path.relative_to(one))
        for name, t in pair[0].items():
            torch.testing.assert_close(t, pair[1][name], rtol=0, atol=2e-4, msg=lambda text: f"{path} {name}: {text}")


def test_one_of_them_prints_and_writes(both):
    """The two leave the files of one, and the tables once."""
    one, two, printed = both
    names = [sorted(str(p.relative_to(f)) for p in f.rglob("*") if p.is_file()) for f in (one, two)]
    assert names[0] == names[1]
    assert printed.count("| test users") == 1 and printed.count("parameters, ") == 1
    json.loads((two / "config.json").read_text())


def test_two_processes_go_on_from_a_finished_phase(both):
    """--resume, with the last method's results gone: the rest is taken from checkpoints, the ranks are the same."""
    one, two, _ = both
    before = (two / "ranks.json").read_text()
    (two / "results.json").unlink()
    (two / "ranks.json").unlink()
    done = together(2, two.parent, *flags(**SETTINGS, out="two", resume=True))
    assert done.returncode == 0, done.stderr
    assert (two / "ranks.json").read_text() == before


def test_a_failure_is_told_and_ends_all(tmp_path):
    """Bad input ends every process, with the three lines and torchrun's own exit code."""
    done = together(2, tmp_path, "--dataset", "nowhere")
    assert done.returncode and "error: unknown dataset\nfound 'nowhere'" in done.stderr, done.stderr


def test_alone_nothing_changes():
    """One process has everything, adds up nothing, and wraps nothing."""
    module = torch.nn.Linear(2, 2)
    assert (parallel.size(), parallel.rank()) == (1, 0)
    assert parallel.share([1, 2, 3]) == [1, 2, 3] and parallel.adding_up(module) is module
    assert parallel.total(torch.tensor([2])).item() == 2
    with parallel.joined("cuda"), parallel.first_goes_ahead():
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("command", [experiments.main, eval_script.main])
def test_commands_of_one_process_say_so(command, monkeypatch):
    """Several processes would write the same cells and files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(ValueError, match="this command is one process\ntorchrun started 2\nuse python") as caught:
        command()
    assert len(str(caught.value).splitlines()) == 3


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="more processes than GPUs\nfound 1 GPUs for process 2\nuse torchrun") as caught:
        with parallel.joined("cuda"):
            pass
    assert len(str(caught.value).splitlines()) == 3
