"""The cells of a table: train.py learns them, each once; here they are asked for and read.

    OUT/seed-<s>[-user-disjoint]/        a run folder of train.py: pretrain, compared with all other cells
        <cell>/results.json  ranks.json   of peso@lambda=20, say; pretrain's lie in the folder itself
        <cell>/diverged.txt               instead: why there are none. Such a cell is not tried again
        log.txt                           the commands, and what train.py said"""
import dataclasses
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import minipeso
from minipeso.config import Config, UsageError, flag
from minipeso.runs import identity, report, setup
from minipeso.runs.checkpoints import CheckpointError, Stop, write_file

TRAIN = Path(minipeso.__file__).parents[1] / "train.py"
ERRORS = {1: RuntimeError, 2: UsageError, 3: CheckpointError}  # by train.py's exit code; any other: OSError


class Result(NamedTuple):
    """What one seed of a cell gave; without ranks it diverged."""
    ranks: dict[str, Tensor]  # {stage: (users,)}: where the item that each took stands
    training: dict[str, dict]  # {stage: {what: a number}} of report.PICKS
    diverged: str = ""
    seconds: float = 0.0  # of learning D_2 .. D_T, without ranking
    own: dict[str, Tensor] = {}  # {stage: report.per_user of U_A, the stage's users}
    absent: dict[str, Tensor] = {}  # {stage: of U_I, earlier users who are not in it}
    premiums: dict[str, list[float]] = {}  # what adapting and remembering can earn: (mean, low, high)

    @property
    def both(self) -> dict[str, Tensor]:
        """{stage: of U, both, one behind the other}."""
        return {t: torch.cat([self.own[t], absent]) for t, absent in self.absent.items()}


class Job(NamedTuple):
    """One train.py command: the cells of one seed and split."""
    folder: Path
    cells: list[str]
    flags: list[str]  # of train.py: the user's, then seed and split

    def place(self, cell: str) -> Path:
        return self.folder if cell == "pretrain" else self.folder / cell

    def diverged(self, cell: str) -> bool:
        return (self.place(cell) / "diverged.txt").is_file()

    def missing(self) -> list[str]:
        """The cells still to be learnt, in train.py's order: its --method, pretrain, comes last."""
        return [cell for cell in sorted(self.cells, key="pretrain".__eq__)
                if not self.diverged(cell) and not (self.place(cell) / "results.json").is_file()]

    def start(self) -> subprocess.Popen:
        """In a session of its own: Ctrl-C reaches it through us, and once."""
        compare = ",".join(cell for cell in self.cells if not self.diverged(cell))
        command = [sys.executable, str(TRAIN), *self.flags, "--method", "pretrain", "--compare", compare,
                   "--out", str(self.folder), "--resume"]
        tqdm.write(shlex.join(command), file=sys.stderr)
        self.folder.mkdir(parents=True, exist_ok=True)  # for log.txt; the run itself begins without a config.json
        with open(self.folder / "log.txt", "a") as log:
            print(f"\n$ {shlex.join(command)}", file=log, flush=True)  # before what the command itself says
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def ended(self, code: int) -> bool:
        """Whether to start it again: a cell (or D_1, so all) diverged, and is marked. Any other failure is ours."""
        log, first = self.folder / "log.txt", self.folder / "checkpoints" / "LoRA-stage-1"
        said = log.read_text(errors="replace").rpartition("\n$ ")[2]  # by the last command alone
        message = said.rpartition("\nerror: ")[2].strip() if "\nerror: " in said else (
            f"train.py ended with exit code {code}\n{said.splitlines()[-1]}\nread {log}")
        if code not in (0, 4):  # 4: a number is not finite
            raise ERRORS.get(code, OSError)(message)
        for cell in self.missing()[:1 if first.is_dir() else None] if code == 4 else []:
            self.place(cell).mkdir(exist_ok=True)  # it may not have come to a checkpoint
            write_file(self.place(cell) / "diverged.txt", message.splitlines()[0] + "\n")
        return code == 4 and bool(self.missing())

    def result(self, cell: str) -> Result:
        place = self.place(cell)
        if self.diverged(cell):
            return Result({}, {}, (place / "diverged.txt").read_text().strip())
        results, ranks = report.load(place)
        return Result(ranks, results["training"], "", results["seconds"].get(cell, 0.0),
                      *report.per_user(place, ranks), results["premiums"])


def agree(cfg: Config) -> None:
    """Cells of other settings or data are not mixed: UsageError names what differs from those in cfg.out."""
    out, hashes, kind = Path(cfg.out), {}, ("method", "seed", "split", "world_alpha")
    for file in sorted(out.glob("seed-*/config.json")):
        if not cfg.resume:
            raise UsageError(f"{out} already holds cells\n{file.parent} is there\n"
                             "add --resume to go on from them, or name another --out")
        there = identity.read_json(file, "name another --out")
        mine = dataclasses.replace(cfg, **{name: there.get(name) for name in kind})
        if (which := (mine.split, mine.world_alpha)) not in hashes:  # read once: a large data set takes minutes
            hashes[which] = setup.fingerprints(setup.load_dataset(mine, out / f"world-{mine.world_alpha}"))
        identity.agree(file.parent, mine, hashes[which])


def fill(cfg: Config, flags: list[str], cells: list[str], seeds: int, workers: int = 1,
         **kind: str | float) -> dict[str, list[Result]]:
    """Every cell's results for seeds 0 .. seeds - 1 with cfg's `flags`, and settings that cells of another `kind` have
    otherwise; only those are learnt that are not there."""
    name = "".join(f"-{value}" for setting, value in kind.items() if value != getattr(cfg, setting))
    flags = [*flags, *(part for setting, value in kind.items() for part in (flag(setting), f"{value}")), "--seed"]
    jobs = [Job(Path(cfg.out) / f"seed-{seed}{name}", cells, [*flags, str(seed)]) for seed in range(seeds)]
    learn(jobs, workers)
    return {cell: [job.result(cell) for job in jobs] for cell in cells}


def learn(jobs: list[Job], workers: int) -> None:
    """Runs the jobs that lack cells, `workers` at a time. However it ends, each saves its epoch and is waited for."""
    waiting, running = [job for job in jobs if job.missing()], {}
    with Stop.heard(), tqdm(total=sum(len(job.cells) for job in jobs), desc="cells", unit="cell") as bar:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    job = waiting.pop(0)
                    running[job.start()] = job
                time.sleep(0.2)  # starting takes seconds
                for process in [process for process in running if process.poll() is not None]:
                    job = running.pop(process)
                    waiting[:0] = [job] * job.ended(process.returncode)  # without the cell that diverged
                bar.update(bar.total - sum(len(job.missing()) for job in jobs) - bar.n)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
