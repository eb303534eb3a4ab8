"""Recommendations of a finished run: real items, by the model's own scores, for one user or for all."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval as script
from minipeso.config import UsageError
from minipeso.runs.recommend import histories, recommend, recommend_all, top_items
from minipeso.runs.reopen import reopen
from tests.micro import MICRO, flags, micro, run, shared_ids
from tests.reference import answer_log_p

ROOT = Path(__file__).parents[1]
JAPANESE = "三味線の弦 🎵 العود"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A finished run of the demo's world with titles that no ASCII terminal has, and one of blocks with shared IDs."""
    made = tmp_path_factory.mktemp("runs")
    run(micro(made / "seed"))
    world = made / "data"
    world.mkdir()
    for path in (made / "seed" / "world").iterdir():
        text = path.read_text(encoding="utf-8")
        (world / path.name).write_text(text.replace('"title": "', f'"title": "{JAPANESE} '), encoding="utf-8")
    run(micro(made / "reviews", dataset=str(world)))
    run(micro(made / "blocks", dataset=str(shared_ids(made / "shared"))))
    return {name: made / name for name in ("reviews", "blocks")}


def called(*argv: str, capsys, monkeypatch) -> str:
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, argv)])
    script.main()
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["reviews", "blocks"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_recommendation_is_a_real_item_that_exists(runs, name, stage):
    """For every user: ten different items of D_1 .. D_t, best first, or all there are."""
    ours = reopen(runs[name], stage)
    known = histories(ours)
    for found in top_items(ours, list(known.values())):
        items, scores = [item for item, _ in found], [score for _, score in found]
        assert len(set(items)) == len(items) == min(10, len(ours.known)) and set(items) <= set(ours.known)
        assert scores == sorted(scores, reverse=True) and all(score < 0 for score in scores)


@pytest.mark.parametrize("name", ["reviews", "blocks"])
def test_the_ten_are_the_best_of_all_items(runs, name):
    """Every known item scored by itself, without a search: the same ten, the same log-probabilities; items with one
    ID by number. (Beams as many as IDs: nothing is lost on the way.)"""
    ours = reopen(runs[name])
    ours = ours._replace(cfg=micro(runs[name], beams=64, window=ours.cfg.window))
    known = histories(ours)
    for user in list(known)[:5]:
        prompt = ours.template.prompt(known[user][-ours.cfg.window:]).tolist()
        with torch.no_grad():
            scores = {item: answer_log_p(ours.model, prompt, ours.template.answer(item)) for item in ours.known}
        best = sorted(ours.known, key=lambda item: (-round(scores[item], 5), item))[:10]
        found = top_items(ours, [known[user]])[0]
        assert [item for item, _ in found] == best
        assert max(abs(score - scores[item]) for item, score in found) < 1e-4


def test_a_history_is_all_that_was_taken_until_the_stage(runs):
    """Stage t sees D_1 .. D_t, each user's newest items last, and nobody who comes later."""
    ours = {t: reopen(runs["reviews"], t) for t in (1, 3)}
    stages = ours[1].data.stages
    for t, again in ours.items():
        taken: dict[int, list[int]] = {}
        for stage in stages[:t]:
            for user, items in stage.current.items():
                taken[user] = taken.get(user, stage.history[user]) + items
        assert histories(again) == taken


def test_all_users_stream_one_line_each(runs, tmp_path, capsys, monkeypatch):
    """--recommend-all: every user once, in order, each line what --recommend shows for that user; scores and IDs are
    numbers and text that JSON has; no unfinished file stays."""
    out = tmp_path / "all.jsonl"
    printed = called(runs["reviews"], "--recommend-all", out, capsys=capsys, monkeypatch=monkeypatch)
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    ours = reopen(runs["reviews"])
    assert [line["user"] for line in lines] == [ours.data.users[user] for user in histories(ours)]
    assert f"{len(lines)} users" in printed and [p.name for p in tmp_path.iterdir()] == ["all.jsonl"]
    for line in lines[:8]:
        shown = recommend(ours, line["user"])
        for place, row in enumerate(line["items"], start=1):
            assert f"{place:>2} {row['score']:7.2f} {row['id']}  {row['title']}" in shown
        for row in line["history"]:
            assert f"{row['id']}  {row['title']}" in shown and JAPANESE in row["title"]


def test_what_breaks_off_leaves_no_file(runs, tmp_path):
    """Neither half a file under the name nor an unfinished one beside it."""
    def breaks(n):
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError):
        recommend_all(reopen(runs["reviews"]), tmp_path / "all.jsonl", breaks)
    assert not list(tmp_path.iterdir())


def test_batches_do_not_change_the_answers(runs, tmp_path):
    """One user at a time, or all at once: the same items."""
    ours = reopen(runs["reviews"])
    for size in (1, 64):
        recommend_all(ours._replace(cfg=micro(runs["reviews"], eval_batch=size)), tmp_path / f"{size}.jsonl")
    one, many = ([[row["item"] for row in json.loads(line)["items"]]
                  for line in (tmp_path / f"{size}.jsonl").read_text(encoding="utf-8").splitlines()] for size in (1, 64))
    assert one == many


@pytest.mark.parametrize("env", [{"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0",
                                                                              "PYTHONCOERCECLOCALE": "0"}])
def test_a_terminal_without_the_letters(runs, env, tmp_path):
    """LANG=C: what cannot be shown is replaced, nothing fails, and files keep every letter."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))}
    done = subprocess.run([sys.executable, str(ROOT / "eval.py"), str(runs["reviews"]), "--recommend", "U00003",
                           "--recommend-all", str(tmp_path / "all.jsonl")], capture_output=True, env=clean | env)
    assert done.returncode == 0 and b"U00003, D3" in done.stdout, done.stderr
    assert JAPANESE in (tmp_path / "all.jsonl").read_text(encoding="utf-8")


def test_a_run_on_a_terminal_without_the_letters(runs, tmp_path):
    """An ASCII terminal ends neither the results table nor --explain, and the run's files are those of any other."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))}
    cfg = reopen(runs["reviews"]).cfg
    changes = {name: getattr(cfg, name) for name in MICRO} | {"dataset": cfg.dataset, "out": tmp_path / "run", "explain": True}
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *flags(**changes)], capture_output=True,
                          env=clean | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and b"rank of the target" in done.stdout, done.stderr
    assert (tmp_path / "run" / "semantic_ids.json").read_bytes() == (runs["reviews"] / "semantic_ids.json").read_bytes()


def test_an_unknown_user_is_told_who_is_known(runs):
    """The nearest name, or some; a user who only comes later is not known yet."""
    ours = reopen(runs["reviews"], 1)
    for name, word in (("U0003", "U000"), ("nobody", "for example")):
        with pytest.raises(UsageError) as error:
            recommend(ours, name)
        assert word in str(error.value) and len(str(error.value).splitlines()) == 3
    later = [user for user in histories(reopen(runs["reviews"], 3)) if user not in histories(ours)]
    with pytest.raises(UsageError):
        recommend(ours, ours.data.users[later[0]])


def test_users_of_blocks_have_numbers(runs, capsys, monkeypatch):
    """Where the source has no names, --recommend takes the number, and a title is the item's number."""
    ours = reopen(runs["blocks"])
    user = next(iter(histories(ours)))
    printed = called(runs["blocks"], "--recommend", user, "--stage", 3, capsys=capsys, monkeypatch=monkeypatch)
    assert f"user {user}, D3" in printed and "item " in printed


def test_the_stage_and_the_method_are_chosen(runs, capsys, monkeypatch):
    """--stage and a method's own folder each change the model that answers."""
    def look(*argv):
        return called(*argv, "--recommend", "U00003", capsys=capsys, monkeypatch=monkeypatch)
    last, first, single = (look(runs["reviews"]), look(runs["reviews"], "--stage", 1), look(runs["reviews"] / "single"))
    assert "D1:" in first and "D3:" in last and "peso recommends" in last and "single recommends" in single
    assert last.splitlines()[-1] != first.splitlines()[-1]


@pytest.mark.parametrize("argv, word", [(["--stage", "2"], "--stage"), (["--recommend", "x", "--stage", "9"], "D9")])
def test_what_cannot_be_done_is_refused(runs, argv, word, monkeypatch):
    """A stage without a use for it, or one that is not there."""
    monkeypatch.setattr(sys, "argv", ["eval.py", str(runs["reviews"]), *argv])
    with pytest.raises(UsageError, match=word):
        script.main()


def test_two_runs_are_one_too_many(runs, monkeypatch):
    """Recommendations and exports are of one model."""
    monkeypatch.setattr(sys, "argv", ["eval.py", str(runs["reviews"]), str(runs["blocks"]), "--recommend", "1"])
    with pytest.raises(UsageError, match="one run"):
        script.main()


def test_eval_exports(runs, tmp_path, capsys, monkeypatch):
    """--export-peft and --export-merged write the folders that test_export.py proves."""
    printed = called(runs["reviews"], "--export-peft", tmp_path / "p", "--export-merged", tmp_path / "m", "--stage", 2,
                     capsys=capsys, monkeypatch=monkeypatch)
    assert "peso after D2" in printed and MICRO["compare"] == "single"
    assert (tmp_path / "p" / "adapter_config.json").is_file() and (tmp_path / "m" / "config.json").is_file()
