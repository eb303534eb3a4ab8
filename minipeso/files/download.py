"""Files from the Hub: at a pinned revision, only those that are needed, every failure told in three lines (exit 5).

A full cache works offline. Before a download, one short request per missing file asks for its size: a closed gate, a
wrong token or no network is known in seconds, where huggingface_hub alone would retry in silence for half a minute."""
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors

REVIEWS = "McAuley-Lab/Amazon-Reviews-2023"
PINNED = {  # repository -> revision: what is downloaded today is downloaded tomorrow
    "meta-llama/Llama-3.2-1B": "4e20de362430cd3b72f300e6b0f18e50e7166e08",
    "unsloth/Llama-3.2-1B": "9535bd9b1d1dea6acafbdc4813b728796aeb28da",
    "meta-llama/Llama-3.2-3B": "13afe5124825b4f3751f836b40dafda64c1ed062",
    "unsloth/Llama-3.2-3B": "d4446454d87d51aa42e1fb174f25acc5f8762331",
    REVIEWS: "2b6d039ed471f2ba5fd2acb718bf33b0a7e5598e"}
FAULTS = {  # what stands in the way, and what to do: the first kind that fits
    errors.GatedRepoError: ("is gated", "accept the licence on https://huggingface.co/{repo_id}, then `hf auth login` "
                                        "or HF_TOKEN, and run again"),
    errors.RevisionNotFoundError: ("has no such revision: {revision}", "update minipeso, or pass a folder"),
    errors.RepositoryNotFoundError: ("is no {repo_type} of the Hub, or your token may not see it",
                                     "check the name; a private one needs `hf auth login`"),
    errors.EntryNotFoundError: ("has no file {name}", "check the name"),
    errors.OfflineModeIsEnabled: ("is not in the cache, and HF_HUB_OFFLINE forbids to ask for it",
                                  "unset HF_HUB_OFFLINE, or pass a folder")}
STATUS = {401: "your token is not valid: `hf auth login`, or unset HF_TOKEN", 403: "your token may not read it",
          429: "too many requests: wait some minutes, or log in"}


class HubError(OSError):
    """A file that the Hub does not give: exit code 5."""


class NoSuchFile(HubError):
    """The repository is there, the file is not."""


def fetch(repo: str, names: Sequence[str], kind: str = "model") -> list[Path]:
    """The local paths of these files of a Hub repository ("model" or "dataset"), downloaded where missing.
    HubError says which of gate, token, name, server, network or disk is in the way. No token is ever shown."""
    source = _source(repo, kind)
    paths = {name: cached(repo, name, kind) for name in names}
    missing = [name for name, path in paths.items() if path is None]
    _require_space(repo, sum(can_fetch(repo, name, kind) for name in missing))
    for name in missing:
        with _told(name, source):
            paths[name] = Path(huggingface_hub.hf_hub_download(filename=name, **source))
        _verify(paths[name], repo, name)
    return list(paths.values())


def cached(repo: str, name: str, kind: str = "model") -> Path | None:
    """The file in the cache; None if it is not there. Makes no request."""
    try:
        return Path(huggingface_hub.hf_hub_download(filename=name, local_files_only=True, **_source(repo, kind)))
    except errors.LocalEntryNotFoundError:
        return None


def can_fetch(repo: str, name: str, kind: str = "model") -> int:
    """The file's size in bytes, by one HEAD request; HubError if it could not be downloaded now."""
    source = _source(repo, kind)
    url, token = huggingface_hub.hf_hub_url(filename=name, **source), huggingface_hub.get_token() or False
    with _told(name, source):
        return huggingface_hub.get_hf_file_metadata(url, token=token, timeout=5.0).size or 0


def fetch_checkpoint(repo: str, weights: bool = True) -> Path:
    """The folder with a checkpoint's config and tokenizer, then, if wanted, its weights in one file or in shards."""
    folder = fetch(repo, ["config.json", "tokenizer.json"])[0].parent
    index = cached(repo, "model.safetensors.index.json")
    if weights and not index:  # else the Hub need not be asked for a single file again
        try:
            fetch(repo, ["model.safetensors"])
        except NoSuchFile:
            index, = fetch(repo, ["model.safetensors.index.json"])
    if weights and index:  # hub.weight_files refuses an index that is broken or has other names
        fetch(repo, sorted(set(re.findall(r'"(model-\d{5}-of-\d{5}\.safetensors)"', index.read_text()))))
    return folder


def reviews_files(category: str) -> list[str]:
    """Ratings and metadata of a category of Amazon Reviews 2023: the 0core CSV, from which only duplicates are gone
    (PESO filters users per stage), and the items' texts. For Musical_Instruments 0.17 + 0.63 GB."""
    return [f"benchmark/0core/rating_only/{category}.csv", f"raw/meta_categories/meta_{category}.jsonl"]


def content_hash(path: Path) -> str:
    """The hash by which the Hub's cache names the file, or its SHA-256."""
    blob = _blob(path)
    return blob.name if blob else _digest(path, hashlib.sha256())


def _blob(path: Path) -> Path | None:
    """What a link in the cache leads to, if its name is a hash: one step, for a blob may link to a store of its own."""
    blob = path.parent / os.readlink(path) if path.is_symlink() else None
    return blob if blob and re.fullmatch("[0-9a-f]{64}|[0-9a-f]{40}", blob.name) else None


def _digest(path: Path, digest) -> str:
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 22), b""):
            digest.update(block)
    return digest.hexdigest()


def _verify(path: Path, repo: str, name: str) -> None:
    """Deletes a file that has not the hash its blob is named by: SHA-256, or git's of a small file. HubError."""
    blob, size = _blob(path), path.stat().st_size
    if not blob:
        return  # a cache without links, or a mirror with names of its own, does not tell the hash
    actual = _digest(path, hashlib.sha256() if len(blob.name) == 64 else hashlib.sha1(b"blob %d\0" % size))
    if actual != blob.name:
        for file in (blob.resolve(), blob, path):  # the next start would trust it
            file.unlink(missing_ok=True)
        raise HubError(f"{repo}: {name} is damaged\n{size:,} bytes with the hash {actual[:16]}, the Hub has "
                       f"{blob.name[:16]}\nit was deleted: run the same command again")


def _require_space(repo: str, size: int) -> None:
    folder = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free
    if size > free:
        raise HubError(f"too little disk space for {repo}\n{size:,} bytes are needed, {free:,} are free in {folder}\n"
                       "make room, or set HF_HOME to a larger disk")


def _source(repo: str, kind: str) -> dict:
    return {"repo_id": repo, "revision": PINNED.get(repo), "repo_type": kind}


@contextmanager
def _told(name: str, source: dict) -> Iterator[None]:
    """What fails inside, as a HubError."""
    try:
        yield
    except Exception as error:  # of the Hub's, or the transport's own classes: no name, no route, timed out, cut off
        wrapped = isinstance(error, errors.LocalEntryNotFoundError)  # what the client makes of 429, 500, no network
        raise _fault(name, source, error.__cause__ if wrapped and error.__cause__ else error) from error


def _fault(name: str, source: dict, error: BaseException) -> HubError:
    """Three lines, without anything that looks like a token."""
    repo, status = source["repo_id"], getattr(getattr(error, "response", None), "status_code", None)
    cause = re.sub(r"hf_\w+", "hf_...", f"{type(error).__name__}: {error}".splitlines()[0])[:200]
    kind = next((kind for kind in FAULTS if isinstance(error, kind)), None)
    if kind:
        what, remedy = (text.format(name=name, **source) for text in FAULTS[kind])
    elif status:
        what, remedy = f"was refused with HTTP {status}", STATUS.get(status, "the server's fault: try again later")
    elif isinstance(error, OSError) and error.errno is not None:  # the disk's, not the network's
        what = f"cannot be stored in {constants.HF_HUB_CACHE}"
        remedy = "make it writable and make room, or set HF_HOME to another folder"
    else:
        what = "cannot be reached: the connection to the Hub failed"
        remedy = "run the same command again (what is there stays), or pass a folder with the files"
    if kind is errors.GatedRepoError:
        sent = "the token sent is not valid" if huggingface_hub.get_token() else "no token was sent"
        cause = f"HTTP {status}: {'your account has not been given access' if status == 403 else sent}"
        if (copy := repo.replace("meta-llama/", "unsloth/")) in PINNED:
            remedy += f"; or --base {copy}, an ungated copy with the same weights"
    made = NoSuchFile if kind is errors.EntryNotFoundError else HubError
    return made(f"{repo} {what}\n{name}: {cause}\n{remedy}")
