"""Which run a folder holds: config.json has every setting, and hashes of the settings and of what the run stands on.
A run that is gone on with, or opened again, is that run or is refused."""
import dataclasses
import hashlib
import importlib.metadata
import json
from pathlib import Path

from minipeso.config import MAY_CHANGE, Config, UsageError, flag
from minipeso.runs.checkpoints import remove, write_file

HASHES = {"data": "the data has", "items": "the items' texts or IDs have", "base": "the base's files have"}
PACKAGES = ("minipeso", "torch", "numpy", "safetensors", "tokenizers")
FACTS = ("hashes", "versions")  # what config.json has besides the settings


def settings(cfg: Config, free: tuple[str, ...] = ("resume",)) -> dict:
    """The settings as JSON has them, without the `free` ones."""
    return {name: value for name, value in json.loads(json.dumps(dataclasses.asdict(cfg))).items() if name not in free}


def digest(cfg: Config) -> str:
    """A hash of the settings that decide what is computed."""
    return hashlib.sha256(json.dumps(settings(cfg, MAY_CHANGE)).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def void(out: Path, cfg: Config) -> None:
    """What an older run left in `out`, and what its methods left, counts no more."""
    for old in ("checkpoints", "adapters", *(f"{name}/adapters" for name in cfg.methods)):
        remove(out / old)
    for old in (path for name in ("results.json", "expected.json") for path in (out / name, *out.glob(f"*/{name}"))):
        if old.parent == out or not (old.parent / "config.json").is_file():  # else: a run of its own, not a method's
            old.unlink(missing_ok=True)
    (out / "config.json").unlink(missing_ok=True)


def begin(out: Path, cfg: Config, hashes: dict[str, str]) -> None:
    """A new run in `out` on what has these hashes."""
    about = settings(cfg) | {"hashes": hashes | {"settings": digest(cfg)}, "versions": versions()}
    write_file(out / "config.json", json.dumps(about, indent=1) + "\n")


def agree(out: Path, cfg: Config, hashes: dict[str, str] | None = None) -> None:
    """The settings (and hashes) must be those that the run began with: UsageError says which not. Versions: a note."""
    before, now = read_json(out / "config.json", "start anew, without --resume"), settings(cfg, MAY_CHANGE)
    then = before["hashes"] if isinstance(before.get("hashes"), dict) else {}
    pairs = [(n, before.get(n), now.get(n)) for n in sorted((before.keys() | now.keys()) - {*FACTS, *MAY_CHANGE})]
    differ = [f"{flag(name)} {there} there, {here} now" for name, there, here in pairs if there != here]
    differ += [f"{HASHES[name]} another hash" for name in hashes or () if then.get(name) != hashes[name]]
    if differ:
        raise UsageError(f"{out} was begun with other settings\n{'; '.join(differ)}\n"
                         "use the same, start anew without --resume, or name another --out")
    if hashes and before.get("versions") != versions():
        print(f"note: begun with {before.get('versions')}, going on with {versions()}", end="\n\n")


def read_settings(folder: Path) -> tuple[Path, Config]:
    """(the run's own folder, Config) of a run, or of a method inside it. UsageError if config.json was changed."""
    path = (root := folder if (folder / "config.json").is_file() else folder.parent) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a run\nit has no config.json\npass a folder that train.py --out left")
    about = read_json(path, "run anew")
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in about.items() if name not in FACTS}
    strange = sorted(values.keys() ^ (Config.__dataclass_fields__.keys() - {"resume"}))
    if strange:
        raise UsageError(f"{path} has settings that this version does not know, or lacks some\n{', '.join(strange)}\n"
                         "use the minipeso that made the run")
    cfg, hashes = Config(**values), about.get("hashes")
    if not isinstance(hashes, dict) or digest(cfg) != hashes.get("settings"):
        raise UsageError(f"{path} is not what the run wrote\nits settings have the hash {digest(cfg)}, not the run's\n"
                         "undo the change, or run anew")
    return root, cfg if folder == root else cfg.of(folder.name)


def read_json(path: Path, remedy: str) -> dict:
    """The JSON object in a file; UsageError in three lines."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        wrong = "" if isinstance(value, dict) else f"it holds a {type(value).__name__}"
    except (ValueError, RecursionError) as error:
        wrong = str(error)
    if wrong:
        raise UsageError(f"{path} is not a JSON object\n{wrong}\n{remedy}")
    return value
