"""A Hugging Face Hub on the loopback, for the tests: stdlib only, in memory, spoken to by the real huggingface_hub.

    with Hub() as hub:
        subprocess.run([...], env=hub.env(home))    # HF_ENDPOINT, HF_TOKEN, HF_HOME ...
        hub.files("tester/model")                   # {path: bytes} at the head of main

It knows accounts (one), model, dataset and space repositories, private ones, branches, pull requests, regular and
git-LFS files, ranges. `hub.faults` is a list of Fault: answers to give instead of, or connections to cut around, the
next requests that match. `hub.log` is what was asked: (method, path, status or "cut").
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import threading
import traceback
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LFS = re.compile(r"\.(safetensors|parquet|tar|zip|jpg|jpeg|png)$")
KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
TOKEN = "hf_loopbackSECRETtoken0123456789"  # looks like one, so that a leak can be searched for
NEVER = "2026-01-01T00:00:00.000Z"


@dataclass
class Fault:
    """`status`: an HTTP status, "cut" (no answer, nothing done) or "lost" (done, but the answer never arrives)."""

    method: str
    path: str  # regular expression
    status: int | str
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Commit:
    oid: str
    files: dict[str, bytes]
    title: str


class Repo:
    """refs: branch or refs/pr/N -> commits, oldest first."""

    def __init__(self, name: str, private: bool = False) -> None:
        self.name, self.private = name, private
        self.lfs: set[str] = set()
        self.pulls: list[dict[str, Any]] = []
        self.refs: dict[str, list[Commit]] = {"main": []}
        self.add("main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, "initial commit")

    def add(self, ref: str, files: dict[str, bytes], title: str) -> Commit:
        seed = f"{self.name} {ref} {len(self.refs[ref])} {title}".encode() + b"".join(sorted(files.values()))
        commit = Commit(hashlib.sha1(seed).hexdigest(), dict(files), title)
        self.refs[ref].append(commit)
        return commit

    def at(self, ref: str | None) -> Commit | None:
        if (ref or "main") in self.refs:
            return self.refs[ref or "main"][-1]
        every = [commit for commits in self.refs.values() for commit in commits]
        return next((c for c in every if ref and len(ref) >= 7 and c.oid.startswith(ref)), None)

    def entry(self, commit: Commit, path: str) -> dict[str, Any]:
        content = commit.files[path]
        found: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
        if path in self.lfs:
            found["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return found


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    def __init__(self, user: str = "tester") -> None:
        self.user, self.token = user, TOKEN
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}  # git-LFS
        self.log: list[tuple[str, str, int | str]] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *failure: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def env(self, home: Path, **more: str) -> dict[str, str]:
        """The environment of a client whose only Hub is this one and whose home is empty."""
        dropped = (
            "HF_HUB_OFFLINE",
            "HF_DATASETS_OFFLINE",
            "TRANSFORMERS_OFFLINE",
            "HF_TOKEN",
            "HUGGING_FACE_HUB_TOKEN",
        )
        kept = {key: value for key, value in os.environ.items() if key not in dropped}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_PRUNE_RETRY_PAUSE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            **more,
        }

    def files(self, name: str, kind: str = "model", ref: str = "main") -> dict[str, bytes]:
        commit = self.repos[kind, name].at(ref)
        assert commit is not None
        return commit.files

    def add(self, name: str, folder: Path | None = None, kind: str = "model", private: bool = False) -> Repo:
        """A repository that is there already, with the files of a folder."""
        repo = self.repos[kind, name] = Repo(name, private)
        if folder is not None:
            files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
            repo.lfs |= {path for path in files if LFS.search(path)}
            repo.add("main", repo.refs["main"][-1].files | files, "seed")
        return repo

    def fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    cut = False  # whether the answer of this request is lost on the way

    def log_message(self, *args: object) -> None:
        pass

    # -------------------------------------------------------------------------------------------------- in and out
    def handle_request(self) -> None:
        body = self.body()
        fault = self.hub.fault(self.command, self.path)
        self.cut = fault is not None and fault.status == "lost"
        if fault is not None and fault.status == "cut":
            return self.hang_up()
        if fault is not None and fault.status == 409 and self.path == "/api/repos/create":
            name = f"{self.hub.user}/{json.loads(body)['name']}"  # the Hub says where the repository is
            return self.answer({"error": "injected", "url": f"{self.hub.url}/{name}", "name": name}, 409)
        if fault is not None and isinstance(fault.status, int):
            return self.fail(fault.status, message="injected", headers=fault.headers)
        path, _, query = self.path.partition("?")
        try:
            self.route(urllib.parse.unquote(path), urllib.parse.parse_qs(query), body)
        except (BrokenPipeError, ConnectionResetError):
            pass
        except Exception as error:  # a bug of this server must be visible to the test
            traceback.print_exc()
            self.fail(500, message=f"loopback hub: {error!r}")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def hang_up(self) -> None:
        self.hub.log.append((self.command, self.path, "cut"))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = b""
        while count := int(self.rfile.readline().split(b";")[0], 16):
            found += self.rfile.read(count)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def answer(self, content: Any = b"", status: int = 200, **headers: str) -> None:
        if self.cut:
            return self.hang_up()
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        told = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        for key, value in (told | {key.replace("_", "-"): value for key, value in headers.items()}).items():
            self.send_header(key, value)
        self.end_headers()
        with self.hub.lock:
            self.hub.log.append((self.command, self.path, status))
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, status: int, code: str = "", message: str = "", headers: dict[str, str] | None = None) -> None:
        more = {"X-Error-Message": message or str(status)} | ({"X-Error-Code": code} if code else {}) | (headers or {})
        self.answer({"error": message or code or str(status)}, status, **more)

    def known(self) -> bool:
        return self.headers.get("authorization") == f"Bearer {self.hub.token}"

    # ------------------------------------------------------------------------------------------------------ routes
    def route(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        hub, data = self.hub, _json(body)
        if path == "/api/whoami-v2":
            account = {"type": "user", "id": "1", "name": hub.user, "fullname": hub.user, "orgs": []}
            account["auth"] = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
            return self.answer(account) if self.known() else self.fail(401, message="Invalid token")
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path.startswith("/api/telemetry"):
            return self.answer({})
        if path == "/api/repos/create":
            return self.create(data)
        if found := re.fullmatch(r"/(?:datasets/|spaces/)?[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            return self.batch(data)
        if path == "/_lfs/verify":
            return self.answer({}, 200 if data["oid"] in hub.objects else 404)
        if found := re.fullmatch(r"/_lfs/([0-9a-f]{64})", path):
            if hashlib.sha256(body).hexdigest() != found[1]:
                return self.fail(400, message="sha256 mismatch")
            with hub.lock:
                hub.objects[found[1]] = body
            return self.answer()
        if found := re.fullmatch(r"/api/(models|datasets|spaces)/([^/]+/[^/]+?)(?:/([a-z-]+)(?:/(.*))?)?", path):
            repo = hub.repos.get((KINDS[found[1]], found[2]))
            if repo is None or (repo.private and not self.known()):
                return self.fail(401 if not self.known() else 404, "RepoNotFound", "Repository not found")
            return self.api(repo, found[3] or "revision", found[4] or "", query, data, body)
        if found := re.fullmatch(
            r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)/(?:resolve|raw)/(refs/[^/]+/[^/]+|[^/]+)/(.+)", path
        ):
            return self.file(hub.repos.get((KINDS[found[1] or "models"], found[2])), found[3], found[4])
        self.fail(404, message=f"loopback hub: no route for {self.command} {path}")

    def create(self, data: dict[str, Any]) -> None:
        if not self.known():
            return self.fail(401, message="Invalid username or password.")
        owner = data.get("organization") or self.hub.user
        if owner != self.hub.user:
            return self.fail(403, message=f"You don't have the rights to create a model under the namespace {owner!r}")
        key = (data.get("type") or "model", f"{owner}/{data['name']}")
        told = {"url": f"{self.hub.url}/{key[1]}", "name": key[1], "id": key[1]}
        with self.hub.lock:
            if key in self.hub.repos:
                return self.answer(told | {"error": "You already created this model repo"}, 409)
            private = data.get("visibility") == "private" or bool(data.get("private"))
            self.hub.repos[key] = Repo(key[1], private)
        self.answer(told)

    def batch(self, data: dict[str, Any]) -> None:
        objects = []
        for each in data["objects"]:
            told = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.hub.objects:
                url = self.hub.url
                told["actions"] = {
                    "upload": {"href": f"{url}/_lfs/{each['oid']}", "header": {}},
                    "verify": {"href": f"{url}/_lfs/verify", "header": {}},
                }
            objects.append(told)
        self.answer({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def file(self, repo: Repo | None, ref: str, path: str) -> None:
        if repo is None or (repo.private and not self.known()):
            return self.fail(404 if self.known() else 401, "RepoNotFound", "Repository not found")
        commit = repo.at(ref)
        if commit is None:
            return self.fail(404, "RevisionNotFound", "Revision not found")
        if path not in commit.files:
            return self.fail(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit.oid})
        content = commit.files[path]
        tag = hashlib.sha256(content).hexdigest() if path in repo.lfs else git_oid(content)
        told = {"X-Repo-Commit": commit.oid, "ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
        told["Content-Type"] = "application/octet-stream"
        if path in repo.lfs:
            told |= {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(content))}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if part:
            first, last = int(part[1]), min(int(part[2] or len(content) - 1), len(content) - 1)
            told["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self.answer(content[first : last + 1], 206, **told)
        self.answer(content, **told)

    def api(
        self, repo: Repo, action: str, rest: str, query: dict[str, list[str]], data: dict[str, Any], body: bytes
    ) -> None:
        if action in ("revision", "tree", "paths-info", "refs", "discussions", "xet-read-token"):
            return self.look(repo, action, rest, query, data, body)
        if not self.known():
            return self.fail(401, message="You need write access")
        if action == "branch":
            if rest in repo.refs:
                return self.fail(409, message="Reference already exists")
            repo.refs[rest] = list(repo.refs["main"])
            return self.answer({})
        if action == "preupload":
            commit = repo.at(rest)
            if commit is None:
                return self.fail(404, "RevisionNotFound", "Revision not found")
            told = []
            for each in data["files"]:
                mode = "lfs" if LFS.search(each["path"]) else "regular"
                told.append({"path": each["path"], "uploadMode": mode, "shouldIgnore": False})
                if (old := commit.files.get(each["path"])) is not None:
                    told[-1]["oid"] = hashlib.sha256(old).hexdigest() if mode == "lfs" else git_oid(old)
            return self.answer({"commitOid": commit.oid, "files": told})
        if action == "commit":
            return self.commit(repo, rest, query.get("create_pr", ["0"])[0] == "1", body)
        self.fail(404, message=f"loopback hub: no action {action}")

    def look(
        self, repo: Repo, action: str, rest: str, query: dict[str, list[str]], data: dict[str, Any], body: bytes
    ) -> None:
        if action == "refs":
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c[-1].oid} for n, c in repo.refs.items()]
            return self.answer({"branches": branches, "tags": [], "converts": []})
        if action == "discussions":
            return self.answer({"discussions": repo.pulls, "count": len(repo.pulls), "start": 0})
        if action == "xet-read-token":
            return self.fail(404, message="no xet on the loopback hub")
        ref, sub = rest, ""
        if action == "tree":
            parts = re.fullmatch(r"(refs/[^/]+/[^/]+|[^/]+)(?:/(.*))?", rest)
            assert parts is not None
            ref, sub = parts[1], (parts[2] or "").strip("/")
        commit = repo.at(ref)
        if commit is None:
            return self.fail(404, "RevisionNotFound", "Revision not found")
        if action == "revision":
            names = [{"rfilename": path} for path in sorted(commit.files)]
            return self.answer(
                {"_id": "0" * 24, "id": repo.name, "modelId": repo.name, "author": self.hub.user, "sha": commit.oid,
                 "private": repo.private, "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0,
                 "lastModified": NEVER, "createdAt": NEVER, "siblings": names, "cardData": {}}
            )  # fmt: skip
        if action == "paths-info":
            form = urllib.parse.parse_qs(body.decode()).get("paths", [])
            wanted = data.get("paths", form) if isinstance(data, dict) else form
            found = [repo.entry(commit, path) for path in wanted if path in commit.files]
            folders = [p for p in wanted if any(f.startswith(p + "/") for f in commit.files)]
            return self.answer(found + [{"type": "directory", "path": p, "size": 0, "oid": "0" * 40} for p in folders])
        deep = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        told, seen = [], set()
        for path in sorted(commit.files):
            if sub and not path.startswith(sub + "/"):
                continue
            parts = path[len(sub) + 1 if sub else 0 :].split("/")
            for depth in range(1, len(parts) if deep else min(len(parts), 2)):
                folder = "/".join(([sub] if sub else []) + parts[:depth])
                if folder not in seen:
                    seen.add(folder)
                    told.append({"type": "directory", "path": folder, "size": 0, "oid": git_oid(folder.encode())})
            if deep or len(parts) == 1:
                told.append(repo.entry(commit, path))
        if sub and not told:
            return self.fail(404, "EntryNotFound", "path not found")
        self.answer(told)

    def commit(self, repo: Repo, ref: str, pull: bool, body: bytes) -> None:
        hub = self.hub
        with hub.lock:
            if ref not in repo.refs:
                return self.fail(404, "RevisionNotFound", "Revision not found")
            head = repo.refs[ref][-1]
            files, title, lfs = dict(head.files), "", set(repo.lfs)
            for line in filter(str.strip, body.decode().splitlines()):
                item = json.loads(line)
                key, value = item["key"], item["value"]
                if key == "header":
                    title = value["summary"]
                    if value.get("parentCommit") not in (None, head.oid):
                        return self.fail(412, message="parent commit mismatch")
                elif key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                    lfs.discard(value["path"])
                elif key == "lfsFile":
                    if value["oid"] not in hub.objects:
                        return self.fail(400, message=f"lfs object {value['oid']} was not uploaded")
                    files[value["path"]] = hub.objects[value["oid"]]
                    lfs.add(value["path"])
                elif key == "deletedFile":
                    files.pop(value["path"], None)
            repo.lfs = lfs
            target, told = ref, {}
            if pull:
                number = len(repo.pulls) + 1
                target = f"refs/pr/{number}"
                repo.refs[target] = list(repo.refs[ref])
                repo.pulls.append({"num": number, "title": title, "author": {"name": hub.user}, "status": "open",
                                   "repo": {"name": repo.name, "type": "model"},
                                   "createdAt": NEVER, "isPullRequest": True,
                                   "repoOwner": {"name": hub.user}})  # fmt: skip
                told["pullRequestUrl"] = f"{hub.url}/{repo.name}/discussions/{number}"
            made = repo.add(target, files, title)
        self.answer({"success": True, "commitOid": made.oid, "commitUrl": f"{hub.url}/{repo.name}/commit/{made.oid}",
                     "hookOutput": "", **told})  # fmt: skip


def _json(body: bytes) -> Any:
    try:
        return json.loads(body or b"{}")
    except ValueError:
        return {}
