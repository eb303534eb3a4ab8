"""The doctor: its findings are what there is, every lack has its remedy, and no token is shown."""
import importlib.metadata
import os
import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from minipeso.files import download
from minipeso.runs import doctor
from tests.loopback import Hub

ROOT = Path(__file__).parents[1]
SECRET = "hf_" + "s3cr3t" * 5
Usage = namedtuple("Usage", "total used free")


def examine(cwd: Path, **env: str) -> str:
    """The doctor's words in a folder, with nothing of this machine's Hub settings: no failure, in seconds."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    env = clean | {"HF_HOME": str(cwd / "cache"), "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1"} | env
    command = [sys.executable, "-m", "minipeso.runs.doctor"]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and SECRET not in done.stdout + done.stderr, done.stderr
    for line, after in zip(done.stdout.splitlines(), done.stdout.splitlines()[1:]):
        assert line.startswith("amiss") == after.strip().startswith("->"), f"{line}\n{after}"
    return done.stdout


@pytest.mark.parametrize("env", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}])
def test_without_network_the_demo_can_run(tmp_path, env):
    """Nobody answers, or offline: said in seconds, and no obstacle to the demo."""
    able, lacks = examine(tmp_path, **env).split("the paper's run lacks")
    assert "the demo can run" in able and "meta-llama/Llama-3.2-1B model.safetensors, McAuley-Lab/" in lacks


@pytest.mark.parametrize("fault, token, words", [
    ("gated", "", ("no token was sent", "unsloth/Llama-3.2-1B", "token: none")),
    ("forbidden", SECRET, ("403", "accept the licence", "token: present, from HF_TOKEN")),
    (401, SECRET, ("HTTP 401", "not valid"))])
def test_the_gate_is_tried(tmp_path, fault, token, words):
    """Whether the token opens the gate is asked of the Hub; only what stands in the way is said, never the token."""
    reviews = [f"datasets/{download.REVIEWS}/{name}" for name in download.reviews_files(doctor.CATEGORY)]
    for name in (f"{doctor.BASE}/model.safetensors", *reviews):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("{}")
    served = Hub(tmp_path)
    served.fault = {"model.safetensors": fault}
    printed = examine(tmp_path, HF_ENDPOINT=served.url, **({"HF_TOKEN": token} if token else {}))
    served.close()
    assert all(word in printed for word in words) and printed.count(" GB can be fetched") == 2, printed
    assert served.requests and all(line.startswith("HEAD") for line in served.requests), served.requests


def test_the_packages_are_those_of_the_project():
    """All that pyproject.toml needs, and none of its extras."""
    needed = re.search(r"\ndependencies = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.S)[1]
    assert [name for name, *_ in doctor.packages()] == re.findall(r'"([\w-]+)>=', needed)


@pytest.mark.parametrize("missing", ["numpy", "minipeso"])
def test_a_missing_package_is_the_only_finding(missing, monkeypatch, capsys):
    """Without it nothing else can be looked at: exit 5, and what to install."""
    found = importlib.metadata.distribution
    monkeypatch.setattr(importlib.metadata, "distribution",
                        lambda name: found("no-such-package" if name == missing else name))
    monkeypatch.setattr(doctor, "machine", lambda: pytest.fail("looked further"))
    assert doctor.main() == 5
    printed = capsys.readouterr().out
    assert "no-such-package: not installed\n       -> pip install -e ." in printed
    assert "the demo cannot run: no-such-package" in printed


@pytest.mark.parametrize("free, writable, code, word", [
    (10**6, True, 5, "the demo cannot run: disk here"), (10**9, True, 0, "the paper's run lacks: GPU, disk here"),
    (10**12, False, 5, "cannot be written")])
def test_a_folder_or_a_disk_that_is_no_use(free, writable, code, word, monkeypatch, capsys):
    """No room for the demo, for the paper's run, or no right to write: the exit code and the reason."""
    monkeypatch.setattr(doctor, "hub", lambda: iter(()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Usage(10, 9, free))
    monkeypatch.setattr(doctor.os, "access", lambda path, how: writable)
    assert doctor.main() == code and word in capsys.readouterr().out


def test_when_nothing_is_missing_it_says_what_to_run(monkeypatch, capsys, tmp_path):
    """A GPU and a full cache: no request is made, no token is needed, and the paper's command is named."""
    card = namedtuple("Card", "total_memory")(80 * 10**9)
    for name, value in (("is_available", True), ("get_device_name", "a card"), ("get_device_properties", card)):
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    monkeypatch.setattr(download, "cached", lambda repo, name, kind: tmp_path)
    monkeypatch.setattr(download, "can_fetch", lambda *args: pytest.fail("asked the Hub"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert doctor.main() == 0
    printed = capsys.readouterr().out
    assert "the paper's run can start: python train.py --dataset instruments --lambda 2.0" in printed
    assert "GPU: a card, 80 GB" in printed and printed.count("in the cache") == 3
