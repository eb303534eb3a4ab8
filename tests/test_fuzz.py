"""Every file that is read, damaged at random: the clean result, or a clear error; no traceback, no wrong number."""
import contextlib
import dataclasses
import gzip
import io
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from minipeso.config import MAY_CHANGE
from minipeso.runs import setup
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
    """Cut off, a bit flipped, a piece gone, doubled or moved, a value of another type, foreign bytes, other order."""
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


def fuzzed(path: Path, look, tries: int, silent=lambda data: False) -> Counter:
    """look() on `tries` damaged versions of the file: how many were told, how many harmless. `silent(data)`: a
    change that is another valid content, which no reader can know."""
    whole, draw, clean, outcomes = path.read_bytes(), random.Random(f"{path.name}0"), look(), Counter()
    for _ in range(tries):
        data = damage(whole, draw)
        path.write_bytes(data)
        try:
            outcome = "harmless" if look() == clean else "other"
        except TOLD as error:
            outcome = "told"
            assert len(str(error).splitlines()) >= 2 or isinstance(error, OSError), repr(error)
        assert outcome != "other" or silent(data), (path.name, data[:300])
        outcomes[outcome] += 1
    path.write_bytes(whole)
    return outcomes


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("made")
    run(micro(out, compare=""))
    return out


def test_a_run_goes_on_from_damaged_checkpoints(made, tmp_path):
    """Any file below RUN/checkpoints and config.json: the resumed run has the clean bytes, or is refused."""
    draw, clean, ends = random.Random(5), content(made) | {"config.json": None}, set()
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
            assert content(out) | {"config.json": None} == clean, path
    assert "the same" in ends and len(ends) > 1, ends


def data_of(folder: Path) -> list:
    with contextlib.redirect_stdout(io.StringIO()):
        data = setup.load_dataset(micro(folder.parent / "out", dataset=str(folder)), folder.parent)
    return [[(s.history, s.current) for s in data.stages], data.keys, data.texts]


@pytest.mark.parametrize("name", ["Demo.jsonl", "Demo.csv", "meta_Demo.jsonl", "Demo.jsonl.gz", "Demo.csv.gz"])
def test_reviews_and_metadata(name, made, tmp_path):
    """A damaged gzip file is the same data or refused: its checksum tells. A damaged file of lines ends as stages or in
    a message: lines that cannot be read are counted, those that can are another valid file, in any order the same."""
    world = shutil.copytree(made / "world", tmp_path / "world")
    lines = (world / "Demo.jsonl").read_bytes()
    if ".csv" in name:
        columns = ("user_id", "parent_asin", "rating", "timestamp")
        records = ([str(json.loads(line)[column]) for column in columns] for line in lines.splitlines())
        lines = "".join(",".join(fields) + "\n" for fields in (columns, *records)).encode()
    if not name.startswith("meta"):
        (world / "Demo.jsonl").unlink()
        (world / name).write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    if name.endswith(".gz"):
        assert fuzzed(world / name, lambda: data_of(world), 60)["told"] > 40
        return
    outcomes = fuzzed(world / name, lambda: data_of(world), 60, silent=lambda data: True)
    assert outcomes["told"] > 5 and outcomes["harmless"] > 3, outcomes
    clean, (head, *rest) = data_of(world), (world / name).read_bytes().splitlines(keepends=True)
    random.Random(1).shuffle(rest)
    (world / name).write_bytes(head + b"".join(rest))
    assert data_of(world) == clean


@pytest.mark.parametrize("name", ["C.all.block_0.json", "C.all.block_1.json", "C.index.json"])
def test_the_releases_files(name, tmp_path):
    """Blocks and semantic IDs: what is no block or index is refused by name. Another item's number is a valid block."""
    folder = shared_ids(tmp_path / "data")

    def look():
        ids = SemanticIDs.load(folder / "C.index.json", 8).codes.tolist()
        with contextlib.redirect_stdout(io.StringIO()):
            data = setup.load_dataset(micro(tmp_path / "out", dataset=str(folder)), tmp_path)
        return [(s.history, s.current) for s in data.stages], ids
    assert fuzzed(folder / name, look, 150, silent=lambda data: isinstance(json.loads(data), dict))["told"] > 90


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "adapter_config.json",
                                  "adapter_model.safetensors"])
def test_a_llama_folder_and_an_adapter(name, tmp_path):
    """What loads is a model of the shapes that config.json names, and an adapter whose every key, shape, scale and
    finite number fits it; all else is refused in three lines. A flipped bit in a weight is invisible to safetensors
    (the hash of a download is checked when it is downloaded; the adapter of a run has hashes besides: below)."""
    folder = checkpoint(tmp_path / "llama")

    def look(use=load_peft):
        inject(model := load_llama(folder), 2, 4.0)
        if "adapter" in name:
            use(model, tmp_path / "adapter")
        return {name: tuple(p.shape) for name, p in model.named_parameters()}, [m.scale for _, m in adapters(model)]
    look(save_peft)
    path, tries, least = (tmp_path / "adapter", 60, 15) if "adapter" in name else (folder, 150, 60)
    assert fuzzed(path / name, look, tries, silent=lambda data: name == "config.json")["told"] > least


@pytest.mark.parametrize("name", ["config.json", "world/Demo.jsonl", "world/meta_Demo.jsonl",
                                  "adapters/stage-3/adapter_model.safetensors", "adapters/stage-3/adapter_config.json",
                                  "adapters/stage-3/manifest.json", "checkpoints/base/state.safetensors"])
def test_a_run_opened_again(name, made, tmp_path):
    """The model, its items and its tokens are the run's, or it is not opened: nothing in between."""
    out = shutil.copytree(made, tmp_path / "run")

    def look():
        run = reopen(out)
        settings = {k: v for k, v in dataclasses.asdict(run.cfg).items() if k not in ("out", *MAY_CHANGE)}
        _, layer = next(adapters(run.model))
        return settings, run.ids.codes.tolist(), run.template.items.tolist(), run.stage, layer.A.tolist()
    assert fuzzed(out / name, look, 100)["told"] > 60
