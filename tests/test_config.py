"""Every setting is alive, later sources win, and what cannot be done is said in three lines."""
from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minipeso import config, evaluate
from minipeso.runs import prepare
from minipeso.config import Config, UsageError, from_args, resolve
from minipeso.runs.guard import guard
from minipeso.runs.disk import CheckpointError
from tests.test_evorec import EVO_FIELDS
from tests.test_twotower import TOWER_FIELDS
from tests.micro import MICRO, checkpoint, fingerprint, flags, micro, run, shared_ids

ROOT = Path(__file__).parents[1]
FIELDS = [field.name for field in dataclasses.fields(Config)]

# -- no dead field ----------------------------------------------------------------------------------

STRONG = dict(lam=1e5)  # so that the penalty is visible beside the cross-entropy
OTHER = {  # another value, for which a run computes something else
    "dataset": "FOLDER", "method": "single", "lam": 1e5, "proximal": "l2", "seed": 1, "data_seed": 1, "users": 40, "dtype": "bfloat16",
    "split": "user-disjoint", "years": "2019-2020", "first": 0.5, "stages": 4, "min_events": 7, "window": 3,
    "levels": 3, "codes": 9, "latent": 5, "rqvae_hidden": (12,), "rqvae_epochs": 40, "rqvae_lr": 0.3,
    "text_width": 12, "prompt": "release", "learn_end": True, "temperature": 0.8,
    "hidden": 24, "layers": 2, "heads": 1, "kv_heads": 2, "intermediate": 20, "base_share": 0.8, "base_epochs": 2,
    "base_lr": 1e-3, "base_batch": 16, "init": 0.1, "rank": 3, "alpha": 8.0, "dropout": 0.3, "first_trains": "adapter",
    "later_trains": "rows", "lr": 2e-3, "later_lr": 0.2, "epochs": 2, "batch": 4, "warmup": 0.9, "weight_decay": 0.5,
    "clip": 1e-4, "groups": "matrix", "reduction": "mean", "prox_scale": "size", "beams": 2, "hit": "id",
    "world_users": 50, "world_items": 50, "world_alpha": 0.9,
}
BESIDES = {"method": STRONG, "proximal": STRONG, "groups": STRONG, "reduction": STRONG, "prox_scale": STRONG,
           "prompt": dict(base="CHECKPOINT"), "learn_end": dict(base="CHECKPOINT"), "hit": dict(dataset="SHARED")}
ALL_METHODS_FILES = ("adapters/stage-2/adapter_model.safetensors", "adapters/stage-3/adapter_model.safetensors")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """What CHECKPOINT, SHARED and FOLDER above stand for."""
    root = tmp_path_factory.mktemp("folders")
    run(micro(root / "other", data_seed=3))
    return {"CHECKPOINT": checkpoint(root / "checkpoint"), "SHARED": shared_ids(root / "shared"),
            "FOLDER": root / "other" / "world"}


@pytest.fixture(scope="module")
def computed(folders, tmp_path_factory):
    """computed(**changes) -> the fingerprint of the micro run with these changes; each run is made once."""
    done = {}

    def look(**changes):
        key = tuple(sorted(changes.items()))
        if key not in done:
            out = tmp_path_factory.mktemp("run")
            run(micro(out, **{k: str(folders.get(v, v)) if isinstance(v, str) else v for k, v in changes.items()}))
            done[key] = fingerprint(out)
        return done[key]

    return look


def test_no_field_is_forgotten():
    """Every field of Config is proved alive: by another value that changes a run, or by a test of its own."""
    own = {name.removeprefix("test_alive_") for name in globals() if name.startswith("test_alive_")}
    own |= {*TOWER_FIELDS, *EVO_FIELDS}  # proved in test_twotower.py and test_evorec.py
    assert set(FIELDS) == set(OTHER) | own, f"unproved or unknown: {sorted(set(FIELDS) ^ (set(OTHER) | own))}"


@pytest.mark.parametrize("name", OTHER)
def test_another_value_changes_what_is_computed(name, computed):
    """A run with another value of the field has other ranks, metrics, semantic IDs or adapters."""
    besides = BESIDES.get(name, {})
    settings = MICRO | besides
    assert OTHER[name] != settings.get(name, getattr(Config, name)), "that is no other value"
    before, after = computed(**besides), computed(**besides, **{name: OTHER[name]})
    if name == "method":  # the folder of the main method is another's: its adapters, not their names
        before, after = ({file: found[file] for file in ALL_METHODS_FILES} for found in (before, after))
    assert before != after, f"--{name} {OTHER[name]} changed nothing"


def test_the_same_settings_compute_the_same(computed, tmp_path):
    """What the proofs above compare is reproducible: a second run of the baseline has the same bytes."""
    run(micro(tmp_path))
    again = fingerprint(tmp_path)
    assert {k: again[k] == v for k, v in computed().items()} == dict.fromkeys(again, True)


def test_alive_base(folders, tmp_path):
    """--base decides which model is built: tiny and small by their presets, a folder by its checkpoint."""
    tiny, small = (resolve({"base": base}) for base in ("tiny", "small"))
    assert prepare.llama_config(tiny) != prepare.llama_config(small)
    cfg = micro(tmp_path, base=str(folders["CHECKPOINT"]))
    assert prepare.load_model(cfg).config.vocab_size == 256 and prepare.load_tokenizer(cfg) is not None
    assert prepare.load_model(micro(tmp_path)).config.vocab_size == 1


def test_alive_threads(tmp_path, monkeypatch):
    """--threads sets how many threads torch computes with; 0 leaves torch's choice alone."""
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    run(micro(tmp_path, threads=3))
    assert asked == [3] and resolve({"base": "tiny"}).threads == 1 and Config.threads == 0


def test_alive_compile(tmp_path, computed, monkeypatch):
    """--compile hands the model's forward to torch.compile, for any shape, and nothing else."""
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **how: asked.append((type(module).__name__, how)))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    run(micro(tmp_path / "run", compile=True))
    assert asked == [("LlamaModel", {"dynamic": True})] and fingerprint(tmp_path / "run") == computed()


def test_compiling_without_a_compiler_stops_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(OSError, match="--compile needs a C\\+\\+ compiler\nfound") as caught:
        run(micro(tmp_path / "run", compile=True))
    assert len(str(caught.value).splitlines()) == 3 and not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_run_computes_the_same(tmp_path):
    """The compiled steps are those of the plain run up to rounding (needs a C++ compiler)."""
    losses = []
    for compiled in (False, True):
        run(micro(tmp_path, compile=compiled, dropout=0.0))
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        losses.append([record["ce"] for record in map(json.loads, lines) if "ce" in record])
    assert len(losses[0]) > 5 and losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_alive_compare(computed):
    """--compare names the methods that run besides the main one, each in a folder of its own."""
    assert "single/results.json" in computed() and "single/results.json" not in computed(compare="")
    assert computed(compare="")["results.json"] == computed()["results.json"], "a rival must not change the main method"
    assert resolve({"compare": "pretrain,peso,single", "method": "peso"}).methods == ["pretrain", "single", "peso"]


def test_alive_recipe():
    """--recipe release changes exactly the fields of its table, and only with a base that has words."""
    paper, release = (resolve({"recipe": recipe, "base": "DIR"}) for recipe in ("paper", "release"))
    moved = {name for name in FIELDS if getattr(paper, name) != getattr(release, name)}
    assert moved - {"recipe"} == set(config.RECIPES["release"]) and config.RECIPES["paper"] == {}
    assert {n: getattr(release, n) for n in config.RECIPES["release"]} == config.RECIPES["release"]


def test_alive_out(tmp_path):
    """Everything goes into --out; without it, into a folder named after dataset, base, method and seed."""
    run(micro(tmp_path / "here", compare=""))
    assert (tmp_path / "here" / "results.json").is_file() and [p.name for p in tmp_path.iterdir()] == ["here"]
    cfg = resolve({"dataset": "/data/Video_Games/", "base": "hub/Llama-9", "method": "single", "seed": 4})
    assert cfg.out == "runs/Video_Games-Llama-9-single-s4"


def test_alive_device(tmp_path, monkeypatch):
    """The model goes where --device says; cuda without a GPU is an error; auto looks for one."""
    assert prepare.load_model(micro(tmp_path, device="cpu")).device.type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert prepare.load_model(micro(tmp_path, device="auto")).device.type == "cpu"
    with pytest.raises(OSError, match="--device cpu"):
        prepare.load_model(micro(tmp_path, device="cuda"))


def test_alive_eval_batch(computed, tmp_path, monkeypatch):
    """--eval-batch changes how many users are searched at once, and no result."""
    calls = []
    search = evaluate.beam_search
    monkeypatch.setattr(evaluate, "beam_search", lambda model, prompts, *rest: (
        calls.append(len(prompts)), search(model, prompts, *rest))[1])
    run(micro(tmp_path, eval_batch=5))
    assert max(calls) == 5 and len(calls) > 8, calls
    assert fingerprint(tmp_path) == computed()


def test_alive_dry_run(tmp_path):
    """--dry-run computes nothing and leaves nothing."""
    assert "steps" in run(micro(tmp_path / "never", dry_run=True)) and not list(tmp_path.iterdir())


def test_alive_explain(tmp_path, computed):
    """--explain adds the walk of one item to what is printed, and changes no result."""
    printed = run(micro(tmp_path, explain=True))
    assert "raw row" in printed and "rank of the target" in printed
    assert "raw row" not in run(micro(tmp_path / "without")), "the walk was not asked for"
    assert {k: v for k, v in fingerprint(tmp_path).items() if not k.startswith("without")} == computed()


def test_alive_resume(tmp_path):
    """--resume goes on from what is there; without it a run starts anew. What is computed is the same."""
    run(micro(tmp_path))
    whole, base = fingerprint(tmp_path), tmp_path / "checkpoints" / "base" / "facts.json"
    (tmp_path / "results.json").unlink()
    before = base.stat().st_mtime_ns
    run(micro(tmp_path, resume=True))
    assert base.stat().st_mtime_ns == before and fingerprint(tmp_path) == whole
    run(micro(tmp_path))
    assert base.stat().st_mtime_ns != before and fingerprint(tmp_path) == whole


def test_alive_debug(monkeypatch, capsys):
    """--debug lets the exception through with its traceback; without it there are three lines and a code."""
    def fails():
        raise UsageError("what\nfound\nto do")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as left:
        guard(fails)
    assert left.value.code == 2 and capsys.readouterr().err == "\nerror: what\nfound\nto do\n"
    monkeypatch.setattr(sys, "argv", ["train.py", "--debug"])
    with pytest.raises(UsageError):
        guard(fails)


# -- which source wins ------------------------------------------------------------------------------

def test_later_sources_win(monkeypatch):
    """defaults < recipe < base < dataset < flags, whatever field they meet in."""
    monkeypatch.setitem(config.RECIPES, "release", dict(window=1, rank=1, latent=1, levels=1))
    monkeypatch.setitem(config.BASES, "tiny", dict(window=2, rank=2, latent=2))
    monkeypatch.setitem(config.DATASETS, "movies", dict(base="tiny", window=3, rank=3))
    cfg = resolve({"recipe": "release", "dataset": "movies", "window": 4})
    assert (cfg.window, cfg.rank, cfg.latent, cfg.levels) == (4, 3, 2, 1)
    assert (cfg.batch, cfg.base) == (Config.batch, "tiny"), "a dataset brings its base; the rest is default"
    cfg = resolve({"recipe": "release", "dataset": "movies", "base": "DIR"})
    assert (cfg.window, cfg.latent, cfg.base) == (3, 1, "DIR"), "a flag's base replaces the dataset's, presets and all"


@pytest.mark.parametrize("base", config.BASES)
@pytest.mark.parametrize("dataset", config.DATASETS)
@pytest.mark.parametrize("recipe", config.RECIPES)
def test_presets_set_known_fields_to_allowed_values(base, dataset, recipe):
    """Every combination of presets is a valid Config of the declared types."""
    cfg = resolve({"base": base, "dataset": dataset, "recipe": recipe})
    hints = {"int": int, "float": (int, float), "str": str, "bool": bool, "tuple[int, ...]": tuple}
    for field in dataclasses.fields(cfg):
        assert isinstance(getattr(cfg, field.name), hints[field.type]), f"{field.name} {getattr(cfg, field.name)!r}"


def test_the_command_line_says_what_resolve_says():
    """Every field, given as a flag, arrives as it was meant."""
    wanted = {k: v for k, v in (MICRO | OTHER).items()} | dict(dry_run=True, explain=True, debug=True, out="x")
    cfg = from_args(flags(**wanted))
    assert {k: getattr(cfg, k) for k in wanted} == wanted
    assert from_args(["--no-learn-end", "--base", "DIR", "--recipe", "release"]).learn_end is False


def test_every_field_has_a_note():
    """Nothing in Config lacks its meaning and source; --help shows them."""
    notes = config.field_notes()
    missing = [name for name in FIELDS if not notes.get(name)]
    assert set(notes) == set(FIELDS) and not missing, f"no note: {missing}"


def test_changed_is_what_differs_from_the_defaults():
    """The first thing a run prints is every non-default value, and nothing else."""
    cfg = Config(rank=Config.rank + 1, codes=Config.codes)
    assert config.changed(cfg) == f"--rank {Config.rank + 1}"


# -- the paper's configuration ----------------------------------------------------------------------

def test_instruments_dry_run_is_the_papers_run(monkeypatch, tmp_path, capsys):
    """--dataset instruments --lambda 2.0 --dry-run: the paper's base, span and sizes, without network or files."""
    def no_network(*args, **kwargs):
        raise AssertionError("the network was touched")
    monkeypatch.setattr(socket, "socket", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.chdir(tmp_path)
    import train
    cfg = from_args(["--dataset", "instruments", "--lambda", "2.0", "--dry-run"])
    assert (cfg.base, cfg.years, cfg.recipe, cfg.lam) == ("meta-llama/Llama-3.2-1B", "2019-2023", "paper", 2.0)
    assert (cfg.method, cfg.groups, cfg.reduction, cfg.first, cfg.stages, cfg.window, cfg.beams, cfg.levels) == \
        ("peso", "module", "sum", 0.6, 5, 20, 10, 4), "Section 5.1, Appendix C.1, Appendix D"
    train.main(cfg)
    printed = capsys.readouterr().out
    rows = cfg.levels * cfg.codes * 2048
    adapter = 16 * cfg.rank * (2 * (2048 + 2048) + 2 * (2048 + 512) + 3 * (2048 + 8192))  # r (d_in + d_out), 112 layers
    for number in (1_235_814_400 + rows + adapter, adapter):
        assert f"{number:,}" in printed, f"{number:,} is not in\n{printed}"
    for users, events in ((17_046, 141_788), (2_238, 17_573)):  # Table 4, D1 and D5
        assert f"{cfg.epochs * math.ceil((events - 2 * users) / cfg.batch):,}" in printed
    assert "Musical_Instruments" in printed and not list(tmp_path.iterdir())


@pytest.mark.parametrize("base, total, bytes_", [("unsloth/Llama-3.2-1B", 1_235_814_400, 2_471_645_608),
                                                 ("meta-llama/Llama-3.2-3B", 3_212_749_824, 4_965_799_096 + 1_459_729_952)])
def test_official_shapes_are_known(base, total, bytes_, monkeypatch, tmp_path, capsys):
    """Parameters as on the model cards; the files are two bytes a parameter and headers under 64 KiB each."""
    import train
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    cfg = from_args(["--dataset", "instruments", "--base", base, "--dry-run"])
    train.main(cfg)
    printed = capsys.readouterr().out
    found = [int(n.replace(",", "")) for n in re.search(r"parameters: ([\d,]+); adapter ([\d,]+)", printed).groups()]
    assert found[0] - found[1] - cfg.levels * cfg.codes * (2048 if "1B" in base else 3072) == total
    sizes = [int(n.replace(",", "")) for n in re.findall(r"model[-\w]*\.safetensors  ([\d,]+) bytes", printed)]
    assert sum(sizes) == bytes_ and 2 * total < bytes_ < 2 * total + 65536 * len(sizes), sizes


def test_instruments_without_its_data_says_what_to_fetch(tmp_path, capsys, monkeypatch):
    """A data set that is not on the machine, and no network: exit 5, with the name of the file that is needed."""
    import train
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as left:
        guard(lambda: train.main(from_args(["--dataset", "instruments", "--base", "tiny", "--out", str(tmp_path)])))
    assert left.value.code == 5 and "Musical_Instruments.csv" in capsys.readouterr().err


# -- what is refused --------------------------------------------------------------------------------

REFUSED = [
    (["--lamda", "2"], "--lambda"), (["--methd", "peso"], "--method"), (["--epoch", "1"], "--epochs"),
    (["--recipe", "papr"], "paper"), (["--hit", "itm"], "item"), (["--reduction", "meam"], "mean"),
    (["--method", "pesso"], "peso"), (["--compare", "singel"], "single"), (["--proximal", "lk"], "kl"),
    (["--lambda", "nan"], "--lambda"), (["--lambda", "-1"], "--lambda"), (["--lambda", "inf"], "--lambda"),
    (["--lambda", "two"], "two"), (["--lambda"], "--lambda"), (["--stages", "1"], "--stages"),
    (["--min-events", "2"], "--min-events"), (["--rank", "0"], "--rank"), (["--clip", "0"], "--clip"),
    (["--dropout", "nan"], "--dropout"), (["--temperature", "0"], "--temperature"), (["--users", "-3"], "--users"),
    (["--rqvae-hidden", "12,x"], "12,x"), (["--epochs", "1.5"], "1.5"), (["--years", "2019:2020"], "2019:2020"),
    (["--world-alpha", "1.5"], "1.5"), (["--dataset", "instrumnts"], "did you mean instruments?"),
    (["--dataset", "xyz"], "a category of the Hub"),
]


@pytest.mark.parametrize("argv, named", REFUSED, ids=[" ".join(argv) for argv, _ in REFUSED])
def test_bad_settings_end_with_three_lines_and_code_2(argv, named, tmp_path, capsys, monkeypatch):
    """An unknown flag or value, a number out of range or no number: exit 2; the message names it or the nearest."""
    import train
    monkeypatch.setattr(sys, "argv", ["train.py"])
    small = flags(**MICRO | {"compare": ""}) + ["--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as left:
        guard(lambda: train.main(from_args(small + argv)))
    error = capsys.readouterr().err.strip("\n").splitlines()[-3:]
    assert left.value.code == 2 and len(error) == 3 and error[0].startswith("error: "), error
    assert named in "\n".join(error), error
    assert not (tmp_path / "run" / "results.json").exists()


NUMBERS = [field.name for field in dataclasses.fields(Config) if field.type in ("int", "float")]


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_bounds(name):
    """Just outside of them, and what is no number, is refused in three lines; the bounds themselves are not."""
    low, high = config.BOUNDS.get(name, (0, 2**31 - 1 if isinstance(OTHER.get(name, getattr(Config, name)), int) else 1e30))
    for wrong in (low - 1e-9, low - 1, high * 1.0001 + 1, float("nan"), float("inf"), float("-inf")):
        with pytest.raises(UsageError, match="out of range") as error:
            resolve({name: wrong})
        assert len(str(error.value).splitlines()) == 3 and config.flag(name) in str(error.value)
    assert [getattr(resolve({name: right}), name) for right in (low, high)] == [low, high]


@pytest.mark.slow
@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_runs_or_is_told(name, tmp_path, capsys, monkeypatch):
    """A whole run with the smallest, the largest and odd values: results, or three lines and an exit code."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    system = "lightgcn-pisa" if name.startswith("tower") or name in ("contrast", "pisa_alpha") else \
        "evorec" if name.startswith("evo") or name == "filter_epochs" else "peso"
    settings = MICRO | dict(compare="", method=system, tower_epochs=2, filter_epochs=1)
    low, high = config.BOUNDS.get(name, (0, 1e30))
    endless = ("epochs", "base_epochs", "rqvae_epochs", "tower_epochs", "filter_epochs", "tower_patience", "layers", "levels",
               "tower_layers", "stages", "tower_negatives", "world_users", "world_items", "tower_neighbours", "threads", "tower_clusters")
    kind = type(getattr(Config, name))
    for value in {low, *(() if name in endless else (min(high, 10**9),)), *((0.5 * low, 1e-3, 1e6) if kind is float else (2, 3))}:
        out = tmp_path / f"{value}"
        try:
            guard(lambda: run(micro(out, **settings | {name: kind(value)})))
        except SystemExit as left:
            error = capsys.readouterr().err.rpartition("error: ")[2].strip("\n").splitlines()
            assert left.code in (2, 4, 5) and len(error) == 3, (value, left.code, error)


def test_a_category_by_its_own_name_is_treated_as_the_papers():
    """The three under either name, and any other, with the paper's base and years; a folder of that name is a folder."""
    for short, name in config.CATEGORIES.items():
        assert dataclasses.replace(resolve({"dataset": name}), dataset=short, out="") == \
               dataclasses.replace(resolve({"dataset": short}), out="")
    other = resolve({"dataset": "Digital_Music"})
    assert (other.base, other.years, other.lam) == ("meta-llama/Llama-3.2-1B", "2019-2023", Config.lam)
    assert resolve({"dataset": "Books"}).years == "2022-2023" and resolve({"dataset": "data/Books"}).base == "tiny"
    assert resolve({"dataset": "Digital_Music", "base": "tiny", "years": ""}).years == ""


def test_exit_code_2_reaches_the_shell():
    """The same through a real command line: code 2, three lines on stderr, no traceback."""
    done = subprocess.run([sys.executable, "train.py", "--lamda", "2.0"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean --lambda?" in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 3, done.stderr


@pytest.mark.parametrize("error, code", [
    (UsageError("x"), 2), (ValueError("x"), 2), (FileNotFoundError("x"), 2), (FloatingPointError("x"), 4),
    (CheckpointError("x"), 3), (torch.OutOfMemoryError("x"), 5), (OSError("x"), 5), (KeyboardInterrupt(), 130)], ids=lambda x: type(x).__name__)
def test_exit_codes(error, code, monkeypatch):
    """2 usage or data, 3 checkpoints, 4 numbers, 5 environment, 130 Ctrl-C."""
    monkeypatch.setattr(sys, "argv", ["train.py"])

    def fails():
        raise error
    with pytest.raises(SystemExit) as left:
        guard(fails)
    assert left.value.code == code


def test_a_bug_is_not_hidden():
    """What is neither usage nor environment keeps its traceback."""
    with pytest.raises(KeyError):
        guard(lambda: {}["a bug"])
