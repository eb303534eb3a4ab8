"""Downloads, by the real huggingface_hub client against a Hub on loopback: the README's command from an empty cache,
again offline, and every way in which it can fail."""
from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from minipeso.files.download import PINNED, REVIEWS, HubError, fetch_checkpoint, fetch_reviews, verify
from minipeso.synthetic import write_world
from minipeso.tokens import QUESTIONS, Template
from tests.loopback import Hub
from tests.micro import llama_checkpoint

ROOT = Path(__file__).parents[1]
BASE = "meta-llama/Llama-3.2-1B"
SECRET = "hf_" + "s3cr3t" * 5
CUT = ["--levels", "2", "--codes", "8", "--latent", "4", "--rqvae-hidden", "16", "--rqvae-epochs", "2", "--rank", "2", "--epochs", "1",
       "--batch", "16", "--threads", "1", "--compare", "single", "--stages", "3"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A toy Llama under the official name, and a CSV with its metadata under the data set's."""
    root = tmp_path_factory.mktemp("hub")
    world = write_world(root / "world", 90, 60, 0.5, 0)
    folder, data = root / BASE, root / "datasets" / REVIEWS
    llama_checkpoint(folder, [*QUESTIONS.values(), *(p.read_text() for p in world.glob("meta_*.jsonl"))])
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"not to be fetched")
    for part in ("benchmark/0core/rating_only", "raw/meta_categories"):
        (data / part).mkdir(parents=True)
    rows = [json.loads(line) for path in world.iterdir() if not path.name.startswith("meta_")
            for line in path.read_text().splitlines()]
    with open(data / "benchmark/0core/rating_only/Musical_Instruments.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["user_id", "parent_asin", "rating", "timestamp"])
        table.writerows([r["user_id"], r["parent_asin"], r["rating"], r["timestamp"]] for r in rows)
    (data / "raw/meta_categories/meta_Musical_Instruments.jsonl").write_text(
        "".join(p.read_text() for p in world.glob("meta_*.jsonl")))
    made = Hub(root)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def healthy(hub):
    hub.fault.clear()
    hub.requests.clear()
    hub.headers.clear()
    hub.token = None


def command(hub: Hub, cache: Path, out: Path, *more: str, **env: str) -> subprocess.CompletedProcess:
    """python train.py --dataset instruments --lambda 2.0, cut to a minute's hundredth."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    line = [sys.executable, str(ROOT / "train.py"), "--dataset", "instruments", "--lambda", "2.0", *CUT, "--out", str(out), *more]
    return subprocess.run(line, cwd=cache.parent, capture_output=True, text=True, timeout=120, env=clean | {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1"} | env)


def failed(done: subprocess.CompletedProcess, *words: str) -> None:
    """Exit 5, three lines, these words, no traceback and no token."""
    error = done.stderr[done.stderr.rfind("error: "):].strip().splitlines()
    assert done.returncode == 5 and len(error) == 3 and "Traceback" not in done.stderr, done.stderr
    assert all(word in "\n".join(error) for word in words), error
    assert SECRET not in done.stderr + done.stdout


@pytest.fixture(scope="module")
def first(hub, tmp_path_factory):
    """(cache, run folder, what was printed) of the README's command from an empty cache."""
    home = tmp_path_factory.mktemp("home")
    hub.fault, hub.token = {"config.json": "gated"}, SECRET
    done = command(hub, home / "cache", home / "run", HF_TOKEN=SECRET)
    assert done.returncode == 0, done.stderr
    return home / "cache", home / "run", done, list(hub.requests)


def test_the_readmes_command_from_an_empty_cache_to_the_results_table(first):
    """Weights, tokenizer, ratings and metadata arrive at their pinned revisions; nothing else is asked for; the run ends
    with the table; the token is nowhere in what it prints or leaves."""
    _, out, done, requests = first
    assert "| peso" in done.stdout and (out / "results.json").is_file()
    wanted = {"config.json", "tokenizer.json", "model.safetensors", "Musical_Instruments.csv", "meta_Musical_Instruments.jsonl"}
    assert {line.rpartition("/")[2] for line in requests} == wanted
    for line in requests:
        if "/resolve/" in line and "cdn/" not in line:
            repo = BASE if BASE in line else REVIEWS
            assert f"/resolve/{PINNED[repo]}/" in line, line
    left = [p for p in out.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]
    assert SECRET not in done.stdout + done.stderr and not left


def test_again_offline_from_the_full_cache(hub, first, tmp_path):
    """HF_HUB_OFFLINE, and without it: no request is made, and every file of the run has the same bytes."""
    cache, out, *_ = first
    for k, offline in enumerate(({"HF_HUB_OFFLINE": "1"}, {})):
        done = command(hub, cache, tmp_path / f"run{k}", **offline)
        assert done.returncode == 0 and not hub.requests, (done.stderr, hub.requests)
        for name in ("semantic_ids.json", "ranks.json", "adapters/stage-3/adapter_model.safetensors"):
            assert (tmp_path / f"run{k}" / name).read_bytes() == (out / name).read_bytes(), name


def test_a_blob_may_lie_in_a_shared_store(tmp_path):
    """huggingface_hub 2 keeps Xet files once for all repositories: blobs/<sha256> is then a link to a file named by
    another hash. What counts is the name of the first link, and a damaged file is still found."""
    data = b"weights"
    sha, store = hashlib.sha256(data).hexdigest(), tmp_path / "blobs" / "ab" / ("ab" * 32)
    store.parent.mkdir(parents=True)
    store.write_bytes(data)
    repo = tmp_path / "models--owner--name"
    (repo / "blobs").mkdir(parents=True)
    (repo / "blobs" / sha).symlink_to(f"../../blobs/ab/{store.name}")
    file = repo / "snapshots" / ("c" * 40) / "model.safetensors"
    file.parent.mkdir(parents=True)
    file.symlink_to(f"../../blobs/{sha}")
    verify(file, "owner/name", file.name)
    assert sha in (repo / "minipeso-verified.json").read_text()
    store.write_bytes(b"weighty")
    with pytest.raises(HubError, match="damaged") as error:
        verify(file, "owner/name", file.name)
    assert str(store) in str(error.value)


def test_a_closed_gate_is_known_before_the_data_is_fetched(hub, tmp_path):
    """Nobody waits for a gigabyte of reviews to be told that there is no token."""
    hub.fault = {"config.json": "gated"}
    failed(command(hub, tmp_path / "cache", tmp_path / "run"), "gated")
    assert not [r for r in hub.requests if "Musical_Instruments" in r], hub.requests


def test_a_cache_that_cannot_be_written(hub, tmp_path):
    """The disk's fault is told as such, not as the network's."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "hub").write_text("a file in the cache's place")
    failed(command(hub, tmp_path / "cache", tmp_path / "run"), "cannot be stored", "HF_HOME")


@pytest.mark.parametrize("fault, token, words", [
    ({"config.json": "gated"}, None, ("gated", "no token was sent", "401", "unsloth/Llama-3.2-1B", "hf auth login")),
    ({"config.json": "gated"}, SECRET, ("gated", "not valid", "401")),
    ({"config.json": "forbidden"}, SECRET, ("gated", "not been given access", "403", "accept the licence")),
    ({"config.json": 401}, SECRET, ("HTTP 401", "not valid")),
    ({"config.json": "revision"}, None, ("no such revision",)),
    ({"tokenizer.json": 429}, None, ("HTTP 429", "too many requests")),
    ({"config.json": 500}, None, ("HTTP 500", "try again later")),
    ({"Musical_Instruments.csv": "late"}, None, ("Musical_Instruments.csv", "HTTP 500", "try again later")),
    ({"config.json": "mute"}, None, ("connection to the Hub failed", "imed out", "same command again")),
    ({"model.safetensors": "cut"}, None, ("connection to the Hub failed", "model.safetensors", "what is there stays")),
    ({"model.safetensors": "damaged"}, None, ("model.safetensors is damaged", "delete", "with the hash")),
    ({"tokenizer.json": "damaged"}, None, ("tokenizer.json is damaged", "delete", "with the hash"))],
    ids=["gated", "bad token at the gate", "no access", "wrong token", "revision", "429", "500", "500 in the body", "no answer",
         "cut", "damaged", "damaged small file"])
def test_what_stands_in_the_way_is_said(hub, tmp_path, fault, token, words):
    """Each in its own three lines with exit 5, in seconds; the ungated copy is named at the gate."""
    hub.fault = fault
    began = time.monotonic()
    failed(command(hub, tmp_path / "cache", tmp_path / "run", **({"HF_TOKEN": token} if token else {})), *words)
    waits = fault == {"tokenizer.json": 429} and huggingface_hub.__version__ < "2"  # an older client does, when asked to
    assert time.monotonic() - began < (40 if waits else 20)
    asked = [line for line in hub.requests if line.startswith("HEAD") and line.endswith(next(iter(fault)))]
    assert len(asked) <= 4 or waits, "silent retries"


def test_a_file_that_is_damaged_later_is_told(first, tmp_path, monkeypatch):
    """Whatever was verified is looked at again when its size or time is another; a record that cannot be read is none."""
    cache = tmp_path / "cache"
    shutil.copytree(first[0], cache, symlinks=True)
    for record in cache.rglob("minipeso-verified.json"):
        record.write_text("[1, {")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fetch_checkpoint(BASE), fetch_reviews("Musical_Instruments")
    for name in ("model.safetensors", "tokenizer.json", "Musical_Instruments.csv"):
        blob = next(cache.rglob(name)).resolve()
        whole = blob.read_bytes()
        blob.write_bytes(whole[:-100])
        with pytest.raises(HubError) as error:
            fetch_checkpoint(BASE), fetch_reviews("Musical_Instruments")
        text = str(error.value)
        assert f"{name} is damaged" in text and f"{len(whole) - 100:,} bytes" in text and str(blob) in text, text
        blob.write_bytes(whole)
    fetch_checkpoint(BASE), fetch_reviews("Musical_Instruments")


def test_a_connection_that_breaks_off_is_taken_up_where_it_broke(hub, tmp_path):
    """Of a file in pieces the pieces that came are kept: the second request, of the client or (before huggingface_hub 1)
    of the same command again, asks for the rest, and the hash is the whole's."""
    repo = hub.root / "owner" / "large"
    repo.mkdir(parents=True)
    (repo / "model.safetensors").write_bytes(os.urandom(1 << 20) * 25)
    hub.fault = {"model.safetensors": "cut once"}
    code = ["from minipeso.runs.guard import guard", "from minipeso.files.download import fetch",
            "guard(lambda: fetch('owner/large', ['model.safetensors']))"]
    done = python(hub, tmp_path, *code)
    if done.returncode == 5 and "same command again" in done.stderr:
        done = python(hub, tmp_path, *code)
    assert done.returncode == 0, done.stderr
    gets = [headers for line, headers in zip(hub.requests, hub.headers) if line.startswith("GET")]
    starts = [int(headers.get("Range", "bytes=0-")[6:].split("-")[0]) for headers in gets]
    assert len(starts) == 2 and starts[0] == 0 and starts[1] >= 10 * (1 << 20), starts


def test_main_that_moves_while_it_is_downloaded_is_told(hub, tmp_path, monkeypatch):
    """Without a pinned revision the files of one call must be of one commit."""
    (hub.root / "owner" / "moving").mkdir(parents=True)
    for name in ("a.json", "b.json"):
        (hub.root / "owner" / "moving" / name).write_text(name)
    code = ["import huggingface_hub, urllib.request", "from minipeso.runs.guard import guard", "from minipeso import download",
            "real = huggingface_hub.hf_hub_download",
            "def moves(filename, **where):",
            "    if filename == 'b.json' and not where.get('local_files_only'):",
            "        urllib.request.urlopen(download.constants.ENDPOINT + '/move')",
            "    return real(filename=filename, **where)",
            "huggingface_hub.hf_hub_download = moves",
            "guard(lambda: download.fetch('owner/moving', ['a.json', 'b.json']))"]
    failed(python(hub, tmp_path, *code), "changed on the Hub", "a.json", "same command again")
    assert python(hub, tmp_path, *code).returncode == 0


def test_a_missing_file_and_a_missing_repository(hub, tmp_path):
    """Names that the Hub does not have, of a category and of a base."""
    failed(command(hub, tmp_path / "cache", tmp_path / "run", "--dataset", "Musical_Instrumentz"), "no file", "Instrumentz")
    failed(command(hub, tmp_path / "cache", tmp_path / "run", "--base", "nobody/nothing"), "no model nobody/nothing")


def test_no_network(hub, tmp_path):
    """Nothing cached and nobody answers, or offline: said at once, with the files' names, before anything is computed."""
    began = time.monotonic()
    failed(command(hub, tmp_path / "cache", tmp_path / "run", HF_ENDPOINT="http://127.0.0.1:9"), "connection to the Hub failed",
           "config.json")
    assert time.monotonic() - began < 15
    failed(command(hub, tmp_path / "cache", tmp_path / "run", HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE", "not in the cache")
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_partial_cache_offline_names_what_is_missing(hub, first, tmp_path):
    """One file of five gone: offline it is named; online it alone is fetched."""
    cache = tmp_path / "cache"
    subprocess.run(["cp", "-r", str(first[0]), str(cache)], check=True)
    next(cache.rglob("meta_Musical_Instruments.jsonl")).unlink()
    failed(command(hub, cache, tmp_path / "run", HF_HUB_OFFLINE="1"), "meta_Musical_Instruments.jsonl", "not in the cache")
    assert command(hub, cache, tmp_path / "run").returncode == 0
    assert {line.rpartition("/")[2] for line in hub.requests} == {"meta_Musical_Instruments.jsonl"}


def test_too_little_disk_is_known_before_the_download(hub, tmp_path, monkeypatch):
    """Sizes are asked first: nothing is downloaded into a full disk."""
    code = ("import shutil, collections, sys; U = collections.namedtuple('U', 'total used free')\n"
            "shutil.disk_usage = lambda path: U(10, 9, 1)\n"
            "from minipeso.runs.guard import guard; from minipeso.files.download import fetch_reviews\n"
            "guard(lambda: fetch_reviews('Musical_Instruments'))")
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1"}
    failed(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env), "too little disk", "1 are free")
    assert all(line.startswith("HEAD") for line in hub.requests), hub.requests


def test_the_ungated_copy_and_other_categories(hub, tmp_path):
    """--base with any repository's name, and any category by its own name: the same files under other names."""
    for old, new in ((hub.root / BASE, hub.root / "unsloth/Llama-3.2-1B"),):
        new.parent.mkdir(exist_ok=True)
        subprocess.run(["cp", "-r", str(old), str(new)], check=True)
    data = hub.root / "datasets" / REVIEWS
    for part, prefix, end in (("benchmark/0core/rating_only", "", ".csv"), ("raw/meta_categories", "meta_", ".jsonl")):
        (data / part / f"{prefix}Digital_Music{end}").write_bytes((data / part / f"{prefix}Musical_Instruments{end}").read_bytes())
    done = command(hub, tmp_path / "cache", tmp_path / "run", "--dataset", "Digital_Music", "--base", "unsloth/Llama-3.2-1B")
    assert done.returncode == 0 and "| peso" in done.stdout, done.stderr


def python(hub: Hub, cache: Path, *code: str, **env: str) -> subprocess.CompletedProcess:
    """Some lines of code in a fresh interpreter with this Hub and cache."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    return subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, timeout=60, env=clean | {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1"} | env)


def test_a_checkpoint_in_shards(hub, tmp_path):
    """Without model.safetensors the index says what to fetch; from the full cache no request is made, so that it
    loads offline too. A broken index is told by its reader, and a strange name in it is never asked for."""
    repo = hub.root / "meta-llama" / "Llama-3.2-3B"
    shutil.copytree(hub.root / BASE, repo)
    tensors, places = load_file(repo / "model.safetensors"), {}
    (repo / "model.safetensors").unlink()
    for i in (1, 2):
        places |= dict.fromkeys(sorted(tensors)[i - 1::2], f"model-{i:05}-of-00002.safetensors")
        save_file({key: tensors[key] for key in sorted(tensors)[i - 1::2]}, repo / f"model-{i:05}-of-00002.safetensors")
    index = repo / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    code = ["from minipeso.runs.guard import guard", "from minipeso.files.hub import load_llama",
            "guard(lambda: load_llama('meta-llama/Llama-3.2-3B'))"]
    assert python(hub, tmp_path / "cache", *code).returncode == 0
    asked = {line.rpartition("/")[2] for line in hub.requests}
    assert asked == {"config.json", "tokenizer.json", "model.safetensors", index.name, *places.values()}
    for offline in ({"HF_HUB_OFFLINE": "1"}, {}):
        hub.requests.clear()
        done = python(hub, tmp_path / "cache", *code, **offline)
        assert done.returncode == 0 and not hub.requests, (done.stderr, hub.requests)
    for k, text in enumerate((json.dumps({"weight_map": places | {"x": "../../datasets/secret"}}), "<html>")):
        index.write_text(text)
        done = python(hub, tmp_path / f"cache{k}", *code)
        assert done.returncode == 2 and index.name in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert not [line for line in hub.requests if "secret" in line]


@pytest.mark.parametrize("dataset, base", [("Video_Games", BASE), ("instruments", "unsloth/Llama-3.2-1B")])
def test_dry_run_asks_nobody(hub, tmp_path, dataset, base):
    """--dry-run of data and base that are not here: files and parameters, no request, nothing written, exit 0."""
    done = command(hub, tmp_path / "cache", tmp_path / "run", "--dataset", dataset, "--base", base, "--dry-run")
    assert done.returncode == 0 and f"{REVIEWS}  raw/meta_categories/meta_" in done.stdout, done.stderr
    assert done.stdout.count("  to fetch") == 5
    assert "parameters: " in done.stdout and not hub.requests and not list(tmp_path.iterdir())


def test_dry_run_of_a_cached_base_has_its_shape(hub, first):
    """The config.json in the cache counts, not what is known of Llama-3.2-1B; neither a request nor weights are needed."""
    done = command(hub, first[0], first[0].parent / "never", "--dry-run")
    total = sum(t.numel() for t in load_file(hub.root / BASE / "model.safetensors").values())
    found = int(re.search(r"parameters: ([\d,]+); adapter ([\d,]+)", done.stdout)[1].replace(",", ""))
    assert "to fetch" not in done.stdout and "Table 4" not in done.stdout and "| D1 | " in done.stdout, done.stdout
    assert total < found < 2 * total and not hub.requests and not (first[0].parent / "never").exists()


def test_code_tokens_behind_a_bpe_vocabulary(hub):
    """The prompt's pieces are encoded apart: every code is one token behind the vocabulary, adjacent codes included, and
    the words decode to the template's own text."""
    tokenizer = Tokenizer.from_file(str(hub.root / BASE / "tokenizer.json"))
    codes = [[0, 7], [3, 3], [7, 0]]
    template = Template.text(tokenizer, "paper", False, codes, 8)
    ids = template.prompt([0, 2, 1]).tolist()
    V = tokenizer.get_vocab_size()
    assert [i - V for i in ids if i >= V] == [0, 15, 7, 8, 3, 11]
    words = tokenizer.decode([i for i in ids if i < V])
    assert words == QUESTIONS["paper"].replace("{items}", ", , ")
