"""The sizes of a model that decide its memory and its time, and how many parameters lie where.

Symbols: D hidden, I width of w1 and w2, V vocabulary rows, L blocks, r LoRA rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qwen_ds.model.configuration import QWenConfig

# The linear maps of a block in the order in which they run, by the names that lora.targets gives them.
LINEARS = ("c_attn", "attn.c_proj", "w1", "w2", "mlp.c_proj")
ENDS = ("wte", "lm_head")


@dataclass(frozen=True, slots=True)
class Shape:
    vocab: int
    hidden: int
    layers: int
    heads: int
    inner: int
    """Width of w1 and w2: half of the config's intermediate_size."""
    context: int
    """Tokens of the longest row that is trained: the config's seq_length."""

    @classmethod
    def of(cls, config: QWenConfig) -> Shape:
        assert config.seq_length is not None
        return cls(
            config.vocab_size, config.hidden_size, config.num_hidden_layers, config.num_attention_heads,
            config.intermediate_size // 2, config.seq_length,
        )  # fmt: skip

    def linear(self, name: str) -> tuple[int, int]:
        """Input and output width of one of LINEARS."""
        d, i = self.hidden, self.inner
        widths = {
            "c_attn": (d, 3 * d),
            "attn.c_proj": (d, d),
            "w1": (d, i),
            "w2": (d, i),
            "mlp.c_proj": (i, d),
        }
        return widths[name]

    @property
    def block_matrices(self) -> int:
        """Parameters that multiply matrices in all blocks: L (4 D^2 + 3 D I)."""
        return self.layers * sum(n_in * n_out for n_in, n_out in map(self.linear, LINEARS))

    @property
    def small_parameters(self) -> int:
        """Norm weights and the bias of c_attn: L (2 D + 3 D) + D."""
        return self.layers * 5 * self.hidden + self.hidden

    @property
    def head(self) -> int:
        """Parameters of lm_head, and as many of the embedding: V D."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All of them: 7,721,324,544 in Qwen-7B."""
        return self.block_matrices + self.small_parameters + 2 * self.head

    def lora_parameters(self, r: int, targets: Iterable[str]) -> int:
        """L r (in + out) summed over the targets: 10,158,080 for r 8 on c_attn and c_proj of Qwen-7B."""
        return self.layers * r * sum(sum(self.linear(name)) for name in matched(targets))


def matched(targets: Iterable[str]) -> tuple[str, ...]:
    """Which of LINEARS a recipe's lora.targets name; c_proj is both that end so."""
    wanted = set(targets)
    return tuple(name for name in LINEARS if name in wanted or name.rpartition(".")[2] in wanted)
