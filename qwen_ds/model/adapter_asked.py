"""The parts of a base that an adapter's configuration asks for, as PEFT's own loading reads it.

PEFT injects what the configuration names and then takes from the file what it finds: a target that
the file lacks keeps random values, a tensor that nothing asked for is dropped, both in silence. So
the two are compared here, once, by everything that merges, proves, serves or continues an adapter.
test_whatever_peft_makes_is_what_its_configuration_asks_for holds this to peft's own decisions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_ds.disk.adapter_options import unknown_options
from qwen_ds.errors import UserError
from qwen_ds.model.adapter_patterns import Patterns
from qwen_ds.model.family import QWEN

NO_TARGETS = "dummy-target-modules"  # peft's word for an adapter of saved modules or rows alone
_ALL_LINEAR = "all-linear"
_FIRST_NUMBER = re.compile(r".*?\.[^.]*\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Asked:
    """The parts of a base that a configuration names, in the base's order."""

    targets: tuple[str, ...]  # modules with LoRA
    saved: dict[str, str]  # parameter that the adapter has its own of -> the option that says so
    token_rows: dict[str, tuple[int, ...]]  # by module
    notes: tuple[str, ...]  # what the configuration says and nothing follows from, a line each


def asked(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Asked:
    """Apply a checked configuration to the base's parameters (name -> shape).

    UserError: it names what can't have LoRA or rows, one module in two ways, or nothing at all.
    """
    base, patterns = _Base(shapes), Patterns(folder)

    def bad(reason: str, expected: str) -> UserError:
        return UserError(f"{folder}: adapter_config.json: {reason}; expected {expected}")

    saved = _saved_modules(config, base)
    targets = tuple(module for module in base.modules if _is_target(config, module, base, patterns))
    for module in targets:
        if module not in base.linears:
            what = "the embedding" if module == QWEN.embedding else "no linear layer"
            raise bad(
                f"target_modules names {module}, {what}",
                "linear layers (modules_to_save or trainable_token_indices for an embedding)",
            )
        if both := [name for name in saved if name.startswith(f"{module}.")]:
            raise bad(
                f"target_modules and modules_to_save both name {both[0].rpartition('.')[0]}",
                "one of them",
            )
    if not targets and config["target_modules"] != NO_TARGETS:
        came = f"target_modules {str(config['target_modules'])[:80]!r} names no module of this base"
        example = QWEN.example.rpartition(".")[2]
        raise bad(came, f"names such as {example} (another kind of model?)")
    biases = {"all": base.biases, "lora_only": [f"{module}.bias" for module in targets]}
    for name in biases.get(str(config.get("bias")), ()):
        if name in shapes:
            saved.setdefault(name, "bias")
    token_rows = _token_rows(config, base, bad)
    if twice := [m for m in token_rows if f"{m}.weight" in saved or m in targets]:
        raise bad(
            f"trainable_token_indices names {twice[0]}, which is trained in another way, too",
            "one of LoRA, token rows, saved module",
        )
    ordered = {name: saved[name] for name in shapes if name in saved}
    notes = _notes(config, base, targets, patterns)
    return Asked(targets, ordered, token_rows, notes)


class _Base:
    """The names of a base, out of those of its parameters."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        parts = [name.split(".") for name in shapes]
        paths = (".".join(part[:i]) for part in parts for i in range(1, len(part)))
        self.modules = tuple(dict.fromkeys(paths))  # with those that hold only other modules
        self.biases = [name for name in shapes if name.endswith(".bias")]
        self.linears = {
            name.removesuffix(".weight")
            for name, shape in shapes.items()
            if name.endswith(".weight") and len(shape) == 2
        } - {QWEN.embedding}
        self.parameters = tuple(shapes)

    def below(self, module: str) -> list[str]:
        """The parameters in a module and in those below it."""
        return [name for name in self.parameters if name.startswith(f"{module}.")]


def _is_target(config: Mapping[str, Any], module: str, base: _Base, patterns: Patterns) -> bool:
    """peft's check_target_module_exists, without what can't be in a checked configuration."""
    excluded, targets = config.get("exclude_modules"), config["target_modules"]
    if excluded and _is_named(excluded, module, patterns):
        return False
    # A module that is saved whole has no LoRA, nor has any below it. Here names count by their
    # parts, below (in `_saved_modules`) by their letters: so peft does it.
    if any(f".{name}." in f".{module}." for name in config.get("modules_to_save") or ()):
        return False
    if targets == NO_TARGETS:
        return False
    if isinstance(targets, str) and targets.lower() == _ALL_LINEAR:
        return module in base.linears and module != QWEN.head
    if not _is_named(targets, module, patterns):
        return False
    # A module that is listed by its full name is meant, whatever its layer.
    if isinstance(targets, str) or module in targets:
        return True
    return _is_in_layers(config, module)


def _is_named(names: str | list[str], module: str, patterns: Patterns) -> bool:
    if isinstance(names, str):
        return patterns.whole(names, module)
    return module in names or any(module.endswith(f".{name}") for name in names)


def _is_in_layers(config: Mapping[str, Any], module: str) -> bool:
    wanted, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    layers = wanted if isinstance(wanted, list) else [] if wanted is None else [wanted]
    if wanted is None or wanted == []:
        return True
    names = [pattern] if isinstance(pattern, str) and pattern else pattern or []
    found = None if names else _FIRST_NUMBER.match(module)
    for name in names:
        if found := re.match(rf"(?:^|.*?\.){re.escape(name)}\.(\d+)\.", module):
            break
    return found is not None and int(found[1]) in layers


def _saved_modules(config: Mapping[str, Any], base: _Base) -> dict[str, str]:
    """The parameters that modules_to_save names by the last letters of a module's name."""
    ends = tuple(config.get("modules_to_save") or ())
    found = [module for module in base.modules if ends and module.endswith(ends)]
    return {name: "modules_to_save" for module in found for name in base.below(module)}


def _token_rows(config: Mapping[str, Any], base: _Base, bad: Any) -> dict[str, tuple[int, ...]]:
    rows, found = config.get("trainable_token_indices"), dict[str, tuple[int, ...]]()
    for name, indices in (rows if isinstance(rows, dict) else {QWEN.embedding: rows or []}).items():
        if rows is None:
            break
        modules = [module for module in base.modules if module.endswith(name)]
        expected = f"{QWEN.embedding} or {QWEN.head}"
        if not modules:
            raise bad(f"trainable_token_indices names {name!r}, no module of this base", expected)
        for module in modules:
            if module not in (QWEN.embedding, QWEN.head):
                raise bad(f"trainable_token_indices names {module}", expected)
            if module in found:
                raise bad(f"trainable_token_indices names {module} twice", "one list for each")
            found[module] = tuple(indices)
    return {module: indices for module, indices in found.items() if indices}


def token_rows_of(config: Mapping[str, Any], module: str) -> list[int] | None:
    """The rows that a configuration lists for a module; None if it lists none."""
    rows = config.get("trainable_token_indices")
    if isinstance(rows, dict):
        return next((listed for name, listed in rows.items() if module.endswith(name)), None)
    # peft's short form, a bare list, means the input embedding.
    return rows if module == QWEN.embedding else None


def _notes(
    config: Mapping[str, Any], base: _Base, targets: tuple[str, ...], patterns: Patterns
) -> tuple[str, ...]:
    """A line for all that is asked for and matches nothing: peft goes on, and so do we."""
    unread = unknown_options(config)
    notes = [f"not read, since this PEFT does not know it: {_first(unread)}"] if unread else []
    saved = config.get("modules_to_save") or ()
    if absent := [n for n in saved if not any(module.endswith(n) for module in base.modules)]:
        notes.append(f"modules_to_save names {_first(absent)}, which this base does not have")
    for option in ("rank_pattern", "alpha_pattern"):
        keys = config.get(option) or {}
        vain = [key for key in keys if not any(patterns.names(key, m) for m in targets)]
        if vain:
            notes.append(f"{option} names no module with LoRA by {_first(vain)}")
    return tuple(notes)


def _first(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    return names[0][:100] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
