"""What this machine has for a run, and what it lacks:  python -m minipeso.runs.doctor

One line a finding, with the remedy where something is amiss. Works offline; a token is never shown. Exit 0 if
the demo can run; what the paper's run lacks is listed and is no failure.
"""
from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGES = {"torch": "2.6", "numpy": "1.26", "safetensors": "0.5", "huggingface-hub": "0.34", "tokenizers": "0.21"}
PAPER = "instruments", "meta-llama/Llama-3.2-1B"
DEMO_BYTES = 50 * 10**6  # a demo's run folder is a tenth of it
PAPER_BYTES = 2 * 10**9  # adapters, states, the items' vectors and the RQ-VAE's states are about 1.5 GB
DEMO_MEMORY = 10**9  # its peak, about
PAPER_MEMORY = 8 * 10**9  # of the GPU: 2.6 GB of weights and states, the rest is activations


class Finding(NamedTuple):
    name: str
    found: str
    remedy: str = ""  # nothing is amiss
    demo: bool = False  # the demo needs it too


def packages() -> Iterator[Finding]:
    """Python and the five packages, by their metadata: nothing is imported that may be missing."""
    old = sys.version_info < (3, 10)
    yield Finding("python", sys.version.split()[0], "install Python 3.10 or later" * old, True)
    for name, least in PACKAGES.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        fine = version[:1].isdigit() and _numbers(version) >= _numbers(least)
        yield Finding(name, version, "" if fine else f"pip install '{name}>={least}'", True)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in version.split("+")[0].split(".")[:2])


def machine() -> Iterator[Finding]:
    """Device, memory, and the disk under the run folder."""
    import torch
    if torch.cuda.is_available():
        size = torch.cuda.get_device_properties(0).total_memory
        small = f"the 1B model needs about {PAPER_MEMORY / 1e9:.0f} GB: lower --batch and --eval-batch"
        yield Finding("GPU", f"{torch.cuda.get_device_name(0)}, {size / 1e9:.0f} GB", small if size < PAPER_MEMORY else "")
    else:
        yield Finding("GPU", "none that torch can use", "the 1B model needs one; --base tiny runs on the CPU")
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield Finding("memory", f"{free / 1e9:.1f} GB free, {os.cpu_count()} cores",
                  "close other programs" if free < DEMO_MEMORY else "", True)
    room = shutil.disk_usage(".").free
    if not os.access(".", os.W_OK):
        yield Finding("disk here", "this folder cannot be written", "go to one that is yours, or name it by --out", True)
    else:
        yield Finding("disk here", f"{room / 1e9:.1f} GB free", "make room, or let --out lie elsewhere" * (room < PAPER_BYTES),
                      room < DEMO_BYTES)


def hub() -> Iterator[Finding]:
    """Token, cache, and whether the missing files of the paper's run can be had."""
    from huggingface_hub import constants, get_token
    from minipeso.config import CATEGORIES
    from minipeso.files.download import REVIEWS, cached, reviews_files
    from minipeso.runs.explain import HUB_BYTES
    token = "HF_TOKEN" if os.environ.get("HF_TOKEN") else constants.HF_TOKEN_PATH
    gated = cached(PAPER[1], "model.safetensors") is None
    yield Finding("token", f"present, from {token}" if get_token() else "none",
                  "" if get_token() or not gated else "hf auth login, for gated weights; the ungated copy needs none")
    files = [(PAPER[1], name, "model") for name in ("config.json", "tokenizer.json", "model.safetensors")]
    files += [(REVIEWS, name, "dataset") for name in reviews_files(CATEGORIES[PAPER[0]])]
    missing = [file for file in files if cached(*file) is None]
    need = sum(HUB_BYTES.get(name.rpartition("/")[2], 0) for _, name, _ in missing)
    cache = Path(constants.HF_HUB_CACHE)
    room = shutil.disk_usage(next(p for p in (cache, *cache.parents) if p.exists())).free
    yield Finding("cache", f"{len(files) - len(missing)} of {len(files)} files of the paper's run in {cache}; "
                  f"{need / 1e9:.1f} GB to fetch, {room / 1e9:.1f} GB free",
                  "make room, or set HF_HOME to a larger disk" * (need > room))
    for repo, kind in ((PAPER[1], "model"), (REVIEWS, "dataset")):
        names = [name for owner, name, _ in missing if owner == repo]
        yield _access(repo, kind, names)


def _access(repo: str, kind: str, names: list[str]) -> Finding:
    from minipeso.files.download import HubError, can_fetch
    if not names:
        return Finding(repo, "complete in the cache, no access needed")
    try:
        can_fetch(repo, names[0], kind)
    except HubError as error:  # the finding, not a failure of the doctor's
        what, found, remedy = str(error).splitlines()
        return Finding(repo, f"{what}; {found}", remedy)
    return Finding(repo, f"can be fetched ({len(names)} files)")


def main() -> int:
    findings = list(packages())
    if not any(f.remedy for f in findings):  # else there is nothing to look with
        findings += [*machine(), *hub()]
    for f in findings:
        print(f"{'ok' if not f.remedy else 'amiss':<6} {f.name}: {f.found}" + f"\n       -> {f.remedy}" * bool(f.remedy))
    broken, lacking = ([f.name for f in findings if f.remedy and (f.demo or not only)] for only in (True, False))
    print(f"\nthe demo cannot run: {', '.join(broken)}" if broken else "\nthe demo can run: python train.py")
    command = f"python train.py --dataset {PAPER[0]} --lambda 2.0"
    print(f"the paper's run lacks: {', '.join(lacking)}" if lacking else f"the paper's run can start: {command}")
    return 5 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
