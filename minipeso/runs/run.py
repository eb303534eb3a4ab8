"""One run, piece by piece: what train.py tells as a story, and what the experiments repeat."""
from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from minipeso import continual, parallel
from minipeso.runs import disk, prepare, report
from minipeso.runs.checkpoint import Snapshot, packed, restore, snapshot, unpacked
from minipeso.config import Config
from minipeso.files.download import content_hash
from minipeso.evaluate import Ranker
from minipeso.rivals.evorec import EvoRec, inactive
from minipeso.runs.journal import Clock, Journal, counter
from minipeso.runs.keeper import KEPT, Keeper, numbered
from minipeso.llama import Llama
from minipeso.lora import LoRALinear, adapter_parameters, inject
from minipeso.files.peft import save_peft
from minipeso.progress import Progress
from minipeso.semantic_ids import SemanticIDs
from minipeso.stages import Example, Stage, examples, statistics, statistics_table
from minipeso.tokens import Template
from minipeso.rivals.twotower import TwoTowers


SEARCH = 4  # ranking a user costs about as much as training on four pairs: for bars that count both


class Run(NamedTuple):
    cfg: Config
    out: Path
    clock: Clock
    data: prepare.Dataset
    ids: SemanticIDs
    template: Template
    model: Llama
    towers: TwoTowers  # beside the LLM, for those who ask for a two-tower method
    tick: Callable[[int], None] | None = None  # takes the place of bars: pairs trained, SEARCH a user ranked

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    def journal(self, name: str) -> Journal:
        return Journal(self.out / "metrics.jsonl", name, self.tick)

    def keeper(self, phase: str, journal: Journal) -> Keeper:
        return Keeper(self.checkpoints, phase, report.digest(self.cfg), journal)

    def tables(self, t: int) -> bool:
        """Whether training has moved the whole token tables by the end of D_t; by D_2: ever."""
        return "tables" in (self.cfg.first_trains, *[self.cfg.later_trains] * (t > 1))

    def save_adapter(self, out: Path, t: int) -> None:
        """The stage's PEFT folder, with hashes: of a flipped bit safetensors says nothing."""
        folder = out / "adapters" / f"stage-{t}"
        save_peft(self.model, folder, self.cfg.base, self.tables(t))
        disk.seal(folder)


class First(NamedTuple):
    """What all methods share: the base with a new adapter, the model of D_1, and D_1's ranks."""

    base: Snapshot
    model: Snapshot
    ranks: Tensor


def load(cfg: Config, base: bool = True) -> tuple[prepare.Dataset, str]:
    """Interactions -> stages D1 .. D5, and their Table 4; the run folder begins, or is gone on with (cfg.resume)."""
    out = Path(cfg.out)
    tidy(out, cfg)
    if report.goes_on(out, cfg):
        report.agree(out, cfg)  # before anything is written
    data = prepare.load_dataset(cfg, out / "world")
    report.begin(out, cfg, prepare.fingerprints(cfg, data, base))
    stats = "\n".join([statistics_table(statistics(data.stages)), "", *data.notes])
    print(stats, end="\n\n")
    disk.write_file(out / "stats.md", stats + "\n")
    return data, stats


def two_towers(cfg: Config) -> tuple[prepare.Dataset, dict[str, dict[str, Tensor]], Clock]:
    """A run of two-tower methods alone: they share the data with the LLM, and need no base."""
    with parallel.first_goes_ahead():
        data = load(cfg, base=False)[0]
    clock, ranks = Clock(), {}
    towers = TwoTowers(data.stages, data.known, len(data.keys), cfg)
    for name in cfg.methods:
        ranks[name] = towers.learn(name)
        clock(name)
    return data, ranks, clock


def set_up(cfg: Config, tick: Callable[[int], None] | None = None) -> Run:
    """Data, semantic IDs, prompts, and the base model with a new adapter."""
    out, clock = Path(cfg.out), Clock()
    with parallel.first_goes_ahead():
        prepare.open_gate(cfg)
        data, stats = load(cfg)
        clock("data")

        # semantic IDs: text -> vector -> RQ-VAE -> L codes an item
        model, tokenizer = prepare.load_model(cfg), prepare.load_tokenizer(cfg)
        if tokenizer and model.device.type == "cpu":
            print(f"note: without a GPU {cfg.base} is slow; --base tiny is made for a CPU\n")
        journal = Journal(out / "metrics.jsonl", "")
        ids = semantic_ids(cfg, data, model, tokenizer, journal, tick is None)
    template = prepare.make_template(cfg, ids, tokenizer)
    if report.goes_on(out, cfg) and (out / "tokens.json").is_file():
        prepare.agree_on_tokens(out / "tokens.json", ids, template)
    disk.write_file(out / "tokens.json", json.dumps(prepare.vocabulary(ids, template)))
    print(ids.table(), end="\n\n")
    disk.write_file(out / "semantic_ids.json", ids.json())
    report.remember(out, "ids", content_hash(out / "semantic_ids.json"))
    disk.write_file(out / "stats.md", f"{stats}\n\n{ids.table()}\n")
    clock("semantic IDs", journal.earlier)

    # the base: pretrained, or learnt here on D0; then LoRA around every projection
    towers = TwoTowers(data.stages, data.known, len(data.keys), cfg)
    run = Run(cfg, out, clock, data, ids, template, model, towers, tick)
    generator = torch.Generator().manual_seed(cfg.seed)
    model.grow(ids.codes.shape[1] * ids.n_codes, generator, cfg.init)
    if prepare.from_scratch(cfg):
        learn_base(run)
    inject(model, cfg.rank, cfg.alpha, cfg.dropout, generator=generator)
    if cfg.compile:
        model.model.compile(dynamic=True)
    lora, total = (sum(p.numel() for p in ps) for ps in (adapter_parameters(model), model.parameters()))
    print(f"{total:,} parameters, {lora:,} of them in the adapter\n")
    clock("base")
    return run


def tidy(out: Path, cfg: Config) -> None:
    """Removes the unfinished files of a start that was killed."""
    for folder in (out, *(report.folder_of(out, cfg, name) for name in cfg.methods)):
        for place in (folder, *(folder / "adapters").glob("*")):
            disk.sweep(place)


def semantic_ids(cfg: Config, data: prepare.Dataset, model: Llama, tokenizer: Tokenizer | None, journal: Journal,
                 show: bool) -> SemanticIDs:
    """The items' IDs, fixed for all stages: those that came with the data, those that an earlier start committed, or an
    RQ-VAE on the items' vectors, which goes on where it was interrupted. A Llama's vectors are kept until then."""
    if data.ids_file:
        return prepare.given_ids(cfg, data)
    vectors, ids = (Keeper(Path(cfg.out) / "checkpoints", phase, report.digest(cfg), journal)
                    for phase in ("item-vectors", "semantic-ids"))
    done = ids.finished()
    if done:
        disk.remove(vectors.folder / vectors.phase)
        return SemanticIDs(done[0]["codes"], cfg.codes, done[1]["collisions_before"])
    kept = vectors.finished()
    x = kept[0]["vectors"] if kept else prepare.item_vectors(
        cfg, data, model, tokenizer, counter("titles", len(data.texts), "item") if show else lambda n: None)
    if not (kept or cfg.text_width):
        vectors.finish({"vectors": x}, {})

    def epochs(at: Progress, all_epochs: range) -> Iterator[int]:
        left = ids.steps(ids.begin(at), all_epochs)
        return tqdm(left, "RQ-VAE", len(all_epochs), False, initial=at.done, unit="epoch", disable=not show)
    found = prepare.fit_ids(cfg, x, steps=epochs)
    ids.finish({"codes": found.codes}, {"collisions_before": found.collisions_before})
    disk.remove(vectors.folder / vectors.phase)
    return found


def learn_base(run: Run) -> None:
    """The base on D_0. Its checkpoint holds {parameter name: tensor}."""
    journal = run.journal("base")
    keeper = run.keeper("base", journal)
    done, own = keeper.finished(), dict(run.model.named_parameters())
    if done:
        for name, p in own.items():
            p.data.copy_(done[0][name])
    else:
        continual.learn_base(run.model, run.data.stages[0], run.template, run.cfg, journal, keeper)
        keeper.finish(own, {})
    run.clock("base", journal.earlier)


def learn_first(run: Run) -> First:
    """D_1 by a new adapter, once for all methods."""
    base, journal = snapshot(run.model, run.tables(2)), run.journal("LoRA")
    keeper = run.keeper("first", journal)
    done = keeper.finished()
    if done:
        first = First(base, unpacked(*done, LoRALinear), go_on(run, *done, LoRALinear)["1"])
    else:
        continual.learn_first(run.model, run.data.stages[:1], run.template, run.cfg, journal, keeper)
        run.save_adapter(run.out, 1)
        first = First(base, snapshot(run.model, run.tables(2)), rank_users(run, 1))
        finish(keeper, first.model, {"1": first.ranks})
    run.clock("D1", journal.earlier)
    return first


def learn_later(run: Run, name: str, first: First, folder: Path | None = None,
                everyone: bool = False) -> dict[str, Tensor]:
    """Method `name` from the model of D_1 through D_2 .. D_T: learn the stage, save the adapter (into
    `folder`), rank every test user's next item. -> {stage: ranks (users,)}; with `everyone`, the inactive
    users' ranks follow those of the stage's users."""
    cfg, method, journal, stages = run.cfg, continual.method_named(name), run.journal(name), run.data.stages
    if method.system == "two-tower":
        return run.towers.learn(name)
    results = numbered(run.checkpoints, f"{name}-stage-")  # of an earlier start; each has the ranks until then
    restore(run.model, first.model)
    evorec, ranks = EvoRec(len(run.data.keys), cfg) if method.system == "evorec" else None, {"1": first.ranks}
    if results:
        done = run.keeper(results[-1].name, journal).finished()
        ranks = go_on(run, *done, LoRALinear, method.adapter)
    for t in range(len(ranks) + 1, len(stages) + 1):
        keeper, shown = run.keeper(f"{name}-stage-{t}", journal), stages[t - 1]
        if evorec:
            shown = evorec.learn_stage(run.model, stages[:t], run.template, journal, keeper)
        else:
            continual.learn_stage(run.model, method, stages[:t], run.template, cfg, first.base, journal, keeper)
        run.clock(name)
        if folder:
            run.save_adapter(folder, t)
        ranks[str(t)] = rank_users(run, t, shown, inactive(stages[:t]) if everyone else [])
        finish(keeper, snapshot(run.model, run.tables(2)), ranks)
        for old in numbered(run.checkpoints, f"{name}-stage-")[:-KEPT]:
            disk.remove(old)
        run.clock(f"{name}: test")
    run.clock(name, journal.earlier)
    return ranks


def finish(keeper: Keeper, model: Snapshot, ranks: dict[str, Tensor]) -> None:
    """Commits the model after a stage, and all ranks until then."""
    tensors, facts = packed(model)
    keeper.finish(tensors, facts | {"ranks": {t: r.tolist() for t, r in ranks.items()}})


def go_on(run: Run, tensors: dict[str, Tensor], facts: dict, *kinds: type[LoRALinear]) -> dict[str, Tensor]:
    """The model of a committed stage -> the ranks until then."""
    restore(run.model, unpacked(tensors, facts, *kinds))
    ranks = {t: torch.tensor(r, dtype=torch.long) for t, r in facts["ranks"].items()}
    if run.tick:
        run.tick(SEARCH * sum(len(r) for t, r in ranks.items() if len(ranks) == 1 or t != "1"))
    return ranks


def rank_users(run: Run, t: int, shown: Stage | None = None, besides: Sequence[Example] = ()) -> Tensor:
    """The rank of every test item of D_t (as `shown`, if its histories were shortened) among what the model now
    recommends, 0 if it is not there; then those of the questions `besides`."""
    test = [*examples(shown or run.data.stages[t - 1], "test", run.cfg.window), *besides]
    ranker = Ranker(run.ids, run.data.known[t - 1], run.template, run.cfg.beams, run.cfg.hit)
    bar = (lambda n: run.tick(SEARCH * n)) if run.tick else counter(f"test D{t}", len(test), "user")
    return ranker.ranks(run.model, test, run.cfg.eval_batch, bar)
