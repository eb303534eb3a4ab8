"""A run that is killed, starved, disturbed or damaged: it ends in the same bytes, or says what is wrong."""
from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from minipeso import continual, rqvae
from minipeso.runs import checkpoint, disk, keeper, prepare, report, signals
from minipeso.runs.guard import guard
from minipeso.runs.reopen import reopen
from minipeso.runs.disk import CheckpointError
from tests.killer import content
from tests.micro import MICRO, flags, micro, run
from tests.micro import checkpoint as llama

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
LONG = dict(epochs=2, compare="sumlora-all,sdlora-latest-inherit,inflora-all,retrain,evorec", lam=1e4,
            evo_consistency=1.0, evo_layers=1.0, filter_epochs=1)


class Killed(BaseException):
    """Stands for SIGKILL in this process: nothing catches it, nothing cleans up after it."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run of MICRO."""
    out = tmp_path_factory.mktemp("whole")
    run(micro(out))
    return out


@pytest.fixture(autouse=True)
def at_once(monkeypatch) -> None:
    """No test waits for what the test before it has spent on saving."""
    monkeypatch.setattr(keeper.Keeper, "due", 0.0)


@pytest.fixture(scope="module")
def killed_halfway(tmp_path_factory) -> Path:
    """A run killed at the third step of peso's last stage, every step saved: it has checkpoints of both kinds."""
    out = tmp_path_factory.mktemp("halfway")
    steps, step = [], continual.train_step

    def dies(objective, batch, optimiser, plan, *rest):
        steps.append(plan)
        if plan[0] == 3 and plan.penalty == "kl" and steps.count(plan) == 3:
            raise Killed
        return step(objective, batch, optimiser, plan, *rest)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(keeper, "SHARE", float("inf"))
        patch.setattr(keeper.Keeper, "due", 0.0)
        patch.setattr(continual, "train_step", dies)
        run(micro(out, batch=2))
    assert (out / "checkpoints" / "peso-stage-3.step-2").is_dir(), list((out / "checkpoints").iterdir())
    return out


@pytest.fixture
def halfway(killed_halfway, tmp_path) -> Path:
    """A copy of it, under another name."""
    return shutil.copytree(killed_halfway, tmp_path / "copy")


@pytest.fixture(scope="module")
def whole_of_halfway(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("whole-2")
    run(micro(out, batch=2))
    return content(out)


def fails(main, capsys, monkeypatch, *argv) -> tuple[int, list[str]]:
    """(exit code, the message's lines) of what main() ends with under guard."""
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    with pytest.raises(SystemExit) as left:
        guard(main)
    return left.value.code, capsys.readouterr().err.rpartition("error: ")[2].strip("\n").splitlines()


# -- A. interruption and resumption -----------------------------------------------------------------

def killed(folder: Path, kills: int, seed: int) -> dict:
    done = subprocess.run([sys.executable, "-W", "error", "-m", "tests.killer", folder, str(kills), str(seed)], cwd=ROOT,
                          env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_20_random_kills_end_in_the_same_bytes(tmp_path):
    """SIGKILL at 20 random moments, wherever they fall (data, RQ-VAE, base, stages, saving, ranking): --resume ends
    in every byte of the uninterrupted run, and leaves no unfinished file."""
    found = killed(tmp_path, 20, seed=int(time.time()))
    assert found.get("kills", 0) >= 20 and found["runs"] >= 1 and len(found["seen"]) >= 3, found


@pytest.mark.slow
def test_200_random_kills_end_in_the_same_bytes(tmp_path):
    """The same, longer."""
    found = killed(tmp_path, 200, seed=1)
    assert found.get("kills") == 200, found


def test_every_step_of_every_kind_of_method_can_be_gone_on_from(tmp_path, monkeypatch):
    """Killed at every 23rd step, all steps saved: the base, D_1 with dropout and new rows, sums of old adapters,
    learnt magnitudes, InfLoRA's memory, a restart from the base and EvoRec's filter all go on bit for bit."""
    run(micro(tmp_path / "whole", **LONG))
    monkeypatch.setattr(keeper, "SHARE", float("inf"))
    step, steps = continual.train_step, []

    def dies(*args):
        steps.append(1)
        if len(steps) % 23 == 0:
            raise Killed
        return step(*args)
    monkeypatch.setattr(continual, "train_step", dies)
    for attempt in range(200):
        with contextlib.suppress(Killed):
            run(micro(tmp_path / "run", resume=True, **LONG))
            break
    assert attempt > 5, attempt
    assert content(tmp_path / "run") == content(tmp_path / "whole")


@pytest.mark.parametrize("base", ["tiny", "llama"])
def test_every_epoch_of_the_rqvae_can_be_gone_on_from(base, tmp_path, monkeypatch):
    """Killed after each epoch, every one saved: the same IDs; of a Llama's texts every item is embedded once."""
    changes = dict(rqvae_epochs=8, compare="", method="pretrain")
    if base == "llama":
        changes |= dict(base=str(llama(tmp_path / "llama")), prompt="paper", layers=0, text_width=0)
    run(micro(tmp_path / "whole", **changes))
    monkeypatch.setattr(keeper, "SHARE", float("inf"))
    save, saved, embedded, vectors = keeper.Keeper.save, [], [], prepare.item_vectors

    def dies(self, at):
        save(self, at)
        if self.phase == "semantic-ids" and at.step not in saved:
            saved.append(at.step)
            raise Killed
    monkeypatch.setattr(keeper.Keeper, "save", dies)
    monkeypatch.setattr(prepare, "item_vectors", lambda *args: (embedded.append(1), vectors(*args))[1])
    for attempt in range(20):
        with contextlib.suppress(Killed):
            run(micro(tmp_path / "run", resume=True, **changes))
            break
    assert saved == list(range(1, 9)) and len(embedded) == (9 if base == "tiny" else 1), (saved, embedded)
    assert content(tmp_path / "run") == content(tmp_path / "whole")
    left = {p.name.partition(".")[0] for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert "semantic-ids" in left and "item-vectors" not in left, left


CALLS = ("os.fsync", "os.rename", "os.replace", "shutil.rmtree")


def crashing(monkeypatch, name: str, nth: int, before: bool) -> None:
    """The nth call of the function kills, before or after it has done its work."""
    module, _, function = name.partition(".")
    real, count = getattr(sys.modules[module], function), []

    def call(*args, **kwargs):
        count.append(1)
        if len(count) == nth and before:
            raise Killed
        result = real(*args, **kwargs)
        if len(count) == nth:
            raise Killed
        return result
    monkeypatch.setattr(name, call)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_kill_while_committing_leaves_the_old_or_the_new_or_nothing(name, before, tmp_path, monkeypatch):
    """At every call that touches names or the disk, with an old folder in the way: what has the name afterwards is
    intact, and a sweep leaves no unfinished file."""
    old, new = ({"a": word * 100, "b": word} for word in (b"old", b"new"))
    for nth in range(1, 8):
        folder = tmp_path / f"{nth}" / "state"
        disk.commit(folder, old)
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            crashing(patch, name, nth, before)
            disk.commit(folder, new)
        if folder.is_dir():
            assert disk.read(folder)["b"] in (b"old", b"new")
        disk.sweep(folder.parent)
        assert {p.name for p in folder.parent.iterdir()} <= {"state"}
        disk.commit(folder, new)
        assert disk.read(folder)["a"] == new["a"]


@pytest.mark.parametrize("name, nth, before", [("os.fsync", 9, True), ("os.rename", 4, True), ("os.rename", 5, False),
                                               ("os.replace", 6, True), ("shutil.rmtree", 1, True)])
def test_a_run_killed_while_saving_ends_in_the_same_bytes(name, nth, before, whole, tmp_path, monkeypatch):
    """Before and after the calls that write: gone on with, the run is the uninterrupted one, without leftovers."""
    monkeypatch.setattr(keeper, "SHARE", 0.3)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        crashing(patch, name, nth, before)
        run(micro(tmp_path))
    run(micro(tmp_path, resume=True))
    assert content(tmp_path) == content(whole) and not list(tmp_path.rglob(".*.part-*"))


def test_a_kill_while_ranking_does_not_train_again(whole, tmp_path, monkeypatch):
    """Killed in the last stage's evaluation: the stage's training is taken from its last step."""
    monkeypatch.setattr(keeper, "SHARE", float("inf"))
    ranks, asked = train.learn_later.__globals__["rank_users"], []

    def dies(made, t, *rest):
        asked.append(t)
        if asked == [1, 2, 3, 2, 3]:
            raise Killed
        return ranks(made, t, *rest)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("minipeso.runs.run.rank_users", dies)
        run(micro(tmp_path))
    monkeypatch.setattr(continual, "train_step", None)  # would fail if it were called
    run(micro(tmp_path, resume=True))
    assert content(tmp_path) == content(whole)


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_first(signum, code, tmp_path):
    """In D_1's training: the step is finished and saved though no save was due; exit 143 and 130, no traceback, and
    --resume starts behind that step."""
    driver = ("import sys, train; from minipeso import config, keeper; from minipeso.runs.guard import guard; keeper.Keeper.due = float('inf'); "
              "guard(lambda: train.main(config.from_args(sys.argv[1:])))")
    argv = flags(**MICRO | dict(out=tmp_path / "run", epochs=400))
    process = subprocess.Popen([sys.executable, "-c", driver, *argv], cwd=ROOT, env=ENVIRONMENT, text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    log = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (log.is_file() and '"stage": 1, "epoch": 1' in log.read_text()):
        time.sleep(0.02)
    process.send_signal(signum)
    _, said = process.communicate(timeout=20)
    assert process.returncode == code and "Traceback" not in said, said
    assert f"stopped by {signal.Signals(signum).name}; the same command with --resume goes on\n" in said, said
    saved = keeper.numbered(tmp_path / "run" / "checkpoints", "first.step-")
    facts = checkpoint.read(saved[-1])[1]
    assert facts["step"] > 0 and not (tmp_path / "run" / "run.lock").exists()


def test_a_signal_in_the_rqvae_saves_first(whole, tmp_path, monkeypatch):
    """The epoch is finished and saved though no save was due, and the IDs go on from there."""
    monkeypatch.setattr(keeper.Keeper, "due", float("inf"))
    loss, asked = rqvae.RQVAE.loss, []

    def told(self, *args, **how):
        asked.append(1)
        if len(asked) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, *args, **how)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(rqvae.RQVAE, "loss", told)
        run(micro(tmp_path))
    assert left.value.code == 143 and [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["semantic-ids.step-1"]
    run(micro(tmp_path, resume=True))
    assert content(tmp_path) == content(whole)


def test_a_second_signal_leaves_at_once(monkeypatch):
    """The first waits for the end of the step; the second does not."""
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    with signals.heard():
        with signals.step():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            assert signals.Request.signum == signal.SIGTERM and not left
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            assert left == [130]


def test_outside_a_step_a_signal_ends_at_once():
    """Nothing would be gained by waiting. Afterwards the signal means what it did."""
    before = signal.getsignal(signal.SIGINT)  # a shell's background job ignores it
    with pytest.raises(SystemExit) as error, signals.heard():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert error.value.code == 130 and signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("change", [dict(lam=3.0), dict(lr=2e-3), dict(seed=1), dict(epochs=3), dict(method="single"),
                                    dict(compare="")], ids=lambda change: next(iter(change)))
def test_a_changed_setting_is_refused_by_name(change, halfway, capsys, monkeypatch):
    """Exit 2 and the flag with both values; nothing is touched."""
    before = {p: p.read_bytes() for p in halfway.rglob("*") if p.is_file()}
    name = next(iter(change))
    code, message = fails(lambda: train.main(micro(halfway, resume=True, **dict(batch=2) | change)), capsys, monkeypatch)
    assert code == 2 and len(message) == 3 and ("--lambda" if name == "lam" else f"--{name}") in message[1], message
    assert {p: p.read_bytes() for p in halfway.rglob("*") if p.is_file()} == before


def test_what_does_not_change_the_numbers_may_change(halfway, whole_of_halfway):
    """--eval-batch and --threads, and the folder's own name and place."""
    moved = halfway.rename(halfway.with_name("elsewhere with spaces ü"))
    assert len(list((moved / "checkpoints").iterdir())) > 5
    run(micro(moved, batch=2, resume=True, eval_batch=7, threads=1))
    assert {k: v for k, v in content(moved).items() if k != "config.json"} == \
           {k: v for k, v in whole_of_halfway.items() if k != "config.json"}


def test_other_data_or_texts_are_refused(tmp_path, capsys, monkeypatch):
    """A review more, or another title: exit 2 saying which."""
    run(micro(tmp_path / "made"))
    world = tmp_path / "made" / "world"
    settings = dict(dataset=str(world), resume=True)
    run(micro(tmp_path / "run", **settings))
    (tmp_path / "run" / "results.json").unlink()
    titles = (world / "meta_Demo.jsonl").read_text()
    (world / "meta_Demo.jsonl").write_text(titles.replace("no. 1", "number 1"))
    code, message = fails(lambda: run(micro(tmp_path / "run", **settings)), capsys, monkeypatch)
    assert code == 2 and "the items' texts or IDs have another hash" in message[1], message
    (world / "meta_Demo.jsonl").write_text(titles)
    rows = (world / "Demo.jsonl").read_text().splitlines(keepends=True)
    (world / "Demo.jsonl").write_text("".join(rows[:-3]))
    code, message = fails(lambda: run(micro(tmp_path / "run", **settings)), capsys, monkeypatch)
    assert code == 2 and "data has another hash" in message[1], message


def test_another_base_is_refused(tmp_path, capsys, monkeypatch):
    """One weight of the checkpoint is another: neither is the run gone on with nor opened again."""
    base = llama(tmp_path / "llama")
    settings = dict(base=str(base), prompt="paper", layers=0, text_width=0, compare="", resume=True)
    run(micro(tmp_path / "run", **settings))
    reopen(tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    flip(base / "model.safetensors")
    code, message = fails(lambda: run(micro(tmp_path / "run", **settings)), capsys, monkeypatch)
    assert code == 2 and "the base's files have another hash" in message[1], message
    code, message = fails(lambda: reopen(tmp_path / "run"), capsys, monkeypatch)
    assert code == 2 and "the base's files have the hash" in message[1], message


def test_the_demo_needs_no_network(tmp_path, monkeypatch):
    """Not a socket is made."""
    def no_network(*args, **kwargs):
        raise AssertionError("the network was touched")
    monkeypatch.setattr(socket, "socket", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    run(micro(tmp_path))
    reopen(tmp_path)


def test_one_process_a_folder(tmp_path, capsys, monkeypatch):
    """A second one is refused with the pid of the first; the lock of a dead one is no hindrance, and none is left."""
    with disk.alone(tmp_path):
        code, message = fails(lambda: train.main(micro(tmp_path)), capsys, monkeypatch)
        assert code == 2 and f"pid {os.getpid()}" in message[1], message
    assert not tmp_path.exists(), "nothing else was written there"
    tmp_path.mkdir()
    (tmp_path / "run.lock").write_text("999999\n")
    run(micro(tmp_path))
    assert not (tmp_path / "run.lock").exists()


def test_a_finished_run_prints_its_results_and_does_nothing(whole):
    """With --resume: the same tables, no file touched."""
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in whole.rglob("*") if p.is_file()}
    printed = run(micro(whole, resume=True))
    assert "peso - single" in printed and "finished before" in printed
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in whole.rglob("*") if p.is_file()} == before


def test_the_seconds_are_those_that_passed(tmp_path):
    """Nothing is counted twice, in a run from the start or in what is gone on with."""
    began = time.monotonic()
    run(micro(tmp_path))
    first = time.monotonic() - began
    seconds = json.loads((tmp_path / "results.json").read_text())["seconds"]
    assert 0 < sum(seconds.values()) <= first, (seconds, first)
    (tmp_path / "results.json").unlink()
    run(micro(tmp_path, resume=True))
    again = json.loads((tmp_path / "results.json").read_text())["seconds"]
    assert sum(again.values()) <= time.monotonic() - began, (seconds, again)


def test_nothing_to_go_on_from_is_a_fresh_start(whole, tmp_path):
    """--resume in an empty folder, so that one command line can be started again and again."""
    run(micro(tmp_path / "new", resume=True))
    assert content(tmp_path / "new") == content(whole)


def test_checkpoints_are_kept_bounded(tmp_path, monkeypatch):
    """Of unfinished steps two, of a method's stages the newest two, each with all ranks until then."""
    monkeypatch.setattr(keeper, "SHARE", float("inf"))
    save, most = keeper.Keeper.save, []

    def watched(self, at):
        save(self, at)
        most.append(len(self.states()))
    monkeypatch.setattr(keeper.Keeper, "save", watched)
    run(micro(tmp_path, stages=5, compare=""))
    assert max(most) == keeper.KEPT and len(most) > 10
    names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert names == {"semantic-ids", "base", "first", "peso-stage-4", "peso-stage-5"}
    four, five = (checkpoint.read(tmp_path / "checkpoints" / f"peso-stage-{t}")[1] for t in (4, 5))
    assert five["ranks"] == json.loads((tmp_path / "ranks.json").read_text())
    assert 0 < four["seconds"] < five["seconds"], "a method's seconds are of all its stages"


def test_saving_costs_little(monkeypatch, tmp_path):
    """After a save that took c seconds the next is due c / 2 % later, whatever phase asks."""
    monkeypatch.setattr(keeper.Keeper, "due", 0.0)
    saves, write = [], checkpoint.write

    def slow(*args):
        saves.append(time.monotonic())
        time.sleep(0.01)
        write(*args)
    monkeypatch.setattr(checkpoint, "write", slow)
    steps, step = [], continual.train_step
    monkeypatch.setattr(continual, "train_step", lambda *args: (steps.append(1), step(*args))[1])
    run(micro(tmp_path, epochs=4))
    phases = 7  # semantic IDs, base, first, two stages each of two methods
    seconds = saves[-1] - saves[0]
    assert len(steps) > 30 and len(saves) - phases <= 2 + seconds * keeper.SHARE / 0.01, (len(saves), seconds)


def test_the_base_can_be_read_as_parameters(whole):
    """checkpoints/base holds {parameter name: tensor} of the model before LoRA, also without --resume."""
    tensors, _ = checkpoint.read(whole / "checkpoints" / "base")
    assert {"model.embed_tokens.weight", "model.embed_tokens.rows", "model.layers.0.self_attn.q_proj.weight"} <= set(tensors)
    assert not any(".A" in name or ".B" in name for name in tensors)


# -- B. damaged files -------------------------------------------------------------------------------

def cut(n: int):
    return lambda path: path.write_bytes(path.read_bytes()[:n if n >= 0 else len(path.read_bytes()) + n])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    path.write_bytes(data)


DAMAGE = [("state.safetensors", cut(-1)), ("state.safetensors", cut(-1000)), ("state.safetensors", cut(7)),
          ("state.safetensors", cut(0)), ("state.safetensors", flip), ("facts.json", flip), ("facts.json", Path.unlink),
          ("manifest.json", flip), ("manifest.json", cut(20)), ("manifest.json", Path.unlink)]


@pytest.mark.parametrize("place", ["peso-stage-3.step-2", "peso-stage-2", "first"])
@pytest.mark.parametrize("file, damage", DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_checkpoint_is_told(place, file, damage, halfway, capsys):
    """Truncated, flipped, missing: reported by name and removed; the intact ones stay."""
    damage(halfway / "checkpoints" / place / file)
    rest = {p.name for p in (halfway / "checkpoints").iterdir()} - {place}
    with pytest.raises(CheckpointError, match=place):
        checkpoint.read(halfway / "checkpoints" / place)
    checkpoint.check(halfway / "checkpoints")
    assert place in capsys.readouterr().err and {p.name for p in (halfway / "checkpoints").iterdir()} == rest


@pytest.mark.parametrize("places", [["peso-stage-3.step-2"], ["peso-stage-3.step-2", "peso-stage-3.step-1"],
                                    ["peso-stage-2"], ["first", "single-stage-3"], ["base", "semantic-ids"]],
                         ids=lambda places: places[0] + f"+{len(places) - 1}")
def test_after_damage_the_result_is_the_same(places, halfway, whole_of_halfway):
    """A bit flipped in tensors, which safetensors would not notice: the checkpoint before it counts."""
    for place in places:
        flip(halfway / "checkpoints" / place / "state.safetensors")
    run(micro(halfway, batch=2, resume=True))
    assert content(halfway) == whole_of_halfway


def test_no_intact_checkpoint_is_code_3(halfway, capsys, monkeypatch):
    """Each is named with its reason, nothing is removed, and the way out is told."""
    places = sorted(p for p in (halfway / "checkpoints").iterdir())
    for place in places:
        cut(7)(place / "state.safetensors")
    code, message = fails(lambda: run(micro(halfway, batch=2, resume=True)), capsys, monkeypatch)
    assert code == 3 and len(message) == 3 and "without --resume" in message[2], message
    assert all(place.name in message[1] and place.is_dir() for place in places), message


def test_checkpoints_of_another_run_are_code_3(whole, tmp_path, capsys, monkeypatch):
    """Copied in from a run with another lambda, or config.json edited by hand: refused."""
    run(micro(tmp_path, lam=3.0))
    (tmp_path / "results.json").unlink()
    edited = json.loads((tmp_path / "config.json").read_text()) | {"lam": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(edited))
    code, message = fails(lambda: run(micro(tmp_path, resume=True)), capsys, monkeypatch)
    assert code == 3 and "other settings" in message[0], message


class Canary:
    def __reduce__(self):
        return os.mkdir, (os.environ["CANARY"],)


def test_a_pickle_is_refused_and_not_run(halfway, tmp_path, monkeypatch):
    """In place of the tensors, even with a manifest that fits it: refused, and what it would do is not done."""
    canary = tmp_path / "canary"
    monkeypatch.setenv("CANARY", str(canary))
    place = halfway / "checkpoints" / "first"
    facts = (place / "facts.json").read_bytes()
    for disguise in (pickle.dumps(Canary()), pickle.dumps({"A": Canary()}, protocol=0)):
        disk.commit(place, {"state.safetensors": disguise, "facts.json": facts})
        with pytest.raises(CheckpointError, match="first"):
            checkpoint.read(place)
    assert not canary.exists()
    sources = [path.read_text() for path in [*(ROOT / "minipeso").glob("*.py"), ROOT / "train.py", ROOT / "eval.py"]]
    for word in ("import pickle", "torch.load", "allow_pickle", "import shelve", "import marshal"):
        assert not any(word in source for source in sources), word


def test_other_files_in_a_checkpoint_are_nothing(halfway, whole_of_halfway):
    """An extra file, and a folder or file beside the checkpoints."""
    (halfway / "checkpoints" / "first" / "notes.txt").write_text("mine")
    (halfway / "checkpoints" / "notes.txt").write_text("mine")
    run(micro(halfway, batch=2, resume=True))
    assert content(halfway) == whole_of_halfway


def test_results_that_are_not_the_ranks_are_refused(tmp_path):
    """Edited, or from another run: eval.py shows no number that the ranks beside it do not give."""
    run(micro(tmp_path, compare=""))
    kept = (tmp_path / "results.json").read_text()
    better = json.loads(kept)
    better["stages"]["2"]["hit@10"] += 0.01
    ranks = json.loads((tmp_path / "ranks.json").read_text())
    for name, text in (("results.json", json.dumps(better)), ("results.json", kept[:100]), ("results.json", "[1]"),
                       ("ranks.json", json.dumps(ranks | {"2": [1] * len(ranks["2"])})), ("ranks.json", '{"2": "x"}')):
        before = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=name) as error:
            report.load(tmp_path)
        assert len(str(error.value).splitlines()) == 3
        (tmp_path / name).write_text(before)
    report.load(tmp_path)


# -- D, E. numbers, disk, environment ---------------------------------------------------------------

def test_nan_stops_before_the_step_and_leaves_the_last_good_state(halfway, capsys, monkeypatch):
    """A NaN in the loss: exit 4; the newest checkpoint is the one before, and finite."""
    step, loss = continual.train_step, continual.stage_loss

    def poisoned(model, *args):
        found = loss(model, *args)
        return found._replace(total=found.total * float("nan"))
    with monkeypatch.context() as patch:
        patch.setattr(continual, "stage_loss", poisoned)
        code, message = fails(lambda: run(micro(halfway, batch=2, resume=True)), capsys, monkeypatch)
    assert code == 4 and len(message) == 3 and step is continual.train_step
    newest = keeper.numbered(halfway / "checkpoints", "peso-stage-3.step-")[-1]
    tensors, facts = checkpoint.read(newest)
    assert facts["step"] == 2 and all(t.isfinite().all() for t in tensors.values())


@contextlib.contextmanager
def files_up_to(size: int):
    """A disk on which no file can grow beyond `size` bytes: what is more does not reach it."""
    real = os.fsync

    def full(handle: int) -> None:
        if stat.S_ISREG(os.fstat(handle).st_mode) and os.fstat(handle).st_size > size:
            os.truncate(handle, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        yield


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """A file, a folder, an adapter: the old one stays intact, no part of the new one stays."""
    disk.write_file(tmp_path / "file", b"old")
    disk.commit(tmp_path / "folder", {"a": b"old"})
    with files_up_to(1000):
        for write in (lambda: disk.write_file(tmp_path / "file", b"new" * 1000),
                      lambda: disk.commit(tmp_path / "folder", {"a": b"new" * 1000})):
            with pytest.raises(OSError, match="free some space"):
                write()
    assert (tmp_path / "file").read_bytes() == b"old" and disk.read(tmp_path / "folder") == {"a": b"old"}
    assert {p.name for p in tmp_path.iterdir()} == {"file", "folder"}


def test_a_full_disk_is_code_5_and_the_run_goes_on_later(halfway, whole_of_halfway, capsys, monkeypatch):
    """No space for the next checkpoint: three lines; with space again the result is the uninterrupted run's."""
    with files_up_to(3_000):
        code, message = fails(lambda: run(micro(halfway, batch=2, resume=True)), capsys, monkeypatch)
    assert code == 5 and len(message) == 3, message
    assert not list(halfway.rglob(".*.part-*"))
    run(micro(halfway, batch=2, resume=True))
    assert content(halfway) == whole_of_halfway


def test_others_may_read_what_a_run_leaves(tmp_path):
    """Under umask 022 every file is 0644 and every folder 0755: a colleague can go on."""
    before = os.umask(0o022)
    try:
        run(micro(tmp_path / "run", compare=""))
    finally:
        os.umask(before)
    modes = {p: p.stat().st_mode & 0o777 for p in (tmp_path / "run").rglob("*")}
    assert {mode for p, mode in modes.items() if p.is_file()} == {0o644}
    assert {mode for p, mode in modes.items() if p.is_dir()} == {0o755}


def test_a_file_in_the_runs_place_is_code_5(tmp_path, capsys, monkeypatch):
    """--out that is a file, or lies below one: told in three lines, and the file stays."""
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/run"):
        code, message = fails(lambda: train.main(micro(tmp_path / out)), capsys, monkeypatch)
        assert code == 5 and len(message) == 3 and "file" in message[0], message
    assert (tmp_path / "file").read_text() == "mine"


def test_locale_and_time_zone_are_nothing(whole, tmp_path):
    """LANG=C and another TZ: the same bytes."""
    environment = ENVIRONMENT | {"LANG": "C", "LC_ALL": "C", "TZ": "Pacific/Chatham", "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, ROOT / "train.py", *flags(**MICRO | dict(out=tmp_path / "run"))],
                          env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "run") == content(whole)
