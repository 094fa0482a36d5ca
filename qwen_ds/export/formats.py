"""The formats that a folder can be written in: Qwen's own, Qwen2's, and Qwen's from a Qwen2."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_ds.disk.read import read_json
from qwen_ds.disk.shards import StoredWeights, open_stored
from qwen_ds.disk.weights import FLOAT_DTYPES
from qwen_ds.disk.write import replacing, write_json
from qwen_ds.errors import UserError
from qwen_ds.export.choices import FormatName
from qwen_ds.export.layout import Layout, identity
from qwen_ds.export.qwen2 import settings
from qwen_ds.export.qwen2.names import layout_from_qwen2, layout_to_qwen2
from qwen_ds.export.qwen2.tokenizer_json import (
    TOKENIZER,
    merges_of,
    read_qwen2_tokenizer,
    write_qwen2_tokenizer,
)
from qwen_ds.model.carry_over import carry_over
from qwen_ds.model.config_check import checked_config
from qwen_ds.model.family import QWEN
from qwen_ds.model.tokenizer import VOCABULARY_FILE, load_encoding


@dataclass(frozen=True, slots=True)
class Format:
    """A kind of folder that can be written."""

    name: str  # as the user and the report call it
    layout: Callable[[StoredWeights], Layout]
    """Of the output, for a source. Tensors that it leaves out are not in the output. Raises
    UserError where the source cannot be written in this format."""
    write_files: Callable[[Path, Path, str | None, bool], dict[str, str]]
    """(base folder, output folder, torch_dtype of all weights or None, whether adapters are
    merged) -> what was changed or made, by file name. Writes everything beside the weights:
    settings, tokenizer, legal texts."""
    reads: tuple[str, ...] = ()
    """The base's files that these are made from, beside the legal texts; none where all are
    carried over."""
    from_qwen: bool = True
    """Whether the source has the native names, so that `layout` leads away from them; otherwise
    the output has them. (Both, where the layout is the identity.)"""
    converts_tokenizer: bool = False


def find_format(source: FormatName, target: FormatName, *, merges_adapter: bool = False) -> Format:
    """Find the way from the format `source` to `target`.

    UserError if both are Qwen2, or an adapter is to be merged into a Qwen2.
    """
    if source == "qwen":
        return QWEN_FORMAT if target == "qwen" else _QWEN2_FORMAT
    if target == "qwen2" or merges_adapter:
        came = "an adapter" if merges_adapter else "the format qwen2"
        raise UserError(
            f"{came} was given with --from qwen2; expected a conversion of the base to the format"
            " qwen"
        )
    return _BACK_TO_QWEN


def write_own_files(
    base: Path, output: Path, torch_dtype: str | None, merges_adapter: bool
) -> dict[str, str]:
    """Carry the small files over to a folder in Qwen's own format, with a few edits.

    config.json gets `rms_norm_eps`, and `torch_dtype` where all weights were brought to one. An
    adapter is trained in ChatML, so a base model that one is merged into answers as a chat model.
    """
    edits: defaultdict[str, list[str]] = defaultdict(list)
    for name in carry_over(base, output):
        if (output / name).read_bytes() != (base / name).read_bytes():
            edits[name].append("auto_map removed: it names code that is not carried")
    carried = read_json(output / settings.CONFIG)
    config = _with_rms_norm_eps(carried, base)
    if config != carried:
        edits[settings.CONFIG].append("rms_norm_eps added for llama.cpp")
    if torch_dtype is not None:
        config = _with_torch_dtype(config, torch_dtype)
        edits[settings.CONFIG].append(f"torch_dtype set to {torch_dtype}")
    if config != carried:
        write_json(output / settings.CONFIG, config)
    generation_file = output / settings.GENERATION_CONFIG
    if merges_adapter and generation_file.is_file():
        generation = read_json(generation_file)
        if QWEN.chat_format(generation) == "raw":
            write_json(generation_file, {**generation, "chat_format": "chatml"})
            edits[generation_file.name].append("chat_format set to chatml")
    return {name: "; ".join(what) for name, what in edits.items()}


def _with_rms_norm_eps(config: dict[str, Any], base: Path) -> dict[str, Any]:
    """config.json with Qwen's `layer_norm_epsilon` also under the name that llama.cpp looks for.

    Without that key llama.cpp converts a Qwen and then cannot load the outcome.
    """
    checked = checked_config(config, base / settings.CONFIG, QWEN.config_class)
    return {**config, "rms_norm_eps": checked.layer_norm_epsilon}


def _with_torch_dtype(config: dict[str, Any], torch_dtype: str) -> dict[str, Any]:
    config = {**config, "torch_dtype": torch_dtype, "bf16": False, "fp16": False, "fp32": False}
    config.pop("dtype", None)
    return config


def _layout_to_qwen2(stored: StoredWeights) -> Layout:
    for name, spec in stored.tensors.items():
        if spec.dtype not in FLOAT_DTYPES:
            raise UserError(
                f"{stored.folder}: {name} is stored as {spec.dtype}; expected"
                f" {', '.join(FLOAT_DTYPES)}"
            )
    merges_of(load_encoding(stored.folder))  # for its checks, before anything is written
    return layout_to_qwen2(stored.shapes, settings.read_qwen_config(stored.folder))


def _layout_from_qwen2(stored: StoredWeights) -> Layout:
    found, path = settings.from_qwen2(stored.folder)[0], stored.folder / settings.CONFIG
    config = checked_config(found, path, QWEN.config_class)
    n_vocab = read_qwen2_tokenizer(stored.folder).n_vocab
    if n_vocab > config.vocab_size:
        raise UserError(
            f"{stored.folder}: {TOKENIZER} and Qwen's special tokens are {n_vocab} tokens but"
            f" config.json says vocab_size {config.vocab_size}; expected an embedding row for"
            " every token"
        )
    return layout_from_qwen2(stored.shapes, config)


def _write_qwen2_files(
    base: Path, output: Path, torch_dtype: str | None, merges_adapter: bool
) -> dict[str, str]:
    encoding = load_encoding(base)
    generation = settings.generation_of_qwen(base, merges_adapter)
    chatml = QWEN.chat_format(generation) == "chatml"
    ends = encoding.eod_id, encoding.im_end_id if chatml else encoding.eod_id
    config = settings.to_qwen2(base, generation, torch_dtype or _stored_dtype(output), *ends)
    seq_length = config["max_position_embeddings"]
    write_json(output / settings.CONFIG, config)
    write_json(output / settings.GENERATION_CONFIG, settings.generation_to_qwen2(generation, *ends))
    write_qwen2_tokenizer(encoding, output, chatml=chatml, model_max_length=seq_length)
    carry_over(base, output, legal_only=True)
    ending = f"{'<|im_end|> or ' if chatml else ''}<|endoftext|>"
    return {
        settings.CONFIG: f"max_position_embeddings is {seq_length}: longer texts need the qwen"
        " format, since Qwen2 has neither dynamic NTK nor LogN",
        settings.GENERATION_CONFIG: f"a reply ends with {ending}",
    }


def _write_qwen_files(
    base: Path, output: Path, torch_dtype: str | None, merges_adapter: bool
) -> dict[str, str]:
    encoding = read_qwen2_tokenizer(base)
    config, tokenizer_config = settings.from_qwen2(base)
    stored = torch_dtype or _stored_dtype(output)
    # The settings date from the conversion to Qwen2: the weights may have another dtype since.
    if torch_dtype is not None or config.get("torch_dtype", config.get("dtype", stored)) != stored:
        config = _with_torch_dtype(config, stored)
    write_json(output / settings.CONFIG, _with_rms_norm_eps(config, base))
    write_json(output / settings.TOKENIZER_CONFIG, tokenizer_config)
    if generation := settings.generation_from_qwen2(base, encoding.eod_id):
        write_json(output / settings.GENERATION_CONFIG, generation)
    with replacing(output / VOCABULARY_FILE) as unfinished:
        unfinished.write_bytes(encoding.vocabulary)
    carry_over(base, output, legal_only=True)
    ntk, logn = config.get("use_dynamic_ntk"), config.get("use_logn_attn")
    return {settings.CONFIG: f"use_dynamic_ntk is {ntk}, use_logn_attn is {logn}"}


def _stored_dtype(output: Path) -> str:
    """Name of the dtype of most tensors in the output, which are there before the settings."""
    dtypes = [spec.dtype for spec in open_stored(output).tensors.values()]
    return str(FLOAT_DTYPES[max(set(dtypes), key=dtypes.count)]).removeprefix("torch.")


QWEN_FORMAT = Format("qwen", identity, write_own_files)
_QWEN2_FORMAT = Format(
    "qwen2",
    _layout_to_qwen2,
    _write_qwen2_files,
    (settings.CONFIG, settings.GENERATION_CONFIG, settings.TOKENIZER_CONFIG, VOCABULARY_FILE),
    converts_tokenizer=True,
)
_BACK_TO_QWEN = Format(
    "qwen",
    _layout_from_qwen2,
    _write_qwen_files,
    (settings.CONFIG, settings.GENERATION_CONFIG, TOKENIZER),
    from_qwen=False,
    converts_tokenizer=True,
)
