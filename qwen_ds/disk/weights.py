"""Files of weights: the header of safetensors, pickles of plain tensors, checksums, and when a file is on the disk.

A safetensors file is: the length of the header (8 bytes, little-endian), the header (JSON: name -> dtype, shape,
data_offsets; and `__metadata__`), and the tensors' bytes side by side without holes.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from qwen_ds.disk.write import sync
from qwen_ds.errors import UserError

BYTES_PER_ITEM = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
TORCH_DTYPES = {  # by their names in recipes and on command lines
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {
    **{dtype: name for name, dtype in FLOAT_DTYPES.items()},
    torch.float64: "F64", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a header says of one tensor. Its rows are its first dimension; a scalar is one row."""

    name: str
    dtype: str  # as in the file: "BF16"
    shape: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def items_per_row(self) -> int:
        items = 1
        for size in self.shape[1:]:
            items *= size
        return items

    @property
    def bytes_per_row(self) -> int:
        return self.items_per_row * BYTES_PER_ITEM[self.dtype]

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.bytes_per_row


def header_bytes(tensors: Iterable[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """What comes before the tensors' bytes, which follow in this order; the data start is a multiple of 8."""
    # transformers refuses files that do not say which framework's layout they hold.
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    position = 0
    for spec in tensors:
        end = position + spec.num_bytes
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, end],
        }
        position = end
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write a safetensors file and wait until the disk has it; returns its sha256 in hex.

    The file gets its own name at once: it belongs into a folder that is not published yet (see
    qwen_ds/disk/write.py). Tensors that are contiguous and on the CPU are not copied.

    Raises:
        OSError: of the disk.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(whole, path, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:  # the library's word for what the system refused
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        raise
    path.chmod(0o644)  # the library leaves 0600, which a server under another user cannot read
    sync(path)
    return file_sha256(path)


def read_pickle(path: Path, *, mmap: bool) -> dict[str, Tensor]:
    """The tensors of a pickle that holds nothing else; with `mmap` mapped into memory, not read.

    Callers read one only where the user may have wanted it (--allow_pickle, lora.init_from). `weights_only`: no code in
    it can run.

    Raises:
        UserError: anything but a dict of tensors; with `mmap` also a file from before torch 1.6.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: not a whole file of plain tensors ({reason}); expected what torch.save wrote"
        ) from None
    if not isinstance(tensors, dict) or not all(
        isinstance(value, Tensor) for value in tensors.values()
    ):
        raise UserError(f"{path}: holds a {type(tensors).__name__}; expected a dict of tensors")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
