"""The structure that answers are held to: one of JSON, a JSON schema, a choice, an expression."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwen_ds.decode.exceptions import InvalidGrammar
from qwen_ds.decode.grammar import Grammar, GrammarCompiler
from qwen_ds.disk.read import parse_json, read_bytes
from qwen_ds.errors import UserError
from qwen_ds.model.folder import ModelFolder

_SCHEMA_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Structure:
    """One kind of structure and what it was asked by: a schema, an expression, choices, true, or
    the arguments of GrammarCompiler.call."""

    kind: Literal["json_object", "json_schema", "regex", "choice", "call"]
    value: Any
    name: str = ""
    """The field of a request that asks for it, where that has a name of its own."""

    @property
    def note(self) -> str | None:
        """A line for users of servers: OpenAI's own API has nothing for some of these."""
        if self.kind in ("json_object", "json_schema"):
            return None
        return f"--{self.kind} is sent as structured_outputs, which vLLM has; others may ignore it"

    def grammar(self, model: ModelFolder) -> Grammar:
        """Compile it for a model's vocabulary. UserError if no answer can be held to it."""
        encoding = model.encoding
        stop_ids = model.family.stop_ids(encoding)
        compiler = GrammarCompiler(encoding.token_bytes, encoding.n_vocab, stop_ids)
        try:
            return self.compiled(compiler)
        except InvalidGrammar as error:
            raise UserError(f"--{error}") from None

    def compiled(self, compiler: GrammarCompiler) -> Grammar:
        """Compile it. InvalidGrammar if no answer can be held to it."""
        match self.kind:
            case "json_object":
                return compiler.json_object()
            case "json_schema":
                return compiler.json_schema(self.value)
            case "regex":
                return compiler.regex(self.value)
            case "choice":
                return compiler.choice(self.value)
            case "call":
                return compiler.call(**self.value)


def read_schema(given: str) -> dict[str, Any]:
    """The schema in an option: its text, or the name of a file that holds it."""
    is_text = given.lstrip().startswith("{")
    name = "--json_schema" if is_text else given
    raw = (
        given.encode()
        if is_text
        else read_bytes(Path(given).expanduser(), _SCHEMA_BYTES, "a JSON schema")
    )
    try:
        found = parse_json(raw)
    except ValueError as error:
        raise UserError(f"{name}: not JSON ({error}); expected a JSON schema") from None
    if not isinstance(found, dict):
        came = json.dumps(found, ensure_ascii=False)
        raise UserError(f"{name}: {came:.40}; expected a JSON schema, which is an object")
    return found
