"""Model folders that are wrong, hostile or ambiguous: one line, exit code 2, in every command."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_ds.export.formats import find_format
from tests.adversarial.harness import Member, Place, check
from tests.export.folders import as_pickles, merge_with, peft_adapter, shard

Change = Callable[[Path], object]
"""Spoils a checkpoint folder."""
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 3\n"
INDEX, WEIGHTS, VOCABULARY = "model.safetensors.index.json", "model.safetensors", "qwen.tiktoken"
POINTER = "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"


def command(name: str, place: Place, base: Path | str) -> Sequence[str | Path]:
    """A short command over a base, which succeeds on a right one."""
    rows, out = place.rows(), place.out
    read = ["--data.train", rows, "--data.cache_dir", out / "cache"]
    short = ["--device", "cpu", "--batch.rows_per_step", "4", "--optim.max_steps", "1"]
    return {
        "data": ["data", "encode", "--model.path", base, *read, "--output", out / "rows.jsonl"],
        "plan": ["plan", "--model.path", base],
        "merge": ["merge", "--base", base, "--dtype", "bfloat16", "--verify", "off",
                  "--output", out / "merged"],
        "predict": ["predict", "--model", base, "--input", rows, "--output", out / "p.jsonl",
                    "--max_new_tokens", "4", "--device", "cpu"],
        "train": ["train", "--model.path", base, *read, *short, "--output_dir", out / "run"],
        "full": ["train", "--model.path", base, *read, *short, "--output_dir", out / "run",
                 "--method", "full", "--model.dtype", "bfloat16"],
    }[name]  # fmt: skip


def member(
    name: str, change: Change, words: str | Sequence[str], run: str, code: int = 2
) -> Member:
    def make(place: Place) -> Sequence[str | Path]:
        base = place.base()
        change(base)
        return command(run, place, base)

    return Member(f"{run}: {name}", make, code, (words,))


def edit(folder: Path, name: str = "config.json", **changes: Any) -> None:
    Place(folder, folder).edit_json(folder / name, changes)


def text(name: str, content: str | bytes) -> Change:
    def change(folder: Path) -> None:
        raw = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(raw)

    return change


def raw_setting(key: str, spelled: str) -> Change:
    """A setting as JSON text, for what json.dumps cannot write."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        settings = json.loads(path.read_text())
        settings.pop(key, None)
        path.write_text(json.dumps(settings)[:-1] + f', "{key}": {spelled}}}')

    return change


# Settings in config.json -> words of the message. Each is tried with one command, in turn.
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "no layer": ({"num_hidden_layers": 0}, "num_hidden_layers is 0; expected a whole number"),
    "negative layers": ({"num_hidden_layers": -3}, "num_hidden_layers is -3"),
    "a billion layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    "layers as text": ({"num_hidden_layers": "3"}, "num_hidden_layers is '3'"),
    "layers as a fraction": ({"num_hidden_layers": 3.0}, "num_hidden_layers is 3.0"),
    "true layers": ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    "null layers": ({"num_hidden_layers": None}, "num_hidden_layers is None"),
    "layers in a list": ({"num_hidden_layers": [3]}, "num_hidden_layers is a list of 1"),
    "layers in an object": ({"num_hidden_layers": {"a": 3}}, "num_hidden_layers is an object of 1"),
    "no width": ({"hidden_size": 0}, "hidden_size is 0"),
    "an absurd width": ({"hidden_size": 2**62}, "hidden_size is 4611686018427387904"),
    "a width of 400 digits": ({"hidden_size": 10**400}, "hidden_size is 1000000000"),
    "a width of no heads": ({"hidden_size": 63}, "is not hidden_size 63"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    "text heads": ({"num_attention_heads": "four"}, "num_attention_heads is 'four'"),
    "odd heads": (
        {"kv_channels": 15, "hidden_size": 60}, "kv_channels is 15; expected an even number",
    ),
    "an odd inner width": ({"intermediate_size": 351}, "intermediate_size is 351; expected twice"),
    "an absurd inner width": ({"intermediate_size": 10**15}, "intermediate_size is 1000000000"),
    "no vocabulary": ({"vocab_size": 0}, "vocab_size is 0"),
    "a small vocabulary": ({"vocab_size": 500}, "512 tokens but config.json says vocab_size 500"),
    "an absurd vocabulary": ({"vocab_size": 10**12}, "vocab_size is 1000000000000"),
    "a text vocabulary": ({"vocab_size": "512"}, "vocab_size is '512'"),
    "no length": ({"seq_length": 0}, "seq_length is 0"),
    "an absurd length": ({"seq_length": 10**12}, "seq_length is 1000000000000"),
    "a text length": ({"seq_length": "8k"}, "seq_length is '8k'"),
    "an absurd context": ({"max_position_embeddings": 10**18}, "max_position_embeddings is 1000"),
    "eps of zero": ({"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0; expected a number"),
    "eps below zero": ({"layer_norm_epsilon": -1e-6}, "layer_norm_epsilon is -1e-06"),
    "eps as text": ({"layer_norm_epsilon": "1e-6"}, "layer_norm_epsilon is '1e-6'"),
    "eps NaN": ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan"),
    "rotary base infinite": ({"rotary_emb_base": float("inf")}, "rotary_emb_base is inf"),
    "rotary base zero": ({"rotary_emb_base": 0}, "rotary_emb_base is 0"),
    "rotary base NaN": ({"rotary_emb_base": float("nan")}, "rotary_emb_base is nan"),
    "rotary share": ({"rotary_pct": 0.25}, "rotary_pct is 0.25; expected 1.0"),
    "dropout of one": ({"attn_dropout_prob": 1.0}, "attn_dropout_prob is 1.0"),
    "a text flag": ({"use_dynamic_ntk": "yes"}, "use_dynamic_ntk is 'yes'; expected true or false"),
    "a number flag": ({"no_bias": 1}, "no_bias is 1; expected true or false"),
    "biases": ({"no_bias": False}, "none of the shards"),
    "two dtypes": ({"bf16": True, "fp16": True}, "at most one of bf16, fp16, fp32"),
    "tied": ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    "a dtype of torch's functions": ({"torch_dtype": "load"}, "torch_dtype is 'load'; expected"),
    "an unknown dtype": ({"dtype": "int4"}, "dtype is 'int4'; expected null or bfloat16"),
    "a list of dtypes": ({"dtype": ["bfloat16"]}, "dtype is a list of 1"),
    "a kernel of the hub": (
        {"attn_implementation": "kernels-community/flash-attn"}, "attn_implementation is 'kernels",
    ),
    "a kernel by its private name": (
        {"_attn_implementation": "kernels-community/flash-attn"}, "_attn_implementation is 'kernel",
    ),
    "other names": ({"attribute_map": {"hidden_size": "vocab_size"}}, "'attribute_map'"),
    "a method's name": ({"to_dict": 5}, "the key 'to_dict' is the name of something in"),
    "a method's name and null": ({"get_text_config": None}, "the key 'get_text_config'"),
    "other weights": ({"transformers_weights": "x.safetensors"}, "transformers_weights is 'x.saf"),
    "another config": ({"configuration_files": ["config.4.0.0.json"]}, "configuration_files is a"),
    "fusions": ({"fusion_config": {"patch_embeddings": True}}, "fusion_config is an object of 1"),
    "a block of another shape": (
        {"per_layer_config": {"1": {"intermediate_size": 8}}}, "per_layer_config is an object of 1",
    ),
    "a plan of ranks": ({"distributed_config": {"tp_size": 2}}, "distributed_config is an object"),
    "scaled rotary angles": ({"rope_scaling": {"type": "linear", "factor": 4}}, "rope_scaling is"),
    "a configuration inside": ({"text_config": {"hidden_size": 8}}, "text_config is an object of"),
    "tuples": ({"return_dict": False}, "return_dict is False; expected True"),
    "all states": ({"output_hidden_states": True}, "output_hidden_states is True"),
    "all attentions": ({"output_attentions": True}, "output_attentions is True"),
    "an encoder": ({"is_encoder_decoder": True}, "is_encoder_decoder is True"),
    "recomputation": ({"gradient_checkpointing": "all"}, "gradient_checkpointing is 'all'"),
    "a billion labels": ({"num_labels": 10**9}, "num_labels is 1000000000"),
    "labels that are no numbers": ({"id2label": {"a": "b"}}, "id2label is an object of 1, with 'a"),
    "a number for labels": ({"id2label": 5}, "id2label is 5; expected an object of numbers and"),
    "labels without numbers": ({"label2id": {"a": "b"}}, "label2id is an object of 1, with 'b'"),
    "a list of architectures": ({"architectures": "QWenLMHeadModel"}, "architectures"),
    "two names, two values": ({"n_layer": 2}, "num_hidden_layers is 3 and n_layer is 2"),
    "quantised": ({"quantization_config": {"bits": 4}, "hidden_size": [1]}, "quantised weights"),
    "endless settings": ({f"k{i}": 1 for i in range(300_000)}, "expected at most 1000"),
    "a sister": ({"model_type": "qwen2"}, "model_type is 'qwen2'; expected 'qwen'"),
    "no type": ({"model_type": ["qwen"]}, "model_type is"),
}  # fmt: skip
COMMANDS = cycle(("data", "plan", "predict", "merge"))
NEEDS_WEIGHTS = {"biases"}


def setting(name: str, changes: dict[str, Any], words: str) -> Member:
    run = next(COMMANDS)
    run = "predict" if name in NEEDS_WEIGHTS else run
    return member(name, lambda folder: edit(folder, **changes), words, run)


def changed_setting(name: str) -> tuple[Change, str]:
    changes, words = SETTINGS[name]
    return lambda folder: edit(folder, **changes), words


def fifo(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def unix_socket(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        here = os.getcwd()
        os.chdir(folder)  # a socket's path may have 108 bytes
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(name)
        os.chdir(here)

    return change


def link(name: str, target: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return change


def as_folder(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return change


def huge(name: str, size: int = 200 << 30) -> Change:
    def change(folder: Path) -> None:
        (folder / name).touch()
        os.truncate(folder / name, size)

    return change


def removed(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def vocabulary(change: Callable[[list[str]], list[str]]) -> Change:
    def changed(folder: Path) -> None:
        lines = (folder / VOCABULARY).read_text().splitlines()
        (folder / VOCABULARY).write_text("\n".join(change(lines)) + "\n")

    return changed


FIRST_BAD = "is not a base64 token and its rank"
RANKS = "tokens without the ranks 0 to"
# Small files -> words; with any command, in turn.
FILES: dict[str, tuple[Change, str]] = {
    "no JSON": (text("config.json", "{"), "config.json: not readable as JSON"),
    "a list": (text("config.json", "[]"), "config.json: a JSON list; expected an object"),
    "Latin-1": (text("config.json", b'{"a": "\xe9"}'), "'utf-8' codec can't decode byte 0xe9"),
    "UTF-16": (text("config.json", "{}".encode("utf-16")), "not readable as JSON"),
    "a byte-order mark": (text("config.json", b"\xef\xbb\xbf{}"), "Unexpected UTF-8 BOM"),
    "100,000 lists": (text("config.json", '{"a": ' + "[" * 100_000), "nested too deeply"),
    "900 objects": (
        raw_setting("hidden_size", '{"a": ' * 900 + "1" + "}" * 900), "hidden_size is an object",
    ),
    "a number of 9,000 digits": (
        raw_setting("hidden_size", "9" * 9000), "config.json: not readable as JSON",
    ),
    "1e999": (raw_setting("rotary_emb_base", "1e999"), "rotary_emb_base is inf"),
    "a key twice": (
        raw_setting("a", '1, "num_hidden_layers": 2'), "the key 'num_hidden_layers' comes twice",
    ),
    "a pointer for config": (text("config.json", LFS), f"config.json: {POINTER}"),
    "a huge config": (huge("config.json"), "config.json: not readable as JSON (more than 32 MiB)"),
    "a FIFO for config": (fifo("config.json"), "a FIFO, not a regular file"),
    "a socket for config": (unix_socket("config.json"), "a socket, not a regular file"),
    "/dev/zero for config": (link("config.json", "/dev/zero"), "a device, not a regular file"),
    "a folder for config": (as_folder("config.json"), "a folder, not a regular file"),
    "a loop for config": (link("config.json", "config.json"), "Too many levels of symbolic links"),
    "a link to nothing": (link("config.json", "nothing"), "No such file or directory"),
    "memory for config": (link("config.json", "/proc/self/mem"), "config.json: not readable"),
    "a pointer for vocabulary": (text(VOCABULARY, LFS), f"qwen.tiktoken: {POINTER}"),
    "/dev/zero for vocabulary": (link(VOCABULARY, "/dev/zero"), "qwen.tiktoken: a device, not a"),
    "/dev/urandom for vocabulary": (link(VOCABULARY, "/dev/urandom"), "a device, not a regular"),
    "a FIFO for vocabulary": (fifo(VOCABULARY), "qwen.tiktoken: a FIFO, not a regular file"),
    "a huge vocabulary": (huge(VOCABULARY), "qwen.tiktoken: more than 16 MiB"),
    "a loop for vocabulary": (link(VOCABULARY, VOCABULARY), "Too many levels of symbolic links"),
    "no vocabulary": (removed(VOCABULARY), "expected the model's qwen.tiktoken"),
    "an empty vocabulary": (text(VOCABULARY, ""), "not every single byte is a token"),
    "no base64": (vocabulary(lambda lines: ["?? 0", *lines[1:]]), f"line 1 {FIRST_BAD}"),
    "broken base64": (vocabulary(lambda lines: ["QQ 0", *lines[1:]]), f"line 1 {FIRST_BAD}"),
    "a rank with a sign": (vocabulary(lambda lines: ["IQ== +0", *lines[1:]]), FIRST_BAD),
    "a rank of 9,000 digits": (
        vocabulary(lambda lines: [f"IQ== {'9' * 9000}", *lines[1:]]), f"line 1 {FIRST_BAD}",
    ),
    "three columns": (vocabulary(lambda lines: [lines[0] + " 7", *lines[1:]]), FIRST_BAD),
    "a rank left out": (vocabulary(lambda lines: lines[:-2] + lines[-1:]), RANKS),
    "a rank twice": (vocabulary(lambda lines: [*lines[:-1], lines[-2]]), RANKS),
    "a generation_config without end": (
        text("generation_config.json", "{"), "generation_config.json: not readable as JSON",
    ),
    "a pointer for generation_config": (text("generation_config.json", LFS), POINTER),
    "a FIFO for generation_config": (fifo("generation_config.json"), "a FIFO, not a regular file"),
    "a generation_config that is a link to nothing": (
        link("generation_config.json", "nothing"), "generation_config.json: not readable",
    ),
    "a chat format of numbers": (
        lambda f: edit(f, "generation_config.json", chat_format=7), "chat_format is 7; expected",
    ),
    "an end of text": (
        lambda f: edit(f, "generation_config.json", eos_token_id="x"), "eos_token_id is 'x'",
    ),
    "a pointer for tokenizer_config": (text("tokenizer_config.json", LFS), POINTER),
    "a tokenizer_config of text": (text("tokenizer_config.json", '"x"'), "a JSON str; expected an"),
    "an adapter beside it": (
        text("adapter_config.json", "{}"), "adapter_config.json beside config.json",
    ),
    "a broken adapter beside it": (
        link("adapter_config.json", "nothing"), "adapter_config.json beside config.json",
    ),
    "an adapter instead of it": (
        lambda f: (f / "config.json").rename(f / "adapter_config.json"), "an adapter, not a model",
    ),
    "a quantiser's file": (text("quantize_config.json", "{}"), "quantised weights"),
}  # fmt: skip


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """Other tensors in the one weight file."""

    def changed(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS, metadata={"format": "pt"})

    return changed


def header(content: dict[str, Any] | str | bytes, length: int | None = None) -> Change:
    """A weight file with this header, and no bytes after it."""

    def changed(folder: Path) -> None:
        raw = content if isinstance(content, bytes) else None
        if raw is None:
            raw = (content if isinstance(content, str) else json.dumps(content)).encode()
        size = len(raw) if length is None else length
        (folder / WEIGHTS).write_bytes(size.to_bytes(8, "little") + raw)

    return changed


def entry(**values: Any) -> Change:
    return header({"x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} | values})


def index(change: Callable[[dict[str, Any], Path], object]) -> Change:
    """Two shards, and a change of their index."""

    def changed(folder: Path) -> None:
        shard(folder, load_file(folder / WEIGHTS), 2)
        path = folder / INDEX
        content = json.loads(path.read_text())
        change(content, folder)
        path.write_text(json.dumps(content))

    return changed


def shard_name(name: Callable[[Path], Any]) -> Change:
    return index(
        lambda content, folder: content["weight_map"].update({"lm_head.weight": name(folder)})
    )


def outside(folder: Path) -> str:
    """A shard of the right tensors that lies beside the folder."""
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder.parent / "outside.safetensors")
    return str(folder.parent / "outside.safetensors")


def pickled(content: Any) -> Change:
    def changed(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        torch.save(content, folder / "pytorch_model.bin")

    return changed


class RunsCode:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return __import__, ("planted_module",)


SURPLUS = "in the weights and not in the model that config.json describes"
MISSING = "in none of the shards"
# Weight files -> words; with predict and merge, in turn.
STORED: dict[str, tuple[Change, str]] = {
    "fewer layers": (
        lambda f: edit(f, num_hidden_layers=2), f"transformer.h.2.attn.c_attn.bias: {SURPLUS}",
    ),
    "more layers": (
        lambda f: edit(f, num_hidden_layers=4), f"transformer.h.3.attn.c_attn.bias: {MISSING}",
    ),
    "another width": (
        lambda f: edit(f, hidden_size=32, num_attention_heads=2), "[512, 64]; expected [512, 32]",
    ),
    "more rows": (lambda f: edit(f, vocab_size=640), "is [512, 64]; expected [640, 64]"),
    "another inner width": (lambda f: edit(f, intermediate_size=128), "expected [64, 64]"),
    "a tensor less": (tensors(lambda t: t.pop("lm_head.weight")), f"lm_head.weight: {MISSING}"),
    "a tensor more": (tensors(lambda t: t.update(x=torch.ones(1))), f"x: {SURPLUS}"),
    "a norm's bias": (
        tensors(lambda t: t.update({"transformer.ln_f.bias": torch.ones(64)})), SURPLUS,
    ),
    "names of a wrapper": (
        tensors(lambda t: t.update({f"module.{name}": t.pop(name) for name in list(t)})), MISSING,
    ),
    "a turned matrix": (
        tensors(lambda t: t.update({"transformer.h.0.mlp.w1.weight": torch.ones(64, 176)})),
        "transformer.h.0.mlp.w1.weight is [64, 176]; expected [176, 64]",
    ),
    "whole numbers": (
        tensors(lambda t: t.update({"lm_head.weight": torch.ones(512, 64, dtype=torch.int8)})),
        "lm_head.weight is stored as I8; expected F32, F16, BF16",
    ),
    "an empty file": (text(WEIGHTS, ""), "0 bytes hold no header"),
    "seven bytes": (text(WEIGHTS, "1234567"), "7 bytes hold no header"),
    "a pointer": (text(WEIGHTS, LFS), f"model.safetensors: {POINTER}"),
    "a FIFO": (fifo(WEIGHTS), "model.safetensors: a FIFO, not a regular file"),
    "/dev/zero": (link(WEIGHTS, "/dev/zero"), "model.safetensors: a device, not a regular"),
    "a folder": (as_folder(WEIGHTS), "model.safetensors: a folder, not a regular file"),
    "a loop": (link(WEIGHTS, WEIGHTS), "Too many levels of symbolic links"),
    "a link to nothing": (link(WEIGHTS, "nothing"), "model.safetensors: No such file"),
    "zeros without end": (
        lambda f: (removed(WEIGHTS)(f), huge(WEIGHTS)(f)), "model.safetensors: a broken header",
    ),
    "no weights": (removed(WEIGHTS), "no weights; expected model.safetensors"),
    "a header as long as the file says": (header("", 2**40), "hold no header"),
    "a header of 20 GB": (
        lambda f: (header("", 20 << 30)(f), huge(WEIGHTS, 30 << 30)(f)), "hold no header",
    ),
    "a header of lists": (header("[" * 100_000), "a broken header"),
    "a header that is a list": (header("[]"), "a broken header"),
    "a tensor that is a number": (header({"x": 1}), "a broken header"),
    "a negative size": (entry(shape=[-1, -4], data_offsets=[0, 16]), "are no sizes"),
    "a size of text": (entry(shape=["0"]), "are no sizes"),
    "a fraction of a size": (entry(shape=[0.0]), "are no sizes"),
    "a true size": (entry(shape=[False]), "are no sizes"),
    "an absurd size": (entry(shape=[10**30], data_offsets=[0, 4 * 10**30]), "the file is cut off"),
    "offsets of one": (entry(data_offsets=[0]), "a broken header"),
    "an unknown dtype": (entry(dtype="F4"), "x has dtype F4"),
    "a dtype in a list": (entry(dtype=["F32"]), "x has dtype"),
    "metadata that are no text": (header({"__metadata__": {"a": 1}}), "metadata are not all text"),
    "an endless name": (
        tensors(lambda t: t.update({"x" * 10**6: torch.ones(1)})), "has 1000000 characters",
    ),
    "a hole": (entry(data_offsets=[8, 8]), "x lies at 8..8"),
    "a tensor twice": (
        header('{"x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "x": 1}'), "a broken",
    ),
    "an absolute shard": (shard_name(outside), "expected a .safetensors file in the same folder"),
    "a shard above": (
        shard_name(lambda f: outside(f) and "../outside.safetensors"), "names the shard '../outs",
    ),
    "a shard below": (shard_name(lambda f: "a/b.safetensors"), "names the shard 'a/b.safetensors'"),
    "a shard that is a number": (shard_name(lambda f: 7), "names the shard '7'"),
    "a shard that is an object": (shard_name(lambda f: {"a": 1}), "names the shard"),
    "a shard of another kind": (shard_name(lambda f: "pytorch_model.bin"), "names the shard 'py"),
    "a shard that is missing": (shard_name(lambda f: "x.safetensors"), "x.safetensors is missing"),
    "a shard with a NUL": (shard_name(lambda f: "x\0.safetensors"), "is missing"),
    "a tensor in another shard": (
        shard_name(lambda f: "model-00002-of-00002.safetensors"), "disagrees with its shards about",
    ),
    "no weight_map": (index(lambda c, f: c.pop("weight_map")), "no weight_map"),
    "a list for weight_map": (index(lambda c, f: c.update(weight_map=["a"])), "no weight_map"),
    "no metadata": (index(lambda c, f: c.pop("metadata")), "no metadata; expected an object"),
    "text for metadata": (index(lambda c, f: c.update(metadata="x")), "metadata is 'x'"),
    "a FIFO for a shard": (
        lambda f: (index(lambda c, f: None)(f), fifo("model-00002-of-00002.safetensors")(f)),
        "model-00002-of-00002.safetensors: a FIFO",
    ),
    "a pointer for a shard": (
        lambda f: (index(lambda c, f: None)(f), text("model-00002-of-00002.safetensors", LFS)(f)),
        f"model-00002-of-00002.safetensors: {POINTER}",
    ),
    "a pointer for the index": (
        lambda f: (index(lambda c, f: None)(f), text(INDEX, LFS)(f)), f"{INDEX}: {POINTER}",
    ),
    "one file before its shards": (
        lambda f: (index(lambda c, f: None)(f), text(WEIGHTS, "")(f)), "0 bytes hold no header",
    ),
    "files of a rank by rank checkpoint": (
        text("shard-00000-model-00001-of-00001.safetensors", ""), "rank by rank",
    ),
    "a pickle that runs code": (
        pickled({"x": RunsCode()}), "pytorch_model.bin: not a whole file of plain tensors",
    ),
    "a pickle of a list": (pickled([torch.ones(1)]), "holds a list; expected a dict of tensors"),
    "a pickle of other tensors": (pickled({"x": torch.ones(1)}), MISSING),
    "a pickle of a sparse tensor": (
        pickled({"x": torch.ones(4).to_sparse()}), "x is no plain tensor (cpu, torch.sparse_coo)",
    ),
    "a pickle of a tensor without values": (
        pickled({"x": torch.ones(4, device="meta")}), "x is no plain tensor (meta",
    ),
    "a pickle with numbers for names": (
        pickled({7: torch.ones(4)}), "holds a Tensor under '7'; expected a dict of tensors by name",
    ),
    "a pickle in a pickle": (
        pickled({"state_dict": {"x": torch.ones(4)}}), "holds a dict under 'state_dict'",
    ),
    "a pickle that is none": (
        lambda f: (removed(WEIGHTS)(f), text("pytorch_model.bin", "x" * 99)(f)), "not a whole file",
    ),
    "a FIFO for a pickle": (
        lambda f: (removed(WEIGHTS)(f), fifo("pytorch_model.bin")(f)), "pytorch_model.bin: a FIFO",
    ),
}  # fmt: skip


def beside(name: str, target: str = "../id_rsa") -> Change:
    """A private file beside the folder, and a link to it in place of one of the folder's files."""

    def change(folder: Path) -> None:
        private = folder.parent / "id_rsa"
        private.write_text("top secret")
        if name.endswith(".json"):
            private.write_text((folder / name).read_text() if (folder / name).exists() else "{}")
        link(name, target)(folder)

    return change


LEAVES = "a link that leaves the folder"
# Files that travel to an output -> words; with a merge, and one with full training.
CARRIED: dict[str, tuple[Change, str]] = {
    "a licence that leaves": (beside("LICENSE"), LEAVES),
    "a notice that leaves": (beside("NOTICE.txt"), LEAVES),
    "a generation_config that leaves": (beside("generation_config.json"), LEAVES),
    "a tokenizer_config that leaves": (beside("tokenizer_config.json"), LEAVES),
    "a special_tokens_map that leaves": (beside("special_tokens_map.json"), LEAVES),
    "a licence by a link of the whole path": (link("LICENSE", "/etc/hostname"), LEAVES),
    "a licence through a folder": (
        lambda f: (beside("x")(f), link("y", "..")(f), link("LICENSE", "y/id_rsa")(f)), LEAVES,
    ),
    "a licence of the process": (link("LICENSE", "/proc/self/environ"), LEAVES),
    "a FIFO for a licence": (fifo("LICENSE"), "LICENSE: a FIFO, not a regular file"),
    "a loop for a licence": (link("LICENSE", "LICENSE"), "LICENSE: "),
    "a licence that is nowhere": (link("LICENSE", "nothing"), "LICENSE: No such file"),
    "a huge licence": (huge("LICENSE"), "LICENSE: more than 32 MiB"),
    "a pointer for a licence": (text("LICENSE", LFS), POINTER),
}  # fmt: skip


def hidden_adapter(folder: Path) -> None:
    peft_adapter(folder, folder)


# What every command must refuse alike, whether it reads weights or only plans with them.
ALIKE: dict[str, tuple[Change, str]] = {
    "a hidden adapter": (hidden_adapter, "adapter_config.json beside config.json"),
    "other weights": (
        lambda f: edit(f, transformers_weights="other.safetensors"), "transformers_weights is",
    ),
    "fewer layers": STORED["fewer layers"],
    "an absolute shard": STORED["an absolute shard"],
    "a shard above": STORED["a shard above"],
}  # fmt: skip

# A Qwen2 that is converted back passes the same gate.
QWEN2: dict[str, tuple[Change, str]] = {
    "a generation_config without end": FILES["a generation_config without end"],
    "a pointer for tokenizer_config": FILES["a pointer for tokenizer_config"],
    "no metadata": STORED["no metadata"],
    "whole numbers": STORED["whole numbers"],
    "a method's name": changed_setting("a method's name"),
    "a dtype of torch's functions": changed_setting("a dtype of torch's functions"),
    "labels that are no numbers": changed_setting("labels that are no numbers"),
    "a configuration inside": changed_setting("a configuration inside"),
    "half of the width turned": (
        lambda f: edit(f, partial_rotary_factor=0.5),
        "partial_rotary_factor is 0.5; expected 1.0",
    ),
    "scaled rotary angles": (
        lambda f: edit(f, rope_scaling={"type": "yarn", "factor": 4.0}),
        "rope_type is 'yarn'",
    ),
    "a pickle that nobody allowed": (pickled({"x": RunsCode()}), "--allow_pickle true"),
}


def qwen2_member(name: str, change: Change, words: str = "", code: int = 2) -> Member:
    def make(place: Place) -> Sequence[str | Path]:
        base = place.here / "qwen2"
        merge_with(place.base(), [], base, to=find_format("qwen", "qwen2"))
        change(base)
        return [*command("merge", place, base), "--from", "qwen2"]

    return Member(f"from qwen2: {name}", make, code, (words,))


MEMBERS = [
    *(setting(name, *case) for name, case in SETTINGS.items()),
    *(member(name, *case, run=next(COMMANDS)) for name, case in FILES.items()),
    *(
        member(name, *case, run=run)
        for (name, case), run in zip(STORED.items(), cycle(("predict", "merge")))
        if "pickle" not in name
    ),
    *(
        member(name, *case, run="predict") for name, case in STORED.items() if "pickle" in name
    ),
    *(member(name, *case, run="merge") for name, case in CARRIED.items()),
    *(member(name, *CARRIED[name], run="full") for name in list(CARRIED)[:1]),
    *(
        member(name, *case, run=run)
        for name, case in ALIKE.items()
        for run in ("train", "predict", "merge", "plan")
    ),
    member("a pickle unasked", pickled({"x": RunsCode()}), "--allow_pickle true", "merge"),
    *(qwen2_member(name, *case) for name, case in QWEN2.items()),
]  # fmt: skip


def right(name: str, change: Change, *runs: str) -> list[Member]:
    return [member(name, change, "", run, code=0) for run in runs]


def computed_tables(found: dict[str, torch.Tensor]) -> None:
    found["transformer.rotary_emb.inv_freq"] = torch.ones(8)
    found["transformer.h.0.attn.masked_bias"] = torch.ones(1)


def turned_pickle(folder: Path) -> None:
    found = load_file(folder / WEIGHTS)
    found["lm_head.weight"] = found["lm_head.weight"].T.contiguous().T
    pickled(found)(folder)


def hub_cache(folder: Path) -> None:
    """The folder's files as blobs of a hub cache, which is put in its place."""
    cache = folder.parent / "models--acme--tiny"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "blobs").mkdir()
    (folder / "LICENSE").write_text("free")
    for path in list(folder.iterdir()):
        path.rename(cache / "blobs" / path.name)
        path.symlink_to(Path("../../blobs") / path.name)
    folder.rename(cache / "snapshots" / "0a1b")
    folder.symlink_to(cache / "snapshots" / "0a1b")


# Settings that mean nothing here, or are spelled as other tools spell them.
SAID_IN_VAIN: dict[str, dict[str, Any]] = {
    "torch's own name of a dtype": {"torch_dtype": "torch.bfloat16"},
    "an empty quantisation": {"quantization_config": {}},
    "no quantisation": {"quantization_config": None},
    "no picture": {"visual": None, "audio": None},
    "no width of a head": {"head_dim": None},
    "a kernel that this model has": {"_attn_implementation": "sdpa"},
    "a kernel that it does not need": {"attn_implementation": "flash_attention_2"},
    "the same by its private name": {"_attn_implementation": "flash_attention_2"},
    "that training recomputes": {"gradient_checkpointing": True},
    "labels": {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0}},
}

RIGHT = [
    *right("as it is", lambda f: None, "data", "plan", "predict", "merge"),
    *right("tables that are computed", tensors(computed_tables), "predict", "merge"),
    *right("shards", index(lambda c, f: None), "predict", "merge"),
    *right("pickles", as_pickles, "predict"),
    *right("a pickle of a turned view", turned_pickle, "predict", "train"),
    *right("a link in the folder", lambda f: (text("a", "x")(f), link("LICENSE", "a")(f)), "merge"),
    *right("a hub cache", hub_cache, "merge", "predict"),
    *right("null for what is not there", lambda f: edit(f, transformers_weights=None), "predict"),
    *right("no weights", removed(WEIGHTS), "plan", "data"),
    *right(
        "an index without its shards",
        lambda f: (index(lambda c, f: None)(f), [p.unlink() for p in f.glob("*.safetensors")]),
        "plan",
    ),
    *(
        right(name, lambda f, changes=changes: edit(f, **changes), run)[0]
        for (name, changes), run in zip(SAID_IN_VAIN.items(), cycle(("predict", "merge", "train")))
    ),
    *(
        qwen2_member(name, lambda f, changes=changes: edit(f, **changes), code=0)
        for name, changes in {**SAID_IN_VAIN, "no scale": {"rope_scaling": None}}.items()
    ),
]


@pytest.mark.parametrize("wrong", MEMBERS, ids=lambda member: member.name)
def test_a_wrong_folder_is_refused_in_one_line(
    wrong: Member, tmp_path: Path, small_dir: Path
) -> None:
    check(wrong, tmp_path, small_dir)


@pytest.mark.parametrize("whole", RIGHT, ids=lambda member: member.name)
def test_an_unusual_folder_that_is_right_is_taken(
    whole: Member, tmp_path: Path, small_dir: Path
) -> None:
    check(whole, tmp_path, small_dir)


@pytest.mark.parametrize(
    "path, words",
    [
        ("loop", "a loop of symbolic links"),
        ("nothing", "folder"),
        ("~nobody_of_this_name", "no such user's home"),
        ("x" * 5000, "too long; expected at most 255 bytes"),
        ("/dev/null", "folder"),
        ("-", "folder"),
    ],
)
@pytest.mark.parametrize("run", ["data", "predict", "merge"])
def test_a_path_that_cannot_be_a_folder_is_named_and_never_looked_up(
    run: str, path: str, words: str, tmp_path: Path, small_dir: Path
) -> None:
    def make(place: Place) -> Sequence[str | Path]:
        (place.here / "loop").symlink_to("loop")
        (place.here / "nothing").symlink_to("nowhere")
        given = place.here / path if path in ("loop", "nothing") else path
        return command(run, place, given)

    check(Member(f"{run} {path[:20]}", make, says=(words,)), tmp_path, small_dir)
