"""The two scripts as a user starts them: what they leave behind, and how they fail."""
from __future__ import annotations

import csv
import gzip
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import eval as eval_script
import train
from minipeso.runs import report
from minipeso.config import from_args
from minipeso.runs.guard import guard
from minipeso.files.peft import load_peft
from minipeso.runs.run import rank_users
from tests.micro import MICRO, blocks, checkpoint, fingerprint, flags, micro, run, set_up, shared_ids

ROOT = Path(__file__).parents[1]


def shell(script: str, *argv: str, cwd: Path, hash_seed: int = 0) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(hash_seed)}
    return subprocess.run([sys.executable, "-W", "error", ROOT / script, *argv], cwd=cwd, env=environment,
                          capture_output=True, text=True)


def fails(argv: list[str], capsys, monkeypatch, main=None) -> tuple[int, list[str]]:
    """(exit code, the lines of the message) of a command line that cannot be done, in this process."""
    monkeypatch.setattr(sys, "argv", ["script.py", *argv])
    with pytest.raises(SystemExit) as left:
        guard(main or (lambda: train.main(from_args(argv))))
    return left.value.code, capsys.readouterr().err.rpartition("error: ")[2].strip("\n").splitlines()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """Three runs from the command line, each from its own folder: two with seed 0 (and other hash seeds), one
    with seed 1 in another world. {name: (folder, what was printed)}"""
    made = {}
    for hash_seed, (name, seed) in enumerate([("a", 0), ("b", 0), ("c", 1)]):
        cwd = tmp_path_factory.mktemp(name)
        done = shell("train.py", *flags(**MICRO, seed=seed, data_seed=seed, out="run"), cwd=cwd, hash_seed=hash_seed)
        assert done.returncode == 0, done.stderr
        made[name] = cwd / "run", done.stdout
    return made


# -- a run ------------------------------------------------------------------------------------------

def test_the_run_folder(runs):
    """What a run leaves is exactly this, and no unfinished file."""
    adapter = {"adapter_config.json", "adapter_model.safetensors", "manifest.json"}
    expected = {"config.json", "stats.md", "semantic_ids.json", "tokens.json", "metrics.jsonl", "results.json", "ranks.json",
                "world/Demo.jsonl", "world/meta_Demo.jsonl", "single/results.json", "single/ranks.json"}
    expected |= {f"adapters/stage-{t}/{file}" for t in (1, 2, 3) for file in adapter}
    expected |= {f"single/adapters/stage-{t}/{file}" for t in (2, 3) for file in adapter}
    phases = ("semantic-ids", "base", "first", *(f"{name}-stage-{t}" for name in ("single", "peso") for t in (2, 3)))
    expected |= {f"checkpoints/{phase}/{file}" for phase in phases
                 for file in ("state.safetensors", "facts.json", "manifest.json")}
    out, _ = runs["a"]
    assert {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} == expected


def measured(path: Path) -> str:
    """A file's text without the lines that measure time and memory."""
    text = re.sub(r'"seconds": \{[^}]*\}', "", path.read_text())
    return re.sub(r'"peak_memory_bytes": \d+', "", text)


def test_the_seed_decides_every_byte(runs):
    """Two runs with one seed leave the same bytes in every file, but for seconds and peak memory; another seed
    leaves other results."""
    (a, printed), (b, again), (c, _) = runs["a"], runs["b"], runs["c"]
    files = sorted(p.relative_to(a) for p in a.rglob("*") if p.is_file())
    for file in files:
        if "checkpoints" in file.parts and file.suffix == ".json":
            continue  # facts.json knows the seconds, manifest.json its hash
        if file.name == "results.json":
            assert measured(a / file) == measured(b / file)
        else:
            assert (a / file).read_bytes() == (b / file).read_bytes(), file
    assert printed.splitlines()[:-1] == again.splitlines()[:-1], "what is printed, but for the last line's seconds"
    for file in ("ranks.json", "metrics.jsonl", "semantic_ids.json", "adapters/stage-1/adapter_model.safetensors"):
        assert (a / file).read_bytes() != (c / file).read_bytes(), file


def test_results_hold_what_the_design_says(runs):
    """Config, metrics and averages, references, seconds, memory; the numbers are those of the ranks beside them."""
    out, _ = runs["a"]
    result, ranks = report.load(out)
    assert set(result) == {"config", "stages", "average", "references", "seconds", "peak_memory_bytes"}
    assert list(result["stages"]) == list(result["references"]) == list(ranks) == ["1", "2", "3"]
    for t, row in result["stages"].items():
        found = ranks[t][ranks[t] > 0]
        assert row["users"] == len(ranks[t]) and row["hit@5"] == pytest.approx(int((found <= 5).sum()) / len(ranks[t]))
        gains = 1 / torch.log2(found[found <= 10] + 1.0)
        assert row["ndcg@10"] == pytest.approx(gains.sum().item() / len(ranks[t]), abs=1e-6)
    assert result["config"]["method"] == "peso" and report.load(out / "single")[0]["config"]["method"] == "single"
    config = json.loads((out / "config.json").read_text())
    assert {k: v for k, v in config.items() if k not in ("versions", "hashes")} == result["config"]
    assert config["versions"]["torch"] == importlib.metadata.version("torch") and min(result["seconds"].values()) >= 0


def test_every_user_of_every_stage_was_tested(runs):
    """As many ranks as there are users in the statistics that were printed."""
    out, printed = runs["a"]
    users = {t: int(n.replace(",", "")) for t, n in re.findall(r"^\| D(\d) \| ([\d,]+) \|", printed, re.M)}
    assert len(users) == 3 and users == {t: len(ranks) for t, ranks in report.load(out)[1].items()}


def test_what_a_run_prints(runs):
    """Every non-default value, the stages, the IDs' report, the parameters, and the table; stats.md keeps the
    stages and the IDs' report."""
    out, printed = runs["a"]
    for wanted in ("rank 2", "| D1:3 |", "semantic IDs", "level a:", "parameters", "Hit@10", "popularity",
                   "peso - single", "results.json"):
        assert wanted in printed, f"{wanted!r} is not in\n{printed}"
    for line in (out / "stats.md").read_text().splitlines():
        assert line in printed.splitlines(), line
    tensors = load_file(out / "adapters" / "stage-1" / "adapter_model.safetensors")
    size = sum(t.numel() for name, t in tensors.items() if "lora_" in name)
    assert f"{size:,} of them in the adapter" in printed


def test_metrics_jsonl(runs):
    """One JSON a line, in the order of training: the base, D_1 once, then each method's stages; every training line
    has ce, prox and their gradients' ratio; only peso is pulled."""
    lines = [json.loads(line) for line in (runs["a"][0] / "metrics.jsonl").read_text().splitlines()]
    order = list(dict.fromkeys((line["name"], line["stage"]) for line in lines))
    assert order == [("base", 0), ("LoRA", 1), ("single", 2), ("single", 3), ("peso", 2), ("peso", 3)]
    steps = [line for line in lines if "ce" in line]
    for line in steps:
        assert {"name", "stage", "epoch", "step", "steps", "ce", "prox", "prox_ce_ratio", "lr", "tokens",
                "pairs"} == set(line)
        pulled = line["name"] == "peso" and line["step"] > 1
        assert line["ce"] > 0 and (line["prox"] > 0) == (line["prox_ce_ratio"] > 0) == pulled, line
    assert {(line["name"], line["stage"]) for line in lines if "valid_ce" in line} == set(order)


def test_the_saved_adapter_reproduces_the_ranks(tmp_path):
    """Base and IDs made again from the settings, the saved adapter of the last stage put in: the same ranks."""
    run(micro(tmp_path / "run"))
    ranks = report.load(tmp_path / "run")[1]
    again = set_up(micro(tmp_path / "again"))
    before = rank_users(again, 3)
    load_peft(again.model, tmp_path / "run" / "adapters" / "stage-3")
    assert torch.equal(rank_users(again, 3), ranks["3"]) and not torch.equal(before, ranks["3"])


def test_what_can_be_recommended_at_each_stage(tmp_path, monkeypatch):
    """The ranker of stage t knows the items of D_1 .. D_t, and is asked for the test users of stage t."""
    made, asked = set_up(micro(tmp_path)), []

    class Spy:
        def __init__(self, ids, known, *rest):
            self.known = known

        def ranks(self, model, examples, *rest):
            asked.append((self.known, {e.stage for e in examples}, [e.user for e in examples]))
    monkeypatch.setattr("minipeso.runs.run.Ranker", Spy)
    for t in (1, 2, 3):
        rank_users(made, t)
    assert asked == [(made.data.known[t - 1], {t}, made.data.stages[t - 1].users) for t in (1, 2, 3)]
    assert len({len(known) for known, *_ in asked}) == 3, "every stage brought new items"


def test_the_seed_decides_adapter_and_new_rows(tmp_path):
    """Before D_1, on one checkpoint: A and the new tokens' rows are those of the seed; B is 0."""
    base = str(checkpoint(tmp_path / "llama"))
    first, again, other = (set_up(micro(tmp_path / str(i), base=base, prompt="paper", seed=seed)).model.state_dict()
                           for i, seed in enumerate((0, 0, 1)))
    drawn = {name for name in first if name.endswith((".A", ".A_prev", ".rows"))}
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert {name for name in first if not torch.equal(first[name], other[name])} == drawn
    assert not any(t.any() for name, t in first.items() if name.endswith((".B", ".B_prev")))


def test_methods_do_not_depend_on_each_other(tmp_path):
    """Alone, last of three or first of three: a method computes the same."""
    for name, method, compare in (
            ("alone", "single", ""), ("last", "single", "retrain,peso"), ("inner", "peso", "single,retrain")):
        run(micro(tmp_path / name, method=method, compare=compare))
    alone, last, inner = (fingerprint(tmp_path / name) for name in ("alone", "last", "inner"))
    for file in ("results.json", "ranks.json", "adapters/stage-3/adapter_model.safetensors"):
        assert alone[file] == last[file] == inner[f"single/{file}"], file
        assert last[f"retrain/{file}"] == inner[f"retrain/{file}"] and last[f"peso/{file}"] == inner[file], file


@pytest.mark.parametrize("recipe", ["paper", "release"])
def test_a_checkpoint_runs_to_the_table(recipe, tmp_path):
    """The way of the 1B model, with a toy in the Hub's layout: text prompt, Llama's own item vectors, no D_0."""
    cfg = micro(tmp_path / "run", base=str(checkpoint(tmp_path / "llama")), recipe=recipe, text_width=0)
    assert "peso - single" in run(cfg)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["name"] == "LoRA", "a checkpoint needs no base training"
    saved = load_file(tmp_path / "run" / "adapters" / "stage-3" / "adapter_model.safetensors")
    assert any("lm_head" in name for name in saved) == (recipe == "release")


# -- stages without users ---------------------------------------------------------------------------

D1 = {u: [(u + 3 * k) % 16 for k in range(6)] for u in range(12)}
SOME = {u: [(5 * u + k) % 16 for k in range(5)] for u in range(8, 16)}
EMPTY = {"one": [D1, {}, SOME], "the last": [D1, SOME, {}], "all": [D1, {}, {}],
         "no pairs": [D1, {1: [9], 2: [9, 8]}, SOME]}


@pytest.mark.parametrize("which", EMPTY)
def test_an_empty_later_stage_runs_through(which, tmp_path):
    """Null metrics where nobody is, numbers elsewhere; every method, the averages, the tables and --explain survive."""
    data = blocks(tmp_path / "data", EMPTY[which], [[i % 4, i // 4] for i in range(16)])
    printed = run(micro(tmp_path / "run", dataset=str(data), compare="pretrain,single,retrain", explain=True))
    result, _ = report.load(tmp_path / "run")
    users = [len(stage) for stage in EMPTY[which]]
    assert [row["users"] for row in result["stages"].values()] == users
    assert [row["hit@10"] is None for row in result["stages"].values()] == [n == 0 for n in users]
    assert [row["popularity"] is None for row in result["references"].values()] == [n == 0 for n in users]
    assert (result["average"]["D2-D3"]["hit@10"] is None) == (which == "all")
    last = max(t for t, n in enumerate(users, start=1) if n)
    assert "retrain" in printed and re.search(rf"stage +D{last}: a test pair", printed), printed


# -- real data --------------------------------------------------------------------------------------

@pytest.mark.parametrize("folder", ["electronics23", "peso_release/Video_Games_cl_0.6_0_5_3_0"])
def test_real_data_runs_to_the_table(folder, shared_data, tmp_path):
    """Raw reviews with their titles, and the authors' own blocks and IDs, the whole way to the table."""
    printed = run(micro(tmp_path, dataset=str(shared_data / folder), users=60, stages=5, levels=4, codes=256,
                        rqvae_epochs=1))
    result, _ = report.load(tmp_path)
    assert "peso" in printed and set(result["average"]) == {"D2-D4", "D2-D5"}
    assert sum(row["users"] for row in result["stages"].values()) >= 60
    ids = json.loads((tmp_path / "semantic_ids.json").read_text())
    assert len(ids) == 25_935 if "Video" in folder else len(ids) > 9_000, "the catalogue is whole"
    assert not (tmp_path / "world").exists()


# -- what fails -------------------------------------------------------------------------------------

def no_such_folder(folder: Path) -> dict:
    return dict(dataset=str(folder / "nowhere"))


def unreadable_rows(folder: Path) -> dict:
    run(micro(folder / "made"))
    with open(folder / "made" / "world" / "Demo.jsonl", "a") as file:
        file.write("{broken\n" * 20)
    return dict(dataset=str(folder / "made" / "world"))


def no_metadata(folder: Path) -> dict:
    run(micro(folder / "made"))
    (folder / "made" / "world" / "meta_Demo.jsonl").unlink()
    return dict(dataset=str(folder / "made" / "world"))


def damaged_archive(folder: Path) -> dict:
    run(micro(folder / "made"))
    world = folder / "made" / "world"
    whole = gzip.compress((world / "Demo.jsonl").read_bytes())
    (world / "Demo.jsonl").unlink()
    (world / "Demo.jsonl.gz").write_bytes(whole[:len(whole) // 2])
    return dict(dataset=str(world))


def neither_schema(folder: Path) -> dict:
    (folder / "data").mkdir()
    (folder / "data" / "notes.txt").write_text("no reviews here")
    return dict(dataset=str(folder / "data"))


def nobody_in_d1(folder: Path) -> dict:
    return dict(min_events=50)


def no_drawn_user_in_d1(folder: Path) -> dict:
    stages = [{0: [0, 1, 2]}, {u: [3, 4, 5] for u in range(1, 30)}]
    return dict(dataset=str(blocks(folder / "data", stages, [[i % 4, i // 4] for i in range(6)])), users=1)


def nothing_in_block_0(folder: Path) -> dict:
    return dict(dataset=str(blocks(folder / "data", [{}, {1: [0, 1, 2]}], [[i, i] for i in range(3)])))


def other_vocabulary(folder: Path) -> dict:
    return dict(base=str(checkpoint(folder / "llama", words=200)), prompt="paper")


def no_weights(folder: Path) -> dict:
    (checkpoint(folder / "llama") / "model.safetensors").unlink()
    return dict(base=str(folder / "llama"), prompt="paper")


def no_checkpoint(folder: Path) -> dict:
    return dict(base=str(folder / "nowhere"), prompt="paper")


def index_with_a_gap(folder: Path) -> dict:
    data = shared_ids(folder / "data")
    rows = json.loads((data / "C.index.json").read_text())
    del rows["7"]
    (data / "C.index.json").write_text(json.dumps(rows))
    return dict(dataset=str(data))


def index_too_short(folder: Path) -> dict:
    data = shared_ids(folder / "data")
    rows = json.loads((data / "C.index.json").read_text())
    (data / "C.index.json").write_text(json.dumps({k: v for k, v in rows.items() if int(k) < 15}))
    return dict(dataset=str(data))


def two_years_without_data(folder: Path) -> dict:
    return dict(years="1999-2000")


BAD = {no_such_folder: "nowhere", nothing_in_block_0: "block_0.json is empty", no_metadata: "metadata file",
       unreadable_rows: "Demo.jsonl, first on lines", damaged_archive: "Demo.jsonl.gz", neither_schema: "notes.txt", nobody_in_d1: "50 events in D1",
       no_drawn_user_in_d1: "none of 1 drawn users", other_vocabulary: "256 tokens, config.json 200",
       no_weights: "model.safetensors", no_checkpoint: "nowhere", index_with_a_gap: "item 7",
       index_too_short: "has 15 items", two_years_without_data: "2019"}


@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
def test_bad_input_ends_with_three_lines_and_code_2(make, tmp_path, capsys, monkeypatch):
    """What failed, where with the value found, what to do; exit 2; no results, and no half of a file."""
    out = tmp_path / "run"
    code, message = fails(flags(**MICRO | make(tmp_path) | dict(out=out)), capsys, monkeypatch)
    assert code == 2 and len(message) == 3 and all(message), message
    assert BAD[make] in message[1] + message[0], message
    left = [p for p in out.rglob("*") if p.is_file()]
    assert not {p.name for p in left} & {"results.json", "ranks.json"}, left
    assert not {p.suffix for p in left} & {".part", ".safetensors"}, left
    for path in left:
        if path.suffix == ".json":
            json.loads(path.read_text())


def test_a_run_that_fails_leaves_no_results(tmp_path, capsys, monkeypatch):
    """Numbers that explode: exit 4, and what an earlier run left in the folder is not taken for this one's."""
    run(micro(tmp_path / "run"))
    assert len(list((tmp_path / "run").rglob("results.json"))) == 2
    code, message = fails(flags(**MICRO | dict(out=tmp_path / "run", lr=1e30)), capsys, monkeypatch)
    assert code == 4 and "finite" in message[0] and len(message) == 3, message
    assert not list((tmp_path / "run").rglob("results.json"))
    with pytest.raises(FileNotFoundError, match="not a finished run"):
        report.load(tmp_path / "run")


def test_an_unknown_method_fails_before_anything_is_done(tmp_path, capsys, monkeypatch):
    """Also one that is only compared, and a penalty: nothing is written first."""
    for wrong in (dict(method="pesso"), dict(compare="pretrain,singel"), dict(proximal="lk")):
        code, message = fails(flags(**MICRO | wrong | dict(out=tmp_path / "run")), capsys, monkeypatch)
        assert code == 2 and ("did you mean" in message[2] or "choose" in message[2]), message
    assert not (tmp_path / "run").exists()


# -- eval.py ----------------------------------------------------------------------------------------

def evaluated(monkeypatch, capsys, *argv) -> str:
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, argv)])
    eval_script.main()
    return capsys.readouterr().out


def test_eval_prints_the_runs_own_table(runs):
    """From the shell: the three parts of the table that train.py ended with, word for word."""
    out, printed = runs["a"]
    done = shell("eval.py", "run", cwd=out.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and done.stdout.strip() in printed, done.stdout


def test_eval_writes_json_and_csv(runs, tmp_path, monkeypatch, capsys):
    """--json is the results of all methods; --csv one row a method and stage or average, the same numbers."""
    out, _ = runs["a"]
    evaluated(monkeypatch, capsys, out, "--json", tmp_path / "t.json", "--csv", tmp_path / "t.csv")
    found = json.loads((tmp_path / "t.json").read_text())
    assert found == {"single": report.load(out / "single")[0], "peso": report.load(out)[0]}
    with open(tmp_path / "t.csv") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 2 * (3 + len(found["peso"]["average"]))
    for row in table:
        numbers = (found[row["run"]]["stages"] | found[row["run"]]["average"])[row["stage"]]
        assert all(float(row[metric]) == numbers[metric] for metric in report.METRICS), row


def test_eval_of_several_runs_names_them_by_folder(runs, monkeypatch, capsys):
    """Two runs of one method are told apart; other test users cannot be compared."""
    (a, _), (b, _), (c, _) = (runs[name] for name in "abc")
    printed = evaluated(monkeypatch, capsys, a, b)
    assert f"peso {a}" in printed and f"single {b}" in printed
    users = [[row["users"] for row in report.load(out)[0]["stages"].values()] for out in (a, c)]
    assert users[0] != users[1], "the seeds' worlds are alike: the next line proves nothing"
    code, message = fails([str(a), str(c)], capsys, monkeypatch, eval_script.main)
    assert code == 2 and "other test users" in message[0] and len(message) == 3


def test_eval_of_what_is_no_run(tmp_path, capsys, monkeypatch):
    """An empty folder, a missing one, a run that failed: exit 2, three lines."""
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "nowhere"):
        code, message = fails([str(tmp_path / folder)], capsys, monkeypatch, eval_script.main)
        assert code == 2 and folder in message[0] and len(message) == 3, message


def test_plot_without_matplotlib_says_what_to_install(runs, tmp_path, capsys, monkeypatch):
    """The only feature with an extra of its own: exit 2 and the pip line, no traceback."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    code, message = fails([str(runs["a"][0]), "--plot", str(tmp_path / "f.png")], capsys, monkeypatch, eval_script.main)
    assert code == 2 and "pip install" in message[2] and not (tmp_path / "f.png").exists()
