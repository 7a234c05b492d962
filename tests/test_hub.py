import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from hfcheckpoints import save_checkpoint, tiny_config

from jvjepa.convert import convert
from jvjepa.convert.hub import resolve
from jvjepa.errors import InputError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b"{}", "model.safetensors": b"weights", "model.pt": b"unwanted"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vjepa2-vitl", "'vjepa2-vitl' is not a folder, .* there are vjepa2-vitl-fpc64-256, "),
        ("model.pt", r"model\.pt does not exist"),
        ("some/model.pth", r"some/model\.pth does not exist"),
        ("vjepa2_vit_large", r"curl -O https://.*/vjepa2/vitl\.pt and convert vitl\.pt"),
        ("./models", r"\./models is not a folder"),
        ("/models", "/models is not a folder"),
        ("a/b/c", "a/b/c is not a folder"),
        ("a b/c", "'a b/c' is not a folder, and cannot be a hub id"),
        ("a/", "'a/' is not a folder, and cannot be a hub id"),
        ("facebook/vjepa2-vitx", "HF_HUB_OFFLINE is set.*; the released checkpoints are vjepa2-"),
        ("facebook/vjepa2-vitl-fpc64-256", r"not in the cache and .* \(HF_HUB_OFFLINE is set\)$"),
    ],
)
def test_sources_that_are_not_there(cache: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        resolve(name)
    assert "\n" not in str(caught.value)


def test_a_folder_wins_and_has_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("vjepa2-vitl-fpc64-256", "odd.pt"):
        (tmp_path / name).mkdir()
        assert resolve(name).path == Path(name)
    with pytest.raises(InputError, match="revision 'v1' is for hub ids"):
        resolve("odd.pt", "v1")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file"):
        resolve("file")


@pytest.mark.parametrize("name", ["vjepa2-vitl-fpc64-256", "facebook/vjepa2-vitl-fpc64-256"])
def test_the_cache_is_enough(cache: Path, tmp_path: Path, name: str) -> None:
    repo = cache / "models--facebook--vjepa2-vitl-fpc64-256"
    save_checkpoint(repo / "snapshots" / COMMIT, tiny_config())
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    report = convert(name, tmp_path / "out")
    assert report.source is not None
    assert report.source.name == "facebook/vjepa2-vitl-fpc64-256"
    assert report.source.revision == COMMIT
    with pytest.raises(InputError, match="at revision v9 is not in the cache"):
        resolve(name, "v9")


class FakeHub(BaseHTTPRequestHandler):
    """The three answers of a hub that matter here: one repository, and errors."""

    def do_GET(self) -> None:
        errors = {"missing": (404, "RepoNotFound"), "gated": (403, "GatedRepo")}
        name = self.path.split("/")[4] if self.path.startswith("/api") else ""
        if name in errors:
            self.answer(b"", errors[name][0], {"X-Error-Code": errors[name][1]})
        elif "/revision/v9" in self.path:
            self.answer(b"", 404, {"X-Error-Code": "RevisionNotFound"})
        elif "/revision/" in self.path:
            self.answer(json.dumps({"id": "o/good", "sha": COMMIT}).encode())
        elif "/tree/" in self.path:
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": path.ljust(40, "0")}
                for path, content in FILES.items()
            ]
            self.answer(json.dumps(entries).encode())
        else:
            path = self.path.split("/")[-1]
            headers = {"ETag": f'"{path}"', "X-Repo-Commit": COMMIT}
            self.answer(FILES[path], 200, headers)

    do_HEAD = do_GET

    def answer(self, body: bytes, code: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


ASK = """
import sys
from jvjepa.convert.hub import resolve
for argument in sys.argv[1:]:
    try:
        print(resolve(*argument.split("@")).path)
    except ValueError as error:
        print(error)
"""


def ask(home: Path, endpoint: str, *sources: str) -> list[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_ENDPOINT": endpoint}
    arguments = [sys.executable, "-c", ASK, *sources]
    done = subprocess.run(arguments, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_hub_and_then_none(tmp_path: Path) -> None:
    server = HTTPServer(("127.0.0.1", 0), FakeHub)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    asked = ("o/good", "o/good@v9", "o/missing", "facebook/missing", "o/gated")
    good, revision, missing, typo, gated = ask(tmp_path, url, *asked)
    server.shutdown()
    server.server_close()
    assert Path(good).name == COMMIT
    assert sorted(path.name for path in Path(good).iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert revision == "o/good has no revision 'v9'"
    assert missing == "o/missing is not a folder, and o/missing is not on the hub, or is private"
    assert "is private; the released checkpoints are vjepa2-vitl-fpc64-256, " in typo
    assert "o/gated asks for its terms to be accepted" in gated
    # The same address, where nobody answers any more:
    cached, other = ask(tmp_path, url, "o/good", "o/other")
    assert cached == good
    assert other.startswith("o/other is not a folder, and o/other is not in the cache and the hub")
    assert "refused" in other
