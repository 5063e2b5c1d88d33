"""The hub's client against a server on this machine that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf_files import write_model

from lowtide.models import catalog
from lowtide.models.errors import DownloadError, ModelNotFound

COMMIT = "a" * 40
FILES = ["tiny.Q4_K_M.gguf", "tiny.Q8_0.gguf", "README.md"]


class _Hub(http.server.BaseHTTPRequestHandler):
    content = b""
    downloads: list[str] = []

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        if "/user/tiny/tree/" in self.path:
            self._json([{"type": "file", "path": f, "size": 1, "oid": "0" * 40} for f in FILES])
        elif self.path.startswith("/api/models/user/tiny"):
            self._json(
                {"id": "user/tiny", "sha": COMMIT, "siblings": [{"rfilename": f} for f in FILES]}
            )
        elif self.path.startswith("/user/tiny/resolve/"):
            self._file(body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _json(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _file(self, body: bool) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(self.content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        if body:
            self.downloads.append(self.path)
            self.wfile.write(self.content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Hub]]:
    import huggingface_hub
    from huggingface_hub import constants

    _Hub.content = write_model(tmp_path / "source.gguf").read_bytes()
    _Hub.downloads = []
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{httpd.server_port}"
    cache = str(tmp_path / "hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    real_get = huggingface_hub.hf_hub_download
    api = huggingface_hub.HfApi(endpoint=endpoint, token=False)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo: api.list_repo_files(repo))
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda repo, name: real_get(repo, name, cache_dir=cache, endpoint=endpoint, token=False),
    )
    yield _Hub
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_the_requested_quantisation_is_fetched_once(server: type[_Hub]) -> None:
    path = catalog.fetch("user/tiny:q8_0", offline=False)
    assert path.name == "tiny.Q8_0.gguf"
    assert path.read_bytes() == server.content
    assert len(server.downloads) == 1
    assert catalog.fetch("user/tiny:Q8_0", offline=True) == path
    assert catalog.fetch("user/tiny:Q8_0", offline=False) == path
    assert len(server.downloads) == 1


def test_the_default_quantisation(server: type[_Hub]) -> None:
    assert catalog.fetch("user/tiny", offline=False).name == "tiny.Q4_K_M.gguf"


def test_an_unknown_repository_is_one_sentence(server: type[_Hub]) -> None:
    with pytest.raises(DownloadError, match="hf:user/none could not be fetched") as caught:
        catalog.fetch("user/none", offline=False)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)


def test_offline_without_a_cache(server: type[_Hub]) -> None:
    with pytest.raises(ModelNotFound, match="run once without offline"):
        catalog.fetch("user/tiny", offline=True)
    assert server.downloads == []


@pytest.mark.parametrize(
    "reference", ["", "tiny", "a/b/c", "user/tiny:", "user/ti ny", "../../etc:x"]
)
def test_invalid_references(reference: str) -> None:
    with pytest.raises(ModelNotFound, match="is not a valid reference"):
        catalog.fetch(reference, offline=True)


NAMES = [
    "m-Q4_K_M-00001-of-00002.gguf",
    "m-Q4_K_M-00002-of-00002.gguf",
    "m-Q4_K.gguf",
    "m-IQ4_K_M.gguf",
]


def test_all_parts_of_a_split_file_are_chosen() -> None:
    assert catalog.choose(NAMES, None, "r") == NAMES[:2]
    assert catalog.choose(NAMES, "q4_k", "r") == ["m-Q4_K.gguf"]


def test_available_files_are_listed() -> None:
    with pytest.raises(ModelNotFound, match="no Q2_K file: it has m-IQ4_K_M.gguf"):
        catalog.choose(NAMES, "Q2_K", "r")
    with pytest.raises(ModelNotFound, match=r"no \.gguf file at all"):
        catalog.choose([], None, "r")
    assert catalog.choose(["only.gguf"], None, "r") == ["only.gguf"]
