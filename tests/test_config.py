"""Every setting is alive, later sources win, and what cannot be done is said in three lines."""
import dataclasses
import math
import re
import sys

import pytest
import torch

from minipeso import config
from minipeso.config import Config, UsageError, resolve
from minipeso.methods import SETTINGS
from minipeso.runs import setup
from minipeso.runs.checkpoints import CheckpointError
from minipeso.runs.command import from_args
from minipeso.runs.guard import guard
from minipeso.synthetic import write_world
from tests.micro import MICRO, checkpoint, fails, fingerprint, flags, micro, run, shared_ids

FIELDS = [field.name for field in dataclasses.fields(Config)]

OTHER = {  # another value, for which a run computes something else
    "dataset": "FOLDER", "method": "single", "lam": 1e5, "proximal": "l2", "seed": 1, "data_seed": 1, "users": 40,
    "dtype": "bfloat16", "split": "user-disjoint", "years": "2019-2020", "first": 0.5, "stages": 4, "min_events": 7,
    "window": 3, "levels": 3, "codes": 9, "latent": 5, "rqvae_hidden": (12,), "rqvae_epochs": 40, "ids_from": "all",
    "ids": "shared",
    "text_width": 12, "prompt": "release", "temperature": 0.8, "shape": (24, 2, 2, 2, 20),
    "base_epochs": 2, "base_lr": 1e-3, "init": 0.1, "rank": 3, "alpha": 8.0, "dropout": 0.3, "first_trains": "adapter",
    "later_trains": "rows", "lr": 2e-3, "later_lr": 0.2, "epochs": 2, "batch": 4, "warmup": 0.9, "weight_decay": 0.5,
    "memory": True, "groups": "matrix", "reduction": "mean", "beams": 2, "hit": "id",
    "world_users": 50, "world_items": 50, "world_alpha": 0.9, "seen": "include", "base_dropout": 0.4, "patience": 1,
}
BESIDES = dict.fromkeys(("method", "proximal", "groups", "reduction"), dict(lam=1e5)) | {
    "prompt": dict(base="CHECKPOINT"), "hit": dict(dataset="SHARED"), "patience": dict(epochs=6, lr=1.0)}


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """computed(**changes) -> the fingerprint of the micro run with these changes; each run is made once."""
    root, done = tmp_path_factory.mktemp("folders"), {}
    folders = {"CHECKPOINT": checkpoint(root / "checkpoint"), "SHARED": shared_ids(root / "shared"),
               "FOLDER": write_world(root / "world", 60, 60, seed=3)}

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
    assert set(FIELDS) == set(OTHER) | own, f"unproved or unknown: {sorted(set(FIELDS) ^ (set(OTHER) | own))}"


@pytest.mark.parametrize("name", OTHER)
def test_another_value_changes_what_is_computed(name, computed):
    besides = BESIDES.get(name, {})
    assert OTHER[name] != (MICRO | besides).get(name, getattr(Config, name)), "that is no other value"
    before, after = computed(**besides), computed(**besides, **{name: OTHER[name]})
    if name == "method":  # the folder of the main method is another's: its adapter, not its name
        before, after = (files["adapters/stage-2/adapter_model.safetensors"] for files in (before, after))
    assert before != after, f"--{name} {OTHER[name]} changed nothing"


def test_alive_base(tmp_path):
    """--base decides which model is built: tiny and small by their presets, a folder by its checkpoint."""
    tiny, small = (resolve({"base": base}) for base in ("tiny", "small"))
    assert setup.llama_config(tiny) != setup.llama_config(small)
    cfg = micro(tmp_path, base=str(checkpoint(tmp_path / "llama")))
    assert setup.load_model(cfg).config.vocab_size == 256 and setup.load_tokenizer(cfg) is not None
    assert setup.load_model(micro(tmp_path)).config.vocab_size == 1


def test_alive_threads(tmp_path, monkeypatch):
    """--threads sets how many threads torch computes with; 0 leaves torch's choice alone."""
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    run(micro(tmp_path, threads=3))
    assert asked == [3] and resolve({"base": "tiny"}).threads == 1 and Config.threads == 0


def test_alive_rivals():
    """What flags say reaches it, or is out of bounds; test_twotower.py and test_evorec.py prove each setting alive."""
    for settings in SETTINGS.values():
        for field in dataclasses.fields(settings):
            value = field.default + 1 if isinstance(field.default, int) else field.default / 2
            cfg = from_args([config.flag(field.name), str(value)])
            assert cfg.rivals == {field.name: value} and getattr(settings.of(cfg), field.name) == value
            assert f"{config.flag(field.name)} {value}" in config.changed(cfg)
            with pytest.raises(UsageError, match=f"{config.flag(field.name)} is out of range"):
                from_args([config.flag(field.name), "-1"])


def test_alive_compare(computed):
    """--compare names the methods that run besides the main one, each in a folder of its own."""
    assert "single/results.json" in computed() and "single/results.json" not in computed(compare="")
    assert computed(compare="")["results.json"] == computed()["results.json"], "a rival must not change the main method"
    assert resolve({"compare": "pretrain,peso,single", "method": "peso"}).methods == ["pretrain", "single", "peso"]


def test_alive_recipe():
    """--recipe release changes exactly the fields of its table, and only with a base that has words."""
    paper, release = (resolve({"recipe": r, "base": "DIR", "dataset": "movies"}) for r in ("paper", "release"))
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
    assert setup.load_model(micro(tmp_path, device="cpu")).device.type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert setup.load_model(micro(tmp_path, device="auto")).device.type == "cpu"
    with pytest.raises(OSError, match="--device cpu"):
        setup.load_model(micro(tmp_path, device="cuda"))


def test_alive_explain(tmp_path, computed):
    """--explain adds the walk of one item to what is printed, and changes no result."""
    printed, without = run(micro(tmp_path / "a", explain=True)), run(micro(tmp_path / "b"))
    assert "raw row" in printed and "rank of the target" in printed and "raw row" not in without
    assert fingerprint(tmp_path / "a") == computed()


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


def test_later_sources_win(monkeypatch):
    """defaults < recipe < base < dataset < flags, whatever field they meet in; what is trained, a recipe says last."""
    monkeypatch.setitem(config.RECIPES, "release", dict(window=1, rank=1, latent=1, levels=1, later_trains="tables"))
    monkeypatch.setitem(config.BASES, "tiny", dict(window=2, rank=2, latent=2, later_trains="rows"))
    monkeypatch.setitem(config.DATASETS, "movies", dict(base="tiny", window=3, rank=3))
    cfg = resolve({"recipe": "release", "dataset": "movies", "window": 4})
    assert (cfg.window, cfg.rank, cfg.latent, cfg.levels, cfg.later_trains) == (4, 3, 2, 1, "tables")
    assert (cfg.batch, cfg.base) == (Config.batch, "tiny"), "a dataset brings its base; the rest is default"
    cfg = resolve({"recipe": "release", "dataset": "movies", "base": "DIR"})
    assert (cfg.window, cfg.latent, cfg.base) == (3, 1, "DIR"), "a flag's base replaces the dataset's, presets and all"


def test_the_command_line_says_what_resolve_says():
    """Every field, given as a flag, arrives as it was meant; what a run prints of its settings is such a line."""
    wanted = MICRO | OTHER | dict(dry_run=True, explain=True, out="x")
    cfg = from_args(flags(**wanted))
    assert {k: getattr(cfg, k) for k in wanted} == wanted
    assert from_args(["--no-explain", "--base", "DIR"]).explain is False
    assert from_args(config.changed(cfg).split()) == cfg and config.changed(Config(codes=Config.codes)) == ""


def test_alive_dry_run(monkeypatch, tmp_path):
    """--dataset instruments --lambda 2.0 --dry-run: the paper's base, span and sizes, without network or files."""
    for name in ("socket.socket", "socket.getaddrinfo"):
        monkeypatch.setattr(name, None)
    monkeypatch.chdir(tmp_path)
    cfg = from_args(["--dataset", "instruments", "--lambda", "2.0", "--dry-run"])
    assert (cfg.base, cfg.years, cfg.recipe, cfg.lam) == ("meta-llama/Llama-3.2-1B", "2019-2023", "paper", 2.0)
    assert (cfg.method, cfg.groups, cfg.reduction, cfg.first, cfg.stages, cfg.window, cfg.beams, cfg.levels) == \
        ("peso", "module", "sum", 0.6, 5, 20, 10, 4), "Section 5.1, Appendix C.1, Appendix D"
    adapter = 16 * cfg.rank * (2 * (2048 + 2048) + 2 * (2048 + 512) + 3 * (2048 + 8192))  # r (d_in + d_out), 112 layers
    numbers = [adapter, adapter + 1_235_814_400 + cfg.levels * cfg.codes * 2048] + [
        cfg.epochs * math.ceil((events - 2 * users) / cfg.batch)  # Table 4, D1 and D5
        for users, events in ((17_046, 141_788), (2_238, 17_573))]
    printed = run(cfg)
    assert not [n for n in numbers if f"{n:,}" not in printed] and "Musical_Instruments" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("base, total, width, bytes_", [("unsloth/Llama-3.2-1B", 1_235_814_400, 2048, 2_471_645_608),
    ("meta-llama/Llama-3.2-3B", 3_212_749_824, 3072, 4_965_799_096 + 1_459_729_952)])
def test_official_shapes_are_known(base, total, width, bytes_, monkeypatch, tmp_path):
    """Parameters as on the model cards; the files are two bytes a parameter and headers under 64 KiB each."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    cfg = from_args(["--dataset", "instruments", "--base", base, "--dry-run"])
    printed = run(cfg).replace(",", "")
    (whole, adapter), = re.findall(r"parameters: (\d+); adapter (\d+)", printed)
    assert int(whole) - int(adapter) - cfg.levels * cfg.codes * width == total
    sizes = [int(n) for n in re.findall(r"model[-\w]*\.safetensors  (\d+) bytes", printed)]
    assert sum(sizes) == bytes_ and 2 * total < bytes_ < 2 * total + 65536 * len(sizes), sizes


REFUSED = {  # the command line: what the message names
    "--lamda 2": "--lambda", "--methd peso": "--method", "--epoch 1": "--epochs", "--recipe papr": "paper",
    "--hit itm": "item", "--reduction meam": "mean", "--method pesso": "mean peso?", "--compare singel": "single",
    "--proximal lk": "rank-kl", "--compare peso@rank=3": "setting of a method", "--lambda nan": "--lambda",
    "--lambda -1": "--lambda", "--lambda inf": "--lambda", "--lambda two": "two", "--lambda": "--lambda",
    "--rqvae-hidden 12,x": "12,x", "--epochs 1.5": "1.5", "--years 2019:2020": "2019:2020", "--world-alpha 1.5": "1.5",
    "--dataset instrumnts": "did you mean instruments?", "--dataset xyz": "a category of the Hub",
    "--lambda ,": "','", "--lambda 0,-1": "--lambda is out of range", "--lambda 0,nan": "out of range",
    "--lambda best": "'best'", "--lr 1,2": "--lr is out of range", "--lr auto": "--lr is out of range",
    "--compare peso@lr=auto": "setting of a method", "--compare peso@later-lr=auto": "needs a number",
    **{f"--shape 16,1,{rest}": "--shape" for rest in ("0,2,16", "3,1,16", "4,0,16", "4,3,16", "4,2")},
    "--proximal fischer": "did you mean fisher?", "--compare inflora-all@proximal=fisher": "found inflora-all",
}


@pytest.mark.parametrize("argv", REFUSED)
def test_bad_settings_end_with_three_lines_and_code_2(argv, tmp_path, capsys, monkeypatch):
    """The message names what is wrong or the nearest; nothing is written, unless only the data can tell."""
    small = flags(**MICRO | dict(compare="", out=tmp_path / "run"))
    code, message = fails(small + argv.split(), capsys, monkeypatch)
    assert code == 2 and len(message) == 3 and REFUSED[argv] in "\n".join(message), message
    assert not (tmp_path / "run").exists() or argv.startswith(("--years", "--dataset", "--shape"))


NUMBERS = [field.name for field in dataclasses.fields(Config) if field.type in (int, float)]


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_bounds(name):
    """Just outside of them, and what is no number, is refused in three lines; the bounds themselves are not."""
    kind = type(OTHER.get(name, getattr(Config, name)))
    low, high = config.BOUNDS.get(name, (0, 2**31 - 1 if kind is int else 1e30))
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
    (low, high), kind = config.BOUNDS.get(name, (0, 1e30)), type(getattr(Config, name))
    values = {low, 0.5 * low, 1e-3, 1e6} if kind is float else {low, 2, 3}
    if name not in "epochs base_epochs rqvae_epochs levels stages world_users world_items threads".split():  # endless
        values.add(min(high, 10**9))
    for value in values:
        try:
            guard(lambda: run(micro(tmp_path / f"{value}", compare="", **{name: kind(value)})))
        except SystemExit as left:
            error = capsys.readouterr().err.rpartition("error: ")[2].strip("\n").splitlines()
            assert left.code in (2, 4, 5) and len(error) == 3, (value, left.code, error)


def test_a_category_by_its_own_name_is_treated_as_the_papers():
    """The three under either name, and any other, with the paper's base and years; a folder of that name is none."""
    for short, name in config.CATEGORIES.items():
        long, brief = (resolve({"dataset": dataset, "out": "x"}) for dataset in (name, short))
        assert dataclasses.replace(long, dataset=short) == brief
    other = resolve({"dataset": "Digital_Music"})
    assert (other.base, other.years, other.lam) == ("meta-llama/Llama-3.2-1B", "2019-2023", Config.lam)
    assert resolve({"dataset": "Books"}).years == "2022-2023" and resolve({"dataset": "data/Books"}).base == "tiny"
    assert resolve({"dataset": "Digital_Music", "base": "tiny", "years": ""}).years == ""


@pytest.mark.parametrize("error, code", [
    (UsageError("x"), 2), (ValueError("x"), 2), (FileNotFoundError("x"), 2), (CheckpointError("x"), 3),
    (FloatingPointError("x"), 4), (torch.OutOfMemoryError("x"), 5), (OSError("x"), 5), (KeyboardInterrupt(), 130),
    (KeyError("a bug"), None)], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("argv", [[], ["--debug"]])
def test_exit_codes(argv, error, code, monkeypatch):
    """A bug keeps its traceback, and with --debug so does all but Ctrl-C."""
    def failing():
        from_args(argv)
        raise error
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    told = code == 130 or code and not argv
    with pytest.raises(SystemExit if told else type(error)) as left:
        guard(failing)
    assert not told or left.value.code == code
