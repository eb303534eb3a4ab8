"""The doctor: what it finds is what there is, every lack has its remedy, and no token is shown."""
from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from minipeso.files import download
from minipeso.runs import doctor
from tests.loopback import Hub

ROOT = Path(__file__).parents[1]
SECRET = "hf_" + "s3cr3t" * 5


def examine(cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """python -m minipeso.runs.doctor in a folder, with nothing of this machine's Hub settings."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    done = subprocess.run([sys.executable, "-m", "minipeso.runs.doctor"], cwd=cwd, capture_output=True, text=True, timeout=60,
                          env=clean | {"HF_HOME": str(cwd / "cache"), "PYTHONPATH": str(ROOT),
                                 "HF_HUB_DISABLE_TELEMETRY": "1"} | env)
    assert "Traceback" not in done.stderr and SECRET not in done.stdout + done.stderr, done.stderr
    for line, after in zip(done.stdout.splitlines(), done.stdout.splitlines()[1:]):
        assert line.startswith("amiss") == after.strip().startswith("->"), f"{line}\n{after}"
    return done


def test_without_network_the_demo_can_run(tmp_path):
    """Nobody answers, or offline: said in seconds, and no obstacle to the demo."""
    for env in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        began = time.monotonic()
        done = examine(tmp_path, **env)
        assert done.returncode == 0 and "the demo can run" in done.stdout and time.monotonic() - began < 30
        lacks = done.stdout[done.stdout.rindex("the paper's run lacks"):]
        assert "meta-llama/Llama-3.2-1B" in lacks and "McAuley-Lab" in lacks and "token" in lacks


@pytest.mark.parametrize("fault, token, words", [
    ("gated", "", ("no token was sent", "unsloth/Llama-3.2-1B", "token: none")),
    ("forbidden", SECRET, ("403", "accept the licence", "token: present, from HF_TOKEN")),
    (401, SECRET, ("HTTP 401", "not valid"))])
def test_the_gate_is_tried(tmp_path, fault, token, words):
    """Whether the token opens the gate is asked of the Hub; only what stands in the way is said, never the token."""
    for kind, name in (("", "meta-llama/Llama-3.2-1B"), ("datasets/", "McAuley-Lab/Amazon-Reviews-2023")):
        (tmp_path / "hub" / f"{kind}{name}").mkdir(parents=True)
    (tmp_path / "hub" / "meta-llama/Llama-3.2-1B" / "config.json").write_text("{}")
    ratings = tmp_path / "hub/datasets/McAuley-Lab/Amazon-Reviews-2023/benchmark/0core/rating_only/Musical_Instruments.csv"
    ratings.parent.mkdir(parents=True)
    ratings.write_text("user_id")
    served = Hub(tmp_path / "hub")
    served.fault = {"config.json": fault}
    done = examine(tmp_path, HF_ENDPOINT=served.url, **({"HF_TOKEN": token} if token else {}))
    served.close()
    assert done.returncode == 0 and all(word in done.stdout for word in words), done.stdout
    assert "McAuley-Lab/Amazon-Reviews-2023: can be fetched (2 files)" in done.stdout
    assert all(line.startswith("HEAD") for line in served.requests), served.requests


def test_the_packages_are_those_of_the_project(monkeypatch):
    """The doctor's list is pyproject.toml's."""
    needed = re.search(r"\ndependencies = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.S)[1]
    wanted = dict(re.findall(r'"([\w-]+)>=([\d.]+)', needed))
    assert doctor.PACKAGES == wanted


@pytest.mark.parametrize("version, fine", [("2.6", True), ("2.13.0+cpu", True), ("2.10.1rc1", True), ("2.5.1", False),
                                           ("1.13", False)])
def test_versions_are_compared_as_numbers(version, fine, monkeypatch):
    """2.13 is later than 2.6."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "torch" else "99.0")
    found = {f.name: f for f in doctor.packages()}
    assert bool(found["torch"].remedy) != fine and not found["numpy"].remedy


def test_a_missing_package_is_the_only_finding(monkeypatch, capsys):
    """Without it nothing else can be looked at: exit 5, and what to install."""
    def version(name):
        if name == "tokenizers":
            raise importlib.metadata.PackageNotFoundError(name)
        return "99.0"
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(doctor, "machine", lambda: pytest.fail("looked further"))
    assert doctor.main() == 5
    printed = capsys.readouterr().out
    assert "tokenizers: not installed\n       -> pip install 'tokenizers>=0.21'" in printed
    assert "the demo cannot run: tokenizers" in printed


def test_a_folder_or_a_disk_that_is_no_use(monkeypatch, capsys):
    """No room for the demo, or no right to write: exit 5 with the reason."""
    monkeypatch.setattr(doctor, "hub", lambda: iter(()))
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Usage(10, 9, 10**6))
    assert doctor.main() == 5 and "the demo cannot run: disk here" in capsys.readouterr().out
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Usage(10, 9, 10**9))
    assert doctor.main() == 0
    printed = capsys.readouterr().out
    assert "the demo can run" in printed and "disk here" in printed[printed.index("the paper's run lacks"):]
    monkeypatch.setattr(doctor.os, "access", lambda path, how: False)
    assert doctor.main() == 5 and "cannot be written" in capsys.readouterr().out


def test_when_nothing_is_missing_it_says_what_to_run(monkeypatch, capsys, tmp_path):
    """A GPU and a full cache: no request is made, no token is needed, and the paper's command is named."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: namedtuple("P", "total_memory")(80 * 10**9))
    monkeypatch.setattr(download, "_cached", lambda name, where: tmp_path)
    monkeypatch.setattr(download, "_ask", lambda *args: pytest.fail("asked the Hub"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert doctor.main() == 0
    printed = capsys.readouterr().out
    assert "the paper's run can start: python train.py --dataset instruments --lambda 2.0" in printed
    assert "GPU: a card, 80 GB" in printed and "5 of 5 files" in printed
