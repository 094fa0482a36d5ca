"""The sides of an evaluation: one model, or several whose answers to the same rows are compared."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qwen_ds.disk.adapter_folder import CONFIG_NAME
from qwen_ds.disk.place import MAX_PART_BYTES, given_path
from qwen_ds.errors import UserError
from serve.options import EvaluateOptions

# Names of a comparison's own; and what would be another place than a folder of this name.
_TAKEN = ("", ".", "..", "comparison.json")


@dataclass(frozen=True, slots=True)
class Side:
    """One side: a model, an adapter on it, or answers that are there already."""

    name: str
    options: EvaluateOptions
    """The options of an evaluation of this side alone: of its model, adapter and endpoint."""
    folder: Path  # gets its files
    given: Path | None = None  # answers to score instead of generating

    @property
    def predictions(self) -> Path:
        """The file of its answers."""
        return self.given or self.folder / "predictions.jsonl"


def is_comparison(options: EvaluateOptions) -> bool:
    """Whether the sides get folders of their own, and comparison.json tells of them."""
    return bool(options.compare) or len(options.predictions) > 1


def sides_of(options: EvaluateOptions) -> list[Side]:
    """The sides of an evaluation, the one first that the others are compared with.

    UserError: two of one name, a name that no folder can have, or options that exclude each other.
    """
    if options.predictions and (options.compare or options.endpoint or options.adapter):
        other = "compare" if options.compare else "endpoint" if options.endpoint else "adapter"
        raise UserError(f"--predictions and --{other} are given; expected one of them")
    if options.predictions:
        return _of_files(options)
    if not options.compare:
        if (options.model is None and options.endpoint is None) or not _has_rows(options):
            raise UserError(
                "no model or no data given; expected --model (or --endpoint, or --compare) and "
                "--data (or --general), or --predictions"
            )
        return [Side(_own_name(options), options, Path(options.output_dir))]
    if not _has_rows(options):
        raise UserError(
            "no data given; expected --data (or --general) with the rows to compare the models on"
        )
    return _of_models(options)


def _has_rows(options: EvaluateOptions) -> bool:
    return bool(options.data or options.general)


def _of_files(options: EvaluateOptions) -> list[Side]:
    named = _named("--predictions", options.predictions, lambda file: Path(file).stem)
    above = Path(options.output_dir)
    return [
        Side(
            name, replace(options, predictions=[file]),
            above / name if is_comparison(options) else above, Path(file),
        )
        for name, file in named
    ]  # fmt: skip


def _of_models(options: EvaluateOptions) -> list[Side]:
    if options.adapter:
        raise UserError(
            "--compare and --adapter are given; expected the adapters among the places of --compare"
        )
    if options.endpoint is not None:
        named = _named("--compare", options.compare, _last_part, are_paths=False)
        sides = [replace(options, compare=[], endpoint_model=place) for _, place in named]
    else:
        named = _named("--compare", options.compare, _last_part)
        sides = [_of_place(options, place) for _, place in named]
        if options.model is not None and not any(side.adapter for side in sides):
            raise UserError(
                "--model is given, and no place of --compare is an adapter for it; expected the "
                "model among the places"
            )
    above = Path(options.output_dir)
    return [Side(name, side, above / name) for (name, _), side in zip(named, sides, strict=True)]


def _of_place(options: EvaluateOptions, place: str) -> EvaluateOptions:
    """A folder with a config.json is a model, any other an adapter or holds one."""
    folder = Path(place)
    is_model = (folder / "config.json").exists() and not (folder / CONFIG_NAME).exists()
    if is_model or not folder.is_dir():
        return replace(options, compare=[], model=place)
    if options.model is None:
        raise UserError(
            f"--compare {place}: no model's folder; expected one, or --model to put an adapter on"
        )
    return replace(options, compare=[], adapter=[place])


def _own_name(options: EvaluateOptions) -> str:
    """A single side's name: the model's, and those of the adapters on it."""
    model = _last_part(options.model or options.endpoint_model or "") or "model"
    return " + ".join([model, *map(_last_part, options.adapter)])


def _last_part(place: str) -> str:
    return place.rstrip("/").rpartition("/")[2]


def _named(
    option: str, values: Sequence[str], name_of: Callable[[str], str], are_paths: bool = True
) -> list[tuple[str, str]]:
    """(name, place) of each value NAME=PLACE or PLACE. A value that exists whole is a place."""
    found: dict[str, str] = {}
    for value in values:
        name, equals, place = value.partition("=")
        if not equals or (are_paths and os.path.lexists(value)):
            name, place = name_of(value), value
        elif are_paths:
            place = given_path(option.removeprefix("--"), place)
        if _is_no_name(name) or not place:
            raise UserError(
                f"{option} {value}: {name!r} is no name for a folder; expected NAME=PLACE"
            )
        if name in found:
            came = f"{option}: two are named {name}, {found[name]} and {place}"
            raise UserError(f"{came}; expected NAME=PLACE with a name of its own for each")
        found[name] = place
    return list(found.items())


def _is_no_name(name: str) -> bool:
    odd = "/" in name or ":" in name or not name.isprintable() or name.startswith(".")
    return odd or name in _TAKEN or len(os.fsencode(name)) > MAX_PART_BYTES
