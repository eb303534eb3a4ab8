"""A run that is killed, starved, disturbed or damaged: it ends in the same bytes, or says what is wrong."""
import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

import train
from minipeso import continual, rqvae
from minipeso.config import UsageError
from minipeso.rivals import twotower
from minipeso.runs import checkpoints, report, setup
from minipeso.runs.checkpoints import (
    KEPT, CheckpointError, Checkpoints, Stop, load_checkpoint, locked, read, sweep, write_file)
from minipeso.runs.guard import guard
from minipeso.runs.reopen import reopen
from minipeso.runs.run import Run
from minipeso.state import Progress
from tests.killer import content
from tests.micro import MICRO, checkpoint, flags, micro, run

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


class Killed(BaseException):
    """Stands for SIGKILL in this process: nothing catches it, nothing cleans up after it."""


def small(out: Path, **changes):
    return micro(out, **dict(epochs=3) | changes)


def goes_on(out: Path, whole: Path, **changes) -> None:
    """With --resume `out` ends in every byte of the uninterrupted run, and leaves no unfinished file."""
    run(small(out, resume=True, **changes))
    assert content(out) == content(whole) and not list(out.rglob(".*.part-*"))


def until_done(out: Path, whole: Path, **changes) -> None:
    """The same, of a run that dies at most starts; the folder is not there at the first."""
    for _ in range(100):
        with contextlib.suppress(Killed):
            return goes_on(out, whole, **changes)


def kill_after_saving(patch: pytest.MonkeyPatch, phase: str = "") -> list[tuple[str, int]]:
    """Every epoch of the phases so called kills when it is first saved -> where they note (phase, epoch)."""
    save, seen = Checkpoints.save, []

    def dies(self, of, progress):
        save(self, of, progress)
        assert len(self.numbered(f"{of}.epoch-")) <= KEPT
        if of.startswith(phase) and (of, progress.epoch) not in seen:
            seen.append((of, progress.epoch))
            raise Killed
    patch.setattr(Checkpoints, "save", dies)
    return seen


def refused(cfg, capsys, code: int, *words: str) -> None:
    """The run ends with this exit code and three lines, which have these words."""
    with pytest.raises(SystemExit) as left:
        guard(lambda: train.main(cfg))
    told = capsys.readouterr().err.rpartition("error: ")[2].strip("\n")
    assert left.value.code == code and told.count("\n") == 2 and all(word in told for word in words), told


def commit(folder: Path, files: dict[str, bytes]) -> None:
    with checkpoints.whole(folder) as part:
        for name, data in files.items():
            (part / name).write_bytes(data)


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def files(folder: Path) -> dict:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(autouse=True)
def every_epoch_is_saved(monkeypatch) -> None:
    monkeypatch.setattr(checkpoints, "SHARE", float("inf"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    run(small(out))
    return out


@pytest.fixture(scope="module")
def killed_halfway(tmp_path_factory) -> Path:
    """The same, killed after the second epoch of peso's last stage: it has checkpoints of both kinds."""
    out = tmp_path_factory.mktemp("halfway")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "SHARE", float("inf"))
        kill_after_saving(patch, "peso-stage-3")
        for resume in (False, True):
            with pytest.raises(Killed):
                run(small(out, resume=resume))
    return out


@pytest.fixture
def halfway(killed_halfway, tmp_path) -> Path:
    return shutil.copytree(killed_halfway, tmp_path / "copy")


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_random_kills_end_in_the_same_bytes(kills, tmp_path):
    """SIGKILL at random moments, --resume: every byte of the uninterrupted run, and no unfinished file."""
    command = [sys.executable, "-W", "error", "-m", "tests.killer", tmp_path, str(kills), str(int(time.time()))]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told.get("kills", 0) >= kills and len(told["seen"]) >= 3, (command, told)


def test_every_epoch_of_every_kind_of_method_can_be_gone_on_from(tmp_path, monkeypatch):
    """The base, D_1 with dropout and rows, sums of adapters, learnt magnitudes, InfLoRA's memory, a restart, EvoRec."""
    methods = ["sumlora-all", "sdlora-latest-inherit", "inflora-all", "retrain", "evorec", "peso"]
    settings = dict(epochs=2, base_epochs=2, compare=",".join(methods), lam=1e4, rivals={"evo_layers": 1.0})
    run(micro(tmp_path / "whole", **settings))
    killed = kill_after_saving(monkeypatch)
    until_done(tmp_path / "run", tmp_path / "whole", **settings)
    phases = ["semantic-ids", "base", "LoRA-stage-1", *(f"{name}-stage-{t}" for name in methods for t in (2, 3))]
    assert killed == [(phase, epoch) for phase in phases for epoch in (1, 2)]


def test_patience_goes_on_where_it_was(tmp_path, monkeypatch):
    """Killed after every epoch, also while it waits for a new best: it ends as early, in the same bytes."""
    settings = dict(stages=2, compare="", epochs=9, base_epochs=9, patience=2, lr=0.3, base_lr=0.3)
    run(micro(tmp_path / "whole", **settings))
    killed = kill_after_saving(monkeypatch)
    until_done(tmp_path / "run", tmp_path / "whole", **settings)
    ends = Counter(phase for phase, _ in killed if phase != "semantic-ids")
    assert ends.keys() == {"base", "LoRA-stage-1", "peso-stage-2"} and 3 <= min(ends.values()) < 9, ends


def test_every_epoch_of_the_rqvae_can_be_gone_on_from(tmp_path, monkeypatch):
    """Also of the best so far; a Llama embeds every item once, and its vectors go when the IDs are there."""
    llama = checkpoint(tmp_path / "llama")
    settings = dict(epochs=1, rqvae_epochs=8, base=str(llama), prompt="paper", text_width=0)
    run(micro(tmp_path / "whole", **settings))
    vectors, embedded = setup.item_vectors, []
    monkeypatch.setattr(setup, "item_vectors", lambda *args: embedded.append(1) or vectors(*args))
    killed = kill_after_saving(monkeypatch, "semantic-ids")
    until_done(tmp_path / "run", tmp_path / "whole", **settings)
    assert killed == [("semantic-ids", epoch) for epoch in range(1, 9)] and embedded == [1]
    assert not (tmp_path / "run" / "checkpoints" / "item-vectors").exists()


def test_the_towers_of_d1_are_learnt_once(tmp_path, monkeypatch):
    """Killed in the stages after D_1: its model is taken from the folder."""
    settings = dict(method="lightgcn-pisa", compare="lightgcn-finetune", rivals=dict(tower_epochs=4))
    run(small(tmp_path / "whole", **settings))
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(twotower.TwoTowers, "learn", None)
        run(small(tmp_path / "run", **settings))
    monkeypatch.setattr(twotower.TwoTowers, "first", None)  # fails if it is called
    goes_on(tmp_path / "run", tmp_path / "whole", **settings)


def crashing(monkeypatch, name: str, nth: int, before: bool) -> None:
    """The nth call of the function kills, before or after it has done its work."""
    module, _, function = name.partition(".")
    real, calls = getattr(sys.modules[module], function), []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) != nth:
            return real(*args, **kwargs)
        if not before:
            real(*args, **kwargs)
        raise Killed
    monkeypatch.setattr(name, call)


@pytest.mark.parametrize("name", ["os.fsync", "os.rename", "os.replace", "shutil.rmtree"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_kill_while_committing_leaves_the_old_or_the_new_or_nothing(name, before, tmp_path, monkeypatch):
    """At every call that touches names or the disk; a sweep removes what has no name yet."""
    old, new = ({"a": word.encode() * 100, "b": word.encode()} for word in ("old", "new"))
    for nth in range(1, 6):
        folder, file = tmp_path / f"{nth}" / "state", tmp_path / f"{nth}" / "file"
        commit(folder, old)
        write_file(file, "old")
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            crashing(patch, name, nth, before)
            commit(folder, new)
            write_file(file, "new")
        assert (not folder.is_dir() or read(folder) in (old, new)) and file.read_text() in ("old", "new")
        sweep(folder.parent)
        assert {p.name for p in folder.parent.iterdir()} <= {"state", "file"}


@pytest.mark.parametrize("name, nth, before", [("os.fsync", 9, True), ("os.rename", 4, True), ("os.rename", 15, False),
                                               ("os.replace", 8, True), ("shutil.rmtree", 8, True)])
def test_a_run_killed_while_saving_ends_in_the_same_bytes(name, nth, before, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        crashing(patch, name, nth, before)
        run(small(tmp_path))
    goes_on(tmp_path, whole)


def test_a_kill_while_ranking_does_not_train_again(halfway, whole, monkeypatch):
    """The training of the last stage, over but not yet ranked, is taken from its last epoch."""
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(Run, "recommend", None)
        run(small(halfway, resume=True))
    monkeypatch.setattr(continual, "train_step", None)  # fails if it is called
    goes_on(halfway, whole)


@pytest.mark.parametrize("signum, code, module, name, phase", [
    (signal.SIGTERM, 143, continual, "train_step", "LoRA-stage-1"),
    (signal.SIGINT, 130, rqvae.RQVAE, "loss", "semantic-ids")])
def test_a_signal_saves_first(signum, code, module, name, phase, whole, tmp_path, monkeypatch, capfd):
    """The epoch is finished and saved though no save was due; told in a line; gone on with from there."""
    real = getattr(module, name)

    def told(*args):
        if not Stop.signum and (module is not continual or args[3] == 1):  # D_1
            os.kill(os.getpid(), signum)
        return real(*args)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(module, name, told)
        patch.setattr(checkpoints, "SHARE", 1e-9)
        guard(lambda: train.main(small(tmp_path)))
    assert left.value.code == code
    assert f"stopped by {signal.Signals(signum).name}; the same command with --resume" in capfd.readouterr().err
    assert (tmp_path / "checkpoints" / f"{phase}.epoch-1").is_dir()
    goes_on(tmp_path, whole)


def test_a_second_signal_or_one_outside_an_epoch_ends_at_once(monkeypatch):
    """The first waits for the end of the epoch if there is one. Afterwards signals mean what they did."""
    left, before = [], signal.getsignal(signal.SIGINT)  # a shell's background job ignores it
    monkeypatch.setattr(os, "_exit", left.append)
    with pytest.raises(SystemExit, match="130"), Stop.heard():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before
    with Stop.heard():
        Stop.waits = True
        for signum, codes in ((signal.SIGTERM, []), (signal.SIGINT, [130])):
            os.kill(os.getpid(), signum)
            time.sleep(0.01)
            assert left == codes


@pytest.mark.parametrize("change", [{"lam": 3.0}, {"lr": 2e-3}, {"seed": 1}, {"epochs": 4}, {"method": "single"}])
def test_a_changed_setting_is_refused_by_name(change, killed_halfway, capsys):
    """The flag with both values; nothing is touched."""
    before, (flag, value) = files(killed_halfway), flags(**change)
    refused(small(killed_halfway, resume=True, **change), capsys, 2, f"{flag} ", f" {value} now")
    assert files(killed_halfway) == before


def test_what_does_not_change_the_numbers_may_change(halfway, whole):
    """--threads, the folder's own name and place, and what others have put into it."""
    moved = halfway.rename(halfway.with_name("elsewhere with spaces ü"))
    for place in ("checkpoints", "checkpoints/LoRA-stage-1"):
        (moved / place / "notes.txt").write_text("mine")
    goes_on(moved, whole, threads=1)


def test_a_method_can_be_added(whole, tmp_path, monkeypatch):
    """--resume with one more in --compare computes that one alone, and ends as a fresh run with both."""
    both = dict(compare="single,sdlora-all")
    run(small(tmp_path / "fresh", **both))
    added, save, saved = shutil.copytree(whole, tmp_path / "added"), Run.save, []
    monkeypatch.setattr(Run, "save", lambda *args: saved.append(args[1:3]) or save(*args))
    goes_on(added, tmp_path / "fresh", **both)
    assert saved == [("sdlora-all", 2), ("sdlora-all", 3)]


def test_other_data_texts_or_weights_are_refused(whole, tmp_path, capsys):
    """A review less, another title, one bit of the base: told which; neither is the run opened again."""
    world, base = shutil.copytree(whole / "world", tmp_path / "world"), checkpoint(tmp_path / "llama")
    cfg = small(tmp_path / "run", dataset=str(world), base=str(base), prompt="paper", compare="", resume=True)
    run(cfg)
    reopen(tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    for path, how, what in ((world / "Demo.jsonl", lambda data: data[:data[:-600].rindex(b"\n")], "the data has"),
            (world / "meta_Demo.jsonl", lambda data: data.replace(b"no. 1", b"1"), "the items' texts or IDs have"),
            (base / "model.safetensors", flip, "the base's files have")):
        kept = path.read_bytes()
        path.write_bytes(how(kept))
        refused(cfg, capsys, 2, f"{what} another hash")
        with pytest.raises(UsageError, match=f"{what} another hash"):
            reopen(tmp_path / "run")
        path.write_bytes(kept)


def test_one_process_per_folder(tmp_path, capsys):
    """A second one is refused; neither leaves anything. A file in the folder's place, or above it, stays: code 5."""
    with locked(tmp_path / "run"):
        refused(small(tmp_path / "run"), capsys, 2, "it holds the folder's lock")
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/run"):
        refused(small(tmp_path / out), capsys, 5, f"cannot write {tmp_path / out}")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_finished_run_prints_its_results_and_does_nothing(whole):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*")}
    assert "- single [95 %]" in run(small(whole, resume=True))
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*")} == before


def test_seconds_add_up_over_starts(halfway):
    """A method's are of all its stages and starts; nothing is counted twice."""
    stage, _, epoch = (load_checkpoint(place)[1]["seconds"] for place in sorted(halfway.glob("checkpoints/peso*")))
    began = time.monotonic()
    run(small(halfway, resume=True))
    seconds = json.loads((halfway / "results.json").read_text())["seconds"]
    assert 0 < stage < epoch < seconds["peso"] and sum(seconds.values()) < epoch + time.monotonic() - began


def test_checkpoints_are_kept_bounded_and_the_demo_needs_no_network(tmp_path, monkeypatch):
    """When all is over, the newest two stages of a method, each with all that was found until then. No socket is made
    for it, nor to open it again."""
    monkeypatch.setattr("socket.socket", None)
    monkeypatch.setattr("socket.getaddrinfo", None)
    run(micro(tmp_path, stages=4, compare=""))
    reopen(tmp_path)
    names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert names == {"semantic-ids", "base", "LoRA-stage-1", "peso-stage-3", "peso-stage-4"}
    ranks, absent = (json.loads((tmp_path / name).read_text()) for name in ("ranks.json", "absent.json"))
    ranks |= {t: ranks[t] + some for t, some in absent.items()}
    found = load_checkpoint(tmp_path / "checkpoints" / "peso-stage-4")[1]["found"]
    assert {t: len(some) for t, some in found.items()} == {t: len(some) for t, some in ranks.items()}


def test_saving_costs_2_percent_of_the_time(monkeypatch, tmp_path):
    """1,000 epochs of a second, and a save takes one."""
    monkeypatch.undo()
    clock, saved = [0], []
    monkeypatch.setattr(time, "monotonic", lambda: sum(clock))
    monkeypatch.setattr(Checkpoints, "write", lambda *args: (clock.append(1), saved.append(sum(clock))))
    made, progress = Checkpoints(tmp_path, "", None), Progress({}, torch.optim.AdamW([torch.zeros(1)]))
    for _ in range(1000):
        clock.append(1)
        made.save("base", progress)
    assert saved[0] == 2 and 19 <= len(saved) <= 21


@pytest.mark.parametrize("place, file, how", [
    ("peso-stage-3.epoch-2", "state.safetensors", "a flipped bit"), ("peso-stage-2", "state.safetensors", -1000),
    ("LoRA-stage-1", "facts.json", 7), ("single-stage-3", "facts.json", "missing"), ("base", "manifest.json", 20),
    ("semantic-ids", "manifest.json", "missing"), ("peso-stage-3.epoch-2", "manifest.json", 0)])
def test_a_damaged_checkpoint_is_code_3_and_once_it_is_deleted_the_result_is_the_same(place, file, how, halfway, whole,
                                                                                     capsys):
    """Cut, flipped (which safetensors would not notice) or missing: told by name, nothing is removed; without it the
    checkpoint before it counts."""
    path, places = halfway / "checkpoints" / place / file, {*(halfway / "checkpoints").iterdir()}
    data = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes(flip(data) if how == "a flipped bit" else data[:how])
    refused(small(halfway, resume=True), capsys, 3, f"{place} is not an intact checkpoint", "delete it and run again")
    assert {*(halfway / "checkpoints").iterdir()} == places
    shutil.rmtree(path.parent)
    goes_on(halfway, whole)


def test_checkpoints_of_another_run_are_code_3(halfway, capsys):
    """config.json is that of a run with another lambda: the checkpoints are not taken for its own."""
    settings = json.loads((halfway / "config.json").read_text())
    (halfway / "config.json").write_text(json.dumps(settings | {"lam": 3.0}))
    refused(small(halfway, resume=True, lam=3.0), capsys, 3, "was made with other settings")


def test_a_pickle_is_refused_and_not_run(halfway, tmp_path):
    """In place of the tensors, with a manifest that fits it: what it would do is not done."""
    class Canary:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "canary"),)
    commit(halfway / "checkpoints" / "base", {"state.safetensors": pickle.dumps(Canary()), "facts.json": b"{}"})
    with pytest.raises(CheckpointError, match="base is not a checkpoint of minipeso"):
        load_checkpoint(halfway / "checkpoints" / "base")
    assert not (tmp_path / "canary").exists()
    source = "".join(path.read_text() for path in [*ROOT.glob("*.py"), *(ROOT / "minipeso").rglob("*.py")])
    for word in ("import pickle", "torch.load", "allow_pickle", "import shelve", "import marshal"):
        assert word not in source


def test_no_number_is_shown_that_the_ranks_do_not_give(whole, tmp_path):
    """Edited numbers are computed anew; files that are cut, or hold something else, are refused in three lines."""
    names = "results.json", "ranks.json", "absent.json", "expected.json"
    texts = {name: (whole / name).read_text() for name in names}
    better = json.loads(texts["results.json"])
    better["stages"]["2"]["hit@10"] += 0.01
    for name, text in (("results.json", json.dumps(better)), ("results.json", texts["results.json"][:100]),
                       ("results.json", "[1]"), ("results.json", "{}"), ("ranks.json", '{"2": "x"}'),
                       ("absent.json", '{"2": ["x"]}'), ("expected.json", "7")):
        for file, kept in (texts | {name: text}).items():
            (tmp_path / file).write_text(kept)
        if "stages" in text:
            assert report.load(tmp_path)[0] == report.load(whole)[0]
            continue
        with pytest.raises(ValueError, match=rf"{name}.*\n.*\n.*$"):
            report.side_by_side({"run": tmp_path})


def test_nan_stops_before_the_step_and_leaves_the_last_good_state(halfway, capsys, monkeypatch):
    """A NaN in the loss: exit 4; the newest checkpoint is the one before, and finite."""
    loss = continual.stage_loss
    monkeypatch.setattr(continual, "stage_loss", lambda *args: (x := loss(*args))._replace(total=x.total * torch.nan))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args: pytest.fail("a step was made"))
    refused(small(halfway, resume=True), capsys, 4, "the loss is no longer finite at stage 3")
    tensors, facts = load_checkpoint(max((halfway / "checkpoints").glob("peso-stage-3*")))
    assert facts["epoch"] == 2 and all(t.isfinite().all() for t in tensors.values())


@pytest.mark.parametrize("size, place, compare", [
    (3_000, "single/expected.json", "single"), (10_000, "checkpoints/peso-stage-3.epoch-3", "")])
def test_a_full_disk_is_code_5_and_the_run_goes_on_later(size, place, compare, halfway, whole, capsys, monkeypatch):
    """No file can grow beyond `size`: what was there stays, and no part of what is new; with space the run goes on."""
    def full(handle: int) -> None:
        if os.fstat(handle).st_size > size:
            os.truncate(handle, size)
            raise OSError(28, "No space left on device")
    before = files((halfway / place).parent)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        cfg = small(halfway, resume=True, compare=compare)
        refused(cfg, capsys, 5, f"{place}\n", "No space left on device\nfree some space")
    assert files((halfway / place).parent) == before
    goes_on(halfway, whole)


def test_locale_time_zone_and_umask_are_nothing(whole, tmp_path):
    """The same bytes; under umask 022 every file is 0644 and every folder 0755: a colleague can go on."""
    environment = ENVIRONMENT | {"LANG": "C", "LC_ALL": "C", "TZ": "Pacific/Chatham", "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, ROOT / "train.py", *flags(**MICRO | dict(out=tmp_path / "run", epochs=3))],
                          env=environment, umask=0o022, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "run") == content(whole)
    modes = {(p.is_dir(), p.stat().st_mode & 0o777) for p in (tmp_path / "run").rglob("*")}
    assert modes == {(False, 0o644), (True, 0o755)}
