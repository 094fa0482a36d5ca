"""How the output's tensors are made of the source's: each is blocks of rows of source tensors, stacked.

So the formats differ by a table and share the streamed merge, its checksums and its proof.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_ds.export.checkpoint import Checkpoint, carry_files
from qwen_ds.export.qwen2.tokenizer_check import TokenizerCheck


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows first..last of a tensor; of a scalar its only one."""

    tensor: str
    first: int
    last: int

    @property
    def num_rows(self) -> int:
        return self.last - self.first


# Output tensor's name -> row blocks of source tensors, stacked in this order.
Layout = Mapping[str, tuple[Rows, ...]]


def identity(checkpoint: Checkpoint) -> Layout:
    """Every tensor as it is."""
    return {name: (Rows(name, 0, spec.num_rows),) for name, spec in checkpoint.tensors.items()}


def inverse(layout: Layout) -> Layout:
    """The layout of the way back: source tensor -> row blocks of the output's tensors, in the order of its own rows."""
    placed: dict[str, list[tuple[int, Rows]]] = {}
    for name, blocks in layout.items():
        first = 0
        for rows in blocks:
            place = Rows(name, first, first + rows.num_rows)
            placed.setdefault(rows.tensor, []).append((rows.first, place))
            first = place.last
    return {
        tensor: tuple(rows for _, rows in sorted(found, key=lambda place: place[0]))
        for tensor, found in placed.items()
    }


@dataclass(frozen=True, slots=True)
class Format:
    """What kind of folder is written.

    Attributes:
        name: as the user and the report call it.
        layout: made for a source checkpoint; raises UserError where that cannot be written in this format. Source
            tensors that it leaves out are not in the output.
        write_files: (base folder, output folder, torch_dtype of all weights or None, whether adapters are merged) ->
            what was changed or made, by file name. Writes everything beside the weights: settings, tokenizer, legal
            texts.
        reads: the base's files that these are made from, beside the legal texts; none where all are carried over.
        from_qwen: whether the source has the native names, so that `layout` leads away from them; otherwise the
            output has them. (Both, where the layout is the identity.)
        check_tokenizer: (base folder, output folder, files of texts) -> whether the tokenizers of both agree; None
            where the output has the base's.
    """

    name: str
    layout: Callable[[Checkpoint], Layout]
    write_files: Callable[[Path, Path, str | None, bool], dict[str, str]]
    reads: tuple[str, ...] = ()
    from_qwen: bool = True
    check_tokenizer: Callable[[Path, Path, Sequence[str]], TokenizerCheck] | None = None


QWEN = Format("qwen", identity, carry_files)
