"""Every number that can change a result, with its source, and the command line made from it.

    defaults  <  --recipe  <  --base  <  --dataset  <  flags        (later ones win)

Nothing below floor 2 imports this file: the mathematics takes plain numbers.
"""
from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import re
import typing
from dataclasses import dataclass
from pathlib import Path

CHOICES = {
    "recipe": ("paper", "release"), "device": ("auto", "cpu", "cuda"), "dtype": ("auto", "float32", "bfloat16"),
    "split": ("natural", "user-disjoint"), "prompt": ("short", "paper", "release"), "groups": ("module", "matrix"),
    "reduction": ("sum", "mean"), "first_trains": ("rows", "tables", "adapter"),
    "later_trains": ("rows", "tables", "adapter"), "hit": ("item", "id"), "prox_scale": ("none", "size"),
}
LARGEST = 2**31 - 1
BOUNDS = {  # of a number; all others lie from 0 to LARGEST, or 1e30 if they need not be whole
    **dict.fromkeys(("window", "levels", "latent", "rank", "epochs", "batch", "base_batch", "beams", "eval_batch", "tower_width",
                     "tower_negatives", "tower_batch", "tower_epochs", "tower_patience", "tower_neighbours",
                     "world_users", "world_items"), (1, LARGEST)),
    **dict.fromkeys(("alpha", "init", "clip", "temperature", "tower_tau", "tower_init"), (1e-6, 1e6)),
    **dict.fromkeys(("warmup", "tower_share", "evo_layers", "evo_forget", "world_alpha"), (0, 1)),
    "stages": (2, LARGEST), "min_events": (3, LARGEST), "codes": (2, LARGEST), "base_share": (1e-6, 1), "first": (1e-6, 0.999999),
    "dropout": (0, 0.99), "threads": (0, 4096), "tower_clusters": (1, 65536),
}


class UsageError(ValueError):
    """What the user asked for cannot be done: exit code 2. Three lines: what, found, what to do."""


@dataclass(frozen=True)
class Config:
    # what to run
    dataset: str = "demo"  # a name of DATASETS, or a folder: reviews + meta, or the authors' release
    base: str = "tiny"  # tiny, small: from scratch; or a folder with a Llama checkpoint, or its Hub name
    method: str = "peso"  # a row of continual.METHODS
    compare: str = "pretrain,single"  # further methods on the same stages and the same D1 model
    recipe: str = "paper"  # where paper and released code differ: see RECIPES
    lam: float = 2.0  # lambda of Eq. 12; Section 5.1: searched in 0.5..8, 2 for Instruments, 5 for the others
    proximal: str = "method"  # kl, l2, quadratic, rank-kl, output-kl, orthogonal, none; or what the method says
    seed: int = 0  # of the weights and of training
    data_seed: int = 0  # of the demo's world, the subset of users and the user-disjoint split
    users: int = 0  # a seeded subset of the users; 0: all
    out: str = ""  # run folder; default runs/<dataset>-<base>-<method>-s<seed>
    device: str = "auto"  # cuda if there is one
    threads: int = 0  # of the CPU; 0: torch decides. One: the same bytes everywhere, and no tenfold slow-down on busy cores
    compile: bool = False  # torch.compile: a minute or two at the start, then faster steps; other rounding
    dtype: str = "auto"  # of the frozen weights: float32 on cpu, bfloat16 on cuda; adapters are float32
    # stages: who is trained on what, when
    split: str = "natural"  # Section 3: by time, or the pseudo user-disjoint split
    years: str = ""  # first-last, inclusive; App. C.1: 2019-2023, Books 2022-2023; empty: all
    first: float = 0.6  # App. C.1: the share of D1
    stages: int = 5  # App. C.1
    min_events: int = 5  # App. C.1: per user and stage. Release: in D1 too
    window: int = 20  # App. C.1: items of history
    # semantic IDs
    levels: int = 4  # App. D
    codes: int = 256  # Release: codes per level
    latent: int = 32  # Release: width of the codebooks
    rqvae_hidden: tuple[int, ...] = (2048, 1024, 512, 256, 128, 64)  # Release
    rqvae_epochs: int = 5000  # Release: 20000; its author says the number hardly matters
    rqvae_lr: float = 1e-3  # Release
    text_width: int = 0  # title vectors without a language model (embed.py); 0: Llama's hidden states
    # the prompt
    prompt: str = "paper"  # Appendix D; release: its own sentence; short: <bos> items, without a sentence
    learn_end: bool = False  # Release: <|end_of_text|> is part of the answer. Eq. 2: the item alone
    temperature: float = 1.0  # of the training logits; Release: 0.8
    # a base trained from scratch on D0, the stand-in for the pretrained LLM; 0 layers: a checkpoint
    hidden: int = 0  # width of the residual stream
    layers: int = 0  # blocks of attention and MLP
    heads: int = 0  # of attention
    kv_heads: int = 0  # of keys and values; divides heads
    intermediate: int = 0  # width of the MLP
    base_share: float = 0.5  # ours: D0 is the training pairs of this share of D1's users
    base_epochs: int = 0  # over D0; the best one is kept
    base_lr: float = 0.0  # with the adapter's warm-up and cosine
    base_batch: int = 128  # pairs a step
    init: float = 0.02  # standard deviation of new vectors. Release: 0.02; at width 128 that learns slowly
    # the adapter and its training
    rank: int = 8  # Release
    alpha: float = 16.0  # Release
    dropout: float = 0.05  # Release: on the adapter's input
    first_trains: str = "rows"  # at D1, besides LoRA: rows of the new tokens. Release: tables (embedding, head)
    later_trains: str = "adapter"  # at D2..: Assumption 1, LoRA alone. Release: tables
    lr: float = 1e-3  # App. C.2. Release: 2e-4
    later_lr: float = 0.1  # App. C.2: factor for D2.., best at 0.05-0.1. Release: 0.1, unannounced
    epochs: int = 4  # Release; the epoch with the best validation loss is kept
    batch: int = 32  # Release: 8 x 2 accumulated x 2 GPUs
    warmup: float = 0.01  # Release: share of the steps; then a cosine to 0
    weight_decay: float = 0.01  # Release: the Trainer's default
    clip: float = 1.0  # Release: the Trainer's default, norm of the gradient
    # the proximal term
    groups: str = "module"  # Eq. 12: v^(g) is a module. Release: A and B are groups of their own
    reduction: str = "sum"  # Eq. 12. Release: mean over modules, 112 times weaker at the 1B model
    prox_scale: str = "none"  # ours: size multiplies the penalty of a group by its number of entries
    # evaluation
    beams: int = 10  # Section 5.1
    eval_batch: int = 64  # users searched at once; changes speed, not results
    hit: str = "item"  # the item itself. Release: the ID, shared or not
    # the demo's world (synthetic.py)
    world_users: int = 1200  # of stage 1; a sixth of them, half new, at each later one
    world_items: int = 600  # a fifth of them appears after stage 1
    world_alpha: float = 0.5  # Eq. 15: how much of a user's taste survives a stage
    # two-tower baselines (lightgcn-*); "PISA" is its authors' code
    tower_width: int = 64  # PISA: dimensions of a user or item vector
    tower_init: float = 0.1  # standard deviation of new vectors. PISA: 0.01, with which D1's best epoch is an early one
    tower_layers: int = 2  # PISA: propagation steps. LightGCN's own example: 3
    tower_negatives: int = 4  # PISA: a positive
    tower_lr: float = 1e-2  # Adam. PISA: 1e-3; validation NDCG@10 of the demo's D1 is 0.17 with it, 0.28 with ours
    tower_weight_decay: float = 1e-5  # PISA, there inside Adam; here on the batch's vectors (lightgcn.fit)
    tower_batch: int = 1024  # PISA: pairs a step
    tower_epochs: int = 500  # PISA: at most, a stage
    tower_patience: int = 20  # PISA: validations (one every 2 epochs) in a row without a new best
    contrast: float = 0.1  # PISA: the weight of contrastive and PIW
    pisa_alpha: float = 0.5  # PISA: the weight of its own regulariser
    tower_tau: float = 0.5  # PISA: temperature of InfoNCE
    tower_neighbours: int = 10  # ours: neighbours a node and batch; PISA: all
    tower_clusters: int = 20  # PISA: of items, for PIW's and PISA's preference shift
    tower_share: float = 0.2  # PISA: the share of users with the largest weights, L
    # EvoRec (evorec.py)
    evo_layers: float = 0.3  # its paper: about 30 % of the layers are updated
    evo_forget: float = 0.2  # ours: the share of a user's past items that is forgotten
    evo_newest: int = 3  # ours: past items that are never forgotten
    evo_consistency: float = 0.0  # its code: weight 1, but switched off
    filter_epochs: int = 10  # ours: of SASRec, on each stage
    # what not to do
    resume: bool = False  # go on where an earlier start with the same settings was interrupted; else anew
    dry_run: bool = False  # print everything that would happen, then stop
    explain: bool = False  # after training, walk one item through every step
    debug: bool = False  # a traceback instead of the three-line message

    @property
    def methods(self) -> list[str]:
        """The methods of the run, the one of --method last."""
        return [name for name in dict.fromkeys(self.compare.split(",")) if name not in ("", self.method)] + [self.method]


RECIPES = {
    "paper": {},
    "release": dict(groups="matrix", reduction="mean", first_trains="tables", later_trains="tables",
                    lr=2e-4, prompt="release", learn_end=True, temperature=0.8, hit="id"),
}
# chosen for tiny by the validation loss on the authors' Video Games blocks; small's are untried guesses
_SCRATCH = dict(prompt="short", learn_end=False, text_width=128, rqvae_hidden=(256, 128), rqvae_epochs=100,
                base_epochs=6, batch=128, lr=4e-3, warmup=0.05)
BASES = {
    "tiny": _SCRATCH | dict(hidden=128, layers=4, heads=4, kv_heads=2, intermediate=384, base_lr=2e-3, init=0.06,
                          threads=1),
    "small": _SCRATCH | dict(hidden=512, layers=8, heads=8, kv_heads=4, intermediate=1536, base_lr=1e-3, init=0.03),
}
_AMAZON = dict(base="meta-llama/Llama-3.2-1B", years="2019-2023")
DATASETS = {  # name -> what Section 5.1 and App. C.1 say of it
    "demo": dict(codes=32, rqvae_epochs=60),
    "instruments": _AMAZON | dict(lam=2.0),
    "movies": _AMAZON | dict(lam=5.0),
    "books": _AMAZON | dict(lam=5.0, years="2022-2023"),
}
CATEGORIES = {"instruments": "Musical_Instruments", "movies": "Movies_and_TV", "books": "Books"}  # on the Hub
ACTIONS = ("dry_run", "explain", "debug")  # change what is printed, not what is computed
MAY_CHANGE = ("out", "device", "threads", "eval_batch", "resume", *ACTIONS)  # between a run's start and its resumption


def category_of(dataset: str) -> str | None:
    """The Hub's category of a data set's name: the paper's three, or any other by its own name (Digital_Music)."""
    name = CATEGORIES.get(dataset, dataset)
    return name if re.fullmatch(r"[A-Z][a-z]+(_[A-Za-z]+)*", name) and not Path(dataset).exists() else None


def preset(dataset: str) -> dict:
    """What the data set's name says: a category that the paper has not is treated as those that it has."""
    names = {category: name for name, category in CATEGORIES.items()}
    return dict(DATASETS.get(names.get(dataset, dataset), _AMAZON) if category_of(dataset) else DATASETS.get(dataset, {}))


def resolve(flags: dict) -> Config:
    """The Config of these explicit settings, the presets of recipe, base and dataset filled in."""
    settings = preset(flags.get("dataset", Config.dataset))
    base = flags.get("base", settings.get("base", Config.base))
    recipe = flags.get("recipe", Config.recipe)
    if recipe not in RECIPES:
        raise UsageError(unknown("recipe", recipe, RECIPES))
    if flags.get("method", "").startswith("lightgcn"):
        settings["compare"] = "lightgcn-pretrain,lightgcn-finetune"  # the same without an LLM: no base is needed
    cfg = Config(**(RECIPES[recipe] | BASES.get(base, {}) | settings | {"base": base} | flags))
    _check(cfg)
    name = cfg.dataset.rstrip("/").split("/")[-1]
    out = cfg.out or f"runs/{name}-{base.rstrip('/').split('/')[-1]}-{cfg.method}-s{cfg.seed}"
    return dataclasses.replace(cfg, out=out)


def from_args(argv: list[str] | None = None, description: str = "") -> Config:
    """Parses the command line; every field of Config is a flag (`lam` is --lambda)."""
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                     allow_abbrev=False)
    types, notes = typing.get_type_hints(Config), field_notes()
    for field in dataclasses.fields(Config):
        shown = f"{notes[field.name]} [{field.default}]".replace("%", "%%")
        if types[field.name] is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        else:
            how = dict(type=_reader(types[field.name]), metavar=field.name.upper())
        parser.add_argument(flag(field.name), dest=field.name, default=argparse.SUPPRESS, help=shown, **how)
    return resolve(vars(parser.parse_args(argv)))


def field_notes() -> dict[str, str]:
    """The trailing comment of every field of Config: its meaning and source, once, where it is set."""
    notes = {}
    for line in inspect.getsource(Config).splitlines():
        code, _, note = line.partition("#")
        name = code.partition(":")[0].strip()
        if name in Config.__dataclass_fields__:
            notes[name] = note.strip()
    return notes


def flag(name: str) -> str:
    """A field's flag on the command line."""
    return "--" + ("lambda" if name == "lam" else name.replace("_", "-"))


def changed(cfg: Config) -> str:
    """The settings that differ from the dataclass's defaults, as flags, a line each."""
    pairs = [(f.name, getattr(cfg, f.name)) for f in dataclasses.fields(cfg) if getattr(cfg, f.name) != f.default]
    return "\n".join(flag(name) + _shown(value) for name, value in pairs)


def _shown(value) -> str:
    if isinstance(value, bool):
        return ""
    return f" {','.join(map(str, value))}" if isinstance(value, tuple) else f" {value}"


def _reader(kind):
    if kind in (int, float, str):
        return kind

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(","))
    return numbers


def _check(cfg: Config) -> None:
    for name, allowed in CHOICES.items():
        if getattr(cfg, name) not in allowed:
            raise UsageError(unknown(name, getattr(cfg, name), allowed))
    for field in dataclasses.fields(cfg):
        if field.type not in ("int", "float"):
            continue
        value, (low, high) = getattr(cfg, field.name), BOUNDS.get(field.name, (0, LARGEST if field.type == "int" else 1e30))
        if not low <= value <= high:  # a nan fails too
            raise UsageError(f"{flag(field.name)} is out of range\nfound {value}\ngive a number from {low:g} to {high:g}")


def unknown(name: str, value, allowed) -> str:
    """The message for a value that is not among those allowed, with the nearest one."""
    near = difflib.get_close_matches(str(value), [str(a) for a in allowed], n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "choose one of them"
    return f"unknown {name.replace('_', '-')}\nfound {value!r}; there are {', '.join(map(str, allowed))}\n{hint}"


class _Parser(argparse.ArgumentParser):
    def parse_args(self, args=None, namespace=None):
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            flags = [s for action in self._actions for s in action.option_strings]
            near = difflib.get_close_matches(rest[0].split("=")[0], flags, n=1, cutoff=0.5)
            self.error(f"unknown argument {rest[0]}" + (f": did you mean {near[0]}?" if near else ""))
        return found

    def error(self, message: str):
        raise UsageError(f"cannot read the command line\n{message}\npython {self.prog} --help lists the flags")
