"""A hub on loopback: the few answers that huggingface_hub asks for, out of folders, and the ways a hub can fail.

    with FakeHub() as hub:
        hub.add("org/name", "step1", folder)
        ...                                 # with huggingface_hub's endpoint pointed at hub.url

It serves refs, trees and files by range, counts the bytes of every file it sends, and can cut a file short, send other
bytes than it lists, keep large files at another address, be busy, or list names that lie.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import urllib.parse
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CHUNK_BYTES = 1 << 14


class FakeHub:
    """Repositories of revisions, each a copy of a folder's files."""

    def __init__(self) -> None:
        self.refs: dict[str, dict[str, str]] = {}
        self.trees: dict[tuple[str, str], dict[str, bytes]] = {}
        self.extra_entries: list[dict[str, Any]] = []
        self.sent: Counter[tuple[str, str]] = Counter()
        self.requests: list[str] = []
        self.cut_after: dict[str, int] = {}
        self.damaged: set[str] = set()
        self.ignores_ranges = False
        self.busy = 0
        self.large_files_at: str | None = None
        self.authorizations: list[str | None] = []
        self.on_chunk: Callable[[], None] = lambda: None
        self.pause_seconds = 0.0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, repository: str, revision: str, folder: Path, *, commit: str | None = None) -> str:
        """A revision with the files of `folder`; returns its commit."""
        files = {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}
        return self.add_files(repository, revision, files, commit=commit)

    def add_files(self, repository: str, revision: str, files: dict[str, bytes], *, commit: str | None = None) -> str:
        """A revision with these files; returns its commit."""
        commit = commit or hashlib.sha1(f"{repository}@{revision}".encode()).hexdigest()
        self.refs.setdefault(repository, {})[revision] = commit
        self.trees[repository, commit] = files
        return commit

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        path = urllib.parse.unquote(urllib.parse.urlsplit(request.path).path)
        self.requests.append(path)
        self.authorizations.append(request.headers.get("Authorization"))
        if self.busy:
            self.busy -= 1
            return self._refuse(request, "TooManyRequests", 429)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/refs", path):
            refs = self.refs.get(match[1])
            if refs is None:
                return self._refuse(request, "RepoNotFound")
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit} for name, commit in refs.items()
            ]
            return self._json(request, {"branches": branches, "tags": [], "converts": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path):
            tree = self.trees.get((match[1], match[2]))
            if tree is None:
                return self._refuse(request, "RevisionNotFound")
            entries = [self._entry(name, content) for name, content in tree.items()]
            return self._json(request, [*entries, *self.extra_entries])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            content = self.trees.get((match[1], match[2]), {}).get(match[3])
            if content is None:
                return self._refuse(request, "EntryNotFound")
            if self.large_files_at and "lfs" in self._entry(match[3], content):
                return self._redirect(request, self.large_files_at + request.path)
            return self._file(request, match[2], match[3], content)
        return self._refuse(request, "RepoNotFound")

    def _entry(self, name: str, content: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": name, "size": len(content)}
        entry["oid"] = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        if name.endswith((".safetensors", ".bin")):
            sha256 = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
        return entry

    def _file(self, request: BaseHTTPRequestHandler, commit: str, name: str, content: bytes) -> None:
        if name in self.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = 0
        asked = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        if asked and not self.ignores_ranges:
            start = int(asked[1])
        body = content[start:]
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(body)))
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        request.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        request.send_header("X-Repo-Commit", commit)
        request.end_headers()
        limit = self.cut_after.get(name, len(body))
        for at in range(0, min(limit, len(body)), CHUNK_BYTES):
            chunk = body[at : min(at + CHUNK_BYTES, limit)]
            request.wfile.write(chunk)
            self.sent[commit, name] += len(chunk)
            self.on_chunk()
            if self.pause_seconds:
                threading.Event().wait(self.pause_seconds)
        if limit < len(body):
            request.close_connection = True

    def _json(self, request: BaseHTTPRequestHandler, content: Any) -> None:
        body = json.dumps(content).encode()
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    def _redirect(self, request: BaseHTTPRequestHandler, url: str) -> None:
        request.send_response(302)
        request.send_header("Location", url)
        request.send_header("Content-Length", "0")
        request.end_headers()

    def _refuse(self, request: BaseHTTPRequestHandler, code: str, status: int = 404) -> None:
        request.send_response(status)
        request.send_header("Retry-After", "0")
        request.send_header("X-Error-Code", code)
        request.send_header("X-Error-Message", code)
        request.send_header("Content-Length", "0")
        request.end_headers()
