"""A Hub on the loopback interface: enough of its HTTP interface for an unmodified client, and faults on demand."""

import base64
import hashlib
import json
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub import constants


TOKEN = "hf_the_right_one"
REPO = r"(?P<repo>[^/]+/[^/]+)"
LICENSES = ("apache-2.0", "mit", "cc-by-nc-4.0", "openrail++", "other")


class Refusal(Exception):
    """An answer with an error status, and with the Hub's name for it if it has one."""

    def __init__(self, status: int, code: str | None = None, commit: str | None = None):
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Repo-Commit": commit, "X-Error-Message": code}


@dataclass
class Fault:
    """
    What goes wrong with the next `times` requests whose "METHOD /path" holds `match`.

    Kinds: a status code; "short", a body that ends early and claims to be whole; "garble", a body of the right length
    with wrong bytes; "cut", a connection that breaks in the middle of the body; "stall", a body that pauses in the
    middle for `seconds`.
    """

    match: str
    kind: int | str
    times: int = 10**9
    seconds: float = 0.0


@dataclass
class Repo:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    access: str = "public"  # or "private" or "gated"


class Hub:
    """Repositories in memory, served at `endpoint`; `requests` lists what was asked for, in order."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.tokens_at_storage: list[str | None] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        # Large files are redirected to another host, as the real Hub does; no token may go there.
        self.storage = f"http://localhost:{self.server.server_port}/storage"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def commit(
        self, repo_id: str, files: dict[str, bytes], branch="main", access="public", replace=False, deleted=()
    ) -> str:
        """Add files to a branch, or make them all it has, and delete some; returns the commit's id."""
        repo = self.repos.setdefault(repo_id, Repo(access=access))
        parent = {} if replace else repo.commits.get(repo.refs.get(branch), {})
        commit = hashlib.sha1(f"{repo_id} {branch} {len(repo.commits)}".encode()).hexdigest()
        repo.commits[commit] = {name: content for name, content in {**parent, **files}.items() if name not in deleted}
        repo.refs[branch] = commit
        return commit

    @contextmanager
    def fault(self, *args, **kwargs):
        self.faults.append(Fault(*args, **kwargs))
        yield self.faults[-1]
        self.faults.pop()

    def find(self, repo_id: str, revision: str, token: str | None) -> tuple[str, dict[str, bytes]]:
        repo = self.repos.get(repo_id)
        if repo is None or (repo.access == "private" and token != TOKEN):
            raise Refusal(401 if token is None else 404, "RepoNotFound")
        if repo.access == "gated" and token != TOKEN:
            raise Refusal(401 if token is None else 403, "GatedRepo")
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            raise Refusal(404, "RevisionNotFound")
        return commit, repo.commits[commit]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def _serve(self):
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.fault = next((f for f in self.hub.faults if f.times > 0 and f.match in request), None)
        try:
            if self.fault:
                self.fault.times -= 1
                if isinstance(self.fault.kind, int):
                    raise Refusal(self.fault.kind)
            for pattern, answer in _ROUTES.items():
                if match := re.fullmatch(pattern, request):
                    return answer(self, **match.groupdict())
            raise Refusal(404)
        except Refusal as refusal:
            self._send(refusal.status, b"{}", refusal.headers)
        except ConnectionError:
            pass  # The client lost patience.

    do_GET = do_HEAD = do_POST = _serve

    def _send(self, status: int, body: bytes, headers=()):
        """Headers and body, after the fault if there is one for bodies."""
        kind = self.fault.kind if self.fault and status < 300 and self.command == "GET" else None
        body = body[: len(body) // 2] if kind == "short" else body
        body = bytes(255 - byte for byte in body) if kind == "garble" else body
        self.send_response(status)
        for name, value in dict(headers).items():
            if value is not None:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        half = len(body) // 2 if kind in ("cut", "stall") else len(body)
        self.wfile.write(body[:half])
        self.wfile.flush()
        if kind == "cut":
            self.close_connection = True
        elif kind == "stall":
            time.sleep(self.fault.seconds)
            self.wfile.write(body[half:])

    def _json(self, content):
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _info(self, repo, revision="main"):
        commit, files = self.hub.find(repo, revision, self.token)
        siblings = [{"rfilename": name} for name in sorted(files)]
        self._json({"id": repo, "modelId": repo, "sha": commit, "private": False, "tags": [], "siblings": siblings})

    def _models(self):
        """The repositories whose cards have all tags that are asked for."""
        wanted = {tag for tags in parse_qs(urlsplit(self.path).query).get("filter", []) for tag in tags.split(",")}
        found = []
        for repo_id, repo in self.hub.repos.items():
            card = metadata(repo.commits[repo.refs["main"]].get("README.md", b"").decode())
            tags = [*card.get("tags", []), f"base_model:{card.get('base_model')}"]
            if wanted <= {*tags}:
                found.append({"id": repo_id, "modelId": repo_id, "tags": tags})
        self._json(found)

    def _validate(self):
        errors = list(metadata_errors(metadata(json.loads(self.body)["content"])))
        content = json.dumps({"errors": [{"message": error} for error in errors], "warnings": []}).encode()
        self._send(400 if errors else 200, content, {"Content-Type": "application/json"})

    def _tree(self, repo, revision):
        _, files = self.hub.find(repo, revision, self.token)
        kinds = {name: {"type": "file", "size": len(files[name]), "oid": _sha(files[name])} for name in sorted(files)}
        self._json([{"path": name, **kind} for name, kind in kinds.items()])

    def _resolve(self, repo, revision, name):
        commit, files = self.hub.find(repo, revision, self.token)
        if name not in files:
            raise Refusal(404, "EntryNotFound", commit)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_sha(files[name])}"'}
        if not name.endswith(".safetensors"):
            return self._content(files[name], headers)
        headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(files[name]))}
        self._send(302, b"", headers | {"Location": f"{self.hub.storage}/{repo}/{commit}/{name}"})

    def _storage(self, repo, commit, name):
        self.hub.tokens_at_storage.append(self.token)
        self._content(self.hub.repos[repo].commits[commit][name], {})

    def _content(self, content: bytes, headers):
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted is None:
            return self._send(200, content, headers)
        start, size = int(wanted[1]), len(content)
        self._send(206, content[start:], headers | {"Content-Range": f"bytes {start}-{size - 1}/{size}"})

    def _create(self):
        if self.token != TOKEN:
            raise Refusal(401)
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if repo_id not in self.hub.repos:
            self.hub.commit(repo_id, {})
        self._json({"url": f"{self.hub.endpoint}/{repo_id}"})

    def _preupload(self, repo, revision):
        files = json.loads(self.body)["files"]
        self._json({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})

    def _commit(self, repo, revision):
        if self.token != TOKEN:
            raise Refusal(401)
        lines = [json.loads(line) for line in self.body.splitlines()]
        added = [line["value"] for line in lines if line["key"] == "file"]
        deleted = [line["value"]["path"] for line in lines if line["key"] == "deletedFile"]
        files = {entry["path"]: base64.b64decode(entry["content"]) for entry in added}
        commit = self.hub.commit(repo, files, branch=revision, deleted=deleted)
        self._json({"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{commit}", "commitOid": commit})


def point_client_at(endpoint: str, monkeypatch):
    """Have the Hub's client of this process talk to `endpoint` as the right user."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )


def metadata(card: str) -> dict:
    """The YAML block that a card begins with."""
    block = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    return yaml.safe_load(block[1]) if block else {}


def metadata_errors(card: dict):
    """
    What the Hub would refuse in a model card's metadata.

    Source: https://huggingface.co/docs/hub/model-cards and https://github.com/huggingface/hub-docs/blob/main/modelcard.md
    """
    if card.get("license", "other") not in LICENSES:
        yield f'"license" must be one of {", ".join(LICENSES)}'
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", card.get("base_model", "a/b")):
        yield '"base_model" must be the name of a model on the Hub'
    if card.get("base_model_relation", "adapter") not in ("adapter", "finetune", "merge", "quantized"):
        yield '"base_model_relation" is unknown'
    for model in card.get("model-index", []):
        required = [("name", model)]
        for result in model["results"]:
            required += [("type", result["task"]), ("type", result["dataset"]), ("name", result["dataset"])]
            required += [(key, metric) for metric in result["metrics"] for key in ("type", "value")]
        yield from (f'"model-index" lacks a "{key}"' for key, part in required if part.get(key) in (None, ""))


def _sha(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


_ROUTES = {
    rf"(GET|HEAD) /api/models/{REPO}": _Handler._info,
    rf"(GET|HEAD) /api/models/{REPO}/revision/(?P<revision>.+)": _Handler._info,
    rf"GET /api/models/{REPO}/tree/(?P<revision>[^/]+)": _Handler._tree,
    rf"(GET|HEAD) /{REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)": _Handler._resolve,
    rf"(GET|HEAD) /storage/{REPO}/(?P<commit>[^/]+)/(?P<name>.+)": _Handler._storage,
    r"POST /api/repos/create": _Handler._create,
    r"POST /api/validate-yaml": _Handler._validate,
    r"GET /api/models": _Handler._models,
    rf"POST /api/models/{REPO}/preupload/(?P<revision>.+)": _Handler._preupload,
    rf"POST /api/models/{REPO}/commit/(?P<revision>.+)": _Handler._commit,
}
