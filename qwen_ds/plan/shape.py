"""The sizes of a model that decide its memory and time, and the shapes of its parameters.

Symbols: D hidden, I width of the MLP's inner matrices, V vocabulary rows, L blocks, r LoRA rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qwen_ds.model.family import Family, ModelConfig, Role, family_of

# Linear maps that read the same x stand together, in running order.
ROLES_BY_INPUT: tuple[tuple[Role, ...], ...] = (
    ("qkv",), ("attention_out",), ("up", "gate"), ("down",)
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A linear map of a block: its name below the block, its role there, and its widths."""

    name: str
    role: Role
    width_in: int
    width_out: int

    @property
    def size(self) -> int:
        return self.width_in * self.width_out


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a model."""

    family: Family
    vocab: int
    hidden: int
    layers: int
    heads: int
    linears: tuple[LinearShape, ...]  # those of one block, in running order
    context: int  # tokens of the longest row that can be trained: the config's seq_length

    @classmethod
    def of(cls, config: ModelConfig) -> Shape:
        assert config.seq_length is not None
        family = family_of(config)
        linears = tuple(
            LinearShape(each.name, each.role, each.width_in(config), each.width_out(config))
            for each in family.linears
        )
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        sizes = config.vocab_size, config.hidden_size, layers, heads
        return cls(family, *sizes, linears, config.seq_length)

    def of_role(self, *roles: Role) -> tuple[LinearShape, ...]:
        """The linear maps of a block in any of these roles."""
        return tuple(linear for linear in self.linears if linear.role in roles)

    @property
    def inner(self) -> int:
        return self.of_role("down")[0].width_in

    @property
    def block(self) -> int:
        """Parameters of the linear maps in a block: 4 D^2 + 3 D I."""
        return sum(linear.size for linear in self.linears)

    @property
    def block_matrices(self) -> int:
        """Parameters of the linear maps in all blocks."""
        return self.layers * self.block

    @property
    def small_parameters(self) -> int:
        """Norm weights and the biases of q, k and v: L (2 D + 3 D) + D."""
        biases = sum(linear.width_out for linear in self.of_role("qkv"))
        return self.layers * (2 * self.hidden + biases) + self.hidden

    @property
    def head(self) -> int:
        """Parameters of the head, V D; the embedding has as many."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters in all: 7,721,324,544 in Qwen-7B."""
        return self.block_matrices + self.small_parameters + 2 * self.head

    def lora_parameters(self, r: int, targets: Iterable[str]) -> int:
        """Sum over the targets of L r (in + out): 10,158,080 for r 8 on c_attn and c_proj of
        Qwen-7B."""
        return self.layers * r * sum(self.lora_widths(targets))

    def lora_widths(self, targets: Iterable[str]) -> list[int]:
        """Widths in and out of the linear maps of a block that lora.targets name."""
        names = {linear.name for linear in self.family.matched(list(targets))}
        matched = (linear for linear in self.linears if linear.name in names)
        return [width for linear in matched for width in (linear.width_in, linear.width_out)]

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor that an adapter can change (matrices and the last norm), by
        parameter name."""
        family, ends = self.family, (self.vocab, self.hidden)
        shapes: dict[str, tuple[int, ...]] = {
            f"{family.blocks}.{i}.{linear.name}": (linear.width_out, linear.width_in)
            for i in range(self.layers)
            for linear in self.linears
        }
        shapes |= {family.embedding: ends, family.head: ends, family.final_norm: (self.hidden,)}
        return {f"{name}.weight": shape for name, shape in shapes.items()}
