"""Structures of answers: where a schema comes from, and how one that is none is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_ds.errors import UserError
from qwen_ds.model.folder import find_model
from serve.structure import Structure, read_schema


def test_a_schema_is_a_text_or_a_file(tmp_path: Path) -> None:
    schema, file = {"type": "object", "title": "键"}, tmp_path / "schema.json"
    file.write_text(json.dumps(schema, ensure_ascii=False), encoding="utf-8")
    assert read_schema(f"  {json.dumps(schema)}") == read_schema(str(file)) == schema
    for text, message in (("[1]", r"schema.json: \[1\]; expected"), ("{", "schema.json: not JSON")):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_schema(str(file))


@pytest.mark.parametrize(
    "structure",
    [
        Structure("json_object", True),
        Structure("json_schema", {"type": "array"}),
        Structure("regex", "[0-9]+"),
        Structure("choice", ["a", "b"]),
    ],
)
def test_each_kind_is_compiled_for_a_models_vocabulary(
    structure: Structure, small_dir: Path
) -> None:
    grammar = structure.grammar(find_model(str(small_dir)))
    first = {"json_object": b"{", "json_schema": b"[", "regex": b"7", "choice": b"b"}
    tokens = [find_model(str(small_dir)).encoding.token_bytes(i) for i in range(256)]
    grammar.accept(tokens.index(first[structure.kind]))
    assert grammar.error is None
    other = structure.grammar(find_model(str(small_dir)))
    other.accept(tokens.index(b"X"))
    assert other.error is not None


def test_one_that_cannot_be_held_to_is_told_by_its_option(small_dir: Path) -> None:
    with pytest.raises(UserError, match="^--regex is refused: ") as error:
        Structure("regex", "(").grammar(find_model(str(small_dir)))
    assert "\n" not in str(error.value)


def test_users_of_servers_hear_what_only_some_servers_have() -> None:
    assert Structure("json_object", True).note is None
    assert "structured_outputs, which vLLM has" in str(Structure("choice", ["a"]).note)
