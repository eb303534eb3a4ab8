"""Every file that is read, damaged at random: the clean result, or a clear error; no traceback, no wrong number."""
from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minipeso.runs import prepare, report
from minipeso.runs.checkpoint import CheckpointError, read
from minipeso.runs.guard import EXIT_CODES
from minipeso.files.hub import load_llama
from minipeso.lora import adapters, inject
from minipeso.files.peft import load_peft, save_peft
from minipeso.runs.reopen import reopen
from minipeso.semantic_ids import SemanticIDs
from tests.killer import content
from tests.micro import checkpoint, micro, run, shared_ids

TOLD = tuple(kind for kind, _ in EXIT_CODES)
WORDS = (b"null", b"-1", b"1e999", b"NaN", b'"x"', b"[]", b"{}", b"true", b"99999999999999999999", b"\xff\xfe", b"\x00",
         b'"\\ud800"', b"[[[[[[", b"0.5")


def damage(data: bytes, draw: random.Random) -> bytes:
    """Cut off, a bit flipped, a piece gone, doubled or moved, a value of another type, foreign bytes, lines shuffled."""
    a, b = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    if draw.random() < 0.7:
        b = min(b, a + draw.randrange(1, 30))
    pieces = data.split(b" ")
    at = draw.randrange(len(pieces))
    lines = data.splitlines(keepends=True)
    draw.shuffle(lines)
    flipped = bytearray(data)
    flipped[min(a, len(data) - 1)] ^= 1 << draw.randrange(8)
    return draw.choice([
        data[:a], bytes(flipped), data[:a] + data[b:], data[:b] + data[a:b] + data[b:], data[b:] + data[:b],
        b" ".join([*pieces[:at], draw.choice(WORDS), *pieces[at + 1:]]), data[:a] + draw.choice(WORDS) + data[b:],
        b"".join(lines), draw.randbytes(len(data) % 5000), b"", b"<!DOCTYPE html><html>", b"version https://git-lfs"])


def fuzzed(path: Path, look, clean, tries: int, seed: int = 0, silent=lambda data: False) -> dict[str, int]:
    """look() on `tries` damaged versions of the file: how many were told, how many harmless. `silent(data)`: a
    change that is another valid content, which no reader can know."""
    whole, draw, outcomes = path.read_bytes(), random.Random(f"{path.name}{seed}"), {"told": 0, "harmless": 0, "other": 0}
    for _ in range(tries):
        data = damage(whole, draw)
        path.write_bytes(data)
        try:
            found = look()
        except TOLD as error:
            outcomes["told"] += 1
            assert len(str(error).splitlines()) >= 2 or isinstance(error, OSError), repr(error)
        else:
            if found == clean:
                outcomes["harmless"] += 1
            else:
                assert silent(data), (path.name, data[:300])
                outcomes["other"] += 1
    path.write_bytes(whole)
    return outcomes


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("made")
    run(micro(out, compare=""))
    return out


def test_checkpoints(made):
    """Any damage to any of the three files is told, or the content is the same."""
    place = made / "checkpoints" / "peso-stage-3"

    def look():
        tensors, facts = read(place)
        return {name: t.tolist() for name, t in tensors.items()}, facts
    for name in ("state.safetensors", "facts.json", "manifest.json"):
        outcomes = fuzzed(place / name, look, look(), 150)
        assert outcomes["told"] > 100 and not outcomes["other"], outcomes


def test_a_run_goes_on_from_damaged_checkpoints(made, tmp_path):
    """Any file below RUN/checkpoints and config.json: the resumed run has the clean bytes, or is refused."""
    draw, clean, ends = random.Random(5), content(made), set()
    for trial in range(60):
        if trial >= 14 and len(ends) > 1:  # which byte is hit depends on the size of every file
            break
        out = shutil.copytree(made, tmp_path / f"{trial}")
        (out / "results.json").unlink()
        files = sorted(p for p in (out / "checkpoints").rglob("*") if p.is_file()) + 3 * [out / "config.json"]
        path = draw.choice(files)
        path.write_bytes(damage(path.read_bytes(), draw))
        try:
            run(micro(out, compare="", resume=True))
        except TOLD as error:
            ends.add(type(error).__name__)
            assert len(str(error).splitlines()) == 3, error
        else:
            ends.add("the same")
            found = content(out)
            assert {k: v for k, v in found.items() if k != "config.json"} == \
                   {k: v for k, v in clean.items() if k != "config.json"}, path
    assert "the same" in ends and len(ends) > 1, ends


def data_of(folder: Path) -> list:
    with contextlib.redirect_stdout(io.StringIO()):
        data = prepare.load_dataset(micro(folder.parent / "out", dataset=str(folder)), folder.parent)
    return [prepare.fingerprint(data.stages), data.keys, data.texts]


def in_the_form_of(world: Path, name: str) -> None:
    """The demo's reviews as that file: the Hub's CSV, packed or not."""
    rows = (world / "Demo.jsonl").read_bytes()
    if ".csv" in name:
        found = [json.loads(line) for line in rows.splitlines()]
        rows = "\n".join(["user_id,parent_asin,rating,timestamp", *(
            f"{r['user_id']},{r['parent_asin']},{r['rating']},{r['timestamp']}" for r in found), ""]).encode()
    if not name.startswith("meta"):
        (world / "Demo.jsonl").unlink()
        (world / name).write_bytes(gzip.compress(rows) if name.endswith(".gz") else rows)


@pytest.mark.parametrize("name", ["Demo.jsonl.gz", "Demo.csv.gz"])
def test_packed_reviews(name, made, tmp_path):
    """A damaged gzip file is the same data, or is refused: its checksum tells."""
    world = shutil.copytree(made / "world", tmp_path / "world")
    in_the_form_of(world, name)
    outcomes = fuzzed(world / name, lambda: data_of(world), data_of(world), 60)
    assert outcomes["told"] > 40 and not outcomes["other"], outcomes


@pytest.mark.parametrize("name", ["Demo.jsonl", "Demo.csv", "meta_Demo.jsonl"])
def test_reviews_and_metadata(name, made, tmp_path):
    """A damaged file of rows ends as stages or in a message; rows that cannot be read are counted, and those that can
    are another valid file. What shuffling its lines leaves is the same."""
    world = shutil.copytree(made / "world", tmp_path / "world")
    in_the_form_of(world, name)
    outcomes = fuzzed(world / name, lambda: data_of(world), data_of(world), 60, silent=lambda data: True)
    assert outcomes["told"] > 5 and outcomes["harmless"] > 3, outcomes
    head, *rows = (world / name).read_bytes().splitlines(keepends=True)
    clean = data_of(world)
    random.Random(1).shuffle(rows)
    (world / name).write_bytes(head + b"".join(rows))
    assert data_of(world) == clean


@pytest.mark.parametrize("name", ["C.all.block_0.json", "C.all.block_1.json", "C.index.json"])
def test_the_releases_files(name, tmp_path):
    """Blocks and semantic IDs: whatever is no block or index is refused by name. A number changed into another item
    is another valid block."""
    folder = shared_ids(tmp_path / "data")

    def look():
        ids = SemanticIDs.load(folder / "C.index.json", 8).codes.tolist()
        with contextlib.redirect_stdout(io.StringIO()):
            data = prepare.load_dataset(micro(tmp_path / "out", dataset=str(folder)), tmp_path)
        return prepare.fingerprint(data.stages), ids

    def valid(data: bytes) -> bool:
        return isinstance(json.loads(data), dict)
    outcomes = fuzzed(folder / name, look, look(), 150, silent=valid)
    assert outcomes["told"] > 90, outcomes


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_llama_folder(name, tmp_path):
    """What loads is a model of the shapes that config.json names; all else is refused in three lines. A flipped bit in
    a weight is invisible to safetensors (the hash of a download is checked when it is downloaded)."""
    folder = checkpoint(tmp_path / "llama")

    def look():
        model = load_llama(folder)
        return {name: tuple(p.shape) for name, p in model.named_parameters()}
    outcomes = fuzzed(folder / name, look, look(), 150, silent=lambda data: name == "config.json")
    assert outcomes["told"] > 60, outcomes


def test_an_index_of_shards(tmp_path):
    """Another index is refused, or names the same files: the tensors are found in them whatever it says of each."""
    folder = checkpoint(tmp_path / "llama")
    shard = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(folder / shard)
    names = load_file(folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, shard)}))

    def look():
        return {name: p.tolist() for name, p in load_llama(folder).named_parameters()}
    outcomes = fuzzed(folder / "model.safetensors.index.json", look, look(), 100)
    assert outcomes["told"] > 30 and not outcomes["other"], outcomes


def test_a_tokenizer(tmp_path):
    """What is no tokenizer of this checkpoint is refused; one with other words of the same number is another valid file."""
    cfg = micro(tmp_path / "run", base=str(checkpoint(tmp_path / "llama")), prompt="paper", codes=8)
    ids = SemanticIDs(torch.tensor([[0, 1], [1, 7]]), 8)

    def look():
        template = prepare.make_template(cfg, ids, prepare.load_tokenizer(cfg))
        return template.prompt([0, 1]).tolist()
    outcomes = fuzzed(tmp_path / "llama" / "tokenizer.json", look, look(), 150, silent=lambda data: True)
    assert outcomes["told"] > 60, outcomes


@pytest.mark.parametrize("name", ["config.json", "semantic_ids.json", "tokens.json", "world/Demo.jsonl", "world/meta_Demo.jsonl",
                                  "adapters/stage-3/adapter_model.safetensors", "adapters/stage-3/adapter_config.json",
                                  "adapters/stage-3/manifest.json", "checkpoints/base/state.safetensors"])
def test_a_run_opened_again(name, made, tmp_path):
    """The model, its items and its tokens are the run's, or it is not opened: nothing in between."""
    out = shutil.copytree(made, tmp_path / "run")
    free = ("out", "device", "threads", "eval_batch", "resume", "dry_run", "explain", "debug")

    def look():
        run = reopen(out)
        settings = {k: v for k, v in dataclasses.asdict(run.cfg).items() if k not in free}
        return settings, run.ids.codes.tolist(), run.template.items.tolist(), run.stage, next(adapters(run.model))[1].A.tolist()
    outcomes = fuzzed(out / name, look, look(), 100)
    assert outcomes["told"] > 60 and not outcomes["other"], outcomes


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter(name, tmp_path):
    """Every key, shape, scale and finite number is held against the model; that of a run has hashes besides (above)."""
    base = checkpoint(tmp_path / "llama")
    model = load_llama(base)
    inject(model, 2, 4.0)
    save_peft(model, tmp_path / "adapter")

    def look():
        other = load_llama(base)
        inject(other, 2, 4.0)
        load_peft(other, tmp_path / "adapter")
        return {name: (layer.scale, *layer.A.shape) for name, layer in adapters(other)}
    outcomes = fuzzed(tmp_path / "adapter" / name, look, look(), 60)
    assert outcomes["told"] > 15, outcomes


@pytest.mark.parametrize("name", ["results.json", "ranks.json"])
def test_results(name, made, tmp_path):
    """A metric that the ranks do not give is refused; what else is in results.json cannot be derived."""
    out = shutil.copytree(made, tmp_path / "run")

    def look():
        found, ranks = report.load(out)
        with contextlib.redirect_stdout(io.StringIO()):
            report.tables({"peso": found}, {"peso": ranks})
        return found["stages"], found["average"]
    outcomes = fuzzed(out / name, look, look(), 150)
    assert outcomes["told"] > 70 and not outcomes["other"], outcomes


def test_all_kinds_of_error_have_an_exit_code():
    """What fuzzing accepts as told is what guard turns into three lines."""
    assert CheckpointError in TOLD and FloatingPointError in TOLD and torch.OutOfMemoryError in TOLD
