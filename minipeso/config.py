"""Every number that can change a result, with its source. Each is a flag of the command line (runs/command.py).

    defaults  <  --recipe  <  --base  <  --dataset  <  flags        (later ones win; --recipe over --base in *_trains)

The mathematics takes plain numbers: only what trains, evaluates or loads sees a Config."""
import dataclasses
import difflib
import re
from dataclasses import dataclass
from pathlib import Path

CHOICES = {"recipe": ("paper", "release"), "device": ("auto", "cpu", "cuda"), "dtype": ("auto", "float32", "bfloat16"),
    "split": ("natural", "user-disjoint"), "prompt": ("short", "paper", "release"), "groups": ("module", "matrix"),
    "reduction": ("sum", "mean"), **dict.fromkeys(("first_trains", "later_trains"), ("rows", "tables", "adapter")),
    "hit": ("item", "id"), "seen": ("exclude", "include"), "ids_from": ("first", "all")}
LARGEST = 2**31 - 1
BOUNDS = {  # of numbers; all others: from 0 on
    **dict.fromkeys("window levels latent rank epochs batch beams world_users world_items".split(), (1, LARGEST)),
    **dict.fromkeys(("alpha", "init", "temperature"), (1e-6, 1e6)), **dict.fromkeys(("warmup", "world_alpha"), (0, 1)),
    "stages": (2, LARGEST), "min_events": (3, LARGEST), "codes": (2, LARGEST),
    "first": (1e-6, 0.999999), "dropout": (0, 0.99), "base_dropout": (0, 0.99), "threads": (0, 4096)}


class UsageError(ValueError):
    """What the user asked for cannot be done: exit code 2. Three lines: what, found, what to do."""


@dataclass(frozen=True)
class Config:
    # what to run
    dataset: str = "demo"  # a name of DATASETS, or a folder: reviews + meta, or the authors' release
    base: str = "tiny"  # nano (the demo's), tiny, small: from scratch; or a Llama checkpoint's folder or Hub name
    method: str = "peso"  # a row of methods.METHODS
    compare: str = "popularity,transitions,pretrain,single"  # others from the same D1 model, or peso@lambda=20
    recipe: str = "paper"  # where paper and released code differ: see RECIPES
    lam: float = 2.0  # lambda of Eq. 12, Sec. 5.1: 2 or 5. auto, or 0,5,20: of these, validation's best at each stage
    proximal: str = "method"  # by method; or kl, l2, quadratic, rank-kl, output-kl, orthogonal, fisher[-product], none
    seed: int = 0  # of weights and training: the same bytes on the same CPU and library alone, elsewhere other digits
    data_seed: int = 0  # of the demo's world, the subset of users and the user-disjoint split
    users: int = 0  # a seeded subset of the users; 0: all
    out: str = ""  # run folder; default runs/<dataset>-<base>-<method>-s<seed>
    device: str = "auto"  # cuda if there is one
    threads: int = 0  # of the CPU; 0: torch decides. Another number gives other digits; 1 suffers least on busy cores
    dtype: str = "auto"  # of the frozen weights: float32 on cpu, bfloat16 on cuda; adapters are float32
    # stages: who is trained on what, when
    split: str = "natural"  # Section 3: by time, or the pseudo user-disjoint split
    years: str = ""  # first-last, inclusive; App. C.1: 2019-2023, Books 2022-2023; empty: all
    first: float = 0.6  # App. C.1: the share of D1
    stages: int = 5  # App. C.1
    min_events: int = 5  # App. C.1: per user and stage. Release: in D1 too
    window: int = 20  # App. C.1: items of history
    # semantic IDs
    ids_from: str = "first"  # Sec. 2: the tokenizer is fixed, so fitted on the items of D1. Release: on all stages'
    levels: int = 4  # App. D
    codes: int = 256  # Release: codes per level
    latent: int = 32  # Release: width of the codebooks
    rqvae_hidden: tuple[int, ...] = (2048, 1024, 512, 256, 128, 64)  # Release
    rqvae_epochs: int = 5000  # Release: 20000. It is LC-Rec's RQ-VAE; its author: the number hardly matters
    ids: str = "unique"  # an item each. Release: shared, some by several items; or a FILE: {item or its number: codes}
    text_width: int = 0  # title vectors without a language model (embed.py); 0: Llama's hidden states
    # the prompt
    prompt: str = "paper"  # App. D; release: its sentence, <|end_of_text|> is learnt too; short: <bos> items alone
    temperature: float = 1.0  # of the training logits; Release: 0.8
    # a base trained from scratch on D1's training pairs, the stand-in for the pretrained LLM
    shape: tuple[int, ...] = ()  # width, layers, heads, key/value heads, width of the MLP; empty: a checkpoint's own
    base_epochs: int = 0  # of the base; the best one is kept
    base_dropout: float = 0.0  # inside the model, while anything is trained; a checkpoint has none
    base_lr: float = 0.0  # with the adapter's warm-up and cosine
    init: float = 0.02  # standard deviation of new vectors. Release: 0.02; at width 128 that learns slowly
    # the adapter and its training
    rank: int = 8  # Release
    alpha: float = 16.0  # Release
    dropout: float = 0.05  # Release: on the adapter's input
    first_trains: str = "rows"  # at D1, besides LoRA: rows of the new tokens. Release: tables (embedding, head)
    later_trains: str = "adapter"  # at D2..: Assumption 1, LoRA alone. Release: tables; tiny, small: rows
    lr: float = 1e-3  # App. C.2. Release: 2e-4
    later_lr: float = 0.1  # App. C.2: factor for D2.., best at 0.05-0.1. Release: 0.1, unannounced
    epochs: int = 4  # Release; the epoch with the best validation loss is kept
    patience: int = 0  # epochs in a row without a new best that end a training; 0: all epochs. Release: 0
    batch: int = 32  # Release: 8 x 2 accumulated x 2 GPUs
    warmup: float = 0.01  # Release: share of the steps; then a cosine to 0
    weight_decay: float = 0.01  # Release. The Trainer's own default is 0
    # the proximal term
    groups: str = "module"  # Eq. 12: v^(g) is a module. Release: A and B are groups of their own
    reduction: str = "sum"  # Eq. 12. Release: mean over modules, 112 times weaker at the 1B model
    # evaluation
    beams: int = 10  # Section 5.1
    seen: str = "exclude"  # ours: what a user has is not recommended again, by any system. Release: include
    hit: str = "item"  # the item itself. Release: the ID, shared or not
    memory: bool = False  # ours: transition counts mixed into the search of every language model, as in kNN-LM
    # the demo's world (synthetic.py)
    world_users: int = 1200  # of stage 1; a sixth of them, half new, at each later one
    world_items: int = 600  # a fifth of them appears after stage 1
    world_alpha: float = 0.5  # Eq. 15: how much of a user's taste survives a stage
    # the rivals: their settings stand beside their code (rivals/)
    rivals: dict = dataclasses.field(default_factory=dict)  # those that flags have set
    # what is done
    resume: bool = False  # go on where an earlier start with the same settings was interrupted; else anew
    dry_run: bool = False  # print everything that would happen, then stop
    explain: bool = False  # after training, walk one item through every step

    @property
    def methods(self) -> list[str]:
        """The methods of the run, the one of --method last."""
        return [*dict.fromkeys(n for n in self.compare.split(",") if n not in ("", self.method)), self.method]

    def of(self, name: str) -> "Config":
        """The settings of one of these methods: "peso@lambda=20@proximal=l2" is peso with two that act from D2 on."""
        _, *pairs = name.split("@")
        changes = {}
        for pair in pairs:
            key, _, value = pair.partition("=")
            key = "lam" if key == "lambda" else key.replace("-", "_")
            if key not in LATER:
                raise UsageError(unknown("setting of a method", key, [flag(name)[2:] for name in LATER]))
            try:
                changes[key] = GRID if (key, value) == ("lam", "auto") else type(getattr(Config, key))(value)
            except ValueError as error:
                raise UsageError(f"{flag(key)} needs a number\nfound {pair!r}\nwrite peso@lambda=20") from error
        return check(dataclasses.replace(self, method=name, **changes))


GRID = (0.0, 2.0, 10.0, 50.0)  # of --lambda auto
LATER = ("lam", "proximal", "later_lr", "groups", "reduction")  # act from D2 on: methods may differ
RECIPES = {"paper": {}, "release": dict(
    groups="matrix", reduction="mean", first_trains="tables", later_trains="tables", lr=2e-4, prompt="release",
    temperature=0.8, hit="id", seen="include", ids="shared", ids_from="all", rqvae_epochs=20000)}
# chosen for tiny by validation loss on Video Games and Electronics (docs/tuning.md); small's are untried guesses
_SCRATCH = dict(prompt="short", text_width=128, rqvae_hidden=(256, 128), rqvae_epochs=100, base_epochs=30,
                base_dropout=0.2, rank=32, alpha=64.0, dropout=0.0, later_trains="rows", batch=32, lr=3e-3,
                later_lr=0.33, epochs=8, patience=4, warmup=0.05, weight_decay=0.05, lam=20.0, beams=50)
BASES = {
    "nano": _SCRATCH | dict(shape=(64, 2, 2, 2, 192), base_epochs=14, base_lr=3e-3, epochs=6, lam=10.0, beams=20,
                            rank=8, alpha=16.0, later_trains="adapter", later_lr=1.0, init=0.06, threads=1),
    "tiny": _SCRATCH | dict(shape=(128, 2, 4, 2, 384), base_lr=2e-3, init=0.06, threads=1),
    "small": _SCRATCH | dict(shape=(512, 8, 8, 4, 1536), base_lr=1e-3, init=0.03),
}
_AMAZON = dict(base="meta-llama/Llama-3.2-1B", years="2019-2023")
DATASETS = {  # name -> what Section 5.1 and App. C.1 say of it
    "demo": dict(base="nano", codes=32, rqvae_epochs=60, compare="popularity,transitions,oracle,pretrain,single"),
    "instruments": _AMAZON | dict(lam=2.0), "movies": _AMAZON | dict(lam=5.0),
    "books": _AMAZON | dict(lam=5.0, years="2022-2023")}
CATEGORIES = {"instruments": "Musical_Instruments", "movies": "Movies_and_TV", "books": "Books"}  # on the Hub
MAY_CHANGE = ("out", "device", "threads", "compare", "resume", "dry_run", "explain")  # when it goes on


def category_of(dataset: str) -> str | None:
    """The Hub's category of a data set's name: the paper's three, or any other by its own name (Digital_Music)."""
    name = CATEGORIES.get(dataset, dataset)
    return name if re.fullmatch(r"[A-Z][a-z]+(_[A-Za-z]+)*", name) and not Path(dataset).exists() else None


def resolve(flags: dict) -> Config:
    """The Config of these explicit settings, the presets of recipe, base and dataset filled in."""
    dataset, names = flags.get("dataset", Config.dataset), {category: name for name, category in CATEGORIES.items()}
    other = _AMAZON if category_of(dataset) else {}  # a category that the paper has not: as those that it has
    settings = dict(DATASETS.get(names.get(dataset, dataset) if other else dataset, other))
    base = flags.get("base", settings.get("base", Config.base))
    recipe = RECIPES.get(flags.get("recipe"), {})
    trained = {name: what for name, what in recipe.items() if name.endswith("trains")}  # whatever the base
    if flags.get("method", "").startswith("lightgcn"):
        settings["compare"] = "popularity,transitions,lightgcn-pretrain,lightgcn-finetune"  # without an LLM
    cfg = check(Config(**(recipe | BASES.get(base, {}) | trained | settings | {"base": base} | flags)))
    name = cfg.dataset.rstrip("/").split("/")[-1]
    out = cfg.out or f"runs/{name}-{base.rstrip('/').split('/')[-1]}-{cfg.method}-s{cfg.seed}"
    return dataclasses.replace(cfg, out=out)


def flag(name: str) -> str:
    """A field's flag on the command line."""
    return "--" + ("lambda" if name == "lam" else name.replace("_", "-"))


def changed(cfg: Config, plain: Config | None = None) -> str:
    """The settings that differ from the defaults (or from those of `plain`), as flags, a line each."""
    plain = plain or Config()
    settings = {name: value for name, value in vars(cfg).items() if value != getattr(plain, name)}
    settings |= settings.pop("rivals", {})
    values = {name: ",".join(map(str, v)) if isinstance(v, tuple) else v for name, v in settings.items()}
    return "\n".join(flag(name) if isinstance(v, bool) else f"{flag(name)} {v}" for name, v in values.items())


def check(settings, bounds: dict[str, tuple[float, float]] = BOUNDS):
    """These settings. UsageError names the first that is not among its choices or out of its bounds (else: below 0)."""
    for field in dataclasses.fields(settings):
        kind, value = type(field.default), getattr(settings, field.name)
        if value not in (allowed := CHOICES.get(field.name, [value])):
            raise UsageError(unknown(field.name, value, allowed))
        low, high = bounds.get(field.name, (0, LARGEST if kind is int else 1e30))
        some = value if isinstance(value, tuple) and field.name == "lam" else [value]
        if kind in (int, float) and not all(isinstance(x, (int, float)) and low <= x <= high for x in some):  # no nan
            raise UsageError(f"{flag(field.name)} is out of range\nfound {value}\ngive one from {low:g} to {high:g}")
    return settings


def unknown(name: str, value, allowed) -> str:
    """The message for a value that is not among those allowed, with the nearest one."""
    near = difflib.get_close_matches(str(value), [str(a) for a in allowed], n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "choose one of them"
    return f"unknown {name.replace('_', '-')}\nfound {value!r}; there are {', '.join(map(str, allowed))}\n{hint}"
