"""A look before a run, --dry-run (no network, nothing left behind), and one after it, --explain."""
import math
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from minipeso.config import Config, category_of
from minipeso.files.download import REVIEWS, cached, reviews_files
from minipeso.files.hub import REPOSITORY, folder_at_hand, read_config
from minipeso.files.reviews import dataset_schema
from minipeso.llama import Llama, LlamaConfig
from minipeso.lora import adapter_parameters, inject
from minipeso.objective import answer_loss
from minipeso.runs import report, setup
from minipeso.runs.facts import HUB_BYTES, MODELS, TABLE_4
from minipeso.runs.run import Run
from minipeso.stages import examples, had, statistics
from minipeso.tokens import collate, sequences


def dry_run(cfg: Config) -> None:
    """Prints files, bytes, stages, parameters, steps and memory of a run."""
    print("files:", *_files(cfg), sep="\n  ", end="\n\n")
    stages, sizes = _stages(cfg)
    model = _meta_model(cfg)
    total, lora = (sum(p.numel() for p in ps) for ps in (model.parameters(), adapter_parameters(model)))
    width, new = model.config.hidden_size, cfg.levels * cfg.codes
    tables = 2 * (model.config.vocab_size + new) * width  # embedding and head
    trained = lora + {"adapter": 0, "rows": new * width, "tables": tables}[cfg.first_trains]
    print(f"{stages}\n\nparameters: {total:,}; adapter {lora:,}; trained at D1 {trained:,}")
    steps = [f"D{t} {cfg.epochs * math.ceil((n - 2 * users) / cfg.batch):,}" for t, (users, n) in enumerate(sizes, 1)]
    if steps:  # all of a user's pairs but the last two
        print(f"steps of {cfg.batch} pairs: {', '.join(steps)} for each of {', '.join(cfg.methods)} (D1 once for all)")
    size = setup.dtype_of(cfg).itemsize
    state = total * size + trained * 16 + lora * 4  # weights; value, gradient, two moments; anchor
    here = torch.cuda.get_device_properties(0).total_memory / 1e9 if torch.cuda.is_available() else 0
    print(f"memory before activations: {state / 1e9:.2f} GB ({size}-byte weights, 16 bytes per trained parameter); "
          f"{f'the GPU here has {here:.0f} GB' if here else 'no GPU here that torch can use'}\n"
          f"results would go to {cfg.out}/results.json")


def _files(cfg: Config) -> Iterator[str]:
    """A line per file that the run reads: bytes as far as known, and whether it is still to be fetched."""
    category, hub = category_of(cfg.dataset), []
    if category:
        hub += [(REVIEWS, name, "dataset") for name in reviews_files(category)]
    elif cfg.dataset == "demo":
        yield f"generated: {cfg.world_users} users, {cfg.world_items} items, alpha {cfg.world_alpha}"
    else:
        dataset_schema(cfg.dataset)  # says so if it is no data set
        yield from (f"{path}  {path.stat().st_size:,} bytes" for path in sorted(Path(cfg.dataset).iterdir()))
    if not setup.from_scratch(cfg):
        _, weights = MODELS.get(cfg.base.rpartition("/")[2], (None, ["model.safetensors"]))
        hub += [(cfg.base, name, "model") for name in ("config.json", "tokenizer.json", *weights)]
    for repo, name, kind in hub:
        here = cached(repo, name, kind) if REPOSITORY.fullmatch(repo) and not Path(repo).is_dir() else Path(repo, name)
        size = here.stat().st_size if here and here.is_file() else HUB_BYTES.get(Path(name).name, 0)
        yield f"{repo}  {name}" + f"  {size:,} bytes" * bool(size) + "  to fetch" * (here is None)


def _stages(cfg: Config) -> tuple[str, list[tuple[int, int]]]:
    """A text on the stages, and (users, interactions) of each: from the data if it is here, else from the paper."""
    category = category_of(cfg.dataset)
    if category and not all(cached(REVIEWS, name, "dataset") for name in reviews_files(category)):
        sizes = TABLE_4.get(category, ())
        lines = [f"  D{t}: {users:,} users, {n:,} interactions" for t, (users, n) in enumerate(sizes, start=1)]
        return "\n".join(["stages, by the paper's Table 4 (the data is not here):", *(lines or ["  not known"])]), sizes
    with TemporaryDirectory() as folder:
        stages = setup.load_dataset(cfg, Path(folder, "world")).stages
    return report.statistics_table(statistics(stages)), [(len(stage.users), stage.interactions) for stage in stages]


def _meta_model(cfg: Config) -> Llama:
    """The model with its adapter on the meta device: shapes without storage."""
    scratch, folder, name = setup.from_scratch(cfg), folder_at_hand(cfg.base), cfg.base.rpartition("/")[2]
    if not (scratch or folder or name in MODELS):
        raise FileNotFoundError(f"the shape of {cfg.base} is not known here\nbuilt in are {', '.join(MODELS)}\n"
                                "pass --base a folder with its config.json")
    with torch.device("meta"):
        model = Llama(setup.llama_config(cfg) if scratch else
                      read_config(folder) if folder else LlamaConfig.from_dict(MODELS[name][0]))
        model.grow(cfg.levels * cfg.codes)
        inject(model, cfg.rank, cfg.alpha, cfg.dropout)
    return model


@torch.no_grad()
def explain(run: Run) -> None:
    """One test user of the last stage that has any, preferably one whose item is recommended, through every step."""
    model, data, ids, template, cfg = run.model, run.data, run.ids, run.template, run.cfg
    def text(item: int) -> str:
        return "{id} {title:.70}".format(**data.described(ids, item))
    stage = next(stage for stage in data.stages[::-1] if stage.current)
    test, ranker = examples(stage, "test", cfg.window)[:200], run.ranker(stage.number)
    owned = had(data.stages)
    own = [owned[e.user] for e in test] if cfg.seen == "exclude" else []
    ranks = ranker.ranks(model, test, own)  # (users,)
    example = test[chosen := int((ranks > 0).int().argmax())]
    prompt = template.prompt(example.history).to(model.device)  # (l,)
    loss = answer_loss(model, collate(sequences([example], template), model.device)).item()
    _, codes, scores = next(ranker.search(model, [example.history], own[chosen:chosen + 1]), (0, (), ()))
    beams = [(ids.item_of(code), score) for code, score in zip(codes, scores)]
    for step, value in (
            ("raw row", data.raw(example.user, example.target)),
            ("stage", f"D{stage.number}: a test pair, the last of the user's items in this stage"),
            *((f"history {i}", text(item)) for i, item in enumerate(example.history, start=1)),
            ("target", text(example.target)),
            ("prompt", f"{len(prompt)} tokens: {prompt.tolist()}"),
            ("answer", template.answer(example.target)),
            ("loss", f"{loss:.4f} nats per token (a guess among {ids.n_codes} codes: {math.log(ids.n_codes):.4f})"),
            *((f"beam {i}, {score:.2f}", text(items[0])) for i, (items, score) in enumerate(beams, start=1) if items),
            ("rank of the target", int(ranks[chosen]) or "not found")):
        print(f"{step:>22}  {value}")
