"""config.json and generation_config.json, checked before anything is sized or loaded by them.

Types and ranges are ours: transformers takes any number, sets an attribute for any key, and some
keys make it read other files, load code or wrap the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, PreTrainedConfig, Qwen2Config

from qwen_ds.disk.weights import TORCH_DTYPES
from qwen_ds.errors import UserError

Settings = Mapping[str, Any]
Config = TypeVar("Config", bound=PreTrainedConfig)

# Least and greatest value, by the names of September 2023. The greatest are far above every Qwen's
# (80 layers of 8192, 152,064 rows), and small enough that nothing overflows or takes forever.
_WHOLE = {
    "vocab_size": (1, 2**24), "hidden_size": (1, 2**18), "num_hidden_layers": (1, 1024),
    "num_attention_heads": (1, 2**14), "kv_channels": (2, 2**14),
    "intermediate_size": (2, 2**21), "seq_length": (1, 2**24),
    "max_position_embeddings": (1, 2**24), "chunk_size_feed_forward": (0, 2**24),
    "num_labels": (0, 10_000),
}  # fmt: skip
_NUMBERS = {
    "layer_norm_epsilon": (1e-20, 0.1), "rotary_emb_base": (1.0, 1e12),
    "initializer_range": (0.0, 10.0), "emb_dropout_prob": (0.0, 0.99),
    "attn_dropout_prob": (0.0, 0.99), "rotary_pct": (0.0, 1.0),
}  # fmt: skip
_FLAGS = (
    "use_dynamic_ntk", "use_logn_attn", "no_bias", "scale_attn_weights", "use_cache", "bf16",
    "fp16", "fp32", "tie_word_embeddings",
)  # fmt: skip
_OPTIONAL = ("layer_norm_epsilon", "seq_length", "use_dynamic_ntk", "use_logn_attn")
_EVEN = {"intermediate_size": "twice the width of w1 and w2", "kv_channels": "an even number"}
# By each of these transformers reads another file, takes other code, or changes the model that it
# builds or has loaded. Null is as good as absent.
_WAYS_AROUND = (
    "transformers_weights", "configuration_files", "gguf_file", "fusion_config",
    "per_layer_config", "distributed_config", "compression_config", "experts_implementation",
    "kernel_config", "use_kernels", "text_config", "decoder", "generator",
)  # fmt: skip
_NOT_IN_QWEN = ("rope_scaling", "rope_parameters")
# Names of transformers' own. Any other is that of a kernel on the hub: code.
_ATTENTIONS = (
    "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4",
    "flex_attention",
)  # fmt: skip
_ONE_OF: dict[str, tuple[object, ...]] = {
    "dtype": (None, *TORCH_DTYPES), "torch_dtype": (None, *TORCH_DTYPES),
    "attn_implementation": (None, *_ATTENTIONS), "_attn_implementation": (None, *_ATTENTIONS),
    "return_dict": (True,), "output_hidden_states": (None, False),
    "output_attentions": (None, False), "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False), "gradient_checkpointing": (None, False, True),
}  # fmt: skip
# Attributes of the class that a file may set as well.
_HARMLESS = {
    "model_type", "num_labels", "output_attentions", "torch_dtype", "name_or_path",
    "keys_to_ignore_at_inference", "rope_scaling",
}  # fmt: skip
_PRIVATE = {"_name_or_path", "_commit_hash", "_from_model_config", "_attn_implementation_autoset"}
_FORMATS = (None, "chatml", "raw")
MAX_KEYS = 1000  # a Qwen's config.json has 40; transformers takes minutes for 300,000
_EMPTY_IS_ABSENT = ("quantization_config", "visual", "audio", "head_dim")


def as_meant(settings: Settings) -> dict[str, Any]:
    """The settings without those that say nothing here: empty ones, whether training recomputes
    activations, and kernels that compute what ours do. `torch.bfloat16` is bfloat16."""
    found = dict(settings)
    for key in _EMPTY_IS_ABSENT:
        if key in found and found[key] in (None, {}):
            del found[key]
    found.pop("gradient_checkpointing", None)
    for key in ("_attn_implementation", "attn_implementation"):
        if (kernel := found.pop(key, None)) in ("eager", "sdpa"):
            found["attn_implementation"] = kernel
    for key in ("dtype", "torch_dtype"):
        if isinstance(found.get(key), str):
            found[key] = found[key].removeprefix("torch.")
    return found


def refuse_ways_around(settings: Settings, path: Path) -> None:
    """Raise UserError for a key by which transformers would load another model than ours, for one
    of any family."""
    for key in _WAYS_AROUND:
        if settings.get(key) is not None:
            raise UserError(
                f"{path}: {key} is {_shown(settings[key])}; expected no such key: it makes"
                " transformers load something else than what was checked"
            )
    for key, allowed in _ONE_OF.items():
        value = settings.get(key, allowed[0])
        if key.endswith("dtype") and isinstance(value, str):
            value = value.removeprefix("torch.")
        if not any(_same(value, right) for right in allowed):
            words = " or ".join("null" if right is None else str(right) for right in allowed)
            raise UserError(f"{path}: {key} is {_shown(settings[key])}; expected {words}")


def checked_config(settings: Settings, path: Path, config_class: type[Config]) -> Config:
    """The configuration that the object in a config.json describes.

    UserError for a number out of range or of another type, a key that would not be a setting, and
    a model that is not implemented. `path` is named in messages.
    """
    refuse_ways_around(settings, path)
    for key in _NOT_IN_QWEN:
        if settings.get(key) is not None:
            came = f"{key} is {_shown(settings[key])}"
            raise UserError(f"{path}: {came}; expected no such key, which Qwen does not read")
    unread = {*_WAYS_AROUND, *_NOT_IN_QWEN}  # all are null
    settings = {key: value for key, value in as_meant(settings).items() if key not in unread}
    _check_values(dict(_canonical(settings, path, config_class.attribute_map)), path)
    return _made(settings, path, config_class)


def checked_qwen2(settings: Settings, path: Path) -> Qwen2Config:
    """As `checked_config`, of a Qwen2 that is to be converted; the converter checks its numbers."""
    refuse_ways_around(settings, path)
    return _made(as_meant(settings), path, Qwen2Config)


def _made(settings: dict[str, Any], path: Path, config_class: type[Config]) -> Config:
    _check_keys(settings, path, config_class)
    _check_token_ids(settings, path)
    _check_labels(settings, path)
    try:
        config = config_class.from_dict(settings)
        GenerationConfig.from_model_config(config)  # which loading makes of it, too
        return config
    # Ours, the strict dataclass's, and whatever else transformers meets in a wrong value.
    except (StrictDataclassError, ValueError, TypeError, AttributeError, KeyError) as error:
        said = " ".join(str(error).removeprefix("config: ").split())[:300]
        raise UserError(f"{path}: {said}") from None


def _check_keys(settings: Settings, path: Path, config_class: type[PreTrainedConfig]) -> None:
    """transformers sets an attribute for any key: one that is a method's would replace it."""
    if len(settings) > MAX_KEYS:
        raise UserError(f"{path}: {len(settings)} settings; expected at most {MAX_KEYS}")
    taken = set(dir(config_class))
    ours = {field.name for field in fields(config_class)} | config_class.attribute_map.keys()
    for key in settings:
        is_private = key.startswith("_") and key not in _PRIVATE
        if is_private or (key in taken and key not in ours and key not in _HARMLESS):
            raise UserError(
                f"{path}: the key {key[:100]!r} is the name of something in transformers' code;"
                " expected settings"
            )
    made_for = settings.get("architectures") or []
    if type(made_for) is not list or not all(isinstance(name, str) for name in made_for):
        raise UserError(f"{path}: architectures is {_shown(made_for)}; expected a list of names")


def _check_values(values: dict[str, tuple[str, Any]], path: Path) -> None:
    """Check types and ranges; `values` are by name of September 2023 the file's key and value."""
    for kind, ranges in ((int, _WHOLE), (float, _NUMBERS)):
        for name in ranges.keys() & values.keys():
            key, value = values[name]
            if value is None and name in _OPTIONAL:
                continue
            low, high = ranges[name]
            # Not isinstance, for which True is a number.
            right = type(value) is int or type(value) is kind
            if not right or not low <= value <= high:
                what = "a whole number" if kind is int else "a number"
                came = f"{key} is {_shown(value)}"
                raise UserError(f"{path}: {came}; expected {what} from {low:g} to {high:g}")
    for name in _FLAGS:
        key, value = values.get(name, (name, False))
        if type(value) is not bool and not (value is None and name in _OPTIONAL):
            raise UserError(f"{path}: {key} is {_shown(value)}; expected true or false")
    for name, expected in _EVEN.items():
        key, value = values.get(name, (name, 0))
        if value % 2:
            raise UserError(f"{path}: {key} is {value}; expected {expected}")


def _check_token_ids(settings: Settings, path: Path) -> None:
    for key, value in settings.items():
        if key.endswith("_token_id") and value is not None:
            ids = value if isinstance(value, list) else [value]
            if any(type(index) is not int or not 0 <= index < 2**24 for index in ids):
                raise UserError(f"{path}: {key} is {_shown(value)}; expected ids of tokens")


def _check_labels(settings: Settings, path: Path) -> None:
    """Names of a classifier's outputs, which no language model has: only their types count."""
    for key, numbers in (("id2label", 0), ("label2id", 1)):
        value = settings.get(key)
        if value is None:
            continue
        pairs = value.items() if isinstance(value, dict) else [("", "")]
        odd = [pair for pair in pairs if not re.fullmatch(r"\d{1,9}", str(pair[numbers]))]
        if odd:
            came = f"{key} is {_shown(value)}"
            came += f", with {_shown(odd[0][numbers])} for a number" if odd[0] != ("", "") else ""
            raise UserError(f"{path}: {came}; expected an object of numbers and their labels")


def check_generation(settings: Settings, path: Path) -> None:
    """Raise UserError for a generation_config.json with values of the wrong type."""
    chosen = settings.get("chat_format")
    if not any(_same(chosen, known) for known in _FORMATS):
        raise UserError(f"{path}: chat_format is {_shown(chosen)}; expected chatml or raw")
    _check_token_ids(settings, path)
    for key, value in settings.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{path}: {key} is {value}; expected a finite number")


def _canonical(
    settings: Settings, path: Path, other_names: Mapping[str, str]
) -> Iterator[tuple[str, tuple[str, Any]]]:
    """Name of September 2023 -> the file's own key, and its value. UserError where the file gives a
    setting under two names, and two values."""
    found: dict[str, tuple[str, Any]] = {}
    for key, value in settings.items():
        name = other_names.get(key, key)
        if name in found and not _same(value, found[name][1]):
            if name != "vocab_size":
                first = found[name]
                raise UserError(
                    f"{path}: {first[0]} is {_shown(first[1])} and {key} is {_shown(value)};"
                    " expected one of them, since both name the same"
                )
            # The first release had `vocab_size` for the tokenizer, and padded rows beside it.
            if key == "vocab_size":
                continue
        found[name] = key, value
    yield from found.items()


def _same(one: object, other: object) -> bool:
    """Whether two plain values are equal, and of one type."""
    return type(one) is type(other) and not isinstance(one, dict | list) and one == other


def _shown(value: object) -> str:
    """A value as messages show it."""
    if isinstance(value, dict | list):  # however deep they are
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
