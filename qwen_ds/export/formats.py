"""The formats that a folder can be written in: Qwen's own, Qwen2's, and from Qwen2 back to Qwen's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from qwen_ds.disk.weights import FLOAT_DTYPES
from qwen_ds.disk.write import write_json
from qwen_ds.errors import UserError
from qwen_ds.export.checkpoint import Checkpoint, with_rms_norm_eps
from qwen_ds.export.layout import QWEN, Format, Layout
from qwen_ds.export.qwen2 import settings
from qwen_ds.export.qwen2.names import layout_from_qwen2, layout_to_qwen2
from qwen_ds.export.qwen2.tokenizer_check import TokenizerCheck, check_tokenizer
from qwen_ds.export.qwen2.tokenizer_json import (
    TOKENIZER,
    merges_of,
    read_qwen2_tokenizer,
    write_qwen2_tokenizer,
)
from qwen_ds.export.stream.blocks import read_header
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.folder import carry_over
from qwen_ds.model.tokenizer import VOCABULARY_FILE, load_encoding

FormatName = Literal["qwen", "qwen2"]


# What the settings and the tokenizer of the other format are made from.
_QWEN_FILES = (
    settings.CONFIG,
    settings.GENERATION_CONFIG,
    settings.TOKENIZER_CONFIG,
    VOCABULARY_FILE,
)
_QWEN2_FILES = (settings.CONFIG, settings.GENERATION_CONFIG, TOKENIZER)


def find_format(source: FormatName, target: FormatName, *, merges_adapter: bool = False) -> Format:
    """How a folder in the format `source` becomes one in `target`, of which one is Qwen's own.

    Raises:
        UserError: both are Qwen2, or an adapter is to be merged into a Qwen2.
    """
    if source == "qwen2" and (target == "qwen2" or merges_adapter):
        came = "an adapter" if merges_adapter else "the format qwen2"
        raise UserError(
            f"{came} was given with --from qwen2; expected a conversion of the base to the format qwen"
        )
    if source == "qwen2":
        return Format(
            "qwen",
            _from_qwen2,
            _write_qwen_files,
            _QWEN2_FILES,
            from_qwen=False,
            check_tokenizer=_check_back,
        )
    return (
        Format("qwen2", _to_qwen2, _write_qwen2_files, _QWEN_FILES, check_tokenizer=_check)
        if target == "qwen2"
        else QWEN
    )


def _check(base: Path, output: Path, texts_files: Sequence[str]) -> TokenizerCheck:
    return check_tokenizer(load_encoding(base), output, texts_files)


def _check_back(base: Path, output: Path, texts_files: Sequence[str]) -> TokenizerCheck:
    return check_tokenizer(load_encoding(output), base, texts_files)


def _to_qwen2(checkpoint: Checkpoint) -> Layout:
    for name, spec in checkpoint.tensors.items():
        if spec.dtype not in FLOAT_DTYPES:
            raise UserError(
                f"{checkpoint.folder}: {name} is stored as {spec.dtype}; expected {', '.join(FLOAT_DTYPES)}"
            )
    merges_of(load_encoding(checkpoint.folder))  # its checks, before anything is written
    return layout_to_qwen2(checkpoint.shapes, settings.read_qwen_config(checkpoint.folder))


def _from_qwen2(checkpoint: Checkpoint) -> Layout:
    config = QWenConfig.from_dict(settings.from_qwen2(checkpoint.folder)[0])
    n_vocab = read_qwen2_tokenizer(checkpoint.folder).n_vocab
    if n_vocab > config.vocab_size:
        raise UserError(
            f"{checkpoint.folder}: {TOKENIZER} and Qwen's special tokens are {n_vocab} tokens but config.json says "
            f"vocab_size {config.vocab_size}; expected an embedding row for every token"
        )
    return layout_from_qwen2(checkpoint.shapes, config)


def _write_qwen2_files(
    base: Path, output: Path, torch_dtype: str | None, merges_adapter: bool
) -> dict[str, str]:
    """Settings, tokenizer and legal texts of a Qwen2 folder made from the Qwen in `base`."""
    encoding = load_encoding(base)
    generation = settings.generation_of_qwen(base, merges_adapter)
    chatml = settings.speaks_chatml(generation)
    ends = encoding.eod_id, encoding.im_end_id if chatml else encoding.eod_id
    config = settings.to_qwen2(base, generation, torch_dtype or _stored_dtype(output), *ends)
    seq_length = config["max_position_embeddings"]
    write_json(output / settings.CONFIG, config)
    write_json(output / settings.GENERATION_CONFIG, settings.generation_to_qwen2(generation, *ends))
    write_qwen2_tokenizer(encoding, output, chatml=chatml, model_max_length=seq_length)
    carry_over(base, output, legal_only=True)
    return {
        settings.CONFIG: f"max_position_embeddings is {seq_length}: longer texts need the qwen format, since Qwen2 has"
        " neither dynamic NTK nor LogN",
        settings.GENERATION_CONFIG: f"a reply ends with {'<|im_end|> or ' if chatml else ''}<|endoftext|>",
    }


def _write_qwen_files(
    base: Path, output: Path, torch_dtype: str | None, merges_adapter: bool
) -> dict[str, str]:
    """Settings, vocabulary and legal texts of a Qwen folder made from the Qwen2 in `base`."""
    encoding = read_qwen2_tokenizer(base)
    config, tokenizer_config = settings.from_qwen2(base)
    stored = torch_dtype or _stored_dtype(output)
    # The settings are as old as the way there; the weights may have been saved in another dtype since.
    if torch_dtype is not None or config.get("torch_dtype", config.get("dtype", stored)) != stored:
        config = {**config, "torch_dtype": stored, "bf16": False, "fp16": False, "fp32": False}
        config.pop("dtype", None)
    write_json(output / settings.CONFIG, with_rms_norm_eps(config))
    write_json(output / settings.TOKENIZER_CONFIG, tokenizer_config)
    if generation := settings.generation_from_qwen2(base, encoding.eod_id):
        write_json(output / settings.GENERATION_CONFIG, generation)
    (output / VOCABULARY_FILE).write_bytes(encoding.vocabulary)
    (output / VOCABULARY_FILE).chmod(0o644)
    carry_over(base, output, legal_only=True)
    ntk = config.get("use_dynamic_ntk"), config.get("use_logn_attn")
    return {settings.CONFIG: f"use_dynamic_ntk is {ntk[0]}, use_logn_attn is {ntk[1]}"}


def _stored_dtype(output: Path) -> str:
    """Name of the dtype of most weights in the output, which are there before the settings."""
    dtypes = [
        spec.dtype
        for file in sorted(output.glob("*.safetensors"))
        for spec in read_header(file).tensors
    ]
    return str(FLOAT_DTYPES[max(set(dtypes), key=dtypes.count)]).removeprefix("torch.")
