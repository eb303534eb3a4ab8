"""One run, as train.py tells it: what it stands on, which phases are finished, and what it leaves in its folder.

    RUN/          config.json  stats.md  metrics.jsonl  semantic_ids.json  adapters/stage-<t>/  checkpoints/
                  results.json  ranks.json  absent.json  expected.json
    RUN/METHOD/   adapters and results of a method that --method's is compared with"""
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minipeso import parallel
from minipeso.config import Config
from minipeso.continual import stage_data, train_stage
from minipeso.evaluate import Ranker
from minipeso.files.hub import checkpoint_folder, checkpoint_hash
from minipeso.files.peft import save_peft
from minipeso.metrics import ranks_of
from minipeso.methods import ADAPTERS, MEMORY, METHODS
from minipeso.runs import identity, report, setup
from minipeso.runs.checkpoints import KEPT, CheckpointError, Checkpoints, Stop, locked, remove, sweep, whole, write_file
from minipeso.runs.log import Log, bar
from minipeso.semantic_ids import SemanticIDs
from minipeso.snapshot import Snapshot, restore, snapshot
from minipeso.stages import Example, Stage, examples, had, questions, statistics
from minipeso.state import Progress
from minipeso.synthetic import oracle

FIRST = "LoRA"  # who learns D_1, once for all methods


@contextmanager
def begun(cfg: Config) -> "Iterator[Run]":
    """The run in cfg.out, which no other process works in; signals are answered when it is safe."""
    with locked(Path(cfg.out)), Stop.heard():
        yield Run(cfg)


class Run:
    """cfg, stages, known items, ids, template, model; found = {method: {stage: items (users, 10)}}, the absent last."""
    def __init__(self, cfg: Config, writes: bool = True):
        self.cfg, self.out, self.writes = cfg, Path(cfg.out), writes
        self.goes_on = cfg.resume and (self.out / "config.json").is_file()
        self.told: list[str] = []
        self.logs: dict[str, Log] = {}
        self.found: dict[str, dict[str, Tensor]] = {}
        self.seconds: dict[str, float] = {}
        self.checkpoints = Checkpoints(self.out / "checkpoints", identity.digest(cfg), self.log)
        self.epochs = self.checkpoints.epochs

    # -- what it stands on

    def load_data(self, language: bool = True) -> None:
        """Interactions -> stages D_1 .. D_T, shown as the paper's Table 4. The folder begins, or is gone on with."""
        cfg = self.cfg
        with self.timed("data"), parallel.first_goes_ahead():
            if self.goes_on:
                identity.agree(self.out, cfg)
            elif not parallel.rank():
                shutil.rmtree(self.out / "world", ignore_errors=True)  # the demo's, of other settings
            self.tokenizer = setup.load_tokenizer(cfg) if language else None  # a closed gate is told before the data
            self.data = setup.load_dataset(cfg, self.out / "world")
            hashes = setup.fingerprints(self.data)
            if self.tokenizer:
                hashes["base"] = checkpoint_hash(checkpoint_folder(cfg.base))
            if self.goes_on:
                identity.agree(self.out, cfg, hashes)
            if self.writes and not parallel.rank():
                self.clear_folder(hashes)
        self.stages, self.known, self.n_items = self.data.stages, self.data.known, len(self.data.keys)
        self.tell(report.statistics_table(statistics(self.stages)), "\n".join(self.data.notes))
        if self.writes:  # what there is to gain, before anything is learnt
            self.found = {name: METHODS[name].learn(self, name) for name in ("transitions", *report.PREMIUMS.values())}
            ranks = {name: self.ranks(found) for name, found in self.found.items()}
            self.premiums = report.premiums(ranks, {str(s.number): len(s.users) for s in self.stages})
            self.tell(report.premium_lines(self.premiums))

    def clear_folder(self, hashes: dict[str, str]) -> None:
        """What is unfinished, broken or of another run goes; metrics.jsonl will be said again."""
        if not self.goes_on:
            identity.void(self.out, self.cfg)
            identity.begin(self.out, self.cfg, hashes)
        sweep(self.out)
        write_file(self.out / "metrics.jsonl", "")

    def load_base(self) -> None:
        """The items' semantic IDs, prompts of them, and the base with their tokens: pretrained, or learnt on D_1."""
        cfg = self.cfg
        with self.timed("semantic IDs"), parallel.first_goes_ahead():
            self.model = setup.load_model(cfg)
            if self.tokenizer and self.model.device.type == "cpu":
                print(f"note: without a GPU {cfg.base} is slow; --base tiny is made for a CPU\n")
            self.ids = self.data.ids or self.fit_ids()
        self.template = setup.make_template(cfg, self.ids, self.tokenizer)
        self.tell(self.ids.table())
        if self.writes:
            write_file(self.out / "semantic_ids.json", self.ids.json())
        self.generator = torch.Generator().manual_seed(cfg.seed)  # of new rows, then of the adapter
        self.model.grow(self.ids.codes.shape[1] * self.ids.n_codes, self.generator, cfg.init)
        if setup.from_scratch(cfg):
            for name, t in self.once("base", self.learn_base).items():
                self.model.get_parameter(name).data.copy_(t)

    def fit_ids(self) -> SemanticIDs:
        """An RQ-VAE on the items' vectors; a Llama's, which take long, are kept until it is done."""
        cfg, data = self.cfg, self.data
        def vectors() -> dict[str, Tensor]:
            with bar("texts", sum(map(len, data.spoken)), "text") as advance:
                return {"x": setup.item_vectors(cfg, data, self.model, self.tokenizer, advance.update)}
        def epochs(progress: Progress, some: range) -> Iterable[int]:
            return tqdm(self.epochs("semantic-ids")(progress, some), "RQ-VAE", len(some), leave=False, unit="epoch")
        def fit() -> dict[str, Tensor]:
            x = self.once("item-vectors", vectors)["x"].to(setup.device_of(cfg))
            ids = SemanticIDs.fit(x, cfg.rqvae_epochs, cfg.seed, cfg.ids == "unique", self.born(), epochs,
                                  levels=cfg.levels, codes=cfg.codes, d_latent=cfg.latent, hidden=cfg.rqvae_hidden)
            return {"codes": ids.codes, "collisions": torch.tensor(ids.collisions_before)}
        fitted = self.once("semantic-ids", fit)
        remove(self.checkpoints.folder / "item-vectors")
        return SemanticIDs(fitted["codes"], cfg.codes, int(fitted["collisions"]))

    def born(self) -> list[int] | None:
        """The stage in which each item can first be recommended; None if the tokenizer is to see all at once."""
        if self.cfg.ids_from == "all":
            return None
        born = {item: t for t, known in reversed([*enumerate(self.known, 1)]) for item in known}
        return [born[item] for item in range(self.n_items)]

    def learn_base(self) -> dict[str, Tensor]:
        """The model's own parameters after D_1's training pairs."""
        cfg = replace(self.cfg, lr=self.cfg.base_lr, epochs=self.cfg.base_epochs, proximal="none")
        data = stage_data(self.stages[:1], self.template, cfg.window)
        train_stage(self.model, data, 0, cfg, self.log("base"), self.epochs("base"))
        return dict(self.model.named_parameters())

    # -- phases

    def once(self, phase: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of a phase: from an earlier start that finished it, or computed now and kept."""
        finished = self.checkpoints.finished(phase)
        if not finished and not self.writes:
            raise CheckpointError(f"{self.out} is not complete\ncheckpoints/{phase} is missing\nrun it with --resume")
        if not finished:
            finished = compute(), {}
            self.checkpoints.finish(phase, *finished)
        return finished[0]

    def done(self, name: str, t: int) -> bool:
        """Whether an earlier start finished D_t; then its model and what it recommended are put back."""
        tensors, facts = self.checkpoints.finished(f"{name}-stage-{t}") or (None, None)
        if facts:
            restore(self.model, Snapshot(tensors, facts["tied"], ADAPTERS[facts["adapter"]]))
            self.found[name] = {t: torch.tensor(f).long().reshape(-1, 10) for t, f in facts["found"].items()}
        return bool(facts)

    def left(self, name: str) -> Iterator[int]:
        """The stages t = 2 .. T that method `name` has still to learn, from the model of the last finished one."""
        restore(self.model, self.first)
        self.found[name] = dict(self.found[FIRST])
        last = next((t for t in range(len(self.stages), 1, -1) if self.done(name, t)), 1)
        yield from range(last + 1, len(self.stages) + 1)

    def save(self, name: str, t: int, found: Tensor) -> None:
        """Keeps the model after D_t, what was recommended until then, and the adapter for others to load."""
        self.found.setdefault(name, {})[str(t)] = found
        if self.cfg.memory:
            self.log(name)({"stage": t, "memory": self.weight})
        with whole(self.folder(name) / "adapters" / f"stage-{t}") as folder:
            save_peft(self.model, folder, self.cfg.base, self.whole_tables(t))
        tensors, tied, adapter = snapshot(self.model, self.whole_tables(2))
        self.checkpoints.finish(f"{name}-stage-{t}", tensors, {
            "tied": tied, "adapter": adapter.__name__, "found": {s: f.tolist() for s, f in self.found[name].items()}})
        for old in self.checkpoints.numbered(f"{name}-stage-")[:-KEPT]:
            remove(old)

    def whole_tables(self, t: int) -> bool:
        """Whether training has moved the whole token tables by the end of D_t; by D_2: ever."""
        return "tables" in (self.cfg.first_trains, *[self.cfg.later_trains] * (t > 1))

    # -- what it says and leaves

    def questions(self, t: int, shown: Stage | None = None) -> tuple[list[Example], list[set[int]]]:
        """D_t's test questions (as `shown`, if given, has them), the absent users' behind; what each user has had."""
        asked = questions([*self.stages[:t - 1], shown or self.stages[t - 1]], self.cfg.window)
        own = had(self.stages[:t])
        return asked, [own[e.user] for e in asked] if self.cfg.seen == "exclude" else []

    def recommend(self, t: int, shown: Stage | None = None) -> Tensor:
        """(n, 10) items, the model's best for every question of D_t."""
        test, own = self.questions(t, shown)
        with self.timed("test"), bar(f"test D{t}", len(test), "user") as advance:
            return self.ranker(t, shown).found(self.model, test, own, progress=advance.update)[:, :10]

    def ranks(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """{stage: (users,)}: where the item that each took stands among those found, 0 if it is not there."""
        targets = {t: torch.tensor([e.target for e in self.questions(int(t))[0]], dtype=torch.long) for t in found}
        return {t: ranks_of(items, targets[t]) for t, items in found.items()}

    @cached_property
    def truth(self) -> dict[Example, Tensor]:
        """{test question: p (I,), how likely each item is}: of the demo, whose world is known; {} of other data."""
        cfg, demo = self.cfg, self.cfg.dataset == "demo"
        asked = [e for stage in self.stages for e in self.questions(stage.number)[0]] if demo else []
        events = [(self.data.users[e.user], self.data.keys[e.target]) for e in asked]
        world = cfg.world_users, cfg.world_items, cfg.world_alpha, cfg.data_seed
        return dict(zip(asked, oracle(*world, events, self.data.keys))) if demo else {}

    def expected(self, t: int, found: Tensor) -> Tensor:
        """p (n, 10): how likely each item found for D_t's questions is, where the truth is known."""
        asked = self.questions(t)[0]
        return torch.stack([self.truth[e][items] * (items >= 0) for e, items in zip(asked, found, strict=True)])

    def ranker(self, t: int, shown: Stage | None = None, beams: int = 0) -> Ranker:
        """The search for D_t's known items; with --memory, as much of it as D_t's validation questions want."""
        cfg, stage, known = self.cfg, self.stages[t - 1], self.data.known[t - 1]
        ranker = Ranker(self.ids, known, self.template, max(beams, cfg.beams), cfg.hit)
        if cfg.memory:
            asked = examples(shown or stage, "valid", cfg.window)
            own = [{*stage.history[e.user], *stage.training(e.user)} for e in asked] if cfg.seen == "exclude" else []
            counted = MEMORY(self.stages[:t], known, self.n_items, ranker.trie)
            self.weight = ranker.weigh(self.model, counted, asked, own)
        return ranker

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began

    def log(self, phase: str) -> Log:
        """One log per method, whatever the stage; and one of the base and of the IDs."""
        name = phase.partition("-stage-")[0]
        return self.logs.setdefault(name, Log(self.out / "metrics.jsonl" if self.writes else None, name))

    def tell(self, *parts: str) -> None:
        """Prints, and adds to stats.md."""
        print(*parts, sep="\n\n", end="\n\n")
        self.told += parts
        if self.writes:
            write_file(self.out / "stats.md", "\n\n".join(self.told) + "\n")

    def folder(self, name: str) -> Path:
        """The run folder is the main method's; one that it is compared with has a folder inside."""
        return self.out if name in (self.cfg.method, FIRST) else self.out / name

    def finish(self, name: str) -> None:
        """Writes the method's results.json and ranks.json."""
        log = self.log(name)
        more = {"references": report.references(self.stages, self.known), "premiums": self.premiums,
                "seconds": self.seconds | {name: log.seconds}}
        found, folder = self.found[name], self.folder(name)
        with parallel.first_goes_ahead():  # the others' tables read what it wrote
            folder.mkdir(parents=True, exist_ok=True)
            if self.truth:  # before results.json, which says that all is there
                p = {t: self.expected(int(t), items).tolist() for t, items in found.items()}
                report.write_json(folder / "expected.json", p)
            report.write(folder, self.cfg.of(name), self.stages, self.ranks(found), log.text, more)

    def finished_before(self) -> bool:
        """Whether, with --resume, nothing is left to compute; --explain needs the model again."""
        if not self.goes_on or self.cfg.explain:
            return False
        identity.agree(self.out, self.cfg)
        return all((self.folder(name) / "results.json").is_file() for name in self.cfg.methods)

    def tables(self) -> None:
        """Prints the results of all methods side by side."""
        print(report.tables(*report.side_by_side({name: self.folder(name) for name in self.cfg.methods})))
        seconds = sum(self.seconds.values()) + sum(log.seconds for log in self.logs.values())
        print(f"\n{seconds:.0f} s, peak {report.peak_memory() / 2**20:,.0f} MiB; {self.out / 'results.json'}")
