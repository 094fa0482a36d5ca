"""config.json and generation_config.json on the way from Qwen to Qwen2, and back.

Up to `seq_length` tokens both compute the same function. Beyond it Qwen changes its rotary base
(dynamic NTK) and scales its queries (LogN). Qwen2 has neither, so its `max_position_embeddings` is
`seq_length`.

The Qwen2 config.json carries the original settings under the key `qwen`, which engines ignore and
`save_pretrained` keeps. From them the way back restores what Qwen2 has no words for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_ds.disk.read import read_json
from qwen_ds.errors import UserError
from qwen_ds.model.config_check import as_meant, checked_config
from qwen_ds.model.family import QWEN, ModelConfig

Settings = dict[str, Any]  # a JSON object of settings
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
_ORIGINAL = "qwen"
_ONLY_QWEN = ("chat_format", "max_window_size", "stop_words_ids")  # in generation_config.json
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip
# Settings of a Qwen2 that have one value in every Qwen.
_ONLY_CHOICE = {"hidden_act": "silu", "use_sliding_window": False, "tie_word_embeddings": False}
_ROPE = {"rope_type": "default", "partial_rotary_factor": 1.0}


def read_qwen_config(folder: Path) -> ModelConfig:
    """The configuration of a Qwen folder; UserError names a key without equivalent in Qwen2."""
    return _checked(read_json(folder / CONFIG), folder / CONFIG)


def _checked(settings: Settings, path: Path) -> ModelConfig:
    config = checked_config(settings, path, QWEN.config_class)
    if not config.no_bias:
        raise UserError(
            f"{path}: no_bias is False; expected True: in Qwen2 only q_proj, k_proj and v_proj have"
            " a bias"
        )
    return config


def _function_of_qwen(config: ModelConfig) -> Settings:
    """The settings that decide the function that is computed, in Qwen2's terms."""
    sizes = {key: getattr(config, key) for key in _SIZES}
    sizes["intermediate_size"] = config.intermediate_size // 2
    sizes["max_position_embeddings"] = config.seq_length
    return _function(sizes, config.layer_norm_epsilon, config.rotary_emb_base)


def _function(sizes: Settings, eps: float | None, rope_theta: float) -> Settings:
    return {
        **sizes,
        "num_key_value_heads": sizes["num_attention_heads"],
        **_ONLY_CHOICE,
        "rms_norm_eps": eps,
        # Engines of before and after transformers 5 look for the base in different places.
        "rope_theta": rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
    }


def to_qwen2(
    base: Path, generation: Settings, torch_dtype: str, end_of_text: int, end_of_reply: int
) -> Settings:
    """config.json of the Qwen2 that computes the function of the Qwen in `base`.

    It keeps the original settings, of which `generation` is generation_config.json. The ends are
    ids of tokens. UserError if there is no such Qwen2 (see `read_qwen_config`).
    """
    config = read_qwen_config(base)
    original = {
        "config": _settings(base / CONFIG),
        "tokenizer_config": _settings(base / TOKENIZER_CONFIG),
        "generation_config": generation,
    }
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **_function_of_qwen(config),
        "attention_dropout": config.attn_dropout_prob,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_reply,
        "pad_token_id": end_of_text,
        "initializer_range": config.initializer_range,
        "torch_dtype": torch_dtype,
        "use_cache": config.use_cache,
        _ORIGINAL: original,
    }


def from_qwen2(base: Path) -> tuple[Settings, Settings]:
    """config.json and tokenizer_config.json of the Qwen that computes the function of a Qwen2.

    They are the original ones where the folder `base` carries them and still computes what they
    say. For any other Qwen2 they are made anew, without dynamic NTK and LogN: those are not in the
    function of that model. UserError names a key that Qwen has no equivalent for.
    """
    found = as_meant(read_json(base / CONFIG))
    function = _function_of_qwen2(found, base / CONFIG)
    longest = function["max_position_embeddings"]
    tokenizer_config = {"model_max_length": longest, "tokenizer_class": "QWenTokenizer"}
    original = _original(found, "config")
    if original is not None:
        config = _checked(original, base / CONFIG)
        if _function_of_qwen(config) == function:
            return original, _original(found, "tokenizer_config") or tokenizer_config
    made = {
        "architectures": ["QWenLMHeadModel"],
        "model_type": QWEN.model_type,
        **{key: function[key] for key in _SIZES},
        "intermediate_size": 2 * function["intermediate_size"],
        "kv_channels": function["hidden_size"] // function["num_attention_heads"],
        "seq_length": longest,
        "layer_norm_epsilon": function["rms_norm_eps"],
        "rotary_emb_base": function["rope_theta"],
        "rotary_pct": 1.0,
        "use_dynamic_ntk": False,
        "use_logn_attn": False,
        "no_bias": True,
        "scale_attn_weights": True,
        "tie_word_embeddings": False,
        "initializer_range": found.get("initializer_range", 0.02),
        "tokenizer_class": "QWenTokenizer",
    }
    _checked(made, base / CONFIG)
    return made, tokenizer_config


def _original(config: Settings, name: str) -> Settings | None:
    """Qwen's own settings that a Qwen2's config.json carries."""
    record = config.get(_ORIGINAL)
    found = record.get(name) if isinstance(record, dict) else None
    return found if isinstance(found, dict) else None


def _function_of_qwen2(found: Settings, path: Path) -> Settings:
    """The settings of a Qwen2 config.json that decide it, checked against what Qwen can be."""
    for key in _SIZES:
        if type(found.get(key)) is not int or found[key] < 1:
            raise UserError(f"{path}: {key} is {found.get(key)!r}; expected a positive number")
    sizes = {key: found[key] for key in _SIZES}
    heads = sizes["num_attention_heads"]
    ropes = [found.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
    if not all(isinstance(rope, dict) for rope in ropes):
        raise UserError(f"{path}: rope_scaling and rope_parameters are not both objects")
    rope = ropes[0] or ropes[1]  # as transformers has it
    says = {**found, **rope, "rope_type": rope.get("rope_type", rope.get("type", "default"))}
    expected = {"num_key_value_heads": heads, **_ONLY_CHOICE, **_ROPE}
    for key, value in {**expected, "head_dim": sizes["hidden_size"] // heads}.items():
        if says.get(key, value) != value:
            raise UserError(
                f"{path}: {key} is {says[key]!r}; expected {value!r}, the only one that Qwen has"
            )
    theta = {**found, **rope}.get("rope_theta", 10000)
    return _function(sizes, found.get("rms_norm_eps", 1e-6), theta)


def generation_of_qwen(base: Path, merges_adapter: bool) -> Settings:
    """generation_config.json of a Qwen; an adapter, trained in ChatML, makes it a chat model."""
    found = _settings(base / GENERATION_CONFIG)
    in_chatml = merges_adapter and QWEN.chat_format(found) == "raw"
    return {**found, "chat_format": "chatml"} if in_chatml else found


def generation_to_qwen2(generation: Settings, end_of_text: int, end_of_reply: int) -> Settings:
    """Qwen2's generation_config.json: Qwen's without the keys that only Qwen's own code knows."""
    eos = end_of_text if end_of_reply == end_of_text else [end_of_reply, end_of_text]
    return {**_without(generation, _ONLY_QWEN), "eos_token_id": eos, "pad_token_id": end_of_text}


def generation_from_qwen2(base: Path, end_of_text: int) -> Settings:
    """Qwen's generation_config.json: one eos, and the format that tells where a reply ends.

    It is the original one where the folder `base` carries it and still says the same.
    """
    found, config = _settings(base / GENERATION_CONFIG), read_json(base / CONFIG)
    original = _original(config, "generation_config")
    ends = found.get("eos_token_id", config.get("eos_token_id"))
    if ends is None:  # it does not say: the original format holds
        chat_format = QWEN.chat_format(original or {})
    else:  # a reply that ends elsewhere than a document has an end of its own
        in_chatml = any(end != end_of_text for end in (ends if isinstance(ends, list) else [ends]))
        chat_format = "chatml" if in_chatml else "raw"
    ids, kept = ("eos_token_id", "pad_token_id"), {}
    if original is not None:
        same = _without(original, (*_ONLY_QWEN, *ids)) == _without(found, ids)
        if same and QWEN.chat_format(original) == chat_format:
            return original
        kept = {key: original[key] for key in _ONLY_QWEN if key in original}
    return {**kept, **found, "chat_format": chat_format, **dict.fromkeys(ids, end_of_text)}


def _without(settings: Settings, keys: Sequence[str]) -> Settings:
    return {key: value for key, value in settings.items() if key not in keys}


def _settings(path: Path) -> Settings:
    """A file of settings, without its reference to code, which is not carried; {} for no file."""
    return _without(read_json(path), ("auto_map",)) if path.is_file() else {}
