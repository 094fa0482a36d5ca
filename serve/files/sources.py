"""The side that answers the rows of files: a model of this machine, or one at an endpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_ds.decode.grammar import Grammar
from qwen_ds.disk.adapter_folder import WEIGHTS_NAME, find_adapter
from qwen_ds.disk.digest import sha256_once
from qwen_ds.errors import UserError
from qwen_ds.model.folder import ModelFolder, find_model
from qwen_ds.model.tokenizer import Encoding
from qwen_ds.runlog import say
from serve.answering import Answerer, EngineAnswerer, room_in_words
from serve.endpoint.client import Endpoint, connect
from serve.endpoint.options import check_source, given_options
from serve.engine.adapters import DEFAULT, named_adapters
from serve.engine.beams import BeamAnswerer, check_beams
from serve.engine.loading import find_adapters, load_engine
from serve.options import AnswerOptions
from serve.structure import Structure

# Options that a server's own settings take the place of.
_ONLY_HERE = (
    "adapter", "adapter_column", "allow_pickle", "device", "dtype", "num_beams", "batch_size",
    "prefill_tokens", "memory_gb", "long_prompts", "special_tokens_in_text",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model's folder, inspected, and its adapters; loaded when the first row is to be answered.
    What its answers are held to is compiled."""

    folder: ModelFolder
    adapters: Mapping[str, Path]
    options: AnswerOptions
    structure: Structure | None = None
    grammar: Grammar | None = None

    @property
    def encoding(self) -> Encoding | None:
        return self.folder.encoding

    @property
    def context(self) -> int:
        return self.folder.family.context(self.folder.config)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that rows choose from; none where one answers all rows."""
        return () if list(self.adapters) == [DEFAULT] else tuple(self.adapters)

    def open(self) -> Answerer:
        o = self.options
        if o.num_beams > 1:
            say(f"beam search with {o.num_beams} beams by transformers' generate: the slow path")
            return BeamAnswerer.load(self.folder, self.adapters.get(DEFAULT), o)
        engine = load_engine(
            self.folder, None, o.device, o.dtype, adapters=self.adapters,
            allow_pickle=o.allow_pickle,
        )  # fmt: skip
        decoding = engine.start(o.batch_size, o.prefill_tokens, o.memory_gb)
        say(room_in_words(decoding))
        return EngineAnswerer(engine, decoding, self.grammar)


@dataclass(frozen=True, slots=True)
class EndpointSource:
    """A server, which counts tokens by itself."""

    endpoint: Endpoint
    structure: Structure | None = None

    @property
    def encoding(self) -> Encoding | None:
        return None

    @property
    def context(self) -> int:
        return 0

    @property
    def names(self) -> tuple[str, ...]:
        return ()

    def open(self) -> Answerer:
        return self.endpoint


Source = ModelSource | EndpointSource


def find_source(model: str | None, options: AnswerOptions) -> Source:
    """Find what answers, before any row is read.

    UserError: no such model, adapter or server, or options that it cannot honour. Failed: the
    server is down.
    """
    check_source(options, model, _ONLY_HERE)
    structure = options.structure()
    if model is None:
        if structure is not None and structure.note is not None:
            say(structure.note)
        seconds = options.timeout_minutes * 60
        return EndpointSource(connect(options, seconds, say, options.concurrency), structure)
    check_beams(options)
    folder = find_model(model)
    options.check_tokens(folder.encoding.n_vocab)
    source = ModelSource(
        folder,
        find_adapters(options.adapter, folder, options.allow_pickle),
        options,
        structure,
        None if structure is None else structure.grammar(folder),
    )
    if "adapter_column" in given_options(options) and not source.names:
        raise UserError(
            "--adapter_column is given without named adapters; expected --adapter NAME=DIR ..."
        )
    return source


def settings_of_source(source: Source) -> dict[str, Any]:
    """Everything about the source that an answer depends on, as JSON."""
    found: dict[str, Any] = {}
    if (structure := source.structure) is not None:
        found[structure.kind] = structure.value
    if isinstance(source, EndpointSource):
        return found | {"endpoint": source.endpoint.url, "endpoint_model": source.endpoint.model}
    cards = {name: cards_in(at) for name, at in source.adapters.items()}
    found |= {"model": cards_in(source.folder.path), "adapter": cards.get(DEFAULT)}
    if source.names:
        found |= {"adapter": None, "adapters": cards}
        found["adapter_column"] = source.options.adapter_column
    return found


def adapters_told(options: AnswerOptions) -> dict[str, Any]:
    """The adapter as a report names it, and the sum of its weights: a model card must not tell the
    scores of another one. Of named adapters both are objects by name."""
    folders = named_adapters(options.adapter)
    files = {name: find_adapter(folder) / WEIGHTS_NAME for name, folder in folders.items()}
    sums = {name: sha256_once(at) if at.is_file() else None for name, at in files.items()}
    if set(folders) - {DEFAULT}:
        return {"adapter": folders, "adapter_sha256": sums}
    return {"adapter": folders.get(DEFAULT), "adapter_sha256": sums.get(DEFAULT)}


def cards_in(folder: Path) -> list[list[Any]]:
    """Cards of the files in a folder, see `file_card`. Hidden files are nothing of a model's, and
    those of an output beside it come and go."""
    files = (file for file in sorted(folder.iterdir()) if not file.name.startswith("."))
    return [file_card(file) for file in files if file.is_file()]


def file_card(file: Path) -> list[Any]:
    """A file by its place, size and time of change."""
    stat = file.stat()
    return [str(file.resolve()), stat.st_size, stat.st_mtime_ns]
