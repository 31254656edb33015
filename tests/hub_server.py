"""A Hugging Face Hub on 127.0.0.1, in memory: what the clients need to push and pull models, data sets and Spaces.

Uploads go through git LFS or the commit itself; Xet and multi-part uploads are not served, so clients need
`HF_HUB_DISABLE_XET=1` (see `HubServer.environment`). Clients read their endpoint when they are imported, so they run
in processes of their own:

    def test_something(hub):
        subprocess.run([sys.executable, "-c", "..."], env={**os.environ, **hub.env}, check=True)
        assert hub.repository("model", "me/bitrans").files("v1.0")["README.md"].data
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_a_token_of_the_loopback_hub"
USER = "me"
# The Hub keeps text in git and everything else in LFS; these names always go to LFS.
LFS_SUFFIXES = frozenset({".safetensors", ".parquet", ".png", ".jpg", ".npz", ".bin", ".onnx", ".pt2", ".arrow"})
KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}

REPO = r"(?P<repo>[^/]+/[^/]+)"
API = rf"/api/(?P<kind>models|datasets|spaces)/{REPO}"
FILES = rf"/(?:(?P<kind>datasets|spaces)/)?{REPO}"
# (method, path) -> name of the method of `Handler` that answers. The first match counts.
ROUTES = (
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"{FILES}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<sha256>[0-9a-f]{64})", "lfs_put"),
    ("POST", rf"{API}/commit/(?P<revision>[^/]+)", "commit"),
    ("GET", rf"{API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", "tree"),
    ("POST", rf"{API}/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("GET", rf"{API}/refs", "refs"),
    ("POST", rf"{API}/tag/(?P<revision>[^/]+)", "tag"),
    ("DELETE", rf"{API}/tag/(?P<name>[^/]+)", "delete_tag"),
    ("POST", rf"{API}/branch/(?P<name>[^/]+)", "branch"),
    ("GET", rf"{API}/commits/(?P<revision>[^/]+)", "commits"),
    ("GET", rf"{API}(?:/revision/(?P<revision>[^/]+))?", "info"),
    ("HEAD", rf"{FILES}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ("GET", rf"{FILES}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
)


class HubError(Exception):
    """An answer other than 200, with the header that clients turn into their own exceptions."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass(frozen=True)
class Blob:
    """The bytes of a file, and whether LFS holds them."""

    data: bytes
    lfs: bool = False

    @property
    def git_oid(self) -> str:
        """Name of the blob in git: of the LFS pointer where there is one."""
        content = self.data
        if self.lfs:
            content = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(content)}\n".encode()
            )
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        """The file as `tree` and `paths-info` list it."""
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(self.data), "oid": self.git_oid}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": 134}
        return entry


@dataclass(frozen=True)
class Commit:
    """One state of a repository."""

    oid: str
    parent: str | None
    title: str
    tree: dict[str, Blob]
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime()))


class Repository:
    """The commits, branches and tags of a model, a data set or a Space."""

    def __init__(self, kind: str, repo_id: str, *, private: bool = False, sdk: str | None = None):
        self.kind, self.repo_id, self.private, self.sdk = kind, repo_id, private, sdk
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.add_commit("main", "initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs\n")})

    def add_commit(self, branch: str, title: str, tree: dict[str, Blob]) -> Commit:
        parent = self.branches.get(branch)
        content = repr(
            (self.kind, self.repo_id, parent, len(self.commits), sorted((p, b.sha256) for p, b in tree.items()))
        )
        commit = Commit(hashlib.sha1(content.encode()).hexdigest(), parent, title, tree)
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch, a tag or a full commit id names."""
        revision = revision.removeprefix("refs/heads/")
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def files(self, revision: str = "main") -> dict[str, Blob]:
        """Every file of a revision by its path."""
        return self.resolve(revision).tree

    def history(self, revision: str = "main") -> list[Commit]:
        """Commits from the newest to the first."""
        commits, oid = [], self.resolve(revision).oid
        while oid is not None:
            commits.append(self.commits[oid])
            oid = commits[-1].parent
        return commits


class HubServer:
    """The server and all that it holds.

    Args:
        home: Folder for the caches of the clients.

    Attributes:
        url: Endpoint of the clients.
        token: The one token that is accepted, of the user `USER`.
        requests: "METHOD /path" of every request since the start.
    """

    def __init__(self, home: Path):
        self.home, self.token = home, TOKEN
        self.requests: list[str] = []
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.lock = threading.RLock()
        self._die_at: re.Pattern[str] | None = None
        self._dying: threading.Thread | None = None
        self._server: ThreadingHTTPServer | None = None
        self._port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def env(self) -> dict[str, str]:
        """Environment for a client's process; it is to go over the tests' own, which sets HF_HUB_OFFLINE."""
        return self.environment(self.token)

    def environment(self, token: str | None, home: Path | None = None) -> dict[str, str]:
        """The environment of a client with another token, or with a cache of its own."""
        home = home or self.home
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": token or "",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_DATASETS_CACHE": str(home / "datasets"),
            "HF_MODULES_CACHE": str(home / "modules"),
        }

    def repository(self, kind: str, repo_id: str) -> Repository:
        """The model, dataset or space of that name."""
        if (kind, repo_id) not in self.repositories:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return self.repositories[kind, repo_id]

    def start(self) -> None:
        """Listen, on the same port as before if there was one; what was committed is still there."""
        hub = self

        class BoundHandler(Handler):
            server_state = hub

        if self._dying is not None:
            self._dying.join()
        self._dying = self._die_at = None
        ThreadingHTTPServer.allow_reuse_address = True
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), BoundHandler)
        self._server.daemon_threads = True
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Refuse connections from now on; what was committed is kept."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    def die_at(self, request: str) -> None:
        """Die in the middle of the first request whose "METHOD /path" holds this regular expression.

        Half of the request's body is read, then the connection is cut and all further ones are refused until
        `start`, as when a machine loses its power.
        """
        self._die_at = re.compile(request)

    def dies_now(self, request: str) -> bool:
        """Whether this request is the one to die at."""
        return self._die_at is not None and self._die_at.search(request) is not None

    def stop_soon(self) -> None:
        """Stop from a thread of its own: a connection's thread cannot wait for itself."""
        self._dying = threading.Thread(target=self.stop)
        self._dying.start()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server_state: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Tests read `HubServer.requests`."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        request = f"{self.command} {unquote(parts.path)}"
        self.server_state.requests.append(request)
        if self.server_state.dies_now(request):
            self._read(half=True)
            self.server_state.stop_soon()
            self.close_connection = True
            self.connection.close()
            return
        body = self._read()
        try:
            for method, pattern, name in ROUTES:
                found = re.fullmatch(pattern, parts.path) if method == self.command else None
                if found:
                    self._authenticate(name)
                    given = {key: unquote(value) for key, value in found.groupdict().items() if value is not None}
                    with self.server_state.lock:
                        getattr(self, name)(body, **given)
                    return
            raise HubError(404, f"the loopback Hub does not serve {request}")
        except HubError as error:
            headers = {"X-Error-Message": error.message}
            if error.code:
                headers["X-Error-Code"] = error.code
            self._send(error.status, json.dumps({"error": error.message}).encode(), headers)

    def _read(self, half: bool = False) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
                if half:
                    return b""
            self.rfile.readline()
            return b"".join(chunks)
        length = int(self.headers.get("Content-Length") or 0)
        return self.rfile.read(length // 2 if half else length)

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, content: Any, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode())

    def _authenticate(self, route: str) -> None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if given and given != self.server_state.token:
            raise HubError(401, "Invalid credentials in Authorization header")
        public = {"tree", "paths_info", "refs", "commits", "info", "resolve", "validate_yaml", "lfs_put"}
        if not given and route not in public:
            raise HubError(401, "Invalid username or password.")
        self.authenticated = bool(given)

    def _repository(self, kind: str, repo: str) -> Repository:
        repository = self.server_state.repository(KINDS[kind], repo)
        if repository.private and not self.authenticated:
            raise HubError(401, "Repository not found", "RepoNotFound")  # the Hub does not tell that it exists
        return repository

    # ---- The account and new repositories.

    def whoami(self, body: bytes) -> None:
        self._json({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"accessToken": {}}})

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        kind, owner = wanted.get("type") or "model", wanted.get("organization") or USER
        if owner != USER:
            raise HubError(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
        repo_id = f"{owner}/{wanted['name']}"
        prefix = "" if kind == "model" else f"{kind}s/"
        url = f"{self.server_state.url}/{prefix}{repo_id}"
        if (kind, repo_id) in self.server_state.repositories:
            self._json({"error": "You already created this repo", "url": url}, status=409)
            return
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        repository = Repository(kind, repo_id, private=private, sdk=wanted.get("sdk"))
        self.server_state.repositories[kind, repo_id] = repository
        self._json({"url": url, "name": repo_id, "id": repo_id})

    def validate_yaml(self, body: bytes) -> None:
        content, errors = json.loads(body)["content"], []
        found = re.match(r"---\r?\n(.*?)\r?\n---", content, re.DOTALL)
        try:
            if found and not isinstance(yaml.safe_load(found.group(1)), dict):
                errors.append({"message": "the metadata must be a mapping"})
        except yaml.YAMLError as error:
            errors.append({"message": str(error)})
        self._json({"errors": errors, "warnings": []}, status=400 if errors else 200)

    # ---- Uploads.

    def preupload(self, body: bytes, kind: str, repo: str, revision: str) -> None:
        tree = self._repository(kind, repo).resolve(revision).tree
        answer = []
        for file in json.loads(body)["files"]:
            text = Path(file["path"]).suffix not in LFS_SUFFIXES and b"\0" not in base64.b64decode(file["sample"])
            known = tree.get(file["path"])
            answer.append(
                {
                    "path": file["path"],
                    "uploadMode": "regular" if text else "lfs",
                    "shouldIgnore": False,
                    "oid": (known.sha256 if known.lfs else known.git_oid) if known else None,
                }
            )
        self._json({"files": answer})

    def lfs_batch(self, body: bytes, repo: str, kind: str = "models") -> None:
        self._repository(kind, repo)
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server_state.lfs_objects:
                entry["actions"] = {"upload": {"href": f"{self.server_state.url}/lfs/{wanted['oid']}"}}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, sha256: str) -> None:
        if hashlib.sha256(body).hexdigest() != sha256:
            raise HubError(400, "the content does not have the announced SHA-256")
        self.server_state.lfs_objects[sha256] = body
        self._send(200, b"")

    def commit(self, body: bytes, kind: str, repo: str, revision: str) -> None:
        repository = self._repository(kind, repo)
        if revision not in repository.branches:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        head = repository.resolve(revision)
        tree, title = dict(head.tree), ""
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, head.oid):
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
            elif operation["key"] == "file":
                tree[value["path"]] = Blob(base64.b64decode(value["content"]))
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.server_state.lfs_objects:
                    raise HubError(400, f"LFS pointer of {value['path']} points to an object that was not uploaded")
                tree[value["path"]] = Blob(self.server_state.lfs_objects[value["oid"]], lfs=True)
            elif operation["key"] == "deletedFile":
                tree.pop(value["path"], None)
            elif operation["key"] == "deletedFolder":
                folder = value["path"].rstrip("/") + "/"
                tree = {path: blob for path, blob in tree.items() if not path.startswith(folder)}
            else:
                raise HubError(400, f"unknown operation {operation['key']}")
        self._check_card(tree)
        new = repository.add_commit(revision, title, tree)
        url = f"{self.server_state.url}/{repository.repo_id}/commit/{new.oid}"
        self._json({"success": True, "commitOid": new.oid, "commitUrl": url, "hookOutput": ""})

    def _check_card(self, tree: dict[str, Blob]) -> None:
        card = tree.get("README.md")
        found = re.match(rb"---\r?\n(.*?)\r?\n---", card.data, re.DOTALL) if card else None
        if found:
            try:
                yaml.safe_load(found.group(1))
            except yaml.YAMLError as error:
                raise HubError(400, f"Invalid metadata in README.md: {error}") from error

    # ---- What is there.

    def info(self, body: bytes, kind: str, repo: str, revision: str = "main") -> None:
        repository = self._repository(kind, repo)
        commit = repository.resolve(revision)
        card = commit.tree.get("README.md", Blob(b"")).data.decode()
        found = re.match(r"---\r?\n(.*?)\r?\n---", card, re.DOTALL)
        self._json(
            {
                "id": repo, "modelId": repo, "author": repo.split("/")[0], "sha": commit.oid,
                "lastModified": commit.date, "createdAt": repository.history()[-1].date,
                "private": repository.private, "disabled": False, "gated": False, "downloads": 0, "likes": 0,
                "tags": [], "cardData": (yaml.safe_load(found.group(1)) or {}) if found else {},
                "siblings": [{"rfilename": path} for path in sorted(commit.tree)],
                **({"sdk": repository.sdk} if repository.sdk else {}),
            }
        )  # fmt: skip

    def tree(self, body: bytes, kind: str, repo: str, revision: str, path: str = "") -> None:
        commit = self._repository(kind, repo).resolve(revision)
        prefix = path.strip("/") + "/" if path.strip("/") else ""
        inside = {name: blob for name, blob in commit.tree.items() if name.startswith(prefix)}
        if prefix and not inside:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        recursive = self.query.get("recursive", "").lower() in ("1", "true")
        self._json(
            [
                self._with_commit(entry, commit)
                for entry in entries(inside)
                if entry["path"].startswith(prefix) and (recursive or "/" not in entry["path"][len(prefix) :])
            ]
        )

    def paths_info(self, body: bytes, kind: str, repo: str, revision: str) -> None:
        commit = self._repository(kind, repo).resolve(revision)
        if self.headers.get("Content-Type", "").startswith("application/json"):
            paths = json.loads(body)["paths"]
        else:
            paths = parse_qs(body.decode()).get("paths", [])
        wanted = {path.strip("/") for path in paths}
        self._json([self._with_commit(entry, commit) for entry in entries(commit.tree) if entry["path"] in wanted])

    def _with_commit(self, entry: dict[str, Any], commit: Commit) -> dict[str, Any]:
        return {**entry, "lastCommit": {"id": commit.oid, "title": commit.title, "date": commit.date}}

    def refs(self, body: bytes, kind: str, repo: str) -> None:
        repository = self._repository(kind, repo)
        listed = {
            name: [
                {"name": each, "ref": f"refs/{folder}/{each}", "targetCommit": oid}
                for each, oid in sorted(refs.items())
            ]
            for name, folder, refs in (
                ("branches", "heads", repository.branches), ("tags", "tags", repository.tags)
            )
        }  # fmt: skip
        self._json({**listed, "converts": [], "pullRequests": []})

    def commits(self, body: bytes, kind: str, repo: str, revision: str) -> None:
        history = self._repository(kind, repo).history(revision)
        self._json(
            [
                {"id": c.oid, "title": c.title, "message": "", "date": c.date, "authors": [{"user": USER}]}
                for c in history
            ]
        )

    def tag(self, body: bytes, kind: str, repo: str, revision: str) -> None:
        repository = self._repository(kind, repo)
        name = json.loads(body)["tag"]
        if name in repository.tags:
            raise HubError(409, f"Tag {name} already exists")
        repository.tags[name] = repository.resolve(revision).oid
        self._json({})

    def delete_tag(self, body: bytes, kind: str, repo: str, name: str) -> None:
        if self._repository(kind, repo).tags.pop(name, None) is None:
            raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        self._json({})

    def branch(self, body: bytes, kind: str, repo: str, name: str) -> None:
        repository = self._repository(kind, repo)
        if name in repository.branches:
            raise HubError(409, f"Branch {name} already exists")
        start = (json.loads(body) if body else {}).get("startingPoint") or "main"
        repository.branches[name] = repository.resolve(start).oid
        self._json({})

    def resolve(self, body: bytes, repo: str, revision: str, path: str, kind: str = "models") -> None:
        commit = self._repository(kind, repo).resolve(revision)
        if path not in commit.tree:
            raise HubError(404, "Entry not found", "EntryNotFound")
        blob = commit.tree[path]
        etag = blob.sha256 if blob.lfs else blob.git_oid
        headers = {"Content-Type": "application/octet-stream", "X-Repo-Commit": commit.oid, "ETag": f'"{etag}"'}
        if blob.lfs:
            headers |= {"X-Linked-Size": str(len(blob.data)), "X-Linked-Etag": f'"{etag}"'}
        data, status = blob.data, 200
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked and any(asked.groups()):
            first = int(asked[1]) if asked[1] else max(0, len(data) - int(asked[2]))
            last = min(int(asked[2]) if asked[1] and asked[2] else len(data) - 1, len(data) - 1)
            if first >= len(data) or last < first:
                headers["Content-Range"] = f"bytes */{len(data)}"
                self._send(416, b"", headers)
                return
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        self._send(status, data, {**headers, "Accept-Ranges": "bytes"})


def entries(files: dict[str, Blob]) -> Iterator[dict[str, Any]]:
    """The files, and every folder that one of them lies in, sorted by path."""
    folders = {str(parent) for path in files for parent in Path(path).parents} - {"."}
    for path in sorted({*files, *folders}):
        if path in files:
            yield files[path].entry(path)
        else:
            yield {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
