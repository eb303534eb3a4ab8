"""Files from the Hub: pinned, only those that are needed, checked, and every failure told in three lines (exit 5).

A file that is cached costs no request, so a full cache works offline. Before anything is downloaded, one short
request a missing file asks for its size: a closed gate, a wrong token or no network is known in seconds, where
huggingface_hub alone would retry in silence for half a minute a file.
"""
from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, OfflineModeIsEnabled,
                                    RepositoryNotFoundError, RevisionNotFoundError)
from tqdm import tqdm

REVIEWS = "McAuley-Lab/Amazon-Reviews-2023"
PINNED = {  # repository -> revision: what is downloaded today is downloaded tomorrow
    "meta-llama/Llama-3.2-1B": "4e20de362430cd3b72f300e6b0f18e50e7166e08",
    "unsloth/Llama-3.2-1B": "9535bd9b1d1dea6acafbdc4813b728796aeb28da",
    "meta-llama/Llama-3.2-3B": "13afe5124825b4f3751f836b40dafda64c1ed062",
    "unsloth/Llama-3.2-3B": "d4446454d87d51aa42e1fb174f25acc5f8762331",
    "meta-llama/Llama-3.2-1B-Instruct": "9213176726f574b556790deb65791e0c5aa438b6",
    REVIEWS: "2b6d039ed471f2ba5fd2acb718bf33b0a7e5598e",
}
UNGATED = {f"meta-llama/Llama-3.2-{size}": f"unsloth/Llama-3.2-{size}" for size in ("1B", "3B", "1B-Instruct")}
TIMEOUT = 5.0  # seconds for the short request


class HubError(OSError):
    """A download that cannot be had: exit code 5."""


class NoSuchFile(HubError):
    """The repository is there, the file is not."""


def fetch(repo: str, names: Sequence[str], kind: str = "model") -> list[Path]:
    """The local paths of these files of a Hub repository ("model" or "dataset"), downloaded where missing.

    HubError says which of gate, token, name, server, network or disk is in the way. No token is ever shown.
    """
    where = _where(repo, kind)
    missing = [name for name in names if not _cached(name, where)]
    if missing:
        sizes = [_ask(name, where) for name in missing]
        _require_space(repo, sum(sizes))
        for name in missing:
            _try(name, where, lambda name=name: huggingface_hub.hf_hub_download(filename=name, **where))
    paths = [_cached(name, where) for name in names]
    if None in paths:  # no revision is pinned, and what "main" means has changed in between
        raise HubError(f"{repo} changed on the Hub while it was downloaded\n{names[paths.index(None)]} is of another revision "
                       "than the rest\nrun the same command again")
    for path, name in zip(paths, names, strict=True):
        verify(path, repo, name)
    return paths


def cached(repo: str, name: str, kind: str = "model") -> Path | None:
    """The file in the cache; None if it is not there. Asks nobody."""
    return _cached(name, _where(repo, kind))


def can_fetch(repo: str, name: str, kind: str = "model") -> None:
    """HubError if the file could not be downloaded now; downloads nothing."""
    _ask(name, _where(repo, kind))


def fetch_small(repo: str) -> Path:
    """The folder with a checkpoint's config and tokenizer: whether the gate is open is known with them."""
    return fetch(repo, ["config.json", "tokenizer.json"])[0].parent


def fetch_checkpoint(repo: str) -> Path:
    """The folder of a Llama checkpoint: config, tokenizer, and model.safetensors or its shards; nothing else of
    the repository (Meta's own files would be as large again)."""
    folder, index = fetch_small(repo), "model.safetensors.index.json"
    if not cached(repo, index):  # else it is in shards: the Hub need not be asked for the single file again
        try:
            fetch(repo, ["model.safetensors"])
            return folder
        except NoSuchFile:
            fetch(repo, [index])
    named = re.findall(r'"(model-\d{5}-of-\d{5}\.safetensors)"', (folder / index).read_text())
    fetch(repo, sorted(set(named)))  # no other name is asked for; hub.weight_files refuses it, and a broken index
    return folder


def reviews_files(category: str) -> list[str]:
    """Ratings and metadata of a category of Amazon Reviews 2023: the 0core CSV, from which only doubles are gone,
    for PESO filters users per stage; and the items' texts. For Musical_Instruments 0.17 + 0.63 GB."""
    return [f"benchmark/0core/rating_only/{category}.csv", f"raw/meta_categories/meta_{category}.jsonl"]


def fetch_reviews(category: str) -> tuple[Path, Path]:
    """(ratings, metadata) of a category."""
    return tuple(fetch(REVIEWS, reviews_files(category), "dataset"))


def _where(repo: str, kind: str) -> dict:
    return {"repo_id": repo, "revision": PINNED.get(repo), "repo_type": kind}


def _cached(name: str, where: dict) -> Path | None:
    try:
        return Path(huggingface_hub.hf_hub_download(filename=name, local_files_only=True, **where))
    except LocalEntryNotFoundError:
        return None


def _ask(name: str, where: dict) -> int:
    """The file's size in bytes, by one HEAD request."""
    url = huggingface_hub.hf_hub_url(where["repo_id"], name, repo_type=where["repo_type"], revision=where["revision"])
    return _try(name, where, lambda: huggingface_hub.get_hf_file_metadata(
        url, token=huggingface_hub.get_token() or False, timeout=TIMEOUT)).size or 0


def _try(name: str, where: dict, request: Callable):
    """request(), its failure turned into three lines."""
    repo = where["repo_id"]
    try:
        return request()
    except GatedRepoError as error:  # a subclass of RepositoryNotFoundError: first
        raise HubError(_gated(repo, error)) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{repo} has no such revision\nasked for {where['revision']}\nupdate minipeso, or pass a folder") from error
    except RepositoryNotFoundError as error:
        raise HubError(f"the Hub has no {where['repo_type']} {repo}, or your token may not see it\nasked for {name}\n"
                       "check the name; a private one needs `hf auth login`") from error
    except LocalEntryNotFoundError as error:  # what hf_hub_download makes of 429, 500 and a lost network
        raise HubError(f"{repo}: {name} could not be downloaded\n{_plain(error.__cause__ or error)}\n"
                       "run the same command again: what is there stays") from error
    except EntryNotFoundError as error:
        raise NoSuchFile(f"{repo} has no file {name}\nrevision {where['revision'] or 'main'}\ncheck the name") from error
    except OfflineModeIsEnabled as error:
        raise HubError(f"{repo}: {name} is not in the cache, and HF_HUB_OFFLINE forbids to ask for it\n"
                       f"the cache is {constants.HF_HUB_CACHE}\nunset HF_HUB_OFFLINE, or pass a folder") from error
    except Exception as error:  # of the Hub's, or the transport's own classes: no name, no route, timed out, cut off
        if getattr(error, "response", None) is not None:
            raise HubError(_refused(repo, name, error.response.status_code)) from error
        if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the network's
            raise HubError(f"{repo}: {name} cannot be stored\n{_plain(error)}\n"
                           f"{constants.HF_HUB_CACHE} must be writable and have room, or set HF_HOME to a folder that is") from error
        raise HubError(f"the connection to the Hub failed at {repo}: {name}\n{_plain(error)}\nrun the same command again (what "
                       "is there stays), or pass a folder that holds the files") from error


def _gated(repo: str, error: GatedRepoError) -> str:
    status = error.response.status_code
    cause = "your token's account has not been given access" if status == 403 else \
        "no token was sent" if not huggingface_hub.get_token() else "the token sent is not valid"
    other = f"; or --base {UNGATED[repo]}, an ungated copy with the same weights" if repo in UNGATED else ""
    return (f"{repo} is gated\n{cause} (HTTP {status})\naccept the licence on https://huggingface.co/{repo}, then `hf auth "
            f"login` or HF_TOKEN, and run again{other}")


def _refused(repo: str, name: str, status: int) -> str:
    remedy = {401: "your token is not valid: `hf auth login`, or unset HF_TOKEN", 403: "your token may not read it",
              429: "too many requests: wait some minutes, or log in"}.get(status, "the server's fault: try again later")
    return f"the Hub refused {repo}: {name}\nHTTP {status}\n{remedy}"


def _plain(error: BaseException) -> str:
    """One line, without anything that looks like a token."""
    return re.sub(r"hf_\w+", "hf_...", f"{type(error).__name__}: {error}".splitlines()[0])[:200]


def _require_space(repo: str, size: int) -> None:
    folder = Path(constants.HF_HUB_CACHE)
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if size > free:
        raise HubError(f"too little disk space for {repo}\n{size:,} bytes are needed, {free:,} are free in {folder}\n"
                       "make room, or set HF_HOME to a larger disk")


def verify(path: Path, repo: str, name: str) -> None:
    """Holds a file's hash, which is its name in the cache, against its content: once, then by size and time.

    A large file is called by its SHA-256, a small one as git calls it, by the SHA-1 of "blob SIZE\\0" and content.
    The result is remembered beside the cache's blobs. HubError if they differ; the file is left for a look.
    """
    blob = _blob(path)
    if not blob:
        return  # a cache without links, or with names of a mirror's own, does not tell the hash
    record, stat = blob.parent.parent / "minipeso-verified.json", blob.stat()
    known = _remembered(record)
    if known.get(blob.name) == [stat.st_size, stat.st_mtime_ns]:
        return
    found = _digest(blob, name, "sha256" if len(blob.name) == 64 else "git")
    if found != blob.name:
        raise HubError(f"{repo}: {name} is damaged\n{stat.st_size:,} bytes with the hash {found[:16]}, the Hub has "
                       f"{blob.name[:16]}\ndelete {blob.resolve()} and run again")
    if os.access(record.parent, os.W_OK):  # a shared, read-only cache is looked at every time
        part = record.with_name(f"{record.name}.{os.getpid()}")
        part.write_text(json.dumps(known | {blob.name: [stat.st_size, stat.st_mtime_ns]}))
        os.replace(part, record)


def _remembered(record: Path) -> dict:
    """What was verified before; nothing if that cannot be read: it is only a matter of seconds."""
    try:
        known = json.loads(record.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def content_hash(path: Path) -> str:
    """The hash that the cache calls the file by, or its SHA-256."""
    blob = _blob(path)
    return blob.name if blob else _digest(path, path.name)


def _blob(path: Path) -> Path | None:
    """Where a link of the cache leads, if that is a hash. One link only: a blob may itself be one, into a store with
    other names."""
    blob = path.parent / os.readlink(path) if path.is_symlink() else None
    return blob if blob and re.fullmatch("[0-9a-f]{64}|[0-9a-f]{40}", blob.name) else None


def _digest(path: Path, name: str, kind: str = "sha256") -> str:
    size = path.stat().st_size
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % size)
    with open(path, "rb") as file, tqdm(total=size, desc=f"verifying {name}", unit="B", unit_scale=True, leave=False,
                                        delay=1) as bar:
        for block in iter(lambda: file.read(1 << 22), b""):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()
