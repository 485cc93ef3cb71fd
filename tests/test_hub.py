"""Uploads, with the real huggingface_hub client against a local server that speaks the Hub's protocol."""

import base64
import hashlib
import json
import select
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT, Run, flags, load_script

TOKEN = "hf_secretSECRETsecretSECRET"
LORA = {"pytorch_lora_weights.safetensors"}
ALL = LORA | {"README.md", "image_0.png"}


@pytest.fixture(scope="module")
def teacher(teachers):
    """Return the folder of the tiny SD 1.5 teacher: nothing here depends on the family."""
    return teachers["train_lcm_lora_sd15"]


class Hub(ThreadingHTTPServer):
    """A Hub; a repository's name says how it fails."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.blobs, self.commits, self.seen, self.bodies, self.tokens = {}, {}, Counter(), [], set()
        self.visibility = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def status(self, name, step):
        """Return the HTTP status of a request: each kind fails once at `flaky`, always at `down`."""
        self.seen[name, step] += 1
        if (name, step) == ("hung", "commit"):
            time.sleep(9)
        if name == "forbidden" or step == "auth-check" and name == "readable":
            return 403
        failing = {"flaky": self.seen[name, step] == 1, "down": True, "full": step == "commit"}
        return 500 if failing.get(name) else 200

    def files(self, name):
        """Return {path: bytes} of a repository after all its commits."""
        return {path: data for commit in self.commits.get(name, []) for path, data in commit.items()}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args):
        pass

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, status, record):
        data = json.dumps(record).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def handle_request(self):
        hub, body, path = self.server, self.body(), self.path.partition("?")[0]
        hub.bodies.append(body)
        hub.tokens.add(self.headers.get("Authorization"))
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            name, step = json.loads(body)["name"], "create"
            hub.visibility[name] = json.loads(body).get("visibility")
        elif path.endswith("/info/lfs/objects/batch"):
            name, step = path.removesuffix(".git/info/lfs/objects/batch").rpartition("/")[2], "lfs"
        elif path.startswith("/upload/"):
            name, step = path.split("/")[2], "put"
        else:  # /api/models/me/NAME/preupload/main, /api/models/me/NAME/commit/main, /api/models/me/NAME
            name, step = [*path.split("/")[4:6], "info"][:2]
        status = hub.status(name, step)
        if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(1, socket.MSG_PEEK):
            return None  # its client has given it up
        answer = {"error": "not now"} if status != 200 else getattr(self, f"do_{step}")(name, body)
        return self.answer(status, answer)

    do_GET = do_POST = do_PUT = handle_request

    def do_create(self, name, _body):
        return {"url": f"{self.server.endpoint}/me/{name}"}

    def do_info(self, name, _body):
        return {"id": f"me/{name}", "sha": "0" * 40}

    locals()["do_auth-check"] = do_info

    def do_preupload(self, _name, body):
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith(("safetensors", "png")) else "regular" for path in paths}
        files = [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]
        return {"files": files}

    def do_lfs(self, name, body):
        objects = json.loads(body)["objects"]
        for entry in objects:
            href = f"{self.server.endpoint}/upload/{name}/{entry['oid']}"
            entry["actions"] = {"upload": {"href": href}}
        return {"transfer": "basic", "objects": objects}

    def do_put(self, _name, body):
        self.server.blobs[hashlib.sha256(body).hexdigest()] = body
        return {}

    def do_commit(self, name, body):
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
        commits = self.server.commits.setdefault(name, [])
        commits.append(files)
        url = f"{self.server.endpoint}/me/{name}/commit/{len(commits)}"
        return {"commitUrl": url, "commitOid": f"{len(commits):040}"}


# ----------------------------------------------------------------------------------------------------------
# The other process: this file as a program, with the real client, which reads HF_ENDPOINT on import
# ----------------------------------------------------------------------------------------------------------

# Repository -> changes of its run.
RUNS = {
    "flaky": {"max_train_steps": 4, "validation_prompts": None},
    "full": {"hub_public_repo": True, "hub_model_id": "full"}, "down": {}, "forbidden": {}, "readable": {},
    "hung": {"push_checkpoints_to_hub": None},
}  # fmt: skip


def wait_less(_script):
    """Make every pause a short one."""
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.01))


def lose_patience(script):
    wait_less(script)
    script.COMMAND_STALL_S = 3


def train_and_publish(folder, teacher, shards):
    """Train into folder/NAME for repositories that fail in different ways, and note what came of it."""
    script, results = load_script("train_lcm_lora_sd15.py"), {}
    for name, changes in RUNS.items():
        changes = {"max_train_steps": 2, "push_to_hub": True, "push_checkpoints_to_hub": True} | changes
        line = flags(
            teacher, shards, folder / name, hub_token=TOKEN, lora_target_modules="to_q,conv1",
            validation_steps=0, **{"hub_model_id": f"me/{name}"} | changes,
        )  # fmt: skip
        run = Run(script, line, folder / f"{name}.txt", hook=lose_patience if name == "hung" else wait_less)
        results[name] = {"code": run.wait()[0], "said": run.said.read_text()}
    (folder / "results.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def hub(teacher, shards, tmp_path_factory):
    """Return (the Hub after all runs, folder with what they left, their results)."""
    hub, folder = Hub(), tmp_path_factory.mktemp("runs")
    online = {"HF_ENDPOINT": hub.endpoint, "LCM_TESTS_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, __file__, str(folder), str(teacher), shards]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1800, env=ENVIRONMENT | online, cwd=ROOT / "tests"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    yield hub, folder, json.loads((folder / "results.json").read_text())
    hub.shutdown()


def test_a_hub_that_fails_now_and_then_gets_checkpoint_and_all_files(hub):
    server, folder, results = hub
    said = results["flaky"]["said"]
    assert results["flaky"]["code"] == 0 and said.count("uploaded to ") == 2 and "not uploaded" not in said
    assert "me/flaky cannot be made" in said and "upload 1 of 2 failed: " in said
    first, last = server.commits["flaky"]
    assert set(first) == LORA and set(last) == LORA | {"README.md"} | {f"image_{n}.png" for n in range(4)}
    for name, commit in (("checkpoint-2", first), (".", last)):
        assert all((folder / "flaky" / name / path).read_bytes() == data for path, data in commit.items())


def test_captions_of_the_data_do_not_become_public(hub):
    server, _, _ = hub
    card = server.files("flaky")["README.md"].decode()
    prompts = load_script("train_lcm_lora_sd15.py").NEUTRAL_PROMPTS
    assert all(prompt in card for prompt in prompts) and "sea 1" not in card and len(prompts) == 4
    assert 'load_lora_weights("me/full"' in (hub[1] / "full" / "README.md").read_text(), "the Hub adds the owner"
    kinds = {"flaky": "private", "full": "public", "down": "private", "forbidden": "private"}
    assert server.visibility.items() >= kinds.items()


@pytest.mark.parametrize("name", ["full", "down"])
def test_a_failing_hub_loses_and_stops_nothing(hub, name):
    lose_nothing(hub, name)
    if name == "down":
        lose_nothing(hub, "hung")


def lose_nothing(hub, name):
    server, folder, results = hub
    assert results[name]["code"] == 0, results[name]["said"][-2000:]
    assert server.files(name) == {}
    assert all((folder / name / path).is_file() for path in ALL)
    said = results[name]["said"]
    assert said.count("upload 2 of 2 failed: ") == 1 and "Traceback" not in said
    patterns = "--include pytorch_lora_weights.safetensors --include README.md --include 'image_*.png'"
    later = f"hf upload me/{name} {folder / name} {patterns}" + " --private" * (name != "full")
    assert said.splitlines()[-1].endswith(later)


def test_the_line_that_publishes_later_is_one_that_hf_takes(hub):
    """With the command line's own parser, run against the same Hub."""
    server, _, results = hub
    words = shlex.split(results["down"]["said"].splitlines()[-1].partition(": hf ")[2].replace("me/down", "me/late"))
    online = {"HF_ENDPOINT": server.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    command = [Path(sys.executable).parent / "hf", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=ENVIRONMENT | online)
    assert done.returncode == 0 and set(server.files("late")) == ALL, done.stderr[-2000:]
    assert server.visibility["late"] == "private"


def test_a_refusal_is_said_before_anything_is_trained(hub):
    _, folder, results = hub
    for name in ("forbidden", "readable"):
        said, refusal = results[name]["said"], f"error: --push_to_hub: me/{name}"
        assert results[name]["code"] == 2
        assert said.splitlines()[-1].startswith(refusal) and "loading the models" not in said
        assert not (folder / name / "log.jsonl").exists()


def test_the_token_goes_to_the_hub_and_nowhere_else(hub):
    server, folder, results = hub
    assert server.tokens == {f"Bearer {TOKEN}", None}, "storage gets none"
    assert not any(TOKEN.encode() in body for body in [*server.bodies, *server.blobs.values()])
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()] and len(files) > 20


def test_no_path_of_this_machine_is_uploaded(hub, teacher, shards):
    server, folder, _ = hub
    for path, data in server.files("flaky").items():
        for secret in (str(folder), str(teacher), str(shards)):
            assert secret.encode() not in data, path


if __name__ == "__main__":
    train_and_publish(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
