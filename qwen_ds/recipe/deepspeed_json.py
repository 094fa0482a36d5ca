"""The user's DeepSpeed JSON, read and checked: every key, in every section, and every value.

DeepSpeed ignores misspelt keys at the top level, and breaks at others only after minutes of
loading. Here each is one line that names file and key, before anything is loaded.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen_ds.disk.read import read_json as read_object
from qwen_ds.errors import UserError
from qwen_ds.recipe.deepspeed_keys import IDLE, OFF, ONLY, SCHEMA, SILENT, Rule, Schema

Json = dict[str, Any]

_STEPS_PER_PRINT = 10**9  # as a run stores it: never
# Not keys of DeepSpeed's: their values, whatever they are, are read by nobody.
_NOBODY = ("comms_config", "monitor_config")
_PACKAGES = {"wandb": "wandb", "comet": "comet_ml", "tensorboard": "tensorboard"}


def read_deepspeed_json(path: str | None) -> Json:
    """Read a DeepSpeed JSON; None gives the built-in ZeRO-2.

    Notes (keys that begin with "_") and null values are left out. UserError: no such file, no JSON
    object, a key that DeepSpeed does not have, a value that it would not take or that has no
    meaning here.
    """
    if path is None:
        zero = {"stage": 2, "overlap_comm": True, "contiguous_gradients": True}
        return {"zero_optimization": zero | {"reduce_bucket_size": "auto"}}
    file = Path(path)
    if not file.exists():
        # So that ds_configs/zero2.json is found wherever the command is run from.
        file = Path(__file__).parents[2] / path
    if not file.is_file():
        example = "expected a DeepSpeed JSON such as ds_configs/zero2.json"
        came = "not a regular file" if file.exists() else "no such file"
        raise UserError(f"deepspeed: {came}: {path}; {example}")
    config = _without_notes(read_object(file))
    try:
        _check_section(config, SCHEMA, "")
        _check_uses(config)
        _check_monitors(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config


def split_idle(config: Json) -> tuple[Json, list[str]]:
    """The JSON without what does nothing here, and of that, in words, what asks for something."""
    return _without_idle(config, "")


def _without_idle(config: Json, prefix: str) -> tuple[Json, list[str]]:
    rest: Json = {}
    words: list[str] = []
    for key, value in config.items():
        name = prefix + key
        if name in OFF or name in SILENT or (name in IDLE and not _asks(name, value)):
            continue
        if name in IDLE:
            words.append(f"{name} ({IDLE[name]})")
        elif isinstance(value, dict):
            rest[key], inner = _without_idle(value, f"{name}.")
            words += inner
        else:
            rest[key] = value
    return rest, words


def _asks(name: str, value: Any) -> bool:
    """Whether the value of an idle key asks for anything."""
    if isinstance(value, dict) and "enabled" in value:
        return value["enabled"] is True
    if isinstance(value, dict) and name not in _NOBODY:
        return any(_asks(f"{name}.{key}", inner) for key, inner in value.items())
    return value is True or value not in (None, False, 0, 1, "auto", "", _STEPS_PER_PRINT, [])


def _without_notes(value: Any) -> Any:
    """The value without keys that begin with "_", and without nulls, which mean unset."""
    if not isinstance(value, dict):
        return value
    kept = {key: inner for key, inner in value.items() if not key.startswith("_")}
    return {key: _without_notes(inner) for key, inner in kept.items() if inner is not None}


def _check_section(config: Mapping[str, Any], schema: Schema, prefix: str) -> None:
    """Check the names and the types of a section's keys, and of those in it."""
    for key, value in config.items():
        name = prefix + key
        if key not in schema:
            raise UserError(_unknown(key, schema, prefix))
        rule = schema[key]
        if isinstance(rule, Rule):
            if value != "auto" and not rule.holds(value):
                raise UserError(f"{name} is {_short(value)}; expected {rule.words}")
        elif isinstance(value, dict):
            _check_section(value, rule, f"{name}.")
        elif value != "auto":
            raise UserError(f"{name} is {_short(value)}; expected an object")


def _unknown(key: str, schema: Schema, prefix: str) -> str:
    near = difflib.get_close_matches(key, list(schema), n=1)
    advice = f"; the nearest is '{near[0]}'" if near else ""
    if not prefix:
        return f"DeepSpeed has no top-level key '{_cut(key)}'{advice}"
    return f"{prefix[:-1]} has no key '{_cut(key)}'{advice}"


def _check_uses(config: Json) -> None:
    """Refuse what DeepSpeed would take and what cannot be honoured."""
    for name, value in _leaves(config, ""):
        if name in ONLY and value != "auto" and value not in ONLY[name][0]:
            raise UserError(f"{name} is {_short(value)}; {ONLY[name][1]}")
    for name, (why, on_by_itself) in OFF.items():
        if _is_on(config.get(name, False), on_by_itself):
            raise UserError(f"{name} is on; expected it to be off or left out: {why}")
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    for key, least in (("offload_optimizer", 1), ("offload_param", 3)):
        device = (zero.get(key) or {}).get("device", "none")
        if stage != "auto" and stage < least and device not in ("none", "auto"):
            raise UserError(
                f"zero_optimization.{key}.device is {device!r} at stage {stage}; expected stage "
                f"{least}{' or more' if least < 3 else ''}, or 'none'"
            )
    ratio = (zero.get("offload_optimizer") or {}).get("ratio", 1)
    if ratio != "auto" and ratio < 1 and stage != 3:
        key = "zero_optimization.offload_optimizer.ratio"
        raise UserError(f"{key} is {ratio} at stage {stage}; expected 1, or stage 3")
    factor = config.get("gradient_predivide_factor", 1)
    if stage != 0 and factor not in (1, "auto"):
        raise UserError(f"gradient_predivide_factor is {factor} under ZeRO; expected 1")
    if stage != 0 and config.get("prescale_gradients") is True:
        raise UserError("prescale_gradients is True under ZeRO; expected false")


def _check_monitors(config: Json) -> None:
    """Check that a monitor has its package, and a place to write to."""
    for name in (*_PACKAGES, "csv_monitor"):
        section = config.get(name, {})
        if section == "auto" or section.get("enabled") is not True:
            continue
        package = _PACKAGES.get(name)
        if package and importlib.util.find_spec(package) is None:
            raise UserError(
                f"{name}.enabled is True and the package {package} is not installed; expected "
                f"`pip install {package}`, or false"
            )
        if name in ("tensorboard", "csv_monitor"):
            place = Path(section.get("output_path", ""), section.get("job_name", ""))
            there = next(each for each in (place, *place.absolute().parents) if each.exists())
            if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
                raise UserError(
                    f"{name}.output_path is {_short(section.get('output_path', ''))} and {there} "
                    "cannot be written to; expected a folder that can be"
                )


def _is_on(section: Any, by_itself: bool) -> bool:
    if isinstance(section, dict):
        # random_ltd counts on its own, whatever the sections around it say.
        inner = any(_is_on(each, False) for each in section.values() if isinstance(each, dict))
        return inner or section.get("enabled", by_itself and bool(section)) is True
    return section is True


def _leaves(config: Json, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        yield prefix + key, value
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")


def _short(value: Any) -> str:
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
