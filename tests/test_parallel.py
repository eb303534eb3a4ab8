"""Two processes of torchrun compute what one does: gradients, adapters, ranks; one of them writes."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies
from safetensors.torch import load_file

from minipeso import parallel
from tests.conftest import draws
from tests.micro import MICRO, flags, micro, run

ROOT = Path(__file__).parents[1]
SETTINGS = dict(world_users=61, base_dropout=0.0, lam=50.0, epochs=2,
                compare="single,inflora-latest,evorec,peso@proximal=output-kl")


def together(cwd: Path, *argv: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, *argv], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[Path, Path, str]:
    """(folder of one process, folder of two, what the two printed)."""
    cwd = tmp_path_factory.mktemp("both")
    run(micro(cwd / "one", **SETTINGS))
    done = together(cwd, *flags(**MICRO | SETTINGS, out="two"))
    assert done.returncode == 0, done.stderr
    return cwd / "one", cwd / "two", done.stdout


def test_two_processes_rank_as_one(both):
    """Every test user of every stage and method is ranked once, and the metrics are those of one process."""
    for name in ("", "single", "inflora-latest", "evorec"):
        one, two = (json.loads((folder / name / "results.json").read_text()) for folder in both[:2])
        assert all(one[part] == two[part] for part in ("stages", "average", "references")), name
        one, two = (json.loads((folder / name / "ranks.json").read_text()) for folder in both[:2])
        assert one == two and sum(map(len, one.values())) > 60, name


def products(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """B A for every A: InfLoRA's directions have a sign that rounding decides, and B makes up for it."""
    return {name: tensors[name.replace("lora_A", "lora_B")] @ t if "lora_A" in name else t
            for name, t in tensors.items() if "lora_B" not in name}


def test_two_processes_learn_as_one(both):
    """In the end the same validation losses and adapters: to rounding, because sums are taken in another order."""
    one, two, _ = both
    logs = ((folder / "metrics.jsonl").read_text().splitlines() for folder in (one, two))
    for a, b in (map(json.loads, pair) for pair in zip(*logs, strict=True)):
        assert a.keys() == b.keys() and a["name"] == b["name"]
        own = {"prox", "prox_ce_ratio"} if "output-kl" in a["name"] else set()  # as ce of each process's own sequences
        for key in a.keys() - {"name", "ce", "pairs", "tokens", "located"} - own:
            assert a[key] == pytest.approx(b[key], rel=1e-3 if "ratio" in key else 2e-4, abs=1e-9), (key, a, b)
    for path in sorted(one.rglob("adapter_model.safetensors")):
        a, b = (products(load_file(folder / path.relative_to(one))) for folder in (one, two))
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4, msg=lambda text: f"{path}: {text}")


def test_one_of_them_prints_and_writes_and_both_go_on(both):
    """The two leave the files of one, and the tables once; with --resume only what is gone is computed again."""
    one, two, printed = both
    names = [{p.relative_to(folder) for p in folder.rglob("*")} for folder in (one, two)]
    assert names[0] == names[1] and printed.count("| test users") == printed.count("parameters, ") == 1
    ranks = (two / "ranks.json").read_text()
    for gone in ("results.json", "ranks.json"):
        (two / gone).unlink()
    shutil.rmtree(two / "checkpoints/peso-stage-3")
    together(two.parent, *flags(**MICRO | SETTINGS, out="two", resume=True))
    assert (two / "ranks.json").read_text() == ranks


def test_a_failure_is_told_and_ends_all(tmp_path):
    """Bad input ends every process, with the three lines and torchrun's own exit code."""
    done = together(tmp_path, "--dataset", "nowhere")
    assert done.returncode and "error: unknown dataset\nfound 'nowhere'" in done.stderr, done.stderr


@draws(30)
@given(n=strategies.integers(2, 5), pairs=strategies.lists(strategies.integers(1, 9), min_size=1, max_size=9))
def test_the_average_is_the_gradient_of_the_whole_batch(n, pairs):
    """Sequences of unlike length, unequal shares, fewer sequences than processes; these come one after another."""
    draw, brought = torch.Generator().manual_seed(0), []
    batch = [torch.randn(k, 3, generator=draw) for k in pairs]  # each (pairs, 3)

    def gradients() -> tuple[torch.Tensor, ...]:
        some = torch.cat(parallel.part(batch))  # (pairs of the share, 3)
        A, frozen, B = (torch.ones(shape, requires_grad=True) for shape in ((2, 3), (1,), (2,)))
        (some @ A.mT @ B).square().mean().backward()
        parallel.average_gradients([A, frozen, B], len(some))
        return A.grad, B.grad

    whole = gradients()  # one process
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "size", lambda: n)
        for total in (lambda x: brought.append(x) or x, lambda x: sum(brought)):  # all bring theirs; each gets the sum
            patch.setattr(parallel, "total", total)
            for rank in range(n):
                patch.setattr(parallel, "rank", lambda: rank)
                averaged = gradients()
    torch.testing.assert_close(averaged, whole, rtol=1e-4, atol=1e-4)


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    message = "^more processes than GPUs\nfound 1 GPUs for process 2\nuse torchrun.*$"
    with pytest.raises(ValueError, match=message), parallel.joined("cuda"):
        pass
