"""A hub of models on this machine: the part of the hub's protocol that uploading and loading need.

huggingface_hub talks to it over HTTP as to the real one (HF_ENDPOINT), so that nothing of it or of
ours is replaced. It keeps branches of files in memory, answers on 127.0.0.1 alone, and lets one
token write.

    POST /api/repos/create                          GET /api/models/ID[/revision/REV][/tree/REV]
    POST /api/models/ID/branch/NAME                 POST /api/models/ID/preupload/REV
    POST /ID.git/info/lfs/objects/batch, PUT /lfs   POST /api/models/ID/commit/REV
    HEAD and GET /ID/resolve/REV/FILE
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_write"
_LARGE = (".safetensors", ".onnx", ".png", ".model")


class LocalHub(ThreadingHTTPServer):
    """The server; `repositories` is NAME -> {"private", "branches": branch -> file -> bytes}."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.objects, self.commits = {}, {}, []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LocalHub

    def log_message(self, *_):
        pass

    def answer(self, status, value=None, headers=(), body=None):
        content = json.dumps(value or {}).encode() if body is None else body
        self.send_response(status)
        for name, each in dict(headers).items():
            self.send_header(name, each)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def read(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def parts(self):
        return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    def do_PUT(self):
        content = self.read()
        name = self.parts()[-1]
        assert hashlib.sha256(content).hexdigest() == name
        self.server.objects[name] = content
        self.answer(200)

    def do_POST(self):
        content = self.read()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid user token."})
        parts = self.parts()
        if parts == ["api", "repos", "create"]:
            return self.create(json.loads(content))
        if parts == ["api", "validate-yaml"]:
            return self.answer(200, {"errors": [], "warnings": []})
        if parts[-3:] == ["lfs", "objects", "batch"]:
            return self.batch(json.loads(content))
        name, (verb, target) = "/".join(parts[2:4]), parts[4:]
        branches = self.server.repositories[name]["branches"]
        if verb == "branch":
            if target in branches:
                return self.answer(409, {"error": "Reference already exists"})
            branches[target] = dict(branches["main"])
            return self.answer(200)
        if target not in branches:
            return self.answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
        if verb == "preupload":
            return self.preupload(json.loads(content))
        return self.commit(name, target, content)

    def create(self, asked):
        name = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.server.url}/{name}"}
        if asked["organization"] == "strangers":
            return self.answer(403, {"error": "You don't have the rights to create a model there"})
        if name in self.server.repositories:
            return self.answer(409, {"error": "You already created this model repo", **url})
        private = asked.get("private", asked.get("visibility") == "private")
        branches = {"main": {".gitattributes": b""}}
        self.server.repositories[name] = {"private": private, "branches": branches}
        return self.answer(200, url)

    def preupload(self, asked):
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(_LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in asked["files"]
        ]
        self.answer(200, {"files": files})

    def batch(self, asked):
        objects = []
        for each in asked["objects"]:
            known = each["oid"] in self.server.objects
            upload = {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}}
            objects.append({**each, **({} if known else {"actions": upload})})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, name, branch, content):
        files = self.server.repositories[name]["branches"][branch]
        for line in content.decode().splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "header":
                self.server.commits.append((name, branch, value["summary"]))
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        url = f"{self.server.url}/{name}/commit/{_commit(files)}"
        self.answer(200, {"commitUrl": url, "commitOid": _commit(files)})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = self.parts()
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        repository = self.server.repositories.get(name)
        may_read = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository["private"] and not may_read):
            return self.answer(401, {}, {"X-Error-Code": "RepoNotFound"})
        revision = parts[5] if parts[0] == "api" and len(parts) > 5 else "main"
        revision = parts[3] if parts[0] != "api" else revision
        # A commit is named by its files; loading asks for files by that name.
        known = repository["branches"] | {
            _commit(files): files for files in repository["branches"].values()
        }
        if (files := known.get(revision)) is None:
            return self.answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
        if parts[0] == "api":
            return self.describe(name, files, is_tree="tree" in parts)
        if (content := files.get("/".join(parts[4:]))) is None:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": _commit(files)}
            return self.answer(404, {}, headers)
        headers = {"ETag": f'"{_blob(content)}"', "X-Repo-Commit": _commit(files)}
        return self.answer(200, headers=headers, body=content)

    def describe(self, name, files, is_tree):
        entries = [
            {"type": "file", "path": path, "oid": _blob(content), "size": len(content)}
            for path, content in sorted(files.items())
        ]
        siblings = [{"rfilename": entry["path"]} for entry in entries]
        model = {"id": name, "sha": _commit(files), "siblings": siblings, "private": True}
        self.answer(200, entries if is_tree else model)


def _blob(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _commit(files):
    names = "".join(f"{path} {_blob(content)}\n" for path, content in sorted(files.items()))
    return hashlib.sha1(names.encode()).hexdigest()
