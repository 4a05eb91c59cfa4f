"""A small Hub: the part of the Hugging Face Hub's HTTP protocol that upload and download of a repository need.

It keeps every commit in memory and serves any of them by its hash. All files are uploaded in the commit itself (no
LFS, no Xet), nobody is asked for a token, and it lives as long as the `with` block.

    with FakeHub() as hub:
        client = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "any", "HF_HUB_DISABLE_XET": "1"}
        subprocess.run([...], env=os.environ | client)
        hub.files("owner/name")
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class FakeHub:
    """The server and what was pushed: `commits[repo]`, oldest first, each {"oid": str, "files": {path: bytes}},
    `branches[repo]`, name -> oid of its newest commit, and `created[repo]`, what it was made as."""

    def __init__(self) -> None:
        self.commits: dict[str, list[dict[str, Any]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.created: dict[str, dict[str, str | None]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FakeHub":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Path -> content at a revision. Raises KeyError when there is no such repository or revision."""
        return self.commit(repo, revision)["files"]

    def commit(self, repo: str, revision: str = "main") -> dict[str, Any]:
        oid = self.branches[repo].get(revision, revision)
        return {commit["oid"]: commit for commit in self.commits[repo]}[oid]

    def create(self, repo: str) -> None:
        first = self.commits.setdefault(repo, [_commit({}, "initial commit")])[0]
        self.branches.setdefault(repo, {"main": first["oid"]})

    def add_commit(self, repo: str, lines: list[dict[str, Any]], branch: str = "main") -> dict[str, Any]:
        files = dict(self.files(repo, branch))
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
        commit = _commit(files, f"commit {len(self.commits[repo])}")
        self.commits[repo].append(commit)
        self.branches[repo][branch] = commit["oid"]
        return commit


def _commit(files: dict[str, bytes], message: str) -> dict[str, Any]:
    digest = hashlib.sha1(message.encode())
    for path in sorted(files):
        digest.update(path.encode() + hashlib.sha1(files[path]).digest())
    return {"oid": digest.hexdigest(), "files": files}


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self._body()
        match urlsplit(self.path).path.strip("/").split("/"):
            case ["api", "repos", "create"]:
                request = json.loads(body)
                repo = f"{request.get('organization') or 'tester'}/{request['name']}"
                self.hub.create(repo)
                self.hub.created[repo] = {"type": request.get("type"), "sdk": request.get("sdk")}
                self._json({"url": f"{self.hub.endpoint}/{repo}", "name": repo, "id": repo})
            case ["api", "validate-yaml"]:
                self._json({"errors": [], "warnings": []})
            case ["api", "models" | "datasets" | "spaces", owner, name, "preupload", _]:
                files = json.loads(body)["files"]
                self._json({"files": [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in files]})
            case ["api", "models" | "datasets" | "spaces", owner, name, "branch", branch]:
                repo = f"{owner}/{name}"
                if branch in self.hub.branches[repo]:
                    return self._error(409, "BranchExists")
                self.hub.branches[repo][branch] = self.hub.commit(repo)["oid"]
                self._json({})
            case ["api", "models" | "datasets" | "spaces", owner, name, "commit", branch]:
                lines = [json.loads(line) for line in body.splitlines() if line.strip()]
                oid = self.hub.add_commit(f"{owner}/{name}", lines, branch)["oid"]
                url = f"{self.hub.endpoint}/{owner}/{name}/commit/{oid}"
                self._json({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})
            case _:
                self._error(404, "EntryNotFound")

    def do_GET(self) -> None:
        match unquote(urlsplit(self.path).path).strip("/").split("/"):
            case ["api", "whoami-v2"]:
                self._json({"type": "user", "name": "tester", "orgs": [], "auth": {"type": "access_token"}})
            case ["api", "models" | "datasets" | "spaces", owner, name, *rest]:
                self._api(f"{owner}/{name}", rest)
            case ["datasets", owner, name, "resolve", revision, *path] | [owner, name, "resolve", revision, *path]:
                self._resolve(f"{owner}/{name}", revision, "/".join(path))
            case _:
                self._error(404, "RepoNotFound")

    do_HEAD = do_GET

    def _api(self, repo: str, rest: list[str]) -> None:
        try:
            commit = self.hub.commit(repo, rest[1] if rest[:1] in (["revision"], ["tree"]) else "main")
        except KeyError:
            return self._error(404, "RevisionNotFound" if repo in self.hub.commits else "RepoNotFound")
        match rest:
            case [] | ["revision", _]:
                siblings = [{"rfilename": path} for path in sorted(commit["files"])]
                self._json({"id": repo, "modelId": repo, "sha": commit["oid"], "siblings": siblings, "tags": []})
            case ["tree", _, *folder]:
                prefix = "".join(f"{part}/" for part in folder)
                contents = {path: file for path, file in commit["files"].items() if path.startswith(prefix)}
                oids = {path: hashlib.sha1(file).hexdigest() for path, file in contents.items()}
                self._json(
                    [
                        {"type": "file", "path": path, "size": len(contents[path]), "oid": oids[path]}
                        for path in contents
                    ]
                )
            case ["refs"]:
                heads = self.hub.branches[repo].items()
                branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in heads]
                self._json({"branches": branches, "tags": [], "converts": []})
            case _:
                self._error(404, "EntryNotFound")

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        if repo not in self.hub.commits:
            return self._error(404, "RepoNotFound")
        try:
            commit = self.hub.commit(repo, revision)
        except KeyError:
            return self._error(404, "RevisionNotFound")
        if path not in commit["files"]:
            return self._error(404, "EntryNotFound", commit["oid"])
        content = commit["files"][path]
        etag = hashlib.sha1(content).hexdigest()
        self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit["oid"], "Accept-Ranges": "none"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, commit: str | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": code}
        self._send(status, b"", headers | ({"X-Repo-Commit": commit} if commit else {}))

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
