"""What this machine has for a run, and what it lacks, each with its remedy:  python -m minipeso.runs.doctor

Works offline, never shows a token. Exit 0 if the demo can run; what only the paper's run lacks is no failure.
A finding is (name, state, remedy or "" if nothing is amiss, whether the demo needs it)."""
import os
import re
import shutil
import sys
from importlib import metadata

BASE, CATEGORY = "meta-llama/Llama-3.2-1B", "Musical_Instruments"
PAPER = "python train.py --dataset instruments --lambda 2.0"
GB = 10**9


def packages():
    """What pyproject.toml asks for. Nothing is imported that may be missing: metadata.PackageNotFoundError names it."""
    for line in metadata.requires("minipeso"):
        name, least = re.match(r"([\w-]+).*>=([\d.]+)", line).groups()
        if "extra" not in line:
            version = metadata.version(name)
            has, wants = ([int(n) for n in re.findall(r"\d+", text)[:2]] for text in (version, least))
            yield name, version, f"pip install '{name}>={least}'" * (has < wants), True


def machine():
    """Device, and the disk under the run folder, against what a run needs, about."""
    import torch
    size = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    yield ("GPU", f"{torch.cuda.get_device_name(0)}, {size / GB:.0f} GB" if size else "none that torch can use",
           "the 1B model needs one of about 8 GB; --base tiny runs on the CPU" * (size < 8 * GB), False)
    room, barred = shutil.disk_usage(".").free, not os.access(".", os.W_OK)
    yield ("disk here", f"{room / GB:.1f} GB free" + ", but this folder cannot be written" * barred,
           "make room, or name another folder by --out" * (barred or room < 2 * GB), barred or room < GB / 20)


def hub():
    """The token, and whether the paper's files are here or can be had now: one request per missing one."""
    from huggingface_hub import constants, get_token
    from minipeso.files.download import REVIEWS, HubError, cached, can_fetch, reviews_files
    source = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "hf auth login"
    yield "token", f"present, from {source}" if get_token() else "none", "", False
    reviews = [(REVIEWS, name, "dataset") for name in reviews_files(CATEGORY)]
    for repo, name, kind in ((BASE, "model.safetensors", "model"), *reviews):
        try:
            state, remedy = f"in the cache {constants.HF_HUB_CACHE}", ""
            if not cached(repo, name, kind):
                state = f"{can_fetch(repo, name, kind) / GB:.1f} GB can be fetched"
        except HubError as error:  # the finding, not a failure of the doctor's
            what, cause, remedy = str(error).splitlines()
            state = f"{what}; {cause}"
        yield f"{repo} {name.rpartition('/')[2]}", state, remedy, False


def main() -> int:
    try:
        findings = list(packages())
        if not any(remedy for _, _, remedy, _ in findings):  # else there is nothing to look with
            findings += [*machine(), *hub()]
    except metadata.PackageNotFoundError as error:
        findings = [(error.name, "not installed", "pip install -e .", True)]
    for name, state, remedy, _ in findings:
        print(f"{'amiss' if remedy else 'ok':<6} {name}: {state}" + f"\n       -> {remedy}" * bool(remedy))
    broken, lacks = ([name for name, _, remedy, demo in findings if remedy and demo >= d] for d in (1, 0))
    print(f"\nthe demo cannot run: {', '.join(broken)}" if broken else "\nthe demo can run: python train.py")
    print(f"the paper's run lacks: {', '.join(lacks)}" if lacks else f"the paper's run can start: {PAPER}")
    return 5 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
