"""Two ways to look before or behind a run: --dry-run and --explain."""
from __future__ import annotations

import math
from pathlib import Path

import torch

from minipeso.runs import prepare
from minipeso.beam import beam_search
from minipeso.config import Config, category_of
from minipeso.files.download import REVIEWS, cached, reviews_files
from minipeso.evaluate import Ranker
from minipeso.files.hub import REPOSITORY, folder_at_hand, read_config
from minipeso.llama import Llama, LlamaConfig
from minipeso.lora import adapter_parameters, inject
from minipeso.objective import answer_loss
from minipeso.files.reviews import dataset_schema
from minipeso.semantic_ids import LETTERS, SemanticIDs
from minipeso.stages import Example, examples, statistics, statistics_table
from minipeso.tokens import Template, collate, sequences

# What the Hub holds and the paper's Table 4 counts, for a run whose data is not on this machine.
LLAMA_1B = dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                num_attention_heads=32, num_key_value_heads=8, head_dim=64, rms_norm_eps=1e-5,
                rope_theta=500000.0, tie_word_embeddings=True, rope_scaling=dict(
                    rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
                    original_max_position_embeddings=8192))
SHAPES = {"Llama-3.2-1B": LLAMA_1B,
          "Llama-3.2-3B": LLAMA_1B | dict(hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, head_dim=128)}
WEIGHTS = {"Llama-3.2-3B": ("model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")}
TABLE_4 = {  # (users, interactions) of D1 .. D5
    "Musical_Instruments": ((17046, 141788), (1772, 13197), (1821, 13334), (2289, 18811), (2238, 17573)),
    "Movies_and_TV": ((17928, 190411), (1866, 17665), (2106, 19874), (2284, 22929), (2332, 22225)),
    "Books": ((15406, 164858), (1807, 13918), (1672, 12395), (1948, 14824), (1652, 11990)),
}
HUB_BYTES = {  # measured on the Hub's pinned revisions
    "Musical_Instruments.csv": 172_583_864, "meta_Musical_Instruments.jsonl": 631_877_970,
    "model.safetensors": 2_471_645_608, "tokenizer.json": 9_085_657, "model.safetensors.index.json": 20_919,
    "model-00001-of-00002.safetensors": 4_965_799_096, "model-00002-of-00002.safetensors": 1_459_729_952,
}


def dry_run(cfg: Config) -> None:
    """Prints files, bytes, stages, parameters, steps and memory of a run; touches no network and
    writes nothing."""
    print(_files(cfg), end="\n\n")
    sizes = _stage_sizes(cfg)
    model = _meta_model(cfg)
    total, lora = (sum(p.numel() for p in ps) for ps in (model.parameters(), adapter_parameters(model)))
    rows = cfg.levels * cfg.codes * model.config.hidden_size
    whole = model.config.vocab_size * model.config.hidden_size * 2  # embedding and head
    trained = lora + {"adapter": 0, "rows": rows, "tables": 2 * rows + whole}[cfg.first_trains]
    print(f"\nparameters: {total:,}; adapter {lora:,}; trained at D1 {trained:,}")
    steps = [cfg.epochs * math.ceil((events - 2 * users) / cfg.batch) for users, events in sizes]
    if steps:
        print("steps of", cfg.batch, "pairs:", ", ".join(f"D{t} {n:,}" for t, n in enumerate(steps, start=1)),
              "for each of", ", ".join(cfg.methods), "(D1 once for all)")
    width = prepare.dtype_of(cfg).itemsize
    state = total * width + trained * 16 + lora * 4  # weights; value, gradient, two moments; anchor
    print(f"memory before activations: {state / 1e9:.2f} GB ({width}-byte weights, 16 bytes a trained parameter)")
    print(f"results would go to {cfg.out}/results.json")


def _files(cfg: Config) -> str:
    category, lines, hub = category_of(cfg.dataset), [], []
    if category:
        hub += [(REVIEWS, name, "dataset") for name in reviews_files(category)]
    elif cfg.dataset == "demo":
        lines.append(f"generated: {cfg.world_users} users, {cfg.world_items} items, alpha {cfg.world_alpha}")
    else:
        dataset_schema(cfg.dataset)  # says so if it is no data set
        lines += [f"{path}  {path.stat().st_size:,} bytes" for path in sorted(Path(cfg.dataset).iterdir())]
    if not prepare.from_scratch(cfg):
        weights = WEIGHTS.get(cfg.base.rpartition("/")[2], ("model.safetensors",))
        hub += [(cfg.base, name, "model") for name in ("config.json", "tokenizer.json", *weights)]
    for repo, name, kind in hub:
        here = cached(repo, name, kind) if REPOSITORY.fullmatch(repo) and not Path(repo).is_dir() else Path(repo, name)
        size = here.stat().st_size if here and here.is_file() else HUB_BYTES.get(name.rpartition("/")[2], 0)
        lines.append(f"{repo}  {name}" + f"  {size:,} bytes" * bool(size) + "  to fetch" * (here is None))
    return "files:\n" + "\n".join(f"  {line}" for line in lines)


def _stage_sizes(cfg: Config) -> list[tuple[int, int]]:
    """(users, interactions) a stage: of the data if it is here, else of the paper's Table 4, else []."""
    category = category_of(cfg.dataset)
    away = category and not all(cached(REVIEWS, name, "dataset") for name in reviews_files(category))
    if cfg.dataset == "demo":
        first = (cfg.world_users, 8 * cfg.world_users)
        print("stages, about:")
        sizes = [first] + [(first[0] // 6, first[1] // 6)] * (cfg.stages - 1)
    elif away and category in TABLE_4:
        print("stages, by the paper's Table 4 (the data is not here):")
        sizes = list(TABLE_4[category])
    elif away:
        print("stages: not known before the data is here")
        return []
    else:
        stages = prepare.load_dataset(cfg, Path(cfg.out)).stages
        print(statistics_table(statistics(stages)))
        return [(len(stage.users), stage.interactions) for stage in stages]
    print("\n".join(f"  D{t}: {users:,} users, {n:,} interactions" for t, (users, n) in enumerate(sizes, start=1)))
    return sizes


def _meta_model(cfg: Config) -> Llama:
    """The model with its adapter on the meta device: shapes without storage."""
    scratch, folder = prepare.from_scratch(cfg), folder_at_hand(cfg.base)
    shape = SHAPES.get(cfg.base.rpartition("/")[2])
    if not (scratch or folder or shape):
        raise FileNotFoundError(f"the shape of {cfg.base} is not known here\nbuilt in are {', '.join(SHAPES)}\n"
                                "pass --base a folder with its config.json")
    with torch.device("meta"):
        model = Llama(prepare.llama_config(cfg) if scratch else
                      read_config(folder) if folder else LlamaConfig.from_dict(shape))
        model.grow(cfg.levels * cfg.codes)
        inject(model, cfg.rank, cfg.alpha, cfg.dropout)
    return model


# -- the walk of one item ---------------------------------------------------------------------------

def explain(model: Llama, data: prepare.Dataset, ids: SemanticIDs, template: Template, cfg: Config) -> None:
    """One test user of the last stage with any, preferably one whose item was found, through every step."""
    stage, known = next(pair for pair in zip(data.stages[::-1], data.known[::-1]) if pair[0].current)
    test = examples(stage, "test", cfg.window)
    ranker = Ranker(ids, known, template, cfg.beams, cfg.hit)
    ranks = ranker.ranks(model, test[:200], cfg.eval_batch)
    chosen = int((ranks > 0).int().argmax())
    walk = _walk(model, data, ids, template, cfg, test[chosen])
    for step, value in [*walk, ("rank of the target", str(int(ranks[chosen])) if ranks[chosen] else "not found")]:
        print(f"{step:>22}  {value}")


def _walk(model, data, ids, template, cfg, example: Example) -> list[tuple[str, str]]:
    def name(item: int) -> str:
        text = data.texts[item] if data.texts else f"item {data.keys[item]}"
        return f"{_tuple(ids.codes[item])} {text[:70]}"

    prompt = template.prompt(example.history).to(model.device)
    with torch.no_grad():
        loss = answer_loss(model, collate(sequences([example], template), model.device)).item()
    trie = Ranker(ids, data.known[example.stage - 1], template).trie.to(model.device)
    codes, scores = beam_search(model, [prompt], trie, template.first_token, cfg.beams)
    found = [(ids.item_of(code), score) for code, score in zip(codes[0].tolist(), scores[0].tolist()) if code[0] >= 0]
    return [
        ("raw row", data.raw(example.user, example.target)),
        ("stage", f"D{example.stage}: a test pair, the last of the user's items in this stage"),
        *((f"history {i}", name(item)) for i, item in enumerate(example.history, start=1)),
        ("target", name(example.target)),
        ("prompt", f"{len(prompt)} tokens: {prompt.tolist()}"),
        ("answer", f"{template.answer(example.target)}"),
        ("loss", f"{loss:.4f} nats a token (a uniform guess among the {ids.n_codes} codes of a level: "
                 f"{math.log(ids.n_codes):.4f})"),
        *((f"beam {i}, {score:.2f}", name(items[0])) for i, (items, score) in enumerate(found, start=1)),
    ]


def _tuple(codes) -> str:
    return "".join(f"<{LETTERS[level]}_{code}>" for level, code in enumerate(codes.tolist()))
