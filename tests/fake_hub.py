"""The part of a model hub's HTTP API that a push speaks to, on this machine, with faults on request."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class FakeHub:
    """Repositories in memory.

    Attributes:
        repos: name -> path -> content.
        commits: name -> number of commits.
        fault: the step that is refused: "upload" or "commit".
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, int] = {}
        self.blobs: dict[str, bytes] = {}
        self.fault: str | None = None

    def answer(self, method: str, path: str, body: bytes, address: str) -> tuple[int, object]:
        """Status and JSON of one request."""
        if path == "/api/repos/create":
            values = json.loads(body)
            name = f"{values.get('organization') or 'me'}/{values['name']}"
            known = name in self.repos
            self.repos.setdefault(name, {".gitattributes": b""})
            return (409 if known else 200), {"url": f"{address}/{name}", "id": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.startswith("/blobs/"):
            if self.fault == "upload":
                return 403, {"error": "no room"}
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/blobs/")
            self.blobs[path.removeprefix("/blobs/")] = body
            return 200, {}
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{address}/blobs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if name not in self.repos:
            return 404, {"error": "not found"}
        if "/preupload/" in path:
            kinds = {True: "lfs", False: "regular"}
            asked = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": p, "uploadMode": kinds[p.endswith(".safetensors")]} for p in asked]
            return 200, {"files": [{**file, "shouldIgnore": False, "oid": None} for file in files]}
        if "/commit/" in path:
            return self._commit(name, body, address)
        siblings = [{"rfilename": file} for file in self.repos[name]]
        return 200, {"id": name, "sha": self._sha(name), "siblings": siblings, "private": False}

    def _sha(self, name: str) -> str:
        return f"{self.commits.get(name, 0):040x}"

    def _commit(self, name: str, body: bytes, address: str) -> tuple[int, object]:
        if self.fault == "commit":
            return 403, {"error": "not allowed"}
        files = dict(self.repos[name])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                assert value["parentCommit"] == self._sha(name)
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.repos[name], self.commits[name] = files, self.commits.get(name, 0) + 1
        return 200, {
            "success": True,
            "commitOid": self._sha(name),
            "commitUrl": f"{address}/{name}/commit/{self._sha(name)}",
        }


@contextlib.contextmanager
def running_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that huggingface_hub takes for the real one."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            address = f"http://127.0.0.1:{self.server.server_address[1]}"
            path = self.path.partition("?")[0]
            if "/resolve/" in path:
                self._send_file(path)
                return
            if not path.startswith("/blobs/") and self.headers.get("Authorization") != "Bearer secret":
                status, value = 401, {"error": "who are you?"}
            else:
                status, value = hub.answer(self.command, path, body, address)
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _send_file(self, path: str) -> None:
            repo, _, place = path.strip("/").partition("/resolve/")
            content = hub.repos[repo][place.partition("/")[2]]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", place.partition("/")[0])
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = handle_any  # noqa: N815 (the names that its parent calls)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "secret")
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
