"""Downloads, by the real huggingface_hub client against a Hub on loopback: the README's command from an empty cache,
again offline, and every way in which it can fail."""
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from safetensors.torch import load_file

from minipeso.files.download import PINNED, REVIEWS, HubError, content_hash, fetch, fetch_checkpoint, reviews_files
from minipeso.files.hub import load_llama
from minipeso.synthetic import write_world
from minipeso.tokens import QUESTIONS
from tests.loopback import Hub
from tests.micro import llama_checkpoint
from tests.test_hub import write

ROOT = Path(__file__).parents[1]
BASE, CATEGORY = "meta-llama/Llama-3.2-1B", "Musical_Instruments"
SECRET = "hf_" + "s3cr3t" * 5
CUT = ("--levels 2 --codes 8 --latent 4 --rqvae-hidden 16 --rqvae-epochs 2 --rank 2 --epochs 1 --batch 16 --threads 1 "
       "--compare single --stages 3").split()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A toy Llama under the official name, and a CSV with its metadata under the data set's."""
    root = tmp_path_factory.mktemp("hub")
    world = write_world(root / "world", 90, 60, 0.5, 0)
    folder, data = root / BASE, root / "datasets" / REVIEWS
    llama_checkpoint(folder, [*QUESTIONS.values(), (world / "meta_Demo.jsonl").read_text()])
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"not to be fetched")
    ratings, items = (data / part for part in ("benchmark/0core/rating_only", "raw/meta_categories"))
    for part in (ratings, items):
        part.mkdir(parents=True)
    columns = ["user_id", "parent_asin", "rating", "timestamp"]
    lines = (world / "Demo.jsonl").read_text().splitlines()
    records = ([str(json.loads(line)[column]) for column in columns] for line in lines)
    (ratings / f"{CATEGORY}.csv").write_text("".join(",".join(fields) + "\n" for fields in (columns, *records)))
    shutil.copyfile(world / "meta_Demo.jsonl", items / f"meta_{CATEGORY}.jsonl")
    made = Hub(root)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def cache(hub, tmp_path, monkeypatch) -> Path:
    """A healthy Hub, asked by this process, with an empty cache and no token."""
    hub.fault, hub.token, hub.headers = {}, None, []
    hub.requests.clear()
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    address = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in (("ENDPOINT", hub.url), ("HUGGINGFACE_CO_URL_TEMPLATE", address), ("HF_HUB_OFFLINE", False),
                        ("HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))):
        monkeypatch.setattr(constants, name, value)
    return tmp_path / "cache"


def all_files(base: str = BASE, category: str = CATEGORY) -> None:
    fetch_checkpoint(base)
    fetch(REVIEWS, reviews_files(category), "dataset")


def refused(*words: str, **names: str) -> None:
    """HubError in three lines, with these words and no token."""
    with pytest.raises(HubError) as error:
        all_files(**names)
    text = str(error.value)
    assert len(text.splitlines()) == 3 and all(word in text for word in words) and SECRET not in text, text


def command(hub: Hub, cache: Path, out: Path, *more: str, **env: str) -> subprocess.CompletedProcess:
    """python train.py --dataset instruments --lambda 2.0, cut to a minute's hundredth."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    line = [sys.executable, str(ROOT / "train.py"), *"--dataset instruments --lambda 2.0 --out".split(), str(out), *CUT]
    return subprocess.run([*line, *more], cwd=cache.parent, capture_output=True, text=True, timeout=240, env=clean | {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1"} | env)


def asked(hub: Hub) -> set[str]:
    """The names of the files that were asked for."""
    return {line.rpartition("/")[2] for line in hub.requests}


@pytest.fixture(scope="module")
def first(hub, tmp_path_factory):
    """(cache, run folder, what was printed, requests, files asked for) of the README's command from an empty cache."""
    home = tmp_path_factory.mktemp("home")
    hub.fault, hub.token = {"config.json": "gated"}, SECRET
    done = command(hub, home / "cache", home / "run", HF_TOKEN=SECRET)
    assert done.returncode == 0, done.stderr
    return home / "cache", home / "run", done, list(hub.requests), asked(hub)


def test_the_readmes_command_from_an_empty_cache_to_the_results_table(first):
    """Weights, tokenizer, ratings and metadata arrive at their pinned revisions; nothing else is asked for; the run
    ends with the table; the token is nowhere in what it prints or leaves."""
    _, out, done, requests, names = first
    assert "| peso" in done.stdout and (out / "results.json").is_file()
    assert names == {"config.json", "tokenizer.json", "model.safetensors", f"{CATEGORY}.csv", f"meta_{CATEGORY}.jsonl"}
    for line in requests:
        if "/resolve/" in line and "cdn/" not in line:
            assert f"/resolve/{PINNED[BASE if BASE in line else REVIEWS]}/" in line, line
    assert SECRET not in done.stdout + done.stderr
    assert not [p for p in out.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]


def test_again_offline_from_the_full_cache(hub, first, tmp_path):
    """HF_HUB_OFFLINE, and without it: no request is made, and every file of the run has the same bytes."""
    cache, out, *_ = first
    for k, offline in enumerate(({"HF_HUB_OFFLINE": "1"}, {})):
        done = command(hub, cache, tmp_path / f"run{k}", **offline)
        assert done.returncode == 0 and not hub.requests, (done.stderr, hub.requests)
        for name in ("semantic_ids.json", "ranks.json", "adapters/stage-3/adapter_model.safetensors"):
            assert (tmp_path / f"run{k}" / name).read_bytes() == (out / name).read_bytes(), name


def test_a_blob_may_lie_in_a_shared_store(tmp_path):
    """huggingface_hub 2's blobs/<sha256> may be a link to a file of another hash's name: the first link's counts."""
    sha, store = hashlib.sha256(b"weights").hexdigest(), tmp_path / "blobs/ab" / ("ab" * 32)
    blob, file = tmp_path / "repo/blobs" / sha, tmp_path / "repo/snapshots" / ("c" * 40) / "model.safetensors"
    for path in (store, blob, file):
        path.parent.mkdir(parents=True)
    store.write_bytes(b"weights")
    blob.symlink_to(f"../../blobs/ab/{store.name}")
    file.symlink_to(f"../../blobs/{sha}")
    assert content_hash(file) == sha == content_hash(store)


def test_a_closed_gate_is_known_before_the_data_is_fetched(hub, tmp_path):
    """Exit 5 in three lines; nobody waits for a gigabyte of reviews to be told that there is no token."""
    hub.fault = {"config.json": "gated"}
    done = command(hub, tmp_path / "cache", tmp_path / "run", HF_TOKEN=SECRET)
    error = done.stderr[done.stderr.rfind("error: "):].strip().splitlines()
    assert done.returncode == 5 and len(error) == 3 and "gated" in error[0], done.stderr
    assert not any(word in done.stderr + done.stdout for word in ("Traceback", SECRET))
    assert not [r for r in hub.requests if CATEGORY in r], hub.requests


@pytest.mark.parametrize("file, fault, token, words", [
    ("config.json", "gated", "", ("gated", "no token was sent", "401", "unsloth/Llama-3.2-1B", "hf auth login")),
    ("config.json", "gated", SECRET, ("gated", "not valid", "401")),
    ("config.json", "forbidden", SECRET, ("gated", "not been given access", "403", "accept the licence")),
    ("config.json", 401, SECRET, ("HTTP 401", "not valid")), ("config.json", "revision", "", ("no such revision",)),
    ("tokenizer.json", 429, "", ("HTTP 429", "many requests")), ("config.json", 500, "", ("HTTP 500", "again later")),
    ("Musical_Instruments.csv", "late", "", ("Musical_Instruments.csv", "HTTP 500", "try again later")),
    ("config.json", "mute", "", ("connection to the Hub failed", "imed out", "same command again")),
    ("model.safetensors", "cut", "", ("connection to the Hub failed", "model.safetensors", "what is there stays"))])
def test_what_stands_in_the_way_is_said(hub, monkeypatch, file, fault, token, words):
    """Each in its own three lines, in seconds; the ungated copy is named at the gate."""
    hub.fault = {file: fault}
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    began, waits = time.monotonic(), fault == 429 and huggingface_hub.__version__ < "2"  # if asked to, an older client
    refused(*words)
    assert time.monotonic() - began < (40 if waits else 20)
    assert sum(line.startswith("HEAD") and line.endswith(file) for line in hub.requests) <= 4 or waits, "silent retries"


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors"])
def test_a_damaged_download_is_told_and_does_not_stay(hub, cache, name):
    """A small and a large file with one bit flipped on the way: held against their hashes, deleted, fetched anew."""
    hub.fault = {name: "damaged"}
    refused(f"{name} is damaged", "with the hash", "run the same command again")
    assert not list((cache / "hub").rglob(name))
    hub.fault.clear()
    all_files()
    assert next((cache / "hub").rglob(name)).read_bytes() == (hub.root / BASE / name).read_bytes()


def test_a_connection_that_breaks_off_is_taken_up_where_it_broke(hub):
    """The pieces that came are kept: the second request, of the client or (before huggingface_hub 1) of the same call
    again, asks for the rest, and the hash is the whole's."""
    repo = hub.root / "owner" / "large"
    repo.mkdir(parents=True)
    (repo / "model.safetensors").write_bytes(os.urandom(1 << 20) * 25)
    hub.fault = {"model.safetensors": "cut once"}
    try:
        fetch("owner/large", ["model.safetensors"])
    except HubError as error:
        assert "same command again" in str(error)
        fetch("owner/large", ["model.safetensors"])
    starts = [int(headers.get("Range", "bytes=0-")[6:].split("-")[0])
              for line, headers in zip(hub.requests, hub.headers) if line.startswith("GET")]
    assert len(starts) == 2 and starts[0] == 0 and starts[1] >= 10 * (1 << 20), starts


def test_what_the_hub_does_not_have(monkeypatch):
    """A file, a repository, and, offline or without a network, anything at all."""
    refused("no file", "Instrumentz", category="Musical_Instrumentz")
    refused("nobody/nothing is no model", base="nobody/nothing")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    refused("connection to the Hub failed", "config.json", base="unsloth/Llama-3.2-3B")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("HF_HUB_OFFLINE", "not in the cache", base="unsloth/Llama-3.2-3B")


def test_the_disks_faults(hub, cache, monkeypatch):
    """A cache that cannot be written is not the network's fault; nothing is downloaded into a full disk."""
    cache.mkdir()
    (cache / "hub").write_text("a file in the cache's place")
    refused("cannot be stored", "HF_HOME")
    (cache / "hub").unlink()
    hub.requests.clear()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    refused("too little disk", "1 are free")
    assert all(line.startswith("HEAD") for line in hub.requests), hub.requests


def test_the_ungated_copy_and_other_categories(hub):
    """Any repository's name, and any category by its own name: the same files under other names."""
    shutil.copytree(hub.root / BASE, hub.root / "unsloth/Llama-3.2-1B")
    for file in list((hub.root / "datasets" / REVIEWS).rglob(f"*{CATEGORY}*")):
        shutil.copyfile(file, file.with_name(file.name.replace(CATEGORY, "Digital_Music")))
    all_files("unsloth/Llama-3.2-1B", "Digital_Music")
    assert not [line for line in hub.requests if CATEGORY in line or BASE in line]


def test_a_checkpoint_in_shards(hub, cache, monkeypatch):
    """Without model.safetensors the index says what to fetch; from the full cache it loads without a request. A broken
    index is told by its reader, and a strange name in it is never asked for."""
    name = "meta-llama/Llama-3.2-3B"
    repo = shutil.copytree(hub.root / BASE, hub.root / name)
    tensors, index = load_file(repo / "model.safetensors"), repo / "model.safetensors.index.json"
    (repo / "model.safetensors").unlink()
    write(repo, tensors, 2, json.loads((repo / "config.json").read_text()))
    places = json.loads(index.read_text())["weight_map"]
    load_llama(name)
    assert asked(hub) == {"config.json", "tokenizer.json", "model.safetensors", index.name, *places.values()}
    hub.requests.clear()
    for offline in (True, False):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        load_llama(name)
    assert not hub.requests
    for k, text in enumerate((json.dumps({"weight_map": places | {"x": "../../datasets/secret"}}), "<html>")):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / f"{k}"))
        index.write_text(text)
        with pytest.raises(ValueError, match=index.name):
            load_llama(name)
        assert not [line for line in hub.requests if "secret" in line]


def test_dry_run_asks_nobody(hub, first, tmp_path):
    """--dry-run of data and base that are not here: files and parameters, no request, nothing written, exit 0. Of a
    cached base the config.json counts, not what is known of Llama-3.2-1B; no weights are needed."""
    hub.requests.clear()
    done = command(hub, tmp_path / "cache", tmp_path / "run", "--dataset", "Video_Games", "--dry-run")
    assert done.returncode == 0 and f"{REVIEWS}  raw/meta_categories/meta_" in done.stdout, done.stderr
    assert done.stdout.count("  to fetch") == 5 and "parameters: " in done.stdout
    assert not hub.requests and not list(tmp_path.iterdir())
    done = command(hub, first[0], first[0].parent / "never", "--dry-run")
    total = sum(t.numel() for t in load_file(hub.root / BASE / "model.safetensors").values())
    told = int(re.search(r"parameters: ([\d,]+); adapter ([\d,]+)", done.stdout)[1].replace(",", ""))
    assert "to fetch" not in done.stdout and "Table 4" not in done.stdout and "\n| D1 " in done.stdout, done.stdout
    assert total < told < 2 * total and not hub.requests and not (first[0].parent / "never").exists()
