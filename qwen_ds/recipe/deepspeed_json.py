"""The user's DeepSpeed JSON, read and checked: every key, in every section, and every value.

DeepSpeed ignores misspelt keys at the top level, and breaks at others only after minutes of
loading. Here each is one line that names file and key, before anything is loaded.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen_ds.disk.place import name_fault
from qwen_ds.disk.read import read_json as read_object
from qwen_ds.errors import UserError
from qwen_ds.recipe.deepspeed_keys import IDLE, OBJECT, OFF, ONLY, SCHEMA, SILENT, Rule, Schema

Json = dict[str, Any]

_STEPS_PER_PRINT = 10**9  # as a run stores it: never
_NOTES = ("_", "//", "#")  # how a key that is a note begins, ...
_NOTE_WORDS = ("comment", "comments")  # ... or all of it
# Not keys of DeepSpeed's: their values, whatever they are, are read by nobody.
_NOBODY = ("comms_config", "monitor_config")
_OFF = ("none", "auto")  # devices of offloading that ask for none
_PACKAGES = {"wandb": "wandb", "comet": "comet_ml", "tensorboard": "tensorboard"}


def read_deepspeed_json(path: str | None) -> Json:
    """Read a DeepSpeed JSON; None gives the built-in ZeRO-2.

    Notes (keys such as "_why", "//" and "comment"), null values and sections that are "auto" are
    left out, and of a section that is switched off all but that. UserError: no such file, no JSON
    object, a key that DeepSpeed does not have, a value that it would not take or that has no
    meaning here.
    """
    if path is None:
        zero = {"stage": 2, "overlap_comm": "auto", "contiguous_gradients": True}
        return {"zero_optimization": zero | {"reduce_bucket_size": "auto"}}
    file = Path(path)
    if not file.exists():
        # So that ds_configs/zero2.json is found wherever the command is run from.
        file = Path(__file__).parents[2] / path
    if not file.is_file():
        example = "expected a DeepSpeed JSON such as ds_configs/zero2.json"
        came = "not a regular file" if file.exists() else "no such file"
        raise UserError(f"deepspeed: {came}: {path}; {example}")
    config = _without_unset(read_object(file), SCHEMA)
    try:
        _check_section(config, SCHEMA, "")
        config = {key: _without_rest_if_off(key, value) for key, value in config.items()}
        _check_uses(config)
        _check_monitors(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config


def split_idle(config: Json) -> tuple[Json, list[str]]:
    """The JSON without what does nothing here, and of that, in words, what asks for something."""
    rest, words = _without_idle(config, "")
    zero = rest.get("zero_optimization", {})
    if zero.get("stage", 0) < 3 and zero.pop("offload_param", {}).get("device", "none") not in _OFF:
        words.append("zero_optimization.offload_param (only stage 3 spreads the parameters)")
    return rest, words


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
    return value is True or value not in (
        None,
        False,
        0,
        1,
        "auto",
        "",
        _STEPS_PER_PRINT,
        math.inf,
        [],
    )


def _without_unset(config: Json, schema: Schema) -> Json:
    """The section without notes and what means unset, and with whole numbers for such as 32.0."""
    kept: Json = {}
    for key, value in config.items():
        rule = schema.get(key)
        is_section = rule is OBJECT or isinstance(rule, Mapping)
        if key.startswith(_NOTES) or key in _NOTE_WORDS or value is None:
            continue
        if value == "auto" and (is_section or key == "stage"):
            continue
        if isinstance(value, dict):
            value = _without_unset(value, rule if isinstance(rule, Mapping) else {})
            if not value and key in ("optimizer", "scheduler"):
                continue
        elif isinstance(value, float) and isinstance(rule, Rule) and rule.whole:
            value = int(value) if rule.holds(value) else value
        kept[key] = value
    return kept


def _without_rest_if_off(name: str, section: Any) -> Any:
    """The section, of which nothing else counts where it says that it is off."""
    # Those in OFF may have switches of their own further in.
    if name not in OFF and isinstance(section, dict) and section.get("enabled") is False:
        return {"enabled": False}
    return section


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
        else:
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
    offload = zero.get("offload_optimizer", {})
    device, ratio = offload.get("device", "none"), offload.get("ratio", 1)
    if stage < 1 and device not in _OFF:
        raise UserError(
            f"zero_optimization.offload_optimizer.device is {device!r} at stage {stage}; expected "
            "stage 1 or more, or 'none'"
        )
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
        if section.get("enabled") is not True:
            continue
        package = _PACKAGES.get(name)
        if package and importlib.util.find_spec(package) is None:
            raise UserError(
                f"{name}.enabled is True and the package {package} is not installed; expected "
                f"`pip install {package}`, or false"
            )
        if name in ("tensorboard", "csv_monitor"):
            place = Path(section.get("output_path", ""), section.get("job_name", ""))
            if not _can_be_written(place):
                raise UserError(
                    f"{name}.output_path is {_short(section.get('output_path', ''))}; expected, "
                    "with job_name below it, a folder that can be written to"
                )


def _can_be_written(folder: Path) -> bool:
    """Whether the folder, or the nearest above it that exists, takes files."""
    if name_fault(str(folder)):
        return False
    for each in (folder, *folder.absolute().parents):
        try:
            os.stat(each)
        except FileNotFoundError:
            continue
        except OSError:  # a file above it, a loop of links
            return False
        return each.is_dir() and os.access(each, os.W_OK | os.X_OK)
    return False


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
