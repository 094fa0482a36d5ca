"""The gate for models: folders that it takes, its word on all others, and what it fetches."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_ds.errors import UserError
from qwen_ds.model.folder import find_model, find_qwen2, inspect_folder

ROOT = Path(__file__).parents[2]
INDEX, GIT_LFS = "model.safetensors.index.json", "version https://git-lfs.github.com/spec/v1"


@pytest.fixture
def folder(small_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_dir, tmp_path / "model"))


def edit(folder: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))


def shard(folder: Path) -> list[str]:
    """The folder's one weight file as two and an index."""
    tensors = load_file(folder / "model.safetensors")
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {tensor: names[i % 2] for i, tensor in enumerate(tensors)}
    for name in names:
        save_file({t: tensors[t] for t in tensors if weight_map[t] == name}, folder / name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    return names


def test_a_whole_folder_is_taken_with_one_weight_file_or_several(folder, full_dir):
    assert find_model(folder).path == find_model(str(folder)).path == folder
    assert find_model(full_dir).path == full_dir
    shard(folder)
    assert find_model(folder).path == folder


def test_a_single_weight_file_goes_before_an_index_as_where_they_are_loaded(folder):
    (folder / INDEX).write_text('{"weight_map": {"lm_head.weight": "none.safetensors"}}')
    assert find_model(folder).path == folder
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match=r"model\.safetensors: .* the file is cut off or damaged"):
        find_model(folder)


def test_weights_are_not_asked_for_where_none_are_needed(folder):
    (folder / "model.safetensors").unlink()
    assert find_model(folder, weights=False).path == folder
    with pytest.raises(UserError, match="no weights"):
        find_model(folder)


def test_the_first_release_names_its_embedding_rows_differently(folder):
    edit(folder, vocab_size=100, padded_vocab_size=512)
    assert inspect_folder(folder).config.vocab_size == 512


def without(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def with_text(name: str, text: str) -> Any:
    return lambda folder: (folder / name).write_text(text)


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("config.json"), "no config.json; expected a checkpoint"),
        (
            lambda f: (f / "config.json").rename(f / "adapter_config.json"),
            "an adapter, not a model",
        ),
        (with_text("config.json", "{"), "config.json: not readable as JSON"),
        (with_text("config.json", "[]"), "config.json: a JSON list; expected an object"),
        (lambda f: edit(f, model_type="qwen2"), "model_type is 'qwen2'; expected 'qwen'"),
        (lambda f: edit(f, drop=("model_type",)), "model_type is None; expected 'qwen'"),
        (lambda f: edit(f, visual={"layers": 48}), "visual input; expected a text-only Qwen"),
        (
            lambda f: edit(f, vocab_size=511),
            "qwen.tiktoken has 512 tokens but config.json says vocab_size 511",
        ),
        (lambda f: edit(f, drop=("vocab_size",)), "says vocab_size None"),
        (without("qwen.tiktoken"), "No such file or directory; expected the model's qwen.tiktoken"),
        (with_text("qwen.tiktoken", GIT_LFS), "qwen.tiktoken: a Git LFS pointer"),
        (without("model.safetensors"), "no weights; expected model.safetensors or"),
        (cut_off, "the file is cut off or damaged"),
        (with_text("model.safetensors", ""), "0 bytes hold no header"),
        (with_text("model.safetensors", GIT_LFS), "Git LFS pointer"),
        (lambda f: (f / shard(f)[1]).unlink(), "is missing (1 of 2 weight files are)"),
        (lambda f: shard(f) and (f / INDEX).write_text("{}"), "no weight_map"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said_in_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError) as caught:
        find_model(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("Qwen-7B-Chat-Int4", {}, "Qwen/Qwen-7B-Chat"),
        ("models--Qwen--Qwen-1_8B-Chat-Int8/snapshots/0a1b", {}, "Qwen/Qwen-1_8B-Chat"),
        ("mine", {"_name_or_path": "Qwen/Qwen-72B-Chat-Int4"}, "Qwen/Qwen-72B-Chat"),
        ("mine", {"hidden_size": 5120}, "Qwen/Qwen-14B-Chat"),
        ("mine", {}, "the model it was made from"),
    ],
)
def test_a_quantised_folder_is_refused_with_the_name_of_the_bf16_model(
    small_dir, tmp_path, name, changes, expected
):
    folder = Path(shutil.copytree(small_dir, tmp_path / name))
    edit(folder, quantization_config={"bits": 4, "quant_method": "gptq"}, **changes)
    with pytest.raises(UserError, match=rf"quantised weights \(Int4/Int8\).*use {expected}$"):
        find_model(folder)


@pytest.mark.parametrize("path", ["/no/such/folder", "./model", "a/b/c", "", "models/*"])
def test_a_path_to_nothing_is_never_looked_up_on_the_hub(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = "qwen_ds.model.folder.snapshot_download"
    monkeypatch.setattr(asked, lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="no such folder|no config.json"):
        find_model(path)


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(UserError, match="x: not a folder"):
        find_model(tmp_path / "x")


# A hub, as far as huggingface_hub asks for one: acme/tiny has safetensors, acme/old only a .bin.
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    files: dict[str, dict[str, bytes]] = {}
    asked: list[str] = []

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        parts = self.path.split("?")[0].strip("/").split("/")
        body, headers = None, {"X-Repo-Commit": COMMIT}
        if parts[:2] == ["api", "models"] and (name := "/".join(parts[2:4])) in self.files:
            held = self.files[name].items()
            siblings = [{"rfilename": path} for path, _ in held]
            answer: Any = {"id": name, "sha": COMMIT, "siblings": siblings}
            if parts[4:5] == ["tree"]:
                entry = {"type": "file", "oid": "0" * 40}
                answer = [entry | {"path": path, "size": len(data)} for path, data in held]
            body = json.dumps(answer).encode()
        elif parts[2:3] == ["resolve"]:
            body = self.files.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))
            if body is not None:
                headers["ETag"] = f'"{hashlib.sha1(body).hexdigest()}"'
        self.send_response(404 if body is None else 200)
        if body is None:
            headers["X-Error-Code"] = "RepoNotFound"
            body = b""
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub(small_dir: Path) -> Iterator[str]:
    tiny = {path.name: path.read_bytes() for path in small_dir.iterdir()}
    tiny |= {"modeling_qwen.py": b"raise SystemExit('ran')", "LICENSE": b"free"}
    pickled = io.BytesIO()
    torch.save(load_file(small_dir / "model.safetensors"), pickled)
    tiny["pytorch_model.bin"] = pickled.getvalue()
    old = {name: body for name, body in tiny.items() if not name.endswith(".safetensors")}
    Hub.files, Hub.asked = {"acme/tiny": tiny, "acme/old": old}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def find_in_a_process(names: list[str], home: Path, **variables: str) -> list[str]:
    """find_model's answer to each name, in a new process: huggingface_hub reads its variables when
    it is imported."""
    code = (
        "import sys\nfrom qwen_ds.model.folder import find_model\n"
        "for name in sys.argv[1:]:\n    try: print(find_model(name).path)\n"
        "    except ValueError as error: print(error)"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE"))}
    env |= {"HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "no_proxy": "127.0.0.1"}
    command = [sys.executable, "-c", code, *names]
    done = subprocess.run(
        command, cwd=ROOT, env=env | variables, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_hub_id_is_fetched_from_the_mirror_without_code_and_found_again_offline(
    hub, tmp_path, monkeypatch
):
    ids = ["acme/tiny", "acme/old", "acme/none"]
    tiny, old, absent = find_in_a_process(ids, tmp_path, HF_ENDPOINT=hub)
    failed = "acme/none: no such folder, and fetching it from the hub failed: "
    wanted = {"config.json", "generation_config.json", "qwen.tiktoken", "LICENSE"}
    assert {path.name for path in Path(tiny).iterdir()} == wanted | {"model.safetensors"}
    assert {path.name for path in Path(old).iterdir()} == wanted | {"pytorch_model.bin"}
    assert absent.startswith(failed)
    assert any("resolve" in path for path in Hub.asked)
    assert not any(".py" in path for path in Hub.asked), "code was fetched"
    inspect_folder(Path(tiny))

    # What HF_HOME and HF_HUB_OFFLINE=1 set when huggingface_hub is imported; a second process would
    # take seconds.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("went to the network"))
    assert find_model("acme/tiny").path == Path(tiny)
    with pytest.raises(UserError, match=failed):
        find_model("acme/none")
    # Of a hub's model some files may not have been fetched yet: the planner does without.
    (Path(tiny) / "model.safetensors").unlink()
    assert find_model("acme/tiny", weights="if there").weights is None


def test_pickles_that_are_not_allowed_are_neither_fetched_nor_opened(folder, monkeypatch):
    patterns: list[str] = []

    def download(_: str, allow_patterns: list[str]) -> str:
        patterns.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr("qwen_ds.model.folder.snapshot_download", download)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened"))
    (folder / "model.safetensors").unlink()
    for pickle_is_there in (False, True):
        if pickle_is_there:
            (folder / "pytorch_model.bin").write_bytes(b"")
        for find, model_type in ((find_model, "qwen"), (find_qwen2, "qwen2")):
            edit(folder, model_type=model_type)
            for place in (folder, "acme/old"):
                with pytest.raises(UserError, match="--allow_pickle true"):
                    find(place, allow_pickle=False)
    assert "*.safetensors" in patterns and not any(".bin" in name for name in patterns)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_the_small_files_of_a_qwen2_are_read_before_anything_is_made_of_it(folder, name):
    edit(folder, model_type="qwen2")
    find_qwen2(folder)
    (folder / name).write_text("{")
    with pytest.raises(UserError, match=f"{name}: not readable as JSON"):
        find_qwen2(folder)


def test_the_planner_looks_at_the_weights_that_are_there(folder):
    edit(folder, num_hidden_layers=2)
    with pytest.raises(UserError, match="in the weights and not in the model"):
        find_model(folder, weights="if there")
    (folder / "model.safetensors").unlink()
    assert find_model(folder, weights="if there").weights is None
