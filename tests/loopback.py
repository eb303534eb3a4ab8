"""A Hub on this machine: the resolve protocol over HTTP, for the real huggingface_hub client, with faults on demand."""
import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c" * 40


class Hub:
    """Serves root/<repo>/<file> and root/datasets/<repo>/<file>. `fault`: {file name: what to do instead}:
    an HTTP status, "gated" or "forbidden" (the gate, without and with a token), "mute" (no answer), "revision" (no such
    one); and in the body, after a good answer to HEAD: "late" (500), "cut" (breaks off), "cut once", "damaged" (a
    flipped byte under the true hash)."""

    def __init__(self, root: Path):
        self.root, self.fault, self.token, self.requests, self.headers = root, {}, None, [], []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            log_message = lambda self, *args: None  # noqa: E731
            do_HEAD = lambda self: hub.answer(self, body=False)  # noqa: E731
            do_GET = lambda self: hub.answer(self, body=True)  # noqa: E731
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = request.path.split("?")[0].lstrip("/")
        self.requests.append(f"{request.command} {path}")
        self.headers.append(dict(request.headers))
        cdn = path.startswith("cdn/")
        repo, _, rest = path.removeprefix("cdn/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        self.commit = revision if len(revision) == 40 else COMMIT
        file, fault = self.root / repo / name, self.fault.get(name.rpartition("/")[2])
        if not (self.root / repo).is_dir():
            return self.refuse(request, 404, "RepoNotFound")
        stranger = request.headers.get("Authorization") != f"Bearer {self.token}"
        if fault == "forbidden" or fault == "gated" and stranger:
            return self.refuse(request, 403 if fault == "forbidden" else 401, "GatedRepo")
        if fault == "revision":
            return self.refuse(request, 404, "RevisionNotFound")
        if isinstance(fault, int) or fault == "late" and body:
            return self.refuse(request, 500 if fault == "late" else fault)
        if fault == "mute":
            return time.sleep(60)
        if not file.is_file():
            return self.refuse(request, 404, "EntryNotFound")
        self.send(request, file, body, cdn, fault)

    def refuse(self, request, status: int, code: str = "") -> None:
        request.send_response(status)
        if code:
            request.send_header("X-Error-Code", code)
            request.send_header("X-Error-Message", code)
        request.send_header("Content-Length", "0")
        request.end_headers()

    def send(self, request, file: Path, body: bool, cdn: bool, fault) -> None:
        """Large files by redirect to the "CDN", as the Hub does with LFS; ranges for resumed downloads."""
        data = file.read_bytes()
        large = file.suffix in (".safetensors", ".csv", ".jsonl")
        etag = hashlib.sha256(data).hexdigest() if large else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        if large and not cdn:
            request.send_response(302)
            for key, value in (("Location", f"{self.url}/cdn{request.path}"), ("X-Linked-Size", str(len(data))),
                               ("X-Linked-Etag", f'"{etag}"'), ("X-Repo-Commit", self.commit), ("Content-Length", "0")):
                request.send_header(key, value)
            return request.end_headers()
        start = int(request.headers.get("Range", "bytes=0-").partition("=")[2].partition("-")[0])
        if fault == "damaged":
            data = data[:-1] + bytes([data[-1] ^ 1])
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        for key, value in (("ETag", f'"{etag}"'), ("X-Repo-Commit", self.commit), ("Accept-Ranges", "bytes"),
                           ("Content-Length", str(len(data) - start))):
            request.send_header(key, value)
        request.end_headers()
        if body:
            breaks = fault in ("cut", "cut once")
            request.wfile.write(data[start:start + len(data) // 2] if breaks else data[start:])
            request.close_connection = breaks
            if fault == "cut once":
                del self.fault[file.name]
