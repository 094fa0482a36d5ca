"""The proof layer by layer: both sides' hidden states pass the blocks, one of which is in memory.

The blocks are the native ones, with peft's layers on them. Embedding and head, which are too large
to be held whole, are read in rows. A model of any size is proven in the memory of one block.

Shapes: B rows, T tokens of the longest, D hidden, P positions compared, V vocabulary, N rows of the
head.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from qwen_ds.disk.shards import StoredWeights, open_stored
from qwen_ds.disk.weights import FLOAT_DTYPES
from qwen_ds.export.layout import Layout, identity, inverse
from qwen_ds.export.merge_plan import MergePlan
from qwen_ds.export.proof.noise import RoundingNoise
from qwen_ds.export.proof.sides import Outputs, ProofRow, put_adapters
from qwen_ds.export.stream.blocks import row_ranges
from qwen_ds.export.stream.changes import Adapters
from qwen_ds.export.stream.source import Source
from qwen_ds.model.family import QWEN, ModelConfig
from qwen_ds.model.folder import inspect_folder
from qwen_ds.model.rotary import rotary_tables

_HEAD_ROWS = 1024  # of the head at once, in fp32 16 MB at 7B
_READ_BYTES = 4 * 2**20  # read and widened to fp32 at once


class Weights:
    """A folder's tensors in fp32, under the model's own names, whatever the folder calls them."""

    def __init__(self, stored: StoredWeights, layout: Layout, source: Source) -> None:
        self._stored, self._layout, self._source = stored.tensors, layout, source

    def num_rows(self, name: str) -> int:
        return sum(block.num_rows for block in self._layout[name])

    def rows(self, name: str, first: int, last: int, into: Tensor | None = None) -> Tensor:
        """Rows first..last of the tensor `name`, in `into` or in memory of their own."""
        width = self._stored[self._layout[name][0].tensor].shape[1:]
        target = torch.empty(last - first, *width) if into is None else into
        passed = 0  # rows of the tensor that lie in the blocks before
        for block in self._layout[name]:
            start = max(first - passed, 0)
            end = max(min(last - passed, block.num_rows), start)
            spec = self._stored[block.tensor]
            for piece in row_ranges(spec, block.first + start, block.first + end, _READ_BYTES):
                at = passed + piece.first - block.first - first
                stored = self._source.read(piece).view(FLOAT_DTYPES[spec.dtype])
                part = target[at : at + piece.last - piece.first]
                part.copy_(stored.view(part.shape))
            passed += block.num_rows
        return target

    def chosen_rows(self, name: str, indices: Sequence[int]) -> Tensor:
        """Rows of the tensor `name`: a range, or any."""
        if isinstance(indices, range):
            return self.rows(name, indices[0], indices[-1] + 1)
        return torch.cat([self.rows(name, i, i + 1) for i in indices])


@torch.no_grad()
def layered_outputs(plan: MergePlan, merged: Path, rows: Sequence[ProofRow]) -> Outputs:
    """Compute logits of both sides; texts must not be longer than the model's seq_length."""
    written = open_stored(merged)
    if plan.format.from_qwen:
        native, layouts = plan.base.folder, (identity(plan.base), inverse(plan.layout))
    else:
        native, layouts = merged, (plan.layout, identity(written))
    config = inspect_folder(native, weights=False).config
    with Source(plan.base) as base, Source(written) as output:
        sides = Weights(plan.base, layouts[0], base), Weights(written, layouts[1], output)
        return _Comparison(plan, config, sides).run(rows)


class _Comparison:
    """Four hidden states on their way: base, base + adapters, that on a noisy base, and output."""

    def __init__(self, plan: MergePlan, config: ModelConfig, sides: tuple[Weights, Weights]):
        self._plan, self._config, (self._base, self._output) = plan, config, sides
        # One block's weights, filled again for every block: fresh memory of that size costs more
        # than the reading.
        self._buffers: dict[str, Tensor] = {}
        self._noise = RoundingNoise(plan.rounded(of_output=not plan.format.from_qwen))

    def run(self, rows: Sequence[ProofRow]) -> Outputs:
        # Right padding needs no mask: a real token never looks to its right.
        ids_BT = nn.utils.rnn.pad_sequence([row.ids_T for row in rows], batch_first=True)
        states, config = self._embed(ids_BT), self._config
        angles = rotary_tables(
            torch.arange(ids_BT.shape[1])[None], config.kv_channels, config.rotary_emb_base
        )
        cos, sin = (table[:, :, None, None] for table in angles)
        for i in range(config.num_hidden_layers):
            states = self._through_block(i, states, cos, sin)
        batch_P = torch.cat([torch.full_like(row.positions, i) for i, row in enumerate(rows)])
        token_P = torch.cat([row.positions for row in rows])
        return self._head([x_BTD[batch_P, token_P] for x_BTD in states])

    def _through_rows(
        self, name: str, layer: nn.Module, indices: Sequence[int], inputs: list[Tensor]
    ) -> list[Tensor]:
        """Send the four inputs through a `layer` whose weight is some rows of the tensor `name`."""
        _set_weight(layer, self._base.chosen_rows(name, indices))
        path = name.removesuffix(".weight")
        whole = _placed(layer, path)
        base = layer(inputs[0])
        members = (adapter.of_rows(name, indices) for adapter in self._plan.adapters.members)
        put_adapters(whole, Adapters(tuple(members), self._plan.adapters.weights))
        adapted = whole.get_submodule(path)  # in peft's wrapper, where LoRA is on it
        expected = adapted(inputs[1])
        self._noise.spoil(whole)
        noisy = adapted(inputs[2])
        _set_weight(layer, self._output.chosen_rows(name, indices))
        return [base, expected, noisy, layer(inputs[3])]

    def _embed(self, ids_BT: Tensor) -> list[Tensor]:
        ids_U, index_BT = ids_BT.unique(return_inverse=True)
        layer = nn.Embedding(len(ids_U), self._config.hidden_size, device="meta")
        name = f"{QWEN.embedding}.weight"
        return self._through_rows(name, layer, ids_U.tolist(), [index_BT] * 4)

    def _through_block(
        self, i: int, states: list[Tensor], cos: Tensor, sin: Tensor
    ) -> list[Tensor]:
        base_BTD, expected_BTD, noisy_BTD, merged_BTD = states
        block = self._block(i, self._base)
        whole = _placed(block, f"{QWEN.blocks}.{i}")
        base_BTD = block(base_BTD, cos, sin)
        if self._plan.adapters.members:
            put_adapters(whole, self._plan.adapters)
            expected_BTD = block(expected_BTD, cos, sin)
        else:
            expected_BTD = base_BTD
        self._noise.spoil(whole)
        noisy_BTD = block(noisy_BTD, cos, sin)
        del block, whole
        gc.collect(1)  # peft's wrappers refer to each other; older objects are not among them
        merged_BTD = self._block(i, self._output)(merged_BTD, cos, sin)
        return [base_BTD, expected_BTD, noisy_BTD, merged_BTD]

    def _block(self, i: int, weights: Weights) -> nn.Module:
        with torch.device("meta"):
            block = QWEN.block_class(self._config, i)
        state = {}
        for name, empty in block.state_dict().items():
            buffer = self._buffers.setdefault(name, torch.empty(empty.shape, device="cpu"))
            state[name] = weights.rows(f"{QWEN.blocks}.{i}.{name}", 0, empty.shape[0], buffer)
        block.load_state_dict(state, assign=True)
        return block.eval()

    def _head(self, states: list[Tensor]) -> Outputs:
        hidden_size = self._config.hidden_size
        norm = nn.RMSNorm(hidden_size, self._config.layer_norm_epsilon, device="meta")
        states = self._through_rows(f"{QWEN.final_norm}.weight", norm, range(hidden_size), states)
        name = f"{QWEN.head}.weight"
        vocab_size = self._base.num_rows(name)
        logits = [torch.empty(len(states[0]), vocab_size) for _ in states]
        for first in range(0, vocab_size, _HEAD_ROWS):
            last = min(first + _HEAD_ROWS, vocab_size)
            head = nn.Linear(hidden_size, last - first, bias=False, device="meta")
            parts = self._through_rows(name, head, range(first, last), states)
            for logits_PV, part_PN in zip(logits, parts, strict=True):
                logits_PV[:, first:last] = part_PN
        return Outputs(*logits)


def _placed(module: nn.Module, path: str) -> nn.Module:
    """An empty model but for `module` at `path`, where adapters and noise find it by name."""
    for name in reversed(path.split(".")):
        parent = nn.Module()
        parent.add_module(name, module)
        module = parent
    return module


def _set_weight(layer: nn.Module, weight: Tensor) -> None:
    layer.weight = nn.Parameter(weight, requires_grad=False)
