"""A small Hub that serves a folder as a dataset repository: the part of the HTTP protocol that downloads need.

It keeps the order of what was fetched in `fetched`, and lives as long as the `with` block.
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

REPO = "lab/robot"
COMMIT = "1234567890abcdef1234567890abcdef12345678"
REVISIONS = ("main", "v3.0", COMMIT)


class DatasetHub:
    """Serves `folder` as the dataset repository `lab/robot`, all revisions alike; `fetched` lists the files taken."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.fetched: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "DatasetHub":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def names(self) -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())


class _Handler(BaseHTTPRequestHandler):
    hub: DatasetHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        match unquote(urlsplit(self.path).path).strip("/").split("/"):
            case ["api", "datasets", *name, "revision", revision] if "/".join(name) == REPO:
                self._known(revision) and self._json(
                    {"id": REPO, "sha": COMMIT, "siblings": self._siblings(), "tags": []}
                )
            case ["api", "datasets", *name] if "/".join(name) == REPO:
                self._json({"id": REPO, "sha": COMMIT, "siblings": self._siblings(), "tags": []})
            case ["api", "datasets", owner, name, "tree", revision, *folder] if f"{owner}/{name}" == REPO:
                self._known(revision) and self._json(self._tree("".join(f"{part}/" for part in folder)))
            case ["datasets", owner, name, "resolve", revision, *path] if f"{owner}/{name}" == REPO:
                self._known(revision) and self._file("/".join(path))
            case _:
                self._error(404, "RepoNotFound")

    do_HEAD = do_GET

    def _siblings(self) -> list[dict[str, str]]:
        return [{"rfilename": name} for name in self.hub.names()]

    def _tree(self, prefix: str) -> list[dict[str, object]]:
        files = [(name, (self.hub.folder / name).read_bytes()) for name in self.hub.names() if name.startswith(prefix)]
        return [{"type": "file", "path": name, "size": len(data), "oid": _hash(data)} for name, data in files]

    def _known(self, revision: str) -> bool:
        if revision not in REVISIONS:
            self._error(404, "RevisionNotFound")
        return revision in REVISIONS

    def _file(self, name: str) -> None:
        path = self.hub.folder / name
        if not path.is_file():
            return self._error(404, "EntryNotFound")
        data = path.read_bytes()
        if self.command == "GET":
            self.hub.fetched.append(name)
        self._send(200, data, {"ETag": f'"{_hash(data)}"', "X-Repo-Commit": COMMIT})

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str) -> None:
        self._send(status, json.dumps({"error": code}).encode(), {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _hash(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
