"""Answers held to a grammar: JSON, a JSON schema, a choice or a regular expression, by llguidance.

At each step a grammar tells which tokens may follow. Tokens are taken as bytes, in every division
of the text, so the model keeps its own way to spell. The tokens that end a turn may follow exactly
where the grammar may end, and other control tokens never. JSON may have white space between its
parts, as llguidance's default has it; a schema's "x-guidance" key changes that.

Shapes: C constrained rows, W words of 32 tokens, V tokens.
"""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

from qwen_ds.decode.exceptions import InvalidGrammar
from qwen_ds.decode.transfers import sent

if typing.TYPE_CHECKING:  # imported where grammars are made: a machine that trains may lack it
    from llguidance import LLMatcher

_CONTROL = re.compile(rb"<\|.*\|>", re.DOTALL)  # how a control token spells itself
# llguidance would otherwise force one division of a text into tokens where only one text fits.
_HEADER = '%llguidance {"no_forcing": true}\nstart: '
_IN_REFERENCES = "/$~!&'()*+,;=:@?"
_KEPT = 64  # compiled grammars; a batch of requests tends to bring the same one
# Eight bytes for every byte of a bit mask, 1 where the bit is 0.
_DENIED_OF_BYTE = (
    (((torch.arange(256)[:, None] >> torch.arange(8)) & 1) ^ 1).to(torch.uint8).view(torch.int64)
)


class Grammar:
    """A grammar and how far an answer has come in it. `GrammarCompiler` makes it."""

    def __init__(self, matcher: LLMatcher, compiler: GrammarCompiler) -> None:
        self._matcher, self.compiler = matcher, compiler
        self._ahead: tuple[Future[Tensor], int] | None = None  # masks being made, and our place

    def copy(self) -> Grammar:
        """The same grammar at the same place, going on by itself."""
        return Grammar(self._settled().deep_copy(), self.compiler)

    @property
    def may_end(self) -> bool:
        return bool(self._settled().is_accepting())

    @property
    def is_over(self) -> bool:
        """Whether nothing but the end of the turn may follow."""
        return bool(self._settled().is_stopped())

    @property
    def error(self) -> str | None:
        """Why the grammar cannot go on, in one line: a token that it forbids, or its own limits."""
        matcher = self._settled()
        return _first_line(matcher.get_error()) if matcher.is_error() else None

    def accept(self, token: int) -> None:
        """Go on by a token. After the end of the turn tokens change nothing."""
        matcher = self._settled()
        self._ahead = None
        if not matcher.is_stopped():
            matcher.consume_token(token)

    def _settled(self) -> LLMatcher:
        """The matcher, once the thread that makes the masks has let it go."""
        if self._ahead is not None:
            self._ahead[0].result()
        return self._matcher


class GrammarCompiler:
    """Grammars for one vocabulary. Building it takes about half a second for 150,000 tokens."""

    def __init__(
        self, token_bytes: Callable[[int], bytes], num_tokens: int, stop_ids: Sequence[int]
    ) -> None:
        from llguidance import LLExecutor, LLTokenizer, TokenizerWrapper

        vocabulary = _Vocabulary([token_bytes(i) for i in range(num_tokens)], stop_ids)
        self.num_words = (num_tokens + 31) // 32
        self._tokenizer = LLTokenizer(
            TokenizerWrapper(vocabulary), n_vocab=num_tokens, eos_token=list(stop_ids)
        )
        self._executor = LLExecutor()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._compiled = lru_cache(_KEPT)(self._compile)

    def json_object(self) -> Grammar:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: dict[str, Any] | str) -> Grammar:
        """JSON that the schema allows. InvalidGrammar if llguidance cannot hold to all of it."""
        return self._compiled("json_schema", f"%json {self._schema(schema)}").copy()

    @staticmethod
    def _schema(schema: dict[str, Any] | str) -> str:
        """A schema's text for llguidance."""
        try:
            read = json.loads(schema) if isinstance(schema, str) else schema
            text = json.dumps(read, allow_nan=False)
            text = json.dumps(json.loads(text, object_hook=_plain_reference))
        except RecursionError:
            raise InvalidGrammar("json_schema", "it is nested too deeply") from None
        except (TypeError, ValueError) as error:
            raise InvalidGrammar("json_schema", f"it is not JSON: {error}") from None
        if not isinstance(read, dict):
            raise InvalidGrammar("json_schema", f"it is {text[:40]}; expected an object")
        return text

    def choice(self, choices: Sequence[str]) -> Grammar:
        """One of these texts, as it stands."""
        if isinstance(choices, str) or not all(isinstance(text, str) for text in choices):
            raise InvalidGrammar("choice", f"it is {choices!r:.40}; expected a list of strings")
        if not choices:
            raise InvalidGrammar("choice", "it is empty; expected at least one string")
        return self._compiled("choice", " | ".join(map(json.dumps, choices))).copy()

    def regex(self, pattern: str) -> Grammar:
        """Text that the whole of a regular expression matches, in the syntax of Rust's regex."""
        from llguidance import LLMatcher

        try:
            (grammar,) = json.loads(LLMatcher.grammar_from_regex(pattern))["grammars"]
        except ValueError as error:  # a lone surrogate
            raise InvalidGrammar("regex", _first_line(str(error))) from None
        return self._compiled("regex", grammar["lark_grammar"].removeprefix("start: ")).copy()

    def call(self, functions: Mapping[str, dict[str, Any] | None], thought: int) -> Grammar:
        """A call of one of these functions in ReAct's form (qwen_ds/model/react.py).

        A thought of at most so many characters in one line precedes it. Its arguments are JSON that
        the function's schema allows; any text where that is None. InvalidGrammar: a schema that
        cannot be held to.
        """
        rules = []
        for name, schema in functions.items():
            arguments = r"/\S(.|\n)*/" if schema is None else f"%json {self._schema(schema)}"
            rules.append(f'{json.dumps(name)} "\\nAction Input:" / ?/ {arguments}')
        one_of = " | ".join(f"({rule})" for rule in rules)
        rule = f'/[^\\n]{{0,{thought}}}/ "\\nAction: " ({one_of})'
        return self._compiled("call", rule).copy()

    def _compile(self, name: str, rule: str) -> Grammar:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, _HEADER + rule, log_level=0)
        if matcher.is_error():
            raise InvalidGrammar(name, _first_line(matcher.get_error()))
        grammar = Grammar(matcher, self)
        first = grammar.copy()
        self.fill([first])  # only now does llguidance see that nothing may follow
        if first.is_over and not first.may_end:
            raise InvalidGrammar(name, "no text matches it")
        return grammar

    def fill(self, grammars: Sequence[Grammar]) -> Tensor:
        """Bit masks bits_CW (int32, on the CPU) of the tokens that may follow, all in one call."""
        bits_CW = torch.zeros(len(grammars), self.num_words, dtype=torch.int32)
        matchers = [(grammar._matcher, i) for i, grammar in enumerate(grammars)]
        self._executor.unsafe_compute_mask_ptr(
            matchers, bits_CW.data_ptr(), 4 * self.num_words, len(grammars)
        )
        return bits_CW

    def fill_ahead(self, grammars: Sequence[Grammar]) -> Future[Tensor]:
        """`fill` in a thread; llguidance lets the interpreter go while it works."""
        return self._thread.submit(self.fill, grammars)


class _Vocabulary:
    """The vocabulary as llguidance asks for it."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], stop_ids: Sequence[int]) -> None:
        self.tokens, self.eos_token_id = tokens, stop_ids[0]
        control = {i for i, token in enumerate(tokens) if _CONTROL.fullmatch(token)}
        self.special_token_ids = sorted(control | set(stop_ids))
        self._id_of = {token: i for i, token in enumerate(tokens) if len(token) == 1}

    def __call__(self, text: bytes) -> list[int]:
        """Ids of a text byte by byte. Nothing is forced, so no better division is needed."""
        return [self._id_of[bytes([byte])] for byte in text if bytes([byte]) in self._id_of]


def start_masks(grammars: Sequence[Grammar]) -> None:
    """Start to make the masks of the next step, for example while the model computes it."""
    waiting = [grammar for grammar in grammars if grammar._ahead is None]
    if waiting:
        masks = waiting[0].compiler.fill_ahead(waiting)
        for i, grammar in enumerate(waiting):
            grammar._ahead = masks, i


def denied(grammars: Sequence[Grammar], device: torch.device) -> Tensor:
    """denied_CV (bool): the tokens that may not follow. V is a multiple of 32."""
    start_masks(grammars)
    bits = [grammar._ahead[0].result()[grammar._ahead[1]] for grammar in grammars if grammar._ahead]
    bytes_of_bits = sent(torch.stack(bits), device).view(torch.uint8)
    words = _table(device).index_select(0, bytes_of_bits.flatten().to(torch.int32))
    return words.view(torch.bool).view(len(grammars), -1)


@cache
def _table(device: torch.device) -> Tensor:
    return sent(_DENIED_OF_BYTE.squeeze(1), device)


def _plain_reference(member: dict[str, Any]) -> dict[str, Any]:
    """An object of a schema, its reference in ASCII: llguidance reads no "#/$defs/节点"."""
    if isinstance(member.get("$ref"), str):
        member["$ref"] = quote(member["$ref"], safe="#%" + _IN_REFERENCES)
    return member


def _first_line(message: str) -> str:
    """The reason alone: without llguidance's places, drawings and states."""
    reason = re.search(r"^error: (.+)$", message, re.MULTILINE)  # of the regex library
    line = reason[1] if reason else message.strip().split("\n")[0]
    line = re.sub(r"^(at )?\d+\(\d+\): |^failed to compile JSON schema: ", "", line)
    return line.removeprefix("failed to compile JSON schema: ")[:300]
