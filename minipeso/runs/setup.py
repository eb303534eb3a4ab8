"""From a data set's name to everything that training needs: stages, texts, item vectors, prompts, model."""
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from minipeso.config import BASES, DATASETS, Config, UsageError, category_of, unknown
from minipeso.embed import llama_vectors, title_vectors
from minipeso.files.download import REVIEWS, fetch, reviews_files
from minipeso.files.hub import checkpoint_folder, load_llama, read_config
from minipeso.files.release import read_release
from minipeso.files.reviews import REVIEW_FILES, dataset_schema, find_one, item_texts, read_items, read_reviews
from minipeso.files.lines import read_lines
from minipeso.llama import Llama, LlamaConfig
from minipeso.semantic_ids import LETTERS, SemanticIDs
from minipeso.stages import Stage, cut, subset, user_disjoint
from minipeso.synthetic import write_world
from minipeso.tokens import Template


@dataclass
class Dataset:
    """The stages, with items numbered 0 .. n-1, and what is known about each item."""
    stages: list[Stage]
    keys: list[str]  # the item's name in the source
    source: Path
    texts: list[tuple[str, str, str]] | None = None  # title, description, the rest: of each item, where there are any
    users: list[str] | None = None  # the user's name in the source, where it is not its number
    ids: SemanticIDs | None = None  # those that come with the data
    notes: list[str] = field(default_factory=list)  # lines skipped, doubles, ...: for stats.md
    known: list[list[int]] = field(default_factory=list)  # per stage, the items that can be recommended

    def raw(self, user: int, item: int) -> str:
        """The source's own words on this user and item."""
        if self.users is None:
            return f"{self.source.name}: user {user}, item {item}"
        return next(line.strip() for _, line in read_lines(find_one(self.source, REVIEW_FILES, "review file"))
                    if self.users[user] in line and self.keys[item] in line)

    def described(self, ids: SemanticIDs, item: int) -> dict[str, str]:
        """The item's name in the source, its semantic ID <a_5><b_17>..., its title."""
        tokens, key = (f"<{letter}_{code}>" for letter, code in zip(LETTERS, ids.codes[item].tolist())), self.keys[item]
        title = next(filter(None, self.texts[item])) if self.texts else f"item {key}"
        return {"item": key, "id": "".join(tokens), "title": title}

    @property
    def spoken(self) -> list[tuple[str, ...]]:
        """What a language model reads of each item: its title and description (Release), the rest if it has neither."""
        return [tuple(filter(None, texts[:2])) or texts[2:] for texts in self.texts]


def load_dataset(cfg: Config, folder: Path) -> Dataset:
    """The data set of cfg.dataset: a folder, a category of the Hub, or the demo's world, kept in `folder`. A subset of
    the users (cfg.users) keeps the whole catalogue: its figures estimate the full run's, not an easier problem's."""
    category, source = category_of(cfg.dataset), folder if cfg.dataset == "demo" else Path(cfg.dataset)
    if cfg.dataset == "demo" and not folder.exists():
        write_world(folder, cfg.world_users, cfg.world_items, cfg.world_alpha, cfg.data_seed)
    if category:
        data = _from_reviews(cfg, *fetch(REVIEWS, reviews_files(category), "dataset"))
    elif not source.exists() and source.name == cfg.dataset:  # no path: rather a name
        kinds = [*DATASETS, "a category of the Hub (Digital_Music)", "a folder"]
        raise UsageError(unknown("dataset", cfg.dataset, kinds))
    else:
        data = _from_release(cfg, source) if dataset_schema(source) == "release" else _from_reviews(cfg, source, source)
    if cfg.split == "user-disjoint":
        data.stages = user_disjoint(data.stages, cfg.data_seed)
    data.known = known_items(data.stages)
    if cfg.ids not in ("unique", "shared"):  # the user's own, of these items among others
        data.ids = SemanticIDs.load(cfg.ids, cfg.codes, data.keys)
    if cfg.users:
        data.stages = subset(data.stages, cfg.users, cfg.data_seed)
    return data


def known_items(stages: list[Stage]) -> list[list[int]]:
    """What the trie of stage t holds, the items of D_1 .. D_t, sorted. Release: the codes of all stages at once."""
    return [sorted(set().union(*(stage.items for stage in stages[:t]))) for t in range(1, len(stages) + 1)]


def fingerprints(data: Dataset) -> dict[str, str]:
    """Hashes of who took what at which stage, and of what the semantic IDs are made from."""
    parts = {"data": [(s.number, sorted(s.history.items()), sorted(s.current.items())) for s in data.stages],
             "items": data.ids.codes.tolist() if data.ids else data.texts}
    return {name: hashlib.sha256(json.dumps(part).encode()).hexdigest() for name, part in parts.items()}


def _from_release(cfg: Config, folder: Path) -> Dataset:
    """The authors' blocks, whose items are numbers, with their semantic IDs."""
    stages, ids_file = read_release(folder)
    numbers = [stage.number for stage in stages if stage.number > 1 or stage.current]
    if numbers != list(range(1, max(len(numbers), 2) + 1)):
        raise UsageError("D1 is missing, its block_0.json is empty, or a stage after it is missing\n"
                         f"{folder} holds D{', D'.join(map(str, numbers))}\n"
                         "add the others' block_k.json (k = 0 is D1): each stage goes on from the one before")
    n_items = 1 + max(i for s in stages for part in (s.history, s.current) for items in part.values() for i in items)
    ids = SemanticIDs.load(ids_file, cfg.codes)
    if len(ids.codes) < n_items:
        raise UsageError(f"a semantic ID is missing\n{ids_file} has {len(ids.codes)} items, the stages name "
                         f"item {n_items - 1}\nuse the ID file that belongs to these blocks")
    return Dataset(stages, [str(i) for i in range(n_items)], folder, ids=ids)


def _from_reviews(cfg: Config, ratings: Path, meta: Path) -> Dataset:
    """Reviews (two files, or the folder of both) to stages; the items that no stage kept are dropped."""
    events = read_reviews(ratings, *_span(cfg.years))
    stages = cut(events, cfg.first, cfg.stages, cfg.min_events)
    number = dict(zip(kept := known_items(stages)[-1], range(len(kept))))
    stages = [Stage(s.number, *({u: [number[i] for i in items] for u, items in part.items()}
                                for part in (s.history, s.current))) for s in stages]
    keys, bad_items = [events.items[i] for i in kept], {}
    fields = read_items(meta, set(keys), bad_items)
    notes = [f"{len(events.time):,} interactions read", f"{events.duplicates:,} repeated (user, item) rows dropped",
             f"{len(keys) - len(fields):,} of {len(keys):,} items without metadata: named by their key"]
    notes += [f"{count:,} {what}rows skipped: {reason}" for what, bad in (("", events.bad), ("metadata ", bad_items))
              for reason, count in sorted(bad.items())]
    if events.core >= 5:
        notes.append(f"warning: every user and item has {events.core} events or more, as in the Hub's 5core files; "
                     "PESO filters per stage: use the 0core file")
    texts = [item_texts(fields.get(key, {}), key) for key in keys]
    return Dataset(stages, keys, ratings, texts, events.users, notes=notes)


def _span(years: str) -> tuple[int, ...]:
    """"2019-2023" -> the milliseconds of 2019-01-01 and 2024-01-01, UTC; "" -> (), all times."""
    first, _, last = years.partition("-")
    if not re.fullmatch(r"(\d{4}(-|-\d{4})?)?", years):
        raise UsageError(f"cannot read the span of years\nfound {years!r}\nwrite --years 2019-2023")
    bounds = (int(first), int(last or first) + 1) if years else ()
    return tuple(int(np.datetime64(str(year), "ms").astype(int)) for year in bounds)


# -- the model and its words ---------------------------------------------------------------------------

def from_scratch(cfg: Config) -> bool:
    return cfg.base in BASES


def llama_config(cfg: Config) -> LlamaConfig:
    """The shape of cfg.base; a base from scratch knows one word, <bos>, besides the codes."""
    if not from_scratch(cfg):
        return read_config(checkpoint_folder(cfg.base, weights=False))
    if len(cfg.shape) != 5 or min(cfg.shape) < 1 or cfg.shape[0] % (2 * cfg.shape[2]) or cfg.shape[2] % cfg.shape[3]:
        raise UsageError(f"the base cannot have this shape\nfound --shape {','.join(map(str, cfg.shape))}\ngive width, "
                         "layers, heads, key/value heads, MLP width; 2 x heads divides width, key/values divide heads")
    width, layers, heads, kv_heads, mlp = cfg.shape
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return LlamaConfig(1, width, mlp, layers, heads, kv_heads, width // heads, 1e-5, rope, tie_word_embeddings=True)


def device_of(cfg: Config) -> str:
    return cfg.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")


def dtype_of(cfg: Config) -> torch.dtype:
    """Of the frozen weights."""
    return getattr(torch, cfg.dtype.replace("auto", "bfloat16" if device_of(cfg) == "cuda" else "float32"))


def load_model(cfg: Config) -> Llama:
    """The base: a checkpoint, or random weights still to be trained on D_1."""
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise OSError(f"there is no GPU that torch {torch.__version__} can use\nfound --device cuda\n"
                      "use --device cpu, or a torch built for your GPU")
    if not from_scratch(cfg):
        return load_llama(cfg.base, dtype_of(cfg), device_of(cfg))
    model = Llama(llama_config(cfg), cfg.base_dropout).initialise(torch.Generator().manual_seed(cfg.seed), cfg.init)
    return model.to(device_of(cfg), dtype_of(cfg))


def load_tokenizer(cfg: Config) -> Tokenizer | None:
    if from_scratch(cfg):
        return None
    path = (folder := checkpoint_folder(cfg.base, weights=False)) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no narrower one
        raise UsageError(f"{path} is no tokenizer\n{error}\ndownload the checkpoint again") from error
    words, rows = tokenizer.get_vocab_size(), read_config(folder).vocab_size
    if words != rows:  # the codes' tokens come right behind the words
        raise UsageError(f"vocabulary and checkpoint do not match\n{path} has {words:,} tokens, config.json {rows:,}\n"
                         "use the tokenizer.json that belongs to these weights")
    return tokenizer


def item_vectors(cfg: Config, data: Dataset, model: Llama, tokenizer: Tokenizer | None,
                 progress: Callable[[int], None] = lambda n: None) -> Tensor:
    """(n_items, d) of the items' texts: the language model's mean hidden states of title and of description, averaged
    (Release; there empty ones count too), or, without language, title vectors of title | rest | description."""
    if cfg.text_width:
        lines = [" | ".join(filter(None, (title, rest, description))) for title, description, rest in data.texts]
        first = data.known[0] if cfg.ids_from == "first" else None
        return torch.from_numpy(title_vectors(lines, cfg.text_width, cfg.seed, first))
    if tokenizer is None:
        raise UsageError(f"--text-width 0 means Llama's hidden states\n--base {cfg.base} has no language\n"
                         "give the title vectors a width, 128 say")
    vectors = llama_vectors(model.model, lambda text: tokenizer.encode(text).ids, [t for s in data.spoken for t in s],
                            device=model.device, progress=progress)  # (texts, d)
    counts = np.array([*map(len, data.spoken)])  # (n_items,), of each item's texts
    return torch.from_numpy(np.add.reduceat(vectors, counts.cumsum() - counts) / counts[:, None].astype(np.float32))


def make_template(cfg: Config, ids: SemanticIDs, tokenizer: Tokenizer | None) -> Template:
    if (cfg.prompt == "short") != (tokenizer is None):
        raise UsageError(f"--prompt {cfg.prompt} and --base {cfg.base} do not fit\nshort is for a base without words, "
                         "paper and release are text\nuse --prompt short with tiny and small, another with a Llama")
    if tokenizer is None:
        return Template.short(ids.codes, ids.n_codes)
    return Template.text(tokenizer, cfg.prompt, cfg.prompt == "release", ids.codes, ids.n_codes)
