"""The two scripts as a user starts them: what they leave behind, and how they fail."""
import csv
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import eval as eval_script
from minipeso.runs import report
from minipeso.synthetic import write_world
from tests.micro import MICRO, blocks, checkpoint, fails, fingerprint, flags, micro, run, set_up, shared_ids

ROOT = Path(__file__).parents[1]


def shell(script: str, *argv: str, cwd: Path, hash_seed: int = 0) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(hash_seed)}
    return subprocess.run([sys.executable, "-W", "error", ROOT / script, *argv], cwd=cwd, env=environment,
                          capture_output=True, text=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """{name: (folder, what was printed)}: two runs with seed 0 (and other hash seeds), one with seed 1's world."""
    made = {}
    for hash_seed, (name, seed) in enumerate([("a", 0), ("b", 0), ("c", 1)]):
        cwd = tmp_path_factory.mktemp(name)
        done = shell("train.py", *flags(**MICRO, seed=seed, data_seed=seed, out="run"), cwd=cwd, hash_seed=hash_seed)
        assert done.returncode == 0, done.stderr
        made[name] = cwd / "run", done.stdout
    return made


def test_the_run_folder_and_its_results(runs):
    """Every file there is. Config, metrics and averages, references, seconds, memory; the numbers are those of the
    ranks beside them."""
    later = [f"{name}-stage-{t}" for name in ("single", "peso") for t in (2, 3)]
    folders = {f"checkpoints/{phase}": "state.safetensors facts.json manifest.json"
               for phase in ("semantic-ids", "base", "LoRA-stage-1", *later)}
    folders |= {f"{place}adapters/stage-{t}": "adapter_config.json adapter_model.safetensors manifest.json"
                for place, t in (("", 1), ("", 2), ("", 3), ("single/", 2), ("single/", 3))}
    folders |= {".": "config.json stats.md semantic_ids.json metrics.jsonl results.json ranks.json absent.json "
                     "expected.json",
                "single": "results.json ranks.json absent.json expected.json", "world": "Demo.jsonl meta_Demo.jsonl"}
    out, _ = runs["a"]
    assert {p for p in out.rglob("*") if p.is_file()} == {
        out / folder / file for folder, files in folders.items() for file in files.split()}
    result, ranks = report.load(out)
    assert set(result) == {*"config stages average references premiums training seconds peak_memory_bytes".split()}
    assert list(result["stages"]) == list(result["references"]) == list(ranks) == ["1", "2", "3"]
    for t, row in result["stages"].items():
        hits = ((ranks[t] > 0) & (ranks[t] <= 5)).double()
        assert row["users"] == len(hits) and row["hit@5"] == pytest.approx(hits.mean().item())
    assert result["config"]["method"] == "peso" and report.load(out / "single")[0]["config"]["method"] == "single"
    config = json.loads((out / "config.json").read_text())
    assert {k: v for k, v in config.items() if k not in ("versions", "hashes")} == result["config"]
    assert config["versions"]["torch"] == torch.__version__ and min(result["seconds"].values()) >= 0


def test_the_seed_decides_every_byte(runs):
    """Two runs with one seed leave the same bytes, but for seconds and peak memory; another seed leaves others."""
    (a, printed), (b, again), (c, _) = runs.values()
    for path in (p for p in a.rglob("*") if p.is_file()):
        file = path.relative_to(a)
        if file.name == "results.json":
            measured = r'"seconds": \{[^}]*\}|"peak_memory_bytes": \d+'
            assert re.sub(measured, "", path.read_text()) == re.sub(measured, "", (b / file).read_text())
        elif "checkpoints" not in file.parts or file.suffix != ".json":  # facts.json knows seconds, a manifest its hash
            assert path.read_bytes() == (b / file).read_bytes(), file
    assert printed.splitlines()[:-1] == again.splitlines()[:-1], "what is printed, but for the last line's seconds"
    for file in ("ranks.json", "metrics.jsonl", "semantic_ids.json", "adapters/stage-1/adapter_model.safetensors"):
        assert (a / file).read_bytes() != (c / file).read_bytes(), file


def test_what_a_run_prints(runs):
    """Settings, stages, IDs, parameters, table; as many users as were tested; stats.md repeats the stages and IDs."""
    out, printed = runs["a"]
    tensors = load_file(out / "adapters" / "stage-1" / "adapter_model.safetensors")
    size = sum(t.numel() for name, t in tensors.items() if "lora_" in name)
    for wanted in ("rank 2", "| D1:3 |", "semantic IDs", "level a:", f"{size:,} of them in the adapter", "Hit@10",
                   "random", "what adapting can earn", "- single [95 %]", "results.json"):
        assert wanted in printed, f"{wanted!r} is not in\n{printed}"
    assert set((out / "stats.md").read_text().splitlines()) <= set(printed.splitlines())
    users = {t: int(n.replace(",", "")) for t, n in re.findall(r"^\| D(\d) +\| +([\d,]+) \|", printed, re.M)}
    assert len(users) == 3 and users == {t: len(ranks) for t, ranks in report.load(out)[1].items()}


def test_metrics_jsonl(runs):
    """One JSON a line, in the order of training: the base, D_1 once, then each method's stages; only peso is pulled."""
    lines = [json.loads(line) for line in (runs["a"][0] / "metrics.jsonl").read_text().splitlines()]
    order = list(dict.fromkeys((line["name"], line["stage"]) for line in lines))
    assert order == [("base", 0), ("LoRA", 1), ("single", 2), ("single", 3), ("peso", 2), ("peso", 3)]
    for line in (line for line in lines if "ce" in line):
        assert " ".join(sorted(line)) == "ce epoch lr name pairs prox prox_ce_ratio stage step steps tokens"
        pulled = line["name"] == "peso" and line["step"] > 1
        assert line["ce"] > 0 and (line["prox"] > 0) == (line["prox_ce_ratio"] > 0) == pulled, line
    assert {(line["name"], line["stage"]) for line in lines if "valid_ce" in line} == set(order)


@pytest.mark.parametrize("seen", ["exclude", "include"])
def test_what_can_be_recommended_at_each_stage(seen, tmp_path, monkeypatch):
    """The ranker of stage t knows the items of D_1 .. D_t, and is asked for its test users and, behind, absent ones;
    with what each has had, which is never the answer, or (--seen include) without."""
    made, asked = set_up(micro(tmp_path, seen=seen)), []
    monkeypatch.setattr("minipeso.runs.run.Ranker", lambda ids, known, *rest: SimpleNamespace(
        found=lambda model, test, own, **how: asked.append((known, test, own)) or torch.zeros(len(test), 10).long()))
    users = [stage.users for stage in made.stages]
    for t in (1, 2, 3):
        made.recommend(t)
        known, test, own = asked[-1]
        absent = sorted({u for some in users[:t] for u in some} - {*users[t - 1]})
        assert (known, [e.user for e in test]) == (made.known[t - 1], users[t - 1] + absent) and bool(absent) == (t > 1)
        assert len(own) == (len(test) if seen == "exclude" else 0)
        assert all(some >= {*e.history} and e.target not in some for e, some in zip(test, own))
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


D1 = {u: [(u + 3 * k) % 16 for k in range(6)] for u in range(12)}
SOME = {u: [(5 * u + k) % 16 for k in range(5)] for u in range(8, 16)}
EMPTY = {"one": [D1, {}, SOME], "the last": [D1, SOME, {}], "all": [D1, {}, {}],
         "no pairs": [D1, {1: [9], 2: [9, 8]}, SOME]}


@pytest.mark.parametrize("which", EMPTY)
def test_an_empty_later_stage_runs_through(which, tmp_path):
    """Null metrics where nobody is; the adapter stays; every method, the averages, the tables and --explain survive."""
    data = blocks(tmp_path / "data", EMPTY[which], [[i % 4, i // 4] for i in range(16)])
    printed = run(micro(tmp_path / "run", dataset=str(data), compare="pretrain,single,retrain", explain=True))
    result, _ = report.load(tmp_path / "run")
    users = [len(stage) for stage in EMPTY[which]]
    assert [row["users"] for row in result["stages"].values()] == users
    assert [row["hit@10"] is None for row in result["stages"].values()] == [n == 0 for n in users]
    assert [row["cold"] is None for row in result["references"].values()] == [n == 0 for n in users]
    assert (result["average"]["D2-D3"]["hit@10"] is None) == (which == "all")
    files = fingerprint(tmp_path / "run")
    peso, retrain = ([files[f"{place}adapters/stage-{t}/adapter_model.safetensors"] for t in (2, 3)]
                     for place in ("", "retrain/"))
    first = files["adapters/stage-1/adapter_model.safetensors"]
    assert [peso[0] == first, peso[1] == peso[0]] == [n < 3 for n in users[1:]], "nothing to learn from"
    assert first not in retrain, "it learns from the others"
    last = max(t for t, n in enumerate(users, start=1) if n)
    assert "retrain" in printed and re.search(rf"stage +D{last}: a test pair", printed), printed


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


def changed(folder: Path, name: str, how=None) -> Path:
    """The folder, after `how` has rewritten the bytes of one of its files; without it the file is deleted."""
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(how(data)) if how else (folder / name).unlink()
    return folder


def damaged_archive(folder: Path) -> Path:
    whole = gzip.compress((write_world(folder / "world", 60, 60) / "Demo.jsonl").read_bytes())
    (folder / "world" / "Demo.jsonl.gz").write_bytes(whole[:len(whole) // 2])
    return changed(folder / "world", "Demo.jsonl")


D1_OF_ONE = [{0: [0, 1, 2]}, {u: [3, 4, 5] for u in range(1, 30)}]
BAD = {  # what the message names: the settings, whose files are made in a folder
    "nowhere": lambda f: dict(dataset=f / "nowhere"),
    "block_0.json is empty": lambda f: dict(dataset=blocks(f / "data", [{}, {1: [0, 1]}], [[i, i] for i in range(2)])),
    "metadata file": lambda f: dict(dataset=changed(write_world(f / "world", 60, 60), "meta_Demo.jsonl")),
    "Demo.jsonl, first on lines": lambda f: dict(dataset=changed(
        write_world(f / "world", 60, 60), "Demo.jsonl", lambda data: data + b"{broken\n" * 20)),
    "Demo.jsonl.gz": lambda f: dict(dataset=damaged_archive(f)),
    "tokenizer.json": lambda f: dict(dataset=checkpoint(f / "neither")),
    "50 events in D1": lambda f: dict(min_events=50),
    "none of 1 drawn users": lambda f: dict(users=1, dataset=blocks(f / "data", D1_OF_ONE, [[i, i] for i in range(6)])),
    "256 tokens, config.json 200": lambda f: dict(base=checkpoint(f / "llama", words=200), prompt="paper"),
    "model.safetensors": lambda f: dict(base=changed(checkpoint(f / "llama"), "model.safetensors"), prompt="paper"),
    "no tokenizer": lambda f: dict(base=changed(checkpoint(f / "llama"), "tokenizer.json", lambda data: b"{"),
                                   prompt="paper"),
    "tokenizer.json is no tokenizer": lambda f: dict(base=changed(checkpoint(f / "llama"), "tokenizer.json"),
                                                     prompt="paper"),
    "nowhere/llama": lambda f: dict(base=f / "nowhere" / "llama", prompt="paper"),
    "2019": lambda f: dict(years="1999-2000"),
    "oracle knows the data set demo": lambda f: dict(dataset=shared_ids(f / "data"), compare="oracle"),
}


@pytest.mark.parametrize("named", BAD)
def test_bad_input_ends_with_three_lines_and_code_2(named, tmp_path, capsys, monkeypatch):
    """What failed, where with the value found, what to do; exit 2; no results, and no half of a file."""
    out = tmp_path / "run"
    code, message = fails(flags(**MICRO | BAD[named](tmp_path) | dict(out=out)), capsys, monkeypatch)
    assert code == 2 and len(message) == 3 and all(message) and named in message[1] + message[0], message
    left = [p for p in out.rglob("*") if p.is_file()]
    never = ("results.json", "ranks.json", ".part", ".safetensors")
    assert not [p for p in left if p.name in never or p.suffix in never]
    assert all(json.loads(p.read_text()) for p in left if p.suffix == ".json")


def evaluated(monkeypatch, capsys, *argv) -> str:
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, argv)])
    eval_script.main()
    return capsys.readouterr().out


def test_eval_prints_the_runs_own_table_and_writes_json_and_csv(runs, tmp_path):
    """From the shell: the three parts of the table that train.py ended with, word for word. --json is the results of
    all methods; --csv one row a method and stage or average, the same numbers."""
    out, printed = runs["a"]
    done = shell("eval.py", "run", "--json", tmp_path / "t.json", "--csv", tmp_path / "t.csv", cwd=out.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and done.stdout.strip() in printed, done.stdout
    results = json.loads((tmp_path / "t.json").read_text())
    assert results == {"single": report.load(out / "single")[0], "peso": report.load(out)[0]}
    with open(tmp_path / "t.csv") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 2 * (3 + len(results["peso"]["average"]))
    for row in table:
        numbers = (results[row["run"]]["stages"] | results[row["run"]]["average"])[row["stage"]]
        assert all(float(row[metric]) == numbers[metric] for metric in report.METRICS), row


def test_eval_of_several_runs_names_them_by_folder(runs, monkeypatch, capsys):
    """Two runs of one method are told apart; other test users cannot be compared."""
    a, b, c = (out for out, _ in runs.values())
    printed = evaluated(monkeypatch, capsys, a, b)
    assert f"peso {a}" in printed and f"single {b}" in printed
    users = [[row["users"] for row in report.load(out)[0]["stages"].values()] for out in (a, c)]
    assert users[0] != users[1], "the seeds' worlds are alike: the next line proves nothing"
    code, message = fails([str(a), str(c)], capsys, monkeypatch, eval_script.main)
    assert code == 2 and "other test users" in message[0] and len(message) == 3


def test_eval_writes_a_page_that_needs_nothing(runs, tmp_path, monkeypatch, capsys):
    """Whole HTML without scripts or addresses; a module's movement by hand; users away; a run without adapters."""
    out = shutil.copytree(runs["a"][0], tmp_path / "run")
    evaluated(monkeypatch, capsys, out, "--report", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"<script|://|src=|href=|[$]", page) and page.count("<h3>User") == 5 == page.count("Took then")
    for tag in ("table", "tr", "td", "figure", "svg", "details", "div", "pre"):
        assert re.findall(rf"<{tag}\b", page) and len(re.findall(rf"<{tag}\b", page)) == page.count(f"</{tag}>"), tag
    v = [load_file(out / f"adapters/stage-{t}/adapter_model.safetensors") for t in (1, 2)]
    key = next(key for key in v[0] if "lora_A" in key)
    before, after = (some[key.replace("lora_A", "lora_B")] @ some[key] for some in v)
    assert f">{((after - before).norm() / before.norm()).item():.3f}</td>" in page and "U_I NDCG@10" in page
    shutil.rmtree(out / "adapters")
    evaluated(monkeypatch, capsys, out, "--report", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "No adapter of two stages" in page and "No model to ask" in page and "<polyline" in page
