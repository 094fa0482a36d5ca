"""Configuration of the original Qwen (`model_type: "qwen"`), in both generations of its keys."""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from qwen_ds.errors import UserError

# What a file leaves out gets the default of its own time.
_AUGUST = dict(layer_norm_epsilon=1e-5, seq_length=2048, use_dynamic_ntk=False, use_logn_attn=False)
_SEPTEMBER = dict(
    layer_norm_epsilon=1e-6, seq_length=8192, use_dynamic_ntk=True, use_logn_attn=True
)


@strict
class QWenConfig(PreTrainedConfig):
    """Shape and behaviour of a Qwen v1 model.

    Attributes carry the names of September 2023 (`hidden_size`, `num_hidden_layers` ...). Files of
    August 2023 (`n_embd`, `n_layer`, `n_head`, `n_positions`, `ffn_hidden_size`,
    `padded_vocab_size` ...) load into the same attributes, with defaults of their own.
    `padded_vocab_size`, where present, is the number of rows of the embedding and replaces
    `vocab_size`.

    Args (those whose meaning the name does not give):
        kv_channels: width of one attention head; times num_attention_heads it is hidden_size.
        intermediate_size: twice the width of `w1` and `w2`, as in the official files.
        seq_length: longest training length S; beyond it dynamic NTK and LogN act, at inference
            only.
        rotary_emb_base: base of the rotary frequencies (10000; 1e6 in the 72B model).
        no_bias: no bias in `attn.c_proj` and the MLP (`attn.c_attn` always has one).
        bf16, fp16, fp32: the official way to ask for a dtype; at most one may be true, and `dtype=`
            wins over them.

    A geometry or an option of no official model is not implemented: UserError.
    """

    model_type: ClassVar[str] = "qwen"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "ffn_hidden_size": "intermediate_size",
        "padded_vocab_size": "vocab_size",
        "embd_pdrop": "emb_dropout_prob",
        "attn_pdrop": "attn_dropout_prob",
        "head_dim": "kv_channels",  # what transformers' static cache asks for
    }

    vocab_size: int = 151936
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    kv_channels: int = 128
    intermediate_size: int = 22016
    layer_norm_epsilon: float | None = None
    seq_length: int | None = None
    max_position_embeddings: int = 8192
    rotary_emb_base: int | float = 10000
    rotary_pct: int | float = 1.0
    use_dynamic_ntk: bool | None = None
    use_logn_attn: bool | None = None
    no_bias: bool = True
    scale_attn_weights: bool = True
    initializer_range: float = 0.02
    emb_dropout_prob: int | float = 0.0
    attn_dropout_prob: int | float = 0.0
    use_cache: bool = True
    bf16: bool = False
    fp16: bool = False
    fp32: bool = False
    tie_word_embeddings: bool = False
    tokenizer_class: str | None = "QWenTokenizer"

    def __post_init__(self, **kwargs: Any) -> None:
        is_august = "n_embd" in kwargs or "n_layer" in kwargs
        # Only our own classes serve this config: a reference to code in the folder must neither be
        # followed nor be written into a saved checkpoint.
        kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)
        for name, default in (_AUGUST if is_august else _SEPTEMBER).items():
            if vars(self)[name] is None:
                setattr(self, name, default)
        if self.kv_channels * self.num_attention_heads != self.hidden_size:
            raise UserError(
                f"config: kv_channels {self.kv_channels} x num_attention_heads "
                f"{self.num_attention_heads} is not hidden_size {self.hidden_size}; expected "
                "equality, as in every official Qwen"
            )
        fixed = {"rotary_pct": 1.0, "scale_attn_weights": True, "tie_word_embeddings": False}
        for name, expected in fixed.items():
            if (found := vars(self)[name]) != expected:
                raise UserError(
                    f"config: {name} is {found}; expected {expected}, as in every official Qwen"
                )
        if self.bf16 + self.fp16 + self.fp32 > 1:
            raise UserError("config: at most one of bf16, fp16, fp32 may be true")
