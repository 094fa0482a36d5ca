"""The side that answers the rows of files: a model of this machine, or one at an endpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_ds.disk.adapter_folder import tell_adapter
from qwen_ds.model.adapter import check_adapter_fits, read_adapter
from qwen_ds.model.folder import ModelFolder, find_model
from qwen_ds.model.shapes import state_shapes
from qwen_ds.model.tokenizer import Encoding
from qwen_ds.runlog import say
from serve.answering import Answerer, EngineAnswerer
from serve.endpoint.client import Endpoint, connect
from serve.endpoint.options import check_source
from serve.engine.loading import load_engine
from serve.options import AnswerOptions

# Options that a server's own settings take the place of.
_ONLY_HERE = (
    "adapter", "allow_pickle", "device", "dtype", "batch_size", "prefill_tokens", "memory_gb",
    "long_prompts",
    "special_tokens_in_text",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model's folder, inspected, and its adapter; loaded when the first row is to be answered."""

    folder: ModelFolder
    adapter: Path | None
    options: AnswerOptions

    @property
    def encoding(self) -> Encoding | None:
        return self.folder.encoding

    @property
    def context(self) -> int:
        return self.folder.family.context(self.folder.config)

    def open(self) -> Answerer:
        o = self.options
        engine = load_engine(
            self.folder, self.adapter, o.device, o.dtype, allow_pickle=o.allow_pickle
        )
        decoding = engine.start(o.batch_size, o.prefill_tokens, o.memory_gb)
        store = decoding.store
        tokens = store.num_pages * store.page_size
        gigabytes = tokens * store.shape.bytes_per_token / 1e9
        say(f"room for {tokens:,} tokens of keys and values ({gigabytes:.3g} GB)")
        return EngineAnswerer(decoding, engine.stop)


@dataclass(frozen=True, slots=True)
class EndpointSource:
    """A server, which counts tokens by itself."""

    endpoint: Endpoint

    @property
    def encoding(self) -> Encoding | None:
        return None

    @property
    def context(self) -> int:
        return 0

    def open(self) -> Answerer:
        return self.endpoint


Source = ModelSource | EndpointSource


def find_source(model: str | None, options: AnswerOptions) -> Source:
    """Find what answers, before any row is read.

    UserError: no such model, adapter or server. Failed: the server is down.
    """
    check_source(options, model, _ONLY_HERE)
    if model is None:
        seconds = options.timeout_minutes * 60
        return EndpointSource(connect(options, seconds, say, options.concurrency))
    folder = find_model(model)
    if options.adapter is None:
        return ModelSource(folder, None, options)
    adapter = read_adapter(tell_adapter(options.adapter), allow_pickle=options.allow_pickle)
    for note in check_adapter_fits(adapter, state_shapes(folder.config)):
        say(f"{adapter.folder}: {note}")
    return ModelSource(folder, adapter.folder, options)


def settings_of_source(source: Source) -> dict[str, Any]:
    """Everything about the source that an answer depends on, as JSON."""
    if isinstance(source, EndpointSource):
        return {"endpoint": source.endpoint.url, "endpoint_model": source.endpoint.model}
    adapter = source.adapter
    return {
        "model": cards_in(source.folder.path),
        "adapter": cards_in(adapter) if adapter is not None else None,
    }


def cards_in(folder: Path) -> list[list[Any]]:
    """Cards of the files in a folder, see `file_card`. Hidden files are nothing of a model's, and
    those of an output beside it come and go."""
    files = (file for file in sorted(folder.iterdir()) if not file.name.startswith("."))
    return [file_card(file) for file in files if file.is_file()]


def file_card(file: Path) -> list[Any]:
    """A file by its place, size and time of change."""
    stat = file.stat()
    return [str(file.resolve()), stat.st_size, stat.st_mtime_ns]
