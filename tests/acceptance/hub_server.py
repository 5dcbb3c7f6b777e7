"""A model hub on loopback: the routes that huggingface_hub's real client uses to download, create and upload.

Repositories are kept in memory; a commit's id is a digest of its files. ``gated`` repositories answer 403 without the
right token, and writing needs it.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_right_token_0123456789"


class Hub:
    """repos: name -> revision -> file -> bytes. seen: method and path of every request."""

    def __init__(self):
        self.repos, self.gated, self.private, self.blobs, self.seen = {}, set(), set(), {}, []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def add(self, name, folder, revision="main"):
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        self.repos.setdefault(name, {})[revision] = files

    def commit(self, name, revision):
        files = self.repos[name][revision]
        digest = hashlib.sha1()
        for path in sorted(files):
            digest.update(path.encode() + hashlib.sha1(files[path]).digest())
        return digest.hexdigest()

    def find(self, name, revision):
        """The revision's own name, for a branch or a commit id; None where there is none."""
        known = self.repos.get(name, {})
        return next((one for one in known if revision in (one, self.commit(name, one))), None)


class Handler(BaseHTTPRequestHandler):
    hub = None
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def reply(self, status, body=b"", kind="application/json", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def answer(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        self.hub.seen.append(f"{self.command} {path}")
        is_known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        for pattern, act in (
            (r"/api/repos/create", self.create),
            (r"/api/validate-yaml", self.validate),
            (r"/api/models/([\w.-]+/[\w.-]+)/preupload/(.+)", self.preupload),
            (r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", self.batch),
            (r"/lfs/(\w+)", self.put),
            (r"/api/models/([\w.-]+/[\w.-]+)/commit/(.+)", self.add_commit),
        ):
            found = re.fullmatch(pattern, path)
            if found and self.command in {"POST", "PUT"}:
                if not is_known and not pattern.startswith("/lfs"):
                    return self.reply(401, {"error": "Invalid credentials"})
                return act(body, *found.groups())
        found = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path)
        if found:
            return self.resolve(is_known, *found.groups())
        found = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/revision/(.+))?", path)
        if found:
            return self.info(is_known, found.group(1), found.group(2) or "main")
        return self.reply(404, {"error": "not found"}, X_Error_Code="EntryNotFound")

    def refused(self, name, is_known):
        if name not in self.hub.repos or (name in self.hub.private and not is_known):
            self.reply(401 if not is_known else 404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return True
        if name in self.hub.gated and not is_known:
            self.reply(403, {"error": "gated"}, X_Error_Code="GatedRepo", X_Error_Message=f"Access to model {name} is restricted")
            return True
        return False

    def resolve(self, is_known, name, revision, file):
        if self.refused(name, is_known):
            return None
        own = self.hub.find(name, revision)
        if own is None:
            return self.reply(404, {"error": "no revision"}, X_Error_Code="RevisionNotFound")
        commit, files = self.hub.commit(name, own), self.hub.repos[name][own]
        if file not in files:
            return self.reply(404, {"error": "no file"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        etag = f'"{hashlib.sha1(files[file]).hexdigest()}"'
        return self.reply(200, files[file], "application/octet-stream", X_Repo_Commit=commit, ETag=etag, Accept_Ranges="none")

    def info(self, is_known, name, revision):
        if self.refused(name, is_known):
            return None
        own = self.hub.find(name, revision)
        if own is None:
            return self.reply(404, {"error": "no revision"}, X_Error_Code="RevisionNotFound")
        files = [{"rfilename": file} for file in self.hub.repos[name][own]]
        return self.reply(200, {"id": name, "modelId": name, "sha": self.hub.commit(name, own), "siblings": files, "tags": []})

    def validate(self, body):
        return self.reply(200, {"warnings": [], "errors": []})

    def create(self, body):
        given = json.loads(body)
        name = f"{given.get('organization') or 'me'}/{given['name']}" if "/" not in given["name"] else given["name"]
        if given.get("private") or given.get("visibility") == "private":
            self.hub.private.add(name)
        if name in self.hub.repos:
            return self.reply(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
        self.hub.repos[name] = {"main": {}}
        return self.reply(200, {"url": f"{self.hub.url}/{name}", "id": name})

    def preupload(self, body, name, revision):
        modes = [
            {
                "path": one["path"],
                "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for one in json.loads(body)["files"]
        ]
        return self.reply(200, {"files": modes})

    def batch(self, body, name):
        objects = [
            {"oid": one["oid"], "size": one["size"], "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}
            for one in json.loads(body)["objects"]
        ]
        return self.reply(200, {"transfer": "basic", "objects": objects}, "application/vnd.git-lfs+json")

    def put(self, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        return self.reply(200)

    def add_commit(self, body, name, revision):
        files = dict(self.hub.repos[name][revision])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        self.hub.repos[name][revision] = files
        commit = self.hub.commit(name, revision)
        return self.reply(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit, "success": True})
