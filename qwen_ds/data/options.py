"""Options of `python -m qwen_ds.data`: the command lines are made from these classes."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_ds.recipe.options import DataOptions
from qwen_ds.recipe.ranges import NonNegativeInt, PathText


@dataclass(frozen=True)
class ModelChoice:
    """Whose vocabulary encodes the rows."""

    path: PathText
    """Folder or hub id of a Qwen checkpoint."""


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """Options of both commands."""

    model: ModelChoice
    data: DataOptions


@dataclass(frozen=True, kw_only=True)
class EncodeCommand(RowOptions):
    """Options of encode."""

    output: PathText | None = None
    """File for the rows. Unset: standard output."""
    overwrite: bool = False
    """Let --output replace a file."""


@dataclass(frozen=True, kw_only=True)
class InspectCommand(RowOptions):
    """Options of inspect."""

    rows: NonNegativeInt = 3
    """How many rows to show."""
    at: str | None = None
    """Show the rows of this file:line instead."""
