"""One family of Qwen in one object: classes, module names, tokenizer, chat format, context rule.

Everything outside qwen_ds/model reads these here, so that a second family is a second object.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from qwen_ds.decode.kv import KVShape
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.modeling import QWenBlock, QWenLMHeadModel
from qwen_ds.model.packing import alpha_of_prompt, kv_shape
from qwen_ds.model.tokenizer import END_OF_TEXT, IM_END, IM_START, Encoding, load_encoding

Role = Literal["qkv", "attention_out", "up", "gate", "down"]
# The types of a configuration and a model of any family; a second family makes them unions.
ModelConfig = QWenConfig
LanguageModel = QWenLMHeadModel


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear map of a block. Its widths are functions of the configuration."""

    name: str  # below the block, as in lora.targets: attn.c_proj
    role: Role
    width_in: Callable[[ModelConfig], int]
    width_out: Callable[[ModelConfig], int]

    @property
    def last_name(self) -> str:
        """Name without its parent's, which several linear maps may share: c_proj."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class Family:
    """One family of models."""

    model_type: str  # as in config.json
    config_class: type[ModelConfig]
    model_class: type[LanguageModel]  # with its head
    block_class: type[nn.Module]
    linears: tuple[Linear, ...]  # those of one block, in running order
    blocks: str  # path of the blocks in the model
    embedding: str
    head: str
    block_norms: tuple[str, ...]  # names below the block
    final_norm: str
    stop_tokens: tuple[str, ...]  # each of them ends a generated turn
    load_encoding: Callable[[str | Path], Encoding]  # the tokenizer of a checkpoint folder
    context: Callable[[ModelConfig], int]  # tokens that prompt and answer may have together
    kv_shape: Callable[[ModelConfig, torch.dtype, torch.device], KVShape]
    """Keys and values that a token adds, of a model that computes in a dtype on a device."""
    alpha: Callable[[ModelConfig, int], int]  # of dynamic NTK, for a prompt of so many tokens

    @property
    def roots(self) -> tuple[str, ...]:
        """First parts of the model's parameter names."""
        paths = (self.blocks, self.embedding, self.final_norm, self.head)
        return tuple(dict.fromkeys(path.partition(".")[0] for path in paths))

    @property
    def example(self) -> str:
        """The name of one module, as an example in messages."""
        return f"{self.blocks}.0.{self.linears[0].name}"

    def without_wrappers(self, name: str) -> str | None:
        """A parameter's name without the prefixes of wrappers (base_model.model., module.,
        _orig_mod. ...); None for a name that is not of this family."""
        roots = "|".join(map(re.escape, self.roots))
        found = re.match(rf"(?:\w+\.)*?((?:{roots})\..*)", name)
        return found[1] if found else None

    def matched(self, targets: tuple[str, ...] | list[str]) -> tuple[Linear, ...]:
        """The linear maps that a recipe's lora.targets name, in running order.

        A target is a full name below the block, or a last name, which means all maps with it.
        """
        names = set(targets)
        return tuple(one for one in self.linears if names & {one.name, one.last_name})

    @property
    def target_names(self) -> tuple[str, ...]:
        """Every word that lora.targets may hold: last names, then the full names."""
        last = tuple(dict.fromkeys(linear.last_name for linear in self.linears))
        full = tuple(linear.name for linear in self.linears if linear.name not in last)
        return (*last, *full)

    @property
    def ends(self) -> tuple[str, str]:
        """Last names of embedding and head: what lora.modules_to_save may hold."""
        return self.embedding.rpartition(".")[2], self.head.rpartition(".")[2]

    def stop_ids(self, encoding: Encoding) -> tuple[int, ...]:
        """Ids of the tokens that end a generated turn."""
        return tuple(encoding.special[token] for token in self.stop_tokens)

    def alpha_of(self, config: ModelConfig) -> Callable[[int], int]:
        """`alpha` of one model."""
        return partial(self.alpha, config)

    def chat_format(self, generation_config: dict[str, object]) -> Literal["chatml", "raw"]:
        """The chat format that generation_config.json names: "raw" in the official base models;
        ChatML where it names none."""
        return "raw" if generation_config.get("chat_format", "chatml") == "raw" else "chatml"


def _context(config: ModelConfig) -> int:
    """Tokens of the context, which exceeds seq_length only with dynamic NTK."""
    trained = config.seq_length or config.max_position_embeddings
    return max(trained, config.max_position_embeddings) if config.use_dynamic_ntk else trained


def _hidden(config: ModelConfig) -> int:
    return config.hidden_size


def _inner(config: ModelConfig) -> int:
    return config.intermediate_size // 2


QWEN = Family(
    model_type=QWenConfig.model_type,
    config_class=QWenConfig,
    model_class=QWenLMHeadModel,
    block_class=QWenBlock,
    linears=(
        Linear("attn.c_attn", "qkv", _hidden, lambda config: 3 * config.hidden_size),
        Linear("attn.c_proj", "attention_out", _hidden, _hidden),
        Linear("mlp.w1", "up", _hidden, _inner),
        Linear("mlp.w2", "gate", _hidden, _inner),
        Linear("mlp.c_proj", "down", _inner, _hidden),
    ),
    blocks="transformer.h",
    embedding="transformer.wte",
    head="lm_head",
    block_norms=("ln_1", "ln_2"),
    final_norm="transformer.ln_f",
    stop_tokens=(END_OF_TEXT, IM_START, IM_END),
    load_encoding=load_encoding,
    context=_context,
    kv_shape=kv_shape,
    alpha=alpha_of_prompt,
)
FAMILIES = {QWEN.model_type: QWEN}


def family_of(config: ModelConfig) -> Family:
    """The family whose model_type a configuration has."""
    return FAMILIES[config.model_type]
