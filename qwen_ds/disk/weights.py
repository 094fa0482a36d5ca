"""Files of weights: the header of safetensors, pickles of plain tensors, dtypes and checksums.

A safetensors file is the length of the header (8 bytes, little-endian), the header (JSON: name ->
dtype, shape, data_offsets; and `__metadata__`), and the tensors' bytes side by side without holes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwen_ds.disk.read import open_regular, parse_json, refuse_lfs_pointer
from qwen_ds.disk.write import sync
from qwen_ds.errors import UserError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
"""torch's dtype -> its name in a safetensors file."""
FLOAT_DTYPES = {name: _DTYPES[name] for name in ("F32", "F16", "BF16")}
"""Name in a safetensors file -> torch's dtype, of those that weights may be computed in."""
TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""Name in a recipe, an option or config.json -> torch's dtype."""

_MAX_NAME = 500  # characters of a tensor's name
# A model of 80 layers has 0.1 MB of it. The library allows 100 MB, which take GBs when parsed.
_MAX_HEADER_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor as a header describes it. Its rows are its first dimension; a scalar is one row."""

    name: str
    dtype: str  # as in the file: "BF16"
    shape: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def items_per_row(self) -> int:
        return prod(self.shape[1:])

    @property
    def bytes_per_row(self) -> int:
        return self.items_per_row * _DTYPES[self.dtype].itemsize

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.bytes_per_row


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors of a weight file in the order of their bytes, which start at `data_start`.

    For a pickle, `pickled` holds the tensors, mapped into memory, and `data_start` means nothing.
    """

    path: Path
    tensors: tuple[TensorSpec, ...]
    metadata: dict[str, str]
    data_start: int
    pickled: Mapping[str, Tensor] | None = None

    @property
    def starts(self) -> dict[str, int]:
        """Offset in the file, in bytes, at which each tensor begins."""
        sizes = [spec.num_bytes for spec in self.tensors]
        starts = accumulate(sizes, initial=self.data_start)
        return {spec.name: start for spec, start in zip(self.tensors, starts, strict=False)}


def read_header(path: Path) -> Header:
    """The checked header of a safetensors file.

    Raises UserError for no such file, one that is not safetensors, and a size that is not what the
    header says (a download that broke off).
    """

    def bad(reason: str) -> UserError:
        return UserError(f"{path}: {reason}; expected a whole safetensors file")

    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            beginning = file.read(64)
            refuse_lfs_pointer(path, beginning)
            length = int.from_bytes(beginning[:8], "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise bad(f"{size} bytes hold no header")
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        reason = str(error.strerror or error)
        raise UserError(f"{path}: {reason}; expected a safetensors file") from None
    try:
        tensors, metadata = _parse_header(raw)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # A UserError is a ValueError with a message for the user.
        reason = str(error) if isinstance(error, UserError) else type(error).__name__
        raise bad(f"a broken header ({reason})") from None
    expected = 8 + length + sum(spec.num_bytes for spec in tensors)
    if size != expected:
        raise bad(f"{size} bytes, the header says {expected}: the file is cut off or damaged")
    # What the library cannot read is known before it is to load it. "np" maps no writable memory.
    with open_tensors(path, "np"):
        pass
    return Header(path, tensors, metadata, 8 + length)


@contextmanager
def open_tensors(path: Path, framework: str = "pt") -> Iterator[Any]:
    """A safetensors file opened by the library, for reading on the CPU. UserError names the file
    where the library fails, on opening or on reading."""
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except SafetensorError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: {reason}; expected a whole safetensors file") from None


def _parse_header(raw: bytes) -> tuple[tuple[TensorSpec, ...], dict[str, str]]:
    """Tensors in the order of their bytes, and metadata. UserError, or the error of an access, for
    what is no header."""
    entries: dict[str, Any] = parse_json(raw)
    metadata = entries.pop("__metadata__", None) or {}
    if not all(isinstance(value, str) for value in metadata.values()):
        raise UserError("its metadata are not all text")
    placed = sorted(
        (_sizes(entry["data_offsets"]), name, _sizes(entry["shape"]))
        for name, entry in entries.items()
    )
    tensors = tuple(TensorSpec(name, entries[name]["dtype"], at) for _, name, at in placed)
    _check_offsets(tensors, [offsets for offsets, _, _ in placed])
    return tensors, metadata


def _sizes(values: list[int]) -> tuple[int, ...]:
    # Not isinstance, for which True is a number. Two negative sizes would multiply to a right one.
    if type(values) is not list or any(type(size) is not int or size < 0 for size in values):
        raise UserError(f"{str(values)[:100]} are no sizes")
    return tuple(values)


def _check_offsets(tensors: Iterable[TensorSpec], offsets: Iterable[tuple[int, ...]]) -> None:
    position = 0
    for spec, (first, last) in zip(tensors, offsets, strict=True):
        if len(spec.name) > _MAX_NAME:  # which no message could show
            raise UserError(f"the name {spec.name[:60]!r}... has {len(spec.name)} characters")
        if not isinstance(spec.dtype, str) or spec.dtype not in _DTYPES:
            raise UserError(f"{spec.name} has dtype {str(spec.dtype)[:100]}")
        if first != position or last - first != spec.num_bytes:
            raise UserError(
                f"{spec.name} lies at {first}..{last}, not where its shape {list(spec.shape)}"
                " puts it"
            )
        position = last


def header_bytes(tensors: Iterable[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Encode the header of a file whose tensors follow in this order, padded to 8 bytes."""
    # transformers refuses files that do not say which framework's layout they hold.
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    position = 0
    for spec in tensors:
        span = [position, position + spec.num_bytes]
        entries[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": span}
        position = span[1]
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write a safetensors file and wait until the disk has it; returns its sha256 in hex.

    The file gets its own name at once: it belongs to a folder that is not published yet (see
    qwen_ds/disk/write.py). Tensors that are contiguous and on the CPU are not copied. What the
    disk refuses is an OSError.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(whole, path, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:  # the library wraps what the system refused
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        raise
    path.chmod(0o644)  # the library leaves 0600, which a server under another user cannot read
    sync(path)
    return file_sha256(path)


def read_pickle(path: Path, *, mmap: bool) -> dict[str, Tensor]:
    """Read a pickle that holds tensors by name; `mmap` maps them into memory instead.

    Callers read one only where the user may have meant to (--allow_pickle, lora.allow_pickle). With
    `weights_only` no code in it can run.

    Raises UserError for anything but a dict of tensors, with `mmap` also for a file from before
    torch 1.6.
    """
    try:
        with open_regular(path) as file:
            refuse_lfs_pointer(path, file.read(64))
    except OSError as error:
        reason = str(error.strerror or error)
        raise UserError(f"{path}: {reason}; expected what torch.save wrote") from None
    try:
        with warnings.catch_warnings(action="ignore"):  # of kinds of tensors that are refused below
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    # A damaged file makes torch's reader fail anywhere, with whatever it meets there.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if reason.startswith("Weights only load failed"):  # advice follows, to read it all the same
            reason = "it holds something else, or is damaged"
        raise UserError(
            f"{path}: not a whole file of plain tensors ({reason}); expected what torch.save wrote"
        ) from None
    if not isinstance(tensors, dict):
        raise UserError(f"{path}: holds a {type(tensors).__name__}; expected a dict of tensors")
    for name, value in tensors.items():
        is_name = isinstance(name, str) and len(name) <= _MAX_NAME
        if not (is_name and isinstance(value, Tensor)):
            came = f"a {type(value).__name__} under {str(name)[:100]!r}"
            raise UserError(f"{path}: holds {came}; expected a dict of tensors by name")
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            kind = "quantised" if value.is_quantized else f"{value.device.type}, {value.layout}"
            raise UserError(f"{path}: {name} is no plain tensor ({kind}); expected its values")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def open_file(path: Path) -> Header:
    """The header of a weight file of either kind; raises UserError as its readers do."""
    if path.suffix == ".safetensors":
        return read_header(path)
    tensors = read_pickle(path, mmap=True)
    specs = []
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise UserError(
                f"{path}: {name} has dtype {tensor.dtype}; expected one that safetensors has"
            )
        specs.append(TensorSpec(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)))
    return Header(path, tuple(specs), {"format": "pt"}, 0, tensors)


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_facts(path: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of a file, as reports tell them."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
