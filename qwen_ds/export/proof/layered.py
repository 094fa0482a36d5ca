"""The proof layer by layer: both sides' hidden states go through one block after the other, of which one is in memory.

The native blocks, with peft's layers on them; embedding and head, which are too large to be held whole, are read in
rows. A model of any size is proven in the memory of one block.

Shapes: B rows, T tokens of the longest, D hidden, P positions compared, V vocabulary, N rows of the head.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from qwen_ds.disk.weights import FLOAT_DTYPES
from qwen_ds.export.checkpoint import Checkpoint, open_checkpoint
from qwen_ds.export.layout import Layout, identity, inverse
from qwen_ds.export.merge_plan import Plan
from qwen_ds.export.proof.noise import RoundingNoise
from qwen_ds.export.proof.sides import Outputs, Row, put_adapters, spoil
from qwen_ds.export.stream.blocks import row_ranges
from qwen_ds.export.stream.changes import Adapters
from qwen_ds.export.stream.source import Source
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.modeling import QWenBlock
from qwen_ds.model.rotary import rotary_tables

_HEAD_ROWS = 1024  # of the head at once, in fp32 16 MB at 7B
_READ_BYTES = 4 * 2**20  # read and widened to fp32 at once


class Weights:
    """A checkpoint's tensors under the model's own names, whatever the folder calls them, in fp32."""

    def __init__(self, checkpoint: Checkpoint, layout: Layout, source: Source) -> None:
        self._stored = checkpoint.tensors
        self._layout = layout
        self._source = source

    def num_rows(self, name: str) -> int:
        return sum(rows.num_rows for rows in self._layout[name])

    def rows(self, name: str, first: int, last: int, into: Tensor | None = None) -> Tensor:
        """Rows first..last of the tensor `name`, in `into` or in memory of their own."""
        width = self._stored[self._layout[name][0].tensor].shape[1:]
        target = torch.empty(last - first, *width) if into is None else into
        passed = 0  # rows of the tensor that lie in the blocks before
        for rows in self._layout[name]:
            start, end = max(first - passed, 0), min(last - passed, rows.num_rows)
            spec = self._stored[rows.tensor]
            for piece in row_ranges(
                spec, rows.first + start, rows.first + max(start, end), _READ_BYTES
            ):
                at = passed + piece.first - rows.first - first
                stored = self._source.read(piece).view(FLOAT_DTYPES[spec.dtype])
                part = target[at : at + piece.last - piece.first]
                part.copy_(stored.view(part.shape))
            passed += rows.num_rows
        return target

    def chosen_rows(self, name: str, indices: Sequence[int]) -> Tensor:
        """Rows of the tensor `name`: a range, or any."""
        if isinstance(indices, range):
            return self.rows(name, indices[0], indices[-1] + 1)
        return torch.cat([self.rows(name, i, i + 1) for i in indices])


@torch.no_grad()
def layered_outputs(plan: Plan, merged: Path, rows: Sequence[Row]) -> Outputs:
    """Logits of both sides; texts must not be longer than the model's seq_length."""
    with ExitStack() as stack:
        base = _open(
            plan.base, identity(plan.base) if plan.format.from_qwen else plan.layout, stack
        )
        written = open_checkpoint(merged)
        output = _open(
            written, inverse(plan.layout) if plan.format.from_qwen else identity(written), stack
        )
        config = QWenConfig.from_pretrained(
            str(plan.base.folder if plan.format.from_qwen else merged)
        )
        return _Comparison(plan, config, base, output).run(rows)


def _open(checkpoint: Checkpoint, layout: Layout, stack: ExitStack) -> Weights:
    return Weights(checkpoint, layout, stack.enter_context(Source(checkpoint)))


class _Comparison:
    """Four hidden states on their way through: base, base + adapters, the same with noise on the base, output."""

    def __init__(self, plan: Plan, config: QWenConfig, base: Weights, output: Weights) -> None:
        self._plan, self._config, self._base, self._output = plan, config, base, output
        self._noise = RoundingNoise()
        # One block's weights, filled again for every block: fresh memory of that size costs more than the reading.
        self._buffers: dict[str, Tensor] = {}
        self._rounded = plan.rounded()
        if not plan.format.from_qwen:
            layout = plan.layout.items()
            self._rounded = {
                name: plan.tensors[name].dtype
                for name, blocks in layout
                if any(rows.tensor in self._rounded for rows in blocks)
            }

    def run(self, rows: Sequence[Row]) -> Outputs:
        # Right padding needs no mask: a real token never looks to its right.
        ids_BT = nn.utils.rnn.pad_sequence([row.ids_T for row in rows], batch_first=True)
        states = self._embed(ids_BT)
        config = self._config
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
        """The four ways through a `layer` whose weight is some rows of the tensor `name`."""
        _set_weight(layer, self._base.chosen_rows(name, indices))
        # In its place in the model, so that adapters and noise find it by name.
        *above, own = name.removesuffix(".weight").split(".")
        whole = parent = nn.Module()
        for part in above:
            parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(own, layer)
        base = layer(inputs[0])
        members, weights = self._plan.adapters.members, self._plan.adapters.weights
        put_adapters(
            whole, Adapters(tuple(adapter.of_rows(name, indices) for adapter in members), weights)
        )
        adapted = parent.get_submodule(own)  # in peft's wrapper, where LoRA is on it
        expected = adapted(inputs[1])
        spoil(whole, self._rounded, self._noise)
        noisy = adapted(inputs[2])
        _set_weight(layer, self._output.chosen_rows(name, indices))
        return [base, expected, noisy, layer(inputs[3])]

    def _embed(self, ids_BT: Tensor) -> list[Tensor]:
        ids_U, index_BT = ids_BT.unique(return_inverse=True)
        layer = nn.Embedding(len(ids_U), self._config.hidden_size, device="meta")
        return self._through_rows("transformer.wte.weight", layer, ids_U.tolist(), [index_BT] * 4)

    def _through_block(
        self, i: int, states: list[Tensor], cos: Tensor, sin: Tensor
    ) -> list[Tensor]:
        base_BTD, expected_BTD, noisy_BTD, merged_BTD = states
        block = self._block(i, self._base)
        # In its place in the model, so that adapters and noise find it by name.
        whole, whole.transformer = nn.Module(), nn.Module()
        whole.transformer.h = nn.ModuleDict({str(i): block})
        if self._plan.adapters.members:
            base_BTD = block(base_BTD, cos, sin)
            put_adapters(whole, self._plan.adapters)
        expected_BTD = block(expected_BTD, cos, sin)
        spoil(whole, self._rounded, self._noise)
        noisy_BTD = block(noisy_BTD, cos, sin)
        del block, whole
        gc.collect(
            1
        )  # peft's wrappers refer to each other; what is older need not be looked through
        merged_BTD = self._block(i, self._output)(merged_BTD, cos, sin)
        return [
            base_BTD if self._plan.adapters.members else expected_BTD,
            expected_BTD,
            noisy_BTD,
            merged_BTD,
        ]

    def _block(self, i: int, weights: Weights) -> QWenBlock:
        with torch.device("meta"):
            block = QWenBlock(self._config, i)
        state = {}
        for name, empty in block.state_dict().items():
            buffer = self._buffers.setdefault(name, torch.empty(empty.shape, device="cpu"))
            state[name] = weights.rows(f"transformer.h.{i}.{name}", 0, empty.shape[0], buffer)
        block.load_state_dict(state, assign=True)
        return block.eval()

    def _head(self, states: list[Tensor]) -> Outputs:
        hidden_size, name = self._config.hidden_size, "transformer.ln_f.weight"
        norm = nn.RMSNorm(hidden_size, self._config.layer_norm_epsilon, device="meta")
        states = self._through_rows(name, norm, range(hidden_size), states)
        name = "lm_head.weight"
        vocab_size = self._base.num_rows(name)
        logits = [torch.empty(len(states[0]), vocab_size) for _ in states]
        for first in range(0, vocab_size, _HEAD_ROWS):
            last = min(first + _HEAD_ROWS, vocab_size)
            head = nn.Linear(hidden_size, last - first, bias=False, device="meta")
            for logits_PV, part_PN in zip(
                logits, self._through_rows(name, head, range(first, last), states), strict=True
            ):
                logits_PV[:, first:last] = part_PN
        return Outputs(*logits)


def _set_weight(layer: nn.Module, weight: Tensor) -> None:
    layer.weight = nn.Parameter(weight, requires_grad=False)
