"""Recommendations of a finished run: real items, by the model's own scores, for one user or for all."""
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval as script
from minipeso.config import UsageError
from minipeso.evaluate import Ranker
from minipeso.files.release import read_release
from minipeso.metrics import hit_at, ndcg_at
from minipeso.runs.recommend import histories, recommend, top_items
from minipeso.runs.reopen import reopen
from minipeso.semantic_ids import SemanticIDs
from minipeso.synthetic import write_world
from tests.micro import MICRO, flags, micro, run, shared_ids
from tests.reference import answer_log_p

ROOT = Path(__file__).parents[1]
JAPANESE = "三味線の弦 🎵 العود"
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A finished run of the demo's world with titles that no ASCII terminal has, and one of blocks with shared IDs."""
    made = tmp_path_factory.mktemp("runs")
    write_world(made / "world", 60, 60, 0.5, 0)
    for path in (made / "world").iterdir():
        text = path.read_text(encoding="utf-8").replace('"title": "', f'"title": "{JAPANESE} ')
        path.write_text(text, encoding="utf-8")
    for name, data in (("reviews", made / "world"), ("blocks", shared_ids(made / "shared"))):
        run(micro(made / name, dataset=str(data), later_trains="rows"))
    return {name: made / name for name in ("reviews", "blocks")}


@pytest.fixture
def called(capsys, monkeypatch):
    """eval.py with these arguments -> what it printed."""
    def call(*argv) -> str:
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, argv)])
        script.main()
        return capsys.readouterr().out
    return call


def shell(env: dict, *argv) -> bytes:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))}
    return subprocess.check_output([sys.executable, *map(str, argv)], cwd=ROOT, env=clean | env)


@pytest.mark.parametrize("name", ["reviews", "blocks"])
@pytest.mark.parametrize("seen", ["exclude", "include"])
def test_every_recommendation_is_a_real_item_that_exists(runs, name, seen):
    """Ten different items of D_1 .. D_t, best first, or all there are, less the user's own (--seen include: all)."""
    for stage in (1, 2, 3):
        ours, sizes = reopen(runs[name], stage), set()
        ours.cfg = dataclasses.replace(ours.cfg, seen=seen)
        for taken, best in zip(users := list(histories(ours).values()), top_items(ours, users), strict=True):
            items, scores = [item for item, _ in best], [score for _, score in best]
            left = {*ours.known} - {*taken} if seen == "exclude" else {*ours.known}
            assert len({*items}) == len(items) == min(10, len(left)) and {*items} <= left
            assert scores == sorted(scores, reverse=True) and all(score < 0 for score in scores)
            sizes.add(len(items))
        assert (min(sizes) < 10) == (name == "blocks" and seen == "exclude" and stage > 1), sizes


@pytest.mark.parametrize("name", ["reviews", "blocks"])
def test_the_ten_are_the_best_of_all_items(runs, name):
    """Every known item scored by itself gives the same ten, items with one ID by number (beams as many as IDs)."""
    ours = reopen(runs[name])
    ours.cfg = micro(runs[name], beams=64, window=ours.cfg.window)
    for taken in list(histories(ours).values())[:5]:
        prompt = ours.template.prompt(taken[-ours.cfg.window:]).tolist()
        with torch.no_grad():
            scores = {item: answer_log_p(ours.model, prompt, ours.template.answer(item)) for item in ours.known}
        best, = top_items(ours, [taken])
        order = sorted({*ours.known} - {*taken}, key=lambda item: (-round(scores[item], 5), item))
        assert [item for item, _ in best] == order[:10]
        assert max(abs(score - scores[item]) for item, score in best) < 1e-4


@pytest.mark.parametrize("t", [1, 3])
def test_a_history_is_all_that_was_taken_until_the_stage(runs, t):
    """Stage t sees D_1 .. D_t, each user's newest items last, and nobody who comes later."""
    ours, taken = reopen(runs["reviews"], t), {}
    for stage in ours.data.stages[:t]:
        for user, items in stage.current.items():
            name = ours.data.users[user]
            taken[name] = taken.get(name, stage.history[user]) + items
    assert histories(ours) == taken and len(set().union(*(s.current for s in ours.data.stages))) > len(taken) * (t == 1)


def test_all_users_get_one_line_each(runs, tmp_path):
    """--recommend-all: every user once, in order; each line what --recommend shows for that user alone."""
    ours = reopen(runs["reviews"])
    assert script.recommend_all(ours, tmp_path / "all.jsonl") == len(histories(ours))
    lines = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["user"] for line in lines] == list(histories(ours)) and len(list(tmp_path.iterdir())) == 1
    for line in lines[:8]:
        shown = recommend(ours, line["user"])
        assert all(f"{row['id']}  {row['title']}" in shown for row in line["history"][-ours.cfg.window:])
        assert all(f"{place:>2} {row['score']:7.2f} {row['id']}  {JAPANESE}" in shown
                   for place, row in enumerate(line["items"], start=1))


@pytest.mark.parametrize("env", [{"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}, ASCII])
def test_a_terminal_without_the_letters(runs, env, tmp_path):
    """LANG=C: what cannot be shown is replaced, nothing fails, and files keep every letter; neither does the results
    table of a run nor --explain, and the run's files are those of any other."""
    printed = shell(env, "eval.py", runs["reviews"], "--recommend", "U00003", "--recommend-all", tmp_path / "all.jsonl")
    assert b"U00003, D3" in printed and b" users, " in printed
    assert JAPANESE in (tmp_path / "all.jsonl").read_text(encoding="utf-8")
    if env == ASCII:
        changes = dict(dataset=runs["reviews"].parent / "world", out=tmp_path / "run", explain=True)
        assert b"rank of the target" in shell(env, "train.py", *flags(**MICRO | changes))
        ids = "semantic_ids.json"
        assert (tmp_path / "run" / ids).read_bytes() == (runs["reviews"] / ids).read_bytes()


def test_an_unknown_user_is_told_who_is_known(runs):
    """The nearest name, or some; a user who only comes later is not known yet."""
    ours = reopen(runs["reviews"], 1)
    later = next(user for user in histories(reopen(runs["reviews"], 3)) if user not in histories(ours))
    for name, word in (("U0003", "U000"), ("nobody", "for example"), (later, "D1 .. D1")):
        with pytest.raises(UsageError, match=word) as error:
            recommend(ours, name)
        assert len(str(error.value).splitlines()) == 3


def test_the_stage_and_the_method_are_chosen(runs, called):
    """--stage and a method's own folder each change the model that answers; users without a name have numbers."""
    last, first = (called(runs["reviews"], "--recommend", "U00003", "--stage", t) for t in (3, 1))
    assert "U00003, D3: " in last and "U00003, D1: " in first and last.splitlines()[-1] != first.splitlines()[-1]
    single = called(runs["blocks"] / "single", "--recommend", "5")
    assert "peso recommends" in last and "single recommends" in single and "user 5, " in single and "  item " in single


@pytest.mark.parametrize("names, argv, word", [
    (["reviews"], ["--stage", "2"], "--stage"), (["reviews"], ["--recommend", "x", "--stage", "9"], "D9"),
    (["reviews", "blocks"], ["--recommend", "1"], "one run"),
    (["reviews", "reviews"], ["--report", "page.html"], "one run at a time")])
def test_what_cannot_be_done_is_refused(runs, names, argv, word, called):
    """A stage without a use for it, or one that is not there; more than one model; a page of two runs."""
    with pytest.raises(UsageError, match=word):
        called(*(runs[name] for name in names), *argv)


def test_eval_exports(runs, tmp_path, called):
    """--export-peft and --export-merged write the folders that test_export.py proves; --export-blocks the run's stages
    and IDs in the authors' layout, which reads back as they are."""
    printed = called(runs["reviews"], "--export-peft", tmp_path / "p", "--export-merged", tmp_path / "m", "--stage", 2)
    assert printed.count("peso after D2") == 2
    assert (tmp_path / "p" / "adapter_config.json").is_file() and (tmp_path / "m" / "config.json").is_file()
    for name in ("reviews", "blocks"):
        called(runs[name], "--export-blocks", tmp_path / name)
        (stages, index), run = read_release(tmp_path / name), reopen(runs[name])
        assert stages == run.stages and SemanticIDs.load(index, run.cfg.codes).codes.equal(run.ids.codes)
    assert (tmp_path / name / "blocks.all.block_0.json").is_file()


def test_interpolation_goes_from_one_adapter_to_the_next(runs, called, tmp_path):
    """w = 1 gives what the run ranked; w = 0 the stage's questions to the adapter before; what lies between is neither
    (rows too), and is what an l2 anchor of lambda = rho leaves. The first stage has nothing before it."""
    after, before = reopen(runs["reviews"]), reopen(runs["reviews"], 2)
    shown = [line.split("|") for line in called(runs["reviews"], "--interpolate", "0,0.5,1").splitlines()[2:]]
    rows = {cells[1].strip(): [float(x) for x in cells[3:7]] for cells in shown}
    assert float(shown[1][2]) == 1
    (asked, own), n = after.questions(3), len(after.stages[2].users)
    for w, model in (("0", before.model), ("1", after.model)):
        ranks = Ranker(after.ids, after.known, after.template, after.cfg.beams).ranks(model, asked, own)
        wanted = [metric(r, 10).item() for r in (ranks[:n], ranks[n:]) for metric in (hit_at, ndcg_at)]
        assert rows[w] == pytest.approx(wanted, abs=6e-5)
    with pytest.raises(UsageError, match="nothing to interpolate"):
        called(runs["reviews"], "--interpolate", "0", "--stage", 1)
    with pytest.raises(UsageError, match="needs numbers"):
        called(runs["reviews"], "--interpolate", "a")
    with pytest.raises(UsageError, match="--plot draws"):
        called(runs["reviews"], "--plot", tmp_path / "w.png")
    pytest.importorskip("matplotlib")
    called(runs["reviews"], "--interpolate", "0.5,1", "--plot", tmp_path / "w.png")
    assert (tmp_path / "w.png").read_bytes()[:4] == b"\x89PNG"
