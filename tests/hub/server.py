"""A Hub on the loopback for the real client: repositories in memory, tokens with roles, large files by hash.

It answers what `huggingface_hub` asks for when it makes, reads and writes repositories. Not covered: pull requests,
discussions, histories (a branch has one commit), range requests beyond the whole rest of a file.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = 100_000  # bytes from which a file is kept by hash, as LFS does
WRITER, READER = "hf_" + "w" * 34, "hf_" + "r" * 34


@dataclass
class Repository:
    """Files by branch; `commits` counts what was written."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: int = 0

    def sha(self, branch: str) -> str:
        """A commit's name, which changes with the content."""
        content = sorted((name, hashlib.sha1(data).hexdigest()) for name, data in self.branches[branch].items())
        return hashlib.sha1(json.dumps([branch, content]).encode()).hexdigest()

    def branch(self, revision: str) -> str | None:
        """The branch that a name or a commit stands for."""
        if revision in self.branches:
            return revision
        return next((name for name in self.branches if self.sha(name) == revision), None)


class LocalHub:
    """Serves until it is closed. Uploads of a hash in `cut` break off after a thousand bytes."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[tuple[str, str], bytes] = {}  # by repository and hash
        self.puts: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.cut: set[str] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """What a repository holds."""
        return self.repositories[repo].branches[branch]


def _handler(hub: LocalHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            return None

        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def do_DELETE(self) -> None:
            self._answer()

        def do_PUT(self) -> None:
            length = int(self.headers["Content-Length"])
            repo, oid = self.path.removeprefix("/lfs/").rsplit("/", 1)
            hub.puts.append(oid)
            if oid in hub.cut:
                self.rfile.read(1000)
                self.close_connection = True
                self.connection.close()
                return
            data = self.rfile.read(length)
            if hashlib.sha256(data).hexdigest() == oid:
                hub.large[repo, oid] = data
                self._send(200, {})
            else:
                self._send(400, {"error": "the hash differs"})

        def _answer(self) -> None:
            hub.headers.append(dict(self.headers))
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self._parts = urlsplit(self.path)
            path = unquote(self._parts.path)
            for pattern, name in _ROUTES:
                found = re.fullmatch(pattern, path)
                if found:
                    getattr(self, name)(body, **found.groupdict())
                    return
            self._send(404, {"error": f"no such page: {self.command} {path}"})

        # Who is asking

        def _role(self) -> str | None:
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            return {WRITER: "write", READER: "read", "": "anonymous"}.get(token)

        def _may(self, needed: str, repo: str | None = None) -> Repository | None | bool:
            """The repository, or True without one; None after an answer that refuses."""
            role = self._role()
            found = hub.repositories.get(repo) if repo else None
            if role is None or (needed == "write" and role == "anonymous"):
                self._send(401, {"error": "Invalid credentials in Authorization header"})
            elif repo and (found is None or (found.private and role == "anonymous")):
                self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            elif needed == "write" and role != "write":
                self._send(403, {"error": "this token has no write access"})
            else:
                return found if repo else True
            return None

        # What is asked

        def _whoami(self, body: bytes) -> None:
            if self._role() in (None, "anonymous"):
                self._send(401, {"error": "Invalid user token"})
            else:
                self._send(200, {"type": "user", "name": "me", "auth": {"accessToken": {"role": self._role()}}})

        def _create(self, body: bytes) -> None:
            if not self._may("write"):
                return
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            url = {"url": f"{hub.url}/{repo}", "name": repo, "id": repo}
            if repo in hub.repositories:
                self._send(409, {"error": "You already created this model repo", **url})
                return
            private = asked.get("private") or asked.get("visibility") == "private"
            hub.repositories[repo] = Repository(bool(private))
            self._send(200, url)

        def _validate(self, body: bytes) -> None:
            self._send(200, {"errors": [], "warnings": []})

        def _info(self, body: bytes, repo: str, revision: str = "main") -> None:
            found = self._may("read", repo)
            if isinstance(found, Repository):
                branch = found.branch(revision)
                if branch is None:
                    self._send(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
                    return
                siblings = [{"rfilename": name} for name in found.branches[branch]]
                self._send(200, {
                    "id": repo, "modelId": repo, "private": found.private, "sha": found.sha(branch),
                    "siblings": siblings, "tags": [], "downloads": 0, "likes": 0,
                })  # fmt: skip

        def _tree(self, body: bytes, repo: str, revision: str) -> None:
            found = self._may("read", repo)
            if isinstance(found, Repository):
                branch = found.branch(revision) or "main"
                self._send(200, [_entry(name, data) for name, data in sorted(found.branches[branch].items())])

        def _paths(self, body: bytes, repo: str, revision: str) -> None:
            found = self._may("read", repo)
            if isinstance(found, Repository):
                text = body.decode()
                asked = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
                files = found.branches[found.branch(revision) or "main"]
                self._send(200, [_entry(name, files[name]) for name in asked if name in files])

        def _refs(self, body: bytes, repo: str) -> None:
            found = self._may("read", repo)
            if isinstance(found, Repository):
                heads = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": found.sha(b)} for b in found.branches]
                self._send(200, {"branches": heads, "tags": [], "converts": []})

        def _branch(self, body: bytes, repo: str, branch: str) -> None:
            found = self._may("write", repo)
            if isinstance(found, Repository):
                known = branch in found.branches
                found.branches.setdefault(branch, dict(found.branches["main"]))
                self._send(409 if known else 200, {"error": "exists"} if known else {})

        def _preupload(self, body: bytes, repo: str, revision: str) -> None:
            if self._may("write", repo):
                files = [
                    {
                        "path": one["path"], "shouldIgnore": False,
                        "uploadMode": "lfs" if one["size"] >= LARGE else "regular",
                    }
                    for one in json.loads(body)["files"]
                ]  # fmt: skip
                self._send(200, {"files": files})

        def _batch(self, body: bytes, repo: str) -> None:
            if self._may("write", repo):
                objects = []
                for one in json.loads(body)["objects"]:
                    known = (repo, one["oid"]) in hub.large
                    upload = {"upload": {"href": f"{hub.url}/lfs/{repo}/{one['oid']}"}}
                    objects.append(one if known else {**one, "actions": upload})
                self._send(200, {"transfer": "basic", "objects": objects})

        def _commit(self, body: bytes, repo: str, revision: str) -> None:
            found = self._may("write", repo)
            if not isinstance(found, Repository):
                return
            files = found.branches[revision]
            for line in body.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = hub.large[repo, value["oid"]]
                elif entry["key"] == "deletedFile":
                    del files[value["path"]]
            found.commits += 1
            url = f"{hub.url}/{repo}/commit/{found.sha(revision)}"
            self._send(200, {"commitOid": found.sha(revision), "commitUrl": url, "hookOutput": ""})

        def _resolve(self, body: bytes, repo: str, revision: str, name: str) -> None:
            found = self._may("read", repo)
            if not isinstance(found, Repository):
                return
            branch = found.branch(revision)
            data = found.branches[branch].get(name) if branch else None
            if branch is None or data is None:
                self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
                return
            headers = {"X-Repo-Commit": found.sha(branch), "ETag": f'"{_git_hash(data)}"', "Accept-Ranges": "bytes"}
            if len(data) >= LARGE:
                headers |= {"X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
            start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
            if start:
                rest = data[int(start[1]) :]
                headers["Content-Range"] = f"bytes {start[1]}-{len(data) - 1}/{len(data)}"
                self._send(206, rest, headers)
            else:
                self._send(200, data, headers)

        def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
            message = content.get("error") if isinstance(content, dict) else None
            given = {"X-Error-Message": message} if message else {}
            for key, value in {
                "Content-Type": kind,
                "Content-Length": str(len(data)),
                **given,
                **(headers or {}),
            }.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    return Handler


_REPO, _REVISION = r"(?P<repo>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"
_ROUTES = (
    (r"/api/whoami-v2", "_whoami"),
    (r"/api/repos/create", "_create"),
    (r"/api/validate-yaml", "_validate"),
    (rf"/api/models/{_REPO}", "_info"),
    (rf"/api/models/{_REPO}/revision/{_REVISION}", "_info"),
    (rf"/api/models/{_REPO}/tree/{_REVISION}", "_tree"),
    (rf"/api/models/{_REPO}/paths-info/{_REVISION}", "_paths"),
    (rf"/api/models/{_REPO}/refs", "_refs"),
    (rf"/api/models/{_REPO}/branch/(?P<branch>[^/]+)", "_branch"),
    (rf"/api/models/{_REPO}/preupload/{_REVISION}", "_preupload"),
    (rf"/api/models/{_REPO}/commit/{_REVISION}", "_commit"),
    (rf"/{_REPO}\.git/info/lfs/objects/batch", "_batch"),
    (rf"/{_REPO}/resolve/{_REVISION}/(?P<name>.+)", "_resolve"),
)


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(name: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": _git_hash(data)}
    if len(data) >= LARGE:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry
