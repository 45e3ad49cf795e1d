"""A Hub on the loopback interface: the HTTP calls that huggingface_hub makes to push and to load, kept in memory."""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


USER, ORGANISATION, TOKEN = "tester", "lab", "hf_loopback"
LFS_SUFFIXES = (".safetensors", ".png", ".onnx", ".data")


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Commit:
    """A state of a repository: its id, its message, all its files, and the paths that the client sent for it."""

    oid: str
    message: str
    files: dict[str, bytes]
    sent: list[str] = field(default_factory=list)


@dataclass
class Repository:
    private: bool
    commits: list[Commit] = field(default_factory=list)

    def at(self, revision: str) -> Commit | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit.oid == revision), None)

    def commit(self, message: str, files: dict[str, bytes], sent: list[str] | None = None) -> Commit:
        oid = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits.append(Commit(oid, message, files, sent or []))
        return self.commits[-1]


class LoopbackHub:
    """
    Serves on 127.0.0.1 until `close`; one user, TOKEN, who is in one organisation.

    Args:
        url: what HF_ENDPOINT has to be.
        repositories: by id.
        requests: (method, path) of each call so far.
        broken: a part of a path; calls whose path holds it are cut off in the middle, as when the network goes.
        lost: likewise, but the call is done, and only its answer is lost.
        refused: a part of a path -> status, words and X-Error-Code with which calls whose path holds it are answered.
        storage: where hf_xet, if it is used, is told to send weights.
        portal: answer everything with the login page of a hotel.
        role, organisation_role: of the token, and of the user in the organisation, "read" or "write".
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.broken: str | None = None
        self.role = self.organisation_role = "write"
        self.lost: str | None = None
        self.portal = False
        self.refused: dict[str, tuple[int, str, str]] = {}
        self.storage = "http://127.0.0.1:9"  # where nobody listens
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        # How often it looks whether it is to end: by default every half second, which each test would wait for.
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def files(self, repo_id: str) -> dict[str, bytes]:
        return self.repositories[repo_id].commits[-1].files

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def handle_one_call(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        split = urlsplit(self.path)
        path, self.query = unquote(split.path).strip("/"), parse_qs(split.query)
        self.hub.requests.append((self.command, path))
        if self.hub.broken is not None and self.hub.broken in path:
            self.hang_up()
            return
        if self.hub.portal:
            self.answer(b"<html>Welcome to our hotel</html>", Content_Type="text/html")
            return
        refusal = next((answer for part, answer in self.hub.refused.items() if part in path), None)
        if refusal is not None:
            status, words, code = refusal
            self.answer({"error": words}, status, X_Error_Code=code)
        elif path.startswith("api/"):
            self.api(path.removeprefix("api/"))
        elif path.startswith("lfs/"):
            self.lfs_object(path.removeprefix("lfs/"))
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.lfs_batch()
        elif "/resolve/" in path:
            repo_id, _, rest = path.partition("/resolve/")
            self.resolve(repo_id, *rest.split("/", 1))
        else:
            self.answer({"error": f"no such call {path}"}, 404)

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_one_call

    def answer(self, content, status: int = 200, **headers: str) -> None:
        if self.hub.lost is not None and self.hub.lost in self.path:
            self.hang_up()
            return
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, repo_id: str) -> Repository | None:
        """The repository, or None after the answer that the Hub gives to those who may not see it."""
        found = self.hub.repositories.get(repo_id)
        if found is None or (found.private and not self.authorized):
            self.answer({"error": "Repository not found"}, 401 if found else 404, X_Error_Code="RepoNotFound")
            return None
        return found

    def api(self, path: str) -> None:
        if path == "validate-yaml":
            front_matter = json.loads(self.body)["content"].split("---")[1]
            fine = isinstance(yaml.safe_load(front_matter), dict)
            self.answer({"errors": [] if fine else [{"message": "no mapping"}], "warnings": []}, 200 if fine else 400)
        elif path == "whoami-v2" and self.authorized:
            access = {"accessToken": {"role": self.hub.role, "displayName": "loopback"}}
            orgs = [{"name": ORGANISATION, "type": "org", "roleInOrg": self.hub.organisation_role}]
            self.answer({"type": "user", "name": USER, "orgs": orgs, "auth": access})
        elif path.startswith("repos/") or path == "whoami-v2":
            if not self.authorized:
                self.answer({"error": "Invalid username or password."}, 401)
            elif path == "repos/create":
                self.create()
            else:
                self.answer({"error": f"no such call {path}"}, 404)
        elif path.startswith("models/"):
            owner, name, *rest = path.removeprefix("models/").split("/")
            self.models(f"{owner}/{name}", rest)
        else:
            self.answer({"error": f"no such call {path}"}, 404)

    def create(self) -> None:
        asked = json.loads(self.body)
        repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
        url = f"{self.hub.url}/{repo_id}"
        if repo_id.split("/")[0] not in (USER, ORGANISATION):
            self.answer({"error": f"You don't have the rights to create a model under {repo_id}"}, 403)
        elif repo_id in self.hub.repositories:
            self.answer({"error": "You already created this model repo", "url": url}, 409)
        else:
            private = asked.get("private") or asked.get("visibility") == "private"
            repository = self.hub.repositories[repo_id] = Repository(bool(private))
            repository.commit("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
            self.answer({"url": url, "name": repo_id, "id": repo_id})

    def models(self, repo_id: str, rest: list[str]) -> None:
        repository = self.repository(repo_id)
        if repository is None:
            return
        if rest and rest[0] in ("preupload", "commit"):
            if not self.authorized:
                self.answer({"error": "Unauthorized"}, 401)
            elif rest[0] == "preupload":
                self.preupload(repository)
            else:
                self.commit(repo_id, repository)
            return
        if rest and rest[0] == "xet-write-token":
            told = {"casUrl": self.hub.storage, "exp": 2**33, "accessToken": "loopback"}
            headers = {"Cas_Url": self.hub.storage, "Token_Expiration": str(2**33), "Access_Token": "loopback"}
            # An older library reads the headers.
            self.answer(told, **{f"X_Xet_{name}": value for name, value in headers.items()})
            return
        if rest and rest[0] == "commits":
            when = {"date": "2026-01-01T00:00:00.000Z", "authors": [{"user": USER}], "message": ""}
            self.answer([{"id": commit.oid, "title": commit.message, **when} for commit in repository.commits[::-1]])
            return
        commit = repository.at(rest[1] if len(rest) > 1 else "main")
        if commit is None:
            self.answer({"error": f"Invalid rev id: {rest[1]}"}, 404, X_Error_Code="RevisionNotFound")
        elif rest and rest[0] == "tree":
            self.answer([self.entry(name, content) for name, content in sorted(commit.files.items())])
        else:
            siblings = [{"rfilename": name} for name in sorted(commit.files)]
            info = {"id": repo_id, "sha": commit.oid, "private": repository.private, "siblings": siblings}
            self.answer(info | {"tags": [], "downloads": 0, "likes": 0})

    @staticmethod
    def entry(name: str, content: bytes) -> dict:
        entry = {"type": "file", "path": name, "size": len(content), "oid": git_oid(content)}
        if name.endswith(LFS_SUFFIXES):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry

    def preupload(self, repository: Repository) -> None:
        answers = []
        for asked in json.loads(self.body)["files"]:
            path, is_lfs = asked["path"], asked["path"].endswith(LFS_SUFFIXES)
            answer = {"path": path, "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False}
            known = repository.at("main").files.get(path)
            if known is not None:
                answer["oid"] = hashlib.sha256(known).hexdigest() if is_lfs else git_oid(known)
            answers.append(answer)
        self.answer({"files": answers})

    def lfs_batch(self) -> None:
        objects, request = [], json.loads(self.body)
        for asked in request["objects"]:
            oid = asked["oid"]
            actions = {"upload": {"href": f"{self.hub.url}/lfs/{oid}", "header": {}}}
            actions["verify"] = {"href": f"{self.hub.url}/lfs/verify", "header": {}}
            objects.append({**asked, **({} if oid in self.hub.lfs else {"actions": actions})})
        # An older library asks here whether hf_xet is to send them.
        self.answer({"transfer": "xet" if "xet" in request["transfers"] else "basic", "objects": objects})

    def lfs_object(self, oid: str) -> None:
        if oid != "verify":
            assert hashlib.sha256(self.body).hexdigest() == oid
            self.hub.lfs[oid] = self.body
        self.answer({})

    def commit(self, repo_id: str, repository: Repository) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        parent = header.get("parentCommit")
        if parent not in (None, repository.commits[-1].oid):
            self.answer({"error": "A commit has happened since. Please refresh and try again."}, 412)
            return
        files = dict(repository.commits[-1].files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sent = [line["value"]["path"] for line in lines if line["key"] != "header"]
        oid = repository.commit(header["summary"], files, sent).oid
        url = f"{self.hub.url}/{repo_id}/commit/{oid}"
        self.answer({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        repository = self.repository(repo_id)
        if repository is None:
            return
        commit = repository.at(revision)
        if commit is None:
            self.answer({"error": "Revision not found"}, 404, X_Error_Code="RevisionNotFound")
        elif name not in commit.files:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit.oid)
        else:
            entry = self.entry(name, commit.files[name])
            headers = {"X_Repo_Commit": commit.oid, "ETag": f'"{entry["oid"]}"'}
            if "lfs" in entry:
                headers |= {"X_Linked_Etag": f'"{entry["lfs"]["oid"]}"', "X_Linked_Size": str(entry["size"])}
            self.answer(commit.files[name], **headers)
