"""Grammars on the official vocabulary: what may follow, where answers end, what is refused."""

from __future__ import annotations

import json
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator

from qwen_ds.decode.exceptions import DecodingError, InvalidGrammar
from qwen_ds.decode.grammar import Grammar, GrammarCompiler, denied, start_masks
from qwen_ds.decode.sampler import RowSampler, prepare, sample
from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.model.tokenizer import Encoding, load_encoding

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoding(vocab_path: Path) -> Encoding:
    return load_encoding(vocab_path)


@pytest.fixture(scope="module")
def compiler(encoding: Encoding) -> GrammarCompiler:
    stops = (encoding.im_end_id, encoding.eod_id)
    return GrammarCompiler(encoding.token_bytes, encoding.n_vocab, stops)


def allowed(grammar: Grammar) -> set[int]:
    (denied_V,) = denied([grammar], CPU)
    return set((~denied_V).nonzero()[:, 0].tolist())


def spelled(encoding: Encoding, grammar: Grammar) -> set[str]:
    return {encoding.decode([i]) for i in allowed(grammar)}


def accepts(encoding: Encoding, grammar: Grammar, text: str) -> bool:
    """Whether the text, in the model's own tokens, is a whole answer; each must be in its mask."""
    grammar = grammar.copy()
    for token in encoding.ordinary(text):
        if token not in allowed(grammar):
            return False
        grammar.accept(token)
    assert grammar.may_end == (encoding.im_end_id in allowed(grammar))
    return grammar.may_end


def test_a_call_has_a_short_thought_a_known_name_and_arguments_by_its_schema(
    encoding: Encoding, compiler: GrammarCompiler
) -> None:
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    grammar = compiler.call({"look": city, "画图": None}, thought=6)
    for text, is_right in (
        ('想想\nAction: look\nAction Input: {"city": "上海"}', True),
        ('\nAction: look\nAction Input:{"city": "a"}', True),
        ("想想\nAction: 画图\nAction Input: a cat\non a mat", True),
        ('1234567\nAction: look\nAction Input: {"city": "a"}', False),
        ('\nAction: other\nAction Input: {"city": "a"}', False),
        ("\nAction: look\nAction Input: {}", False),
        ('\nAction: look\nAction Input: {"city": 1}', False),
        ('\nAction: look\nAction Input: {"city": "a', False),
        ("\nAction: 画图\nAction Input: ", False),
    ):
        assert accepts(encoding, grammar, text) == is_right, text
    with pytest.raises(InvalidGrammar):
        compiler.call({"f": {"type": "nonsense"}}, thought=6)


def test_a_turn_ends_exactly_where_the_grammar_may(
    encoding: Encoding, compiler: GrammarCompiler
) -> None:
    grammar = compiler.regex("ab?")
    assert spelled(encoding, grammar) == {"a", "ab"}
    assert not grammar.may_end
    grammar.accept(encoding.ordinary("a")[0])
    assert spelled(encoding, grammar) == {"b", "<|im_end|>", "<|endoftext|>"}
    assert grammar.may_end and not grammar.is_over
    grammar.accept(encoding.ordinary("b")[0])
    assert grammar.is_over
    for _ in range(2):  # who ignores the end gets nothing but ends
        assert spelled(encoding, grammar) == {"<|im_end|>", "<|endoftext|>"}
        grammar.accept(encoding.im_end_id)
    assert grammar.error is None


def test_text_may_be_divided_into_any_tokens_but_control_tokens(
    encoding: Encoding, compiler: GrammarCompiler
) -> None:
    """Nothing is forced, and <|extra_0|> in a string is seven characters, never the token."""
    begins = spelled(encoding, compiler.regex("Observation"))
    assert begins == {"O", "Ob", "Obs", "Observ"} | {"Observation"} & set(begins)
    grammar = compiler.json_schema({"type": "string"})
    grammar.accept(encoding.ordinary('"')[0])
    may_follow = allowed(grammar)
    assert len(may_follow) > 100_000 and not may_follow & set(encoding.special.values())
    assert accepts(encoding, compiler.json_schema({"type": "string"}), '"<|im_start|>"')


def test_json_may_have_white_space(encoding: Encoding, compiler: GrammarCompiler) -> None:
    grammar = compiler.json_object()
    for text in ('{"a":1}', '{"名字": [1, 2.5e3, null],\n "b": {"c": "裙\\n"}}', "{ }"):
        assert accepts(encoding, grammar, text), text
    for text in ("[1]", '"a"', "{'a': 1}", '{"a":1', "1", '{"a":1} '):
        assert not accepts(encoding, grammar, text), text
    compact = {"type": "object", "x-guidance": {"whitespace_flexible": False}}
    assert accepts(encoding, compiler.json_schema(compact), '{"a":1}')
    assert not accepts(encoding, compiler.json_schema(compact), '{ "a":1}')


def test_a_choice_is_one_of_its_texts_as_they_stand(
    encoding: Encoding, compiler: GrammarCompiler
) -> None:
    choices = ["yes", 'no / "don\'t"', "裙子\n", "a|b", ""]
    for text in choices:
        assert accepts(encoding, compiler.choice(choices), text)
    for text in ("ye", "a", "b", "裙子", "yes "):
        assert not accepts(encoding, compiler.choice(choices), text)


def test_a_regex_matches_the_whole_answer(encoding: Encoding, compiler: GrammarCompiler) -> None:
    for pattern, good, bad in (
        (r"[0-9]{3}-[a-z]+", "123-ab", "123-abC"),
        (r"^裙子+$", "裙子子", "裙"),
        (r"a/b\n", "a/b\n", "a/b"),
        ("x|y\nz", "y\nz", "y"),
    ):
        assert accepts(encoding, compiler.regex(pattern), good), pattern
        assert not accepts(encoding, compiler.regex(pattern), bad), pattern


def test_copies_go_on_by_themselves(encoding: Encoding, compiler: GrammarCompiler) -> None:
    """Also those of a grammar that was compiled once for several requests."""
    first = compiler.regex("[ab]c")
    for _ in range(2):
        first.accept(encoding.ordinary("a")[0])
        assert spelled(encoding, first) == {"c"}
        other = compiler.regex("[ab]c")
        assert {"a", "b"} <= spelled(encoding, other)
        first = other.copy()


def test_masks_made_ahead_are_those_made_at_once(
    encoding: Encoding, compiler: GrammarCompiler
) -> None:
    texts = ['{"a":1}', '{"裙": "b"}', '{ "c": 2}']
    ahead = [compiler.json_object() for _ in texts]
    plain = [compiler.json_object() for _ in texts]
    for step in range(2):
        start_masks(ahead)
        start_masks(ahead[:1])  # twice is no harm
        together = denied([ahead[2], ahead[0], ahead[1]], CPU)
        for place, i in enumerate((2, 0, 1)):
            assert torch.equal(together[place], denied([plain[i]], CPU)[0])
        for grammars in (ahead, plain):
            for grammar, text in zip(grammars, texts, strict=True):
                grammar.accept(encoding.ordinary(text)[step])


def test_a_token_that_the_grammar_forbids_is_its_error(
    encoding: Encoding, compiler: GrammarCompiler
) -> None:
    grammar = compiler.choice(["a"])
    assert grammar.error is None
    grammar.accept(encoding.ordinary("b")[0])
    assert grammar.error is not None and "\n" not in grammar.error
    assert allowed(grammar) <= {encoding.im_end_id, encoding.eod_id}


@pytest.mark.parametrize(
    ("kind", "wrong", "reason"),
    [
        ("json_schema", {"type": "foo"}, "Invalid type: foo"),
        ("json_schema", {"type": "object", "properties": 5}, "properties must be an object"),
        ("json_schema", {"not": {}}, r'Unimplemented keys: \["not"\]'),
        ("json_schema", {"$ref": "#/nowhere"}, "nowhere"),
        ("json_schema", {"type": "integer", "minimum": 5, "maximum": 2}, "greater than maximum"),
        ("json_schema", {"type": "string", "pattern": "(?=a)"}, "look-around"),
        ("json_schema", "{", "it is not JSON"),
        ("json_schema", '{"a": 1}, "lark_grammar": "x"', "it is not JSON"),
        ("json_schema", "[1]", r"it is \[1\]; expected an object"),
        ("json_schema", {"enum": [float("nan")]}, "it is not JSON"),
        ("json_schema", {"enum": [{1}]}, "it is not JSON"),
        ("json_schema", {"const": "\ud800"}, "."),
        ("regex", "(a", "unclosed group"),
        ("regex", "a{2,1}", "invalid repetition"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", "\ud800", "."),
        ("regex", r"a[^\s\S]", "no text matches it"),
        ("choice", [], "it is empty"),
        ("choice", "abc", "expected a list of strings"),
        ("choice", [1], "expected a list of strings"),
        ("choice", ["\ud800"], "."),
    ],
)
def test_a_refusal_is_one_line_with_its_reason(
    compiler: GrammarCompiler, kind: str, wrong: Any, reason: str
) -> None:
    make = {
        "json_schema": compiler.json_schema,
        "regex": compiler.regex,
        "choice": compiler.choice,
    }[kind]
    with pytest.raises(InvalidGrammar, match=f"^{kind} is refused: .*{reason}") as error:
        make(wrong)
    assert isinstance(error.value, DecodingError)
    assert "\n" not in str(error.value) and len(str(error.value)) < 350


@pytest.mark.parametrize("depth", [500, 50_000])
def test_a_schema_nested_too_deeply_is_refused(compiler: GrammarCompiler, depth: int) -> None:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"properties": {"a": schema}}
    with pytest.raises(InvalidGrammar, match="recursion|nested") as error:
        compiler.json_schema(schema)
    assert "\n" not in str(error.value)


KEYS = ("名字", "颜色", "价格", "裙 子", "name", "n", 'quo"te', "a\\b", "é", "😀")
ENUM = ["红", "蓝 色", 3, 2.5, None, True, [1], "q\"'"]


def random_schema(chance: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema whose answers have an end: strings and lists are bounded."""
    flat = ("string", "integer", "number", "boolean", "null", "enum", "const", "pattern", "date")
    deep = ("object", "object", "object", "array", "tuple", "any", "ref")
    low, size = chance.randint(-50, 50), chance.randint(0, 3)

    def inner() -> dict[str, Any]:
        return random_schema(chance, depth - 1)

    def thing() -> dict[str, Any]:
        keys = chance.sample(KEYS, chance.randint(1, 4))
        needed = chance.sample(keys, chance.randint(0, len(keys)))
        members = {key: inner() for key in keys}
        return {
            "type": "object", "properties": members, "required": needed,
            "additionalProperties": False,
        }  # fmt: skip

    makers = {
        "string": lambda: {"type": "string", "minLength": size, "maxLength": size + 4},
        "integer": lambda: {"type": "integer", "minimum": low, "maximum": low + 30},
        "number": lambda: {"type": "number", "exclusiveMinimum": low, "maximum": low + 1.5},
        "boolean": lambda: {"type": "boolean"},
        "null": lambda: {"type": ["null", "boolean"]},
        "enum": lambda: {"enum": chance.sample(ENUM, 3)},
        "const": lambda: {"const": chance.choice(["裙子", {"a": [1, "二"]}, 7])},
        "pattern": lambda: {"type": "string", "pattern": "^[a-c裙]{2,4}(-[0-9])?$"},
        "date": lambda: {"type": "string", "format": "date"},
        "object": thing,
        "array": lambda: {
            "type": "array", "items": inner(), "minItems": size, "maxItems": size + 2
        },
        "tuple": lambda: {"type": "array", "prefixItems": [inner(), inner()], "items": False},
        "any": lambda: {"anyOf": [inner(), inner()]},
        "ref": lambda: {"$ref": "#/$defs/节点"},
    }  # fmt: skip
    return makers[chance.choice(flat if depth == 0 else flat + deep * 2)]()


def whole_schema(chance: random.Random) -> dict[str, Any]:
    members = {key: random_schema(chance) for key in chance.sample(KEYS, 3)}
    node = {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}
    return {
        "type": "object", "properties": members, "required": list(members),
        "additionalProperties": False, "$defs": {"节点": node},
    }  # fmt: skip


@pytest.mark.parametrize(("vocabulary", "count"), [("mini", 200), ("official", 15)])
def test_answers_of_a_random_model_parse_and_validate(
    golden: Path, vocab_path: Path, vocabulary: str, count: int
) -> None:
    """At temperature 1.5. The ends of values get a bias, or hardly any would end."""
    path = golden / "small" / "mini.tiktoken" if vocabulary == "mini" else vocab_path
    encoding = load_encoding(path)
    chance, stops = random.Random(5), (encoding.im_end_id, encoding.eod_id)
    compiler = GrammarCompiler(encoding.token_bytes, encoding.n_vocab, stops)
    schemas = [whole_schema(chance) for _ in range(count)]
    if vocabulary == "official":  # hundreds of its tokens are white space, which then has no end
        schemas = [{**one, "x-guidance": {"whitespace_flexible": False}} for one in schemas]
    ends = {encoding.ordinary(text)[0] for text in ('"', "}", "]", ",", ":", "0", "e")}
    bias = tuple((token, 3.0 if vocabulary == "mini" else 12.0) for token in sorted(ends))
    params = SamplingParams(True, 1.5, 1.0, 300, 500, logit_bias=bias)
    rows = [
        RowSampler(params.of_row(i), (), encoding.n_vocab, stops, compiler.json_schema(schema))
        for i, schema in enumerate(schemas)
    ]
    generator = torch.Generator().manual_seed(1)
    for _ in range(params.max_new_tokens):
        running = [row for row in rows if not row.tokens or row.tokens[-1] not in stops]
        if not running:
            break
        prepare(running)
        logits_V = torch.randn(1, encoding.n_vocab, generator=generator)
        assert all(one.error is None for one in sample(logits_V.expand(len(running), -1), running))
    finished = 0
    for row, schema in zip(rows, schemas, strict=True):
        if row.tokens[-1] in stops:
            finished += 1
            text = encoding.decode(row.tokens[:-1], errors="strict")
            # As a float 38.000000000000000000001 would be 38, which may be out of the range.
            Draft202012Validator(schema).validate(json.loads(text, parse_float=Decimal))
    assert finished >= 0.95 * count
