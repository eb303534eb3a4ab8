"""From a data set's name to everything that training needs: stages, texts, semantic IDs, prompts, model."""
from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from minipeso import parallel
from minipeso.runs import disk
from minipeso.config import BASES, DATASETS, Config, UsageError, category_of, flag, unknown
from minipeso.files.download import fetch_reviews
from minipeso.embed import llama_vectors, title_vectors
from minipeso.files.hub import checkpoint_folder, checkpoint_hash, load_llama, read_config
from minipeso.llama import Llama, LlamaConfig
from minipeso.files.reviews import REVIEW_FILES, dataset_schema, find_one, item_text, read_items, read_reviews
from minipeso.files.rows import read_lines
from minipeso.semantic_ids import SemanticIDs
from minipeso.stages import Stage, cut, subset, user_disjoint
from minipeso.files.release import read_release
from minipeso.synthetic import write_world
from minipeso.tokens import Template


@dataclass
class Dataset:
    """The stages, with items numbered 0 .. n-1, and what is known about each item."""

    stages: list[Stage]
    known: list[list[int]]  # per stage t, the items that can be recommended: those of D_1 .. D_t
    keys: list[str]  # the item's name in the source
    texts: list[str] | None  # one line an item; None where the source has none
    ids_file: Path | None  # semantic IDs that come with the data
    notes: list[str]  # rows skipped, doubles, ...: for stats.md
    source: Path
    users: list[str] | None = None  # the user's name in the source; None: its number

    def raw(self, user: int, item: int) -> str:
        """The source's own words on this user and item."""
        if self.users is None:
            return f"{self.source.name}: user {user}, item {item}"
        both = self.users[user], self.keys[item]
        file = find_one(self.source, REVIEW_FILES, "review file")
        return next(line.strip() for _, line in read_lines(file) if all(key in line for key in both))


def load_dataset(cfg: Config, folder: Path) -> Dataset:
    """The data set of cfg.dataset: a folder, or the demo's world, which is written into `folder` first.

    A subset of the users (cfg.users) keeps the whole catalogue, so that its figures are estimates
    of the full run's, not of an easier problem.
    """
    category = category_of(cfg.dataset)
    source = folder if cfg.dataset == "demo" else Path(cfg.dataset)
    if cfg.dataset == "demo" and not parallel.rank():
        write_world(folder, cfg.world_users, cfg.world_items, cfg.world_alpha, cfg.data_seed)
    if category:
        data = _from_reviews(cfg, *fetch_reviews(category))
    elif not source.exists() and source.name == cfg.dataset:  # no path: rather a name
        raise UsageError(unknown("dataset", cfg.dataset, [*DATASETS, "a category of the Hub (Digital_Music)", "a folder"]))
    elif dataset_schema(source) == "release":
        data = _from_release(source)
    else:
        data = _from_reviews(cfg, source, source)
    if cfg.split == "user-disjoint":
        data.stages = user_disjoint(data.stages, cfg.data_seed)
    data.known = known_items(data.stages)
    if cfg.users:
        data.stages = subset(data.stages, cfg.users, cfg.data_seed)
    return data


def fingerprints(cfg: Config, data: Dataset, base: bool = True) -> dict[str, str]:
    """Hashes of what a run stands on: the stages, what the semantic IDs are made from, the checkpoint if it needs one."""
    items = data.ids_file.read_bytes() if data.ids_file else json.dumps(data.texts).encode()
    found = {"data": fingerprint(data.stages), "items": hashlib.sha256(items).hexdigest()}
    return found | ({} if from_scratch(cfg) or not base else {"base": checkpoint_hash(checkpoint_folder(cfg.base))})


def fingerprint(stages: list[Stage]) -> str:
    """A hash of who took what at which stage: two runs can be compared if theirs are equal."""
    text = json.dumps([(s.number, sorted(s.history.items()), sorted(s.current.items())) for s in stages])
    return hashlib.sha256(text.encode()).hexdigest()


def known_items(stages: list[Stage]) -> list[list[int]]:
    """What the trie of every stage t holds: the items of D_1 .. D_t, sorted. An item enters with the
    stage in which somebody first takes it; nothing can be recommended before it exists.
    Release: the codes of all stages at once."""
    return [sorted(set().union(*(stage.items for stage in stages[:t]))) for t in range(1, len(stages) + 1)]


def _from_release(folder: Path) -> Dataset:
    stages, ids_file = read_release(folder)
    numbers = [stage.number for stage in stages]
    if numbers != list(range(1, max(len(numbers), 2) + 1)):
        raise UsageError(f"D1 is missing, or a stage after it\n{folder} holds D{', D'.join(map(str, numbers))}\n"
                         "add the others' block_k.json (k = 0 is D1): each stage goes on from the one before")
    if not stages[0].current:
        raise UsageError(f"D1 has no users\n{folder}, block_0.json is empty\nfetch the file again")
    highest = max(i for s in stages for part in (s.history, s.current) for items in part.values() for i in items)
    return Dataset(stages, [], [str(i) for i in range(highest + 1)], None, ids_file, [], folder)


def _from_reviews(cfg: Config, ratings: Path, meta: Path) -> Dataset:
    """Reviews (two files, or the folder of both) to stages; items that no stage kept are dropped, the others
    numbered anew."""
    events = read_reviews(ratings, *_span(cfg.years))
    stages = cut(events, cfg.first, cfg.stages, cfg.min_events)
    kept = sorted(set().union(*(stage.items for stage in stages)))
    number = {old: new for new, old in enumerate(kept)}
    stages = [Stage(s.number, *({u: [number[i] for i in items] for u, items in part.items()}
                                for part in (s.history, s.current))) for s in stages]
    keys = [events.items[i] for i in kept]
    bad_items = {}
    fields = read_items(meta, set(keys), bad_items)
    notes = [f"{len(events.time):,} interactions read", f"{events.duplicates:,} repeated (user, item) rows dropped",
             f"{len(keys) - len(fields):,} of {len(keys):,} items without metadata: named by their key"]
    notes += [f"{count:,} {what}rows skipped: {reason}" for what, bad in (("", events.bad), ("metadata ", bad_items))
              for reason, count in sorted(bad.items())]
    if events.core >= 5:
        notes.append(f"warning: every user and item has {events.core} events or more, as in the Hub's 5core files; PESO "
                     "filters per stage: use the 0core file")
    return Dataset(stages, [], keys, [item_text(fields.get(key, {}), key) for key in keys], None, notes,
                   ratings, events.users)


def _span(years: str) -> tuple[int | None, int | None]:
    """"2019-2023" -> the milliseconds of 2019-01-01 and 2024-01-01, UTC."""
    if not years:
        return None, None
    first, dash, last = years.partition("-")
    if not (first.isdigit() and (last or first).isdigit()):
        raise UsageError(f"cannot read the span of years\nfound {years!r}\nwrite --years 2019-2023")
    starts = (datetime(int(y), 1, 1, tzinfo=timezone.utc) for y in (first, int(last or first) + 1))
    return tuple(int(start.timestamp() * 1000) for start in starts)


# -- the model and its words ------------------------------------------------------------------------

def from_scratch(cfg: Config) -> bool:
    return cfg.base in BASES


def open_gate(cfg: Config) -> None:
    """Finds now what would stop the run after hours with the data: no compiler, a closed gate (fetches small files)."""
    if cfg.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        raise OSError("--compile needs a C++ compiler\nfound neither g++ nor clang++, nor what CXX may name\n"
                      "install one, or leave --compile away")
    if not from_scratch(cfg):
        checkpoint_folder(cfg.base, weights=False)


def llama_config(cfg: Config) -> LlamaConfig:
    """The shape of cfg.base; a base from scratch knows one word, <bos>, besides the codes."""
    if not from_scratch(cfg):
        return read_config(checkpoint_folder(cfg.base, weights=False))
    shape = {name: getattr(cfg, name) for name in ("hidden", "layers", "heads", "kv_heads", "intermediate")}
    if min(shape.values()) < 1 or cfg.hidden % (2 * cfg.heads) or cfg.heads % cfg.kv_heads:
        raise UsageError("the base cannot have this shape\nfound " + " ".join(f"{flag(k)} {v}" for k, v in shape.items())
                         + "\nlet hidden be a multiple of 2 x heads, heads one of kv-heads, and none be 0")
    return LlamaConfig(vocab_size=1, hidden_size=cfg.hidden, intermediate_size=cfg.intermediate,
                       num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads,
                       num_key_value_heads=cfg.kv_heads, head_dim=cfg.hidden // cfg.heads, rms_norm_eps=1e-5,
                       rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=True)


def device_of(cfg: Config) -> str:
    return cfg.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")


def dtype_of(cfg: Config) -> torch.dtype:
    """Of the frozen weights."""
    return getattr(torch, cfg.dtype.replace("auto", "bfloat16" if device_of(cfg) == "cuda" else "float32"))


def load_model(cfg: Config) -> Llama:
    """The base: a checkpoint, or random weights still to be trained on D_0."""
    device = device_of(cfg)
    if device == "cuda" and not torch.cuda.is_available():
        raise OSError(f"there is no GPU that torch {torch.__version__} can use\nfound --device cuda\n"
                      "use --device cpu, or a torch built for your GPU")
    dtype = dtype_of(cfg)
    if from_scratch(cfg):
        generator = torch.Generator().manual_seed(cfg.seed)
        return Llama(llama_config(cfg)).initialise(generator, cfg.init).to(device, dtype)
    return load_llama(cfg.base, dtype, device)


def load_tokenizer(cfg: Config) -> Tokenizer | None:
    if from_scratch(cfg):
        return None
    folder = checkpoint_folder(cfg.base, weights=False)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing\nthe prompt is text and needs it\ndownload the checkpoint again")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no narrower one
        raise UsageError(f"{path} is no tokenizer\n{error}\ndownload the checkpoint again") from error
    words, rows = tokenizer.get_vocab_size(), read_config(folder).vocab_size
    if words != rows:  # the codes' tokens come right behind the words
        raise UsageError(f"vocabulary and checkpoint do not match\n{path} has {words:,} tokens, config.json {rows:,}\n"
                         "use the tokenizer.json that belongs to these weights")
    return tokenizer


def given_ids(cfg: Config, data: Dataset) -> SemanticIDs:
    """The IDs that came with the data."""
    ids = SemanticIDs.load(data.ids_file, cfg.codes)
    if len(ids.codes) < len(data.keys):
        raise UsageError(f"a semantic ID is missing\n{data.ids_file} has {len(ids.codes)} items, the stages name "
                         f"item {len(data.keys) - 1}\nuse the ID file that belongs to these blocks")
    return ids


def item_vectors(cfg: Config, data: Dataset, model: Llama, tokenizer: Tokenizer | None,
                 progress: Callable[[int], None] = lambda n: None) -> Tensor:
    """(n_items, d) of the items' texts: mean hidden states of the language model (Release), or title vectors
    where the base has no language."""
    if cfg.text_width:
        return torch.from_numpy(title_vectors(data.texts, cfg.text_width, cfg.seed))
    if tokenizer is None:
        raise UsageError(f"--text-width 0 means Llama's hidden states\n--base {cfg.base} has no language\n"
                         "give the title vectors a width, 128 say")
    return torch.from_numpy(llama_vectors(model.model, lambda text: tokenizer.encode(text).ids,
                                          [[text] for text in data.texts], device=model.device, progress=progress))


def fit_ids(cfg: Config, vectors: Tensor, **how) -> SemanticIDs:
    """An RQ-VAE on the items' vectors, where the model is."""
    return SemanticIDs.fit(vectors.to(device_of(cfg)), cfg.levels, cfg.codes, cfg.latent, cfg.rqvae_hidden, cfg.rqvae_epochs,
                           cfg.seed, lr=cfg.rqvae_lr, **how)


def vocabulary(ids: SemanticIDs, template: Template) -> dict[str, int]:
    """{a code's name: its token id}, behind the words."""
    return dict(zip(ids.tokens, range(template.first_token, template.first_token + len(ids.tokens))))


def agree_on_tokens(path: Path, ids: SemanticIDs, template: Template) -> None:
    """Token ids are written down once, and what reads a row of the token tables later holds its own against them."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing\nit holds the codes' token ids\nbring it back, or run anew")
    written, now = disk.read_json(path, "bring it back, or run anew"), vocabulary(ids, template)
    if written != now:
        name = next(name for name in [*now, *written] if written.get(name) != now.get(name))
        raise UsageError(f"the codes have other token ids than the run's\n{name} is {now.get(name)}, in {path} {written.get(name)}\n"
                         "use the tokenizer.json and semantic IDs that the run began with")


def make_template(cfg: Config, ids: SemanticIDs, tokenizer: Tokenizer | None) -> Template:
    if cfg.prompt == "short":
        if tokenizer is not None:
            raise UsageError("--prompt short is for bases without a text vocabulary\n"
                             f"found --base {cfg.base}\nuse --prompt paper or release")
        return Template.short(ids.codes, ids.n_codes)
    if tokenizer is None:
        raise UsageError(f"--prompt {cfg.prompt} is text, and --base {cfg.base} has no text vocabulary\n"
                         "found a base that is trained from scratch\nuse --prompt short, or a Llama checkpoint")
    return Template.text(tokenizer, cfg.prompt, cfg.learn_end, ids.codes, ids.n_codes)
