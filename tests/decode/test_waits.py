"""A step of the engine on a device apart, whose values are looked at once, when tokens are read.

The device is torch's "meta", which has shapes and no values: whatever looks at one fails there, as
do shapes that follow from values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from qwen_ds.decode import grammar as grammar_module
from qwen_ds.decode import paged_attention, transfers
from qwen_ds.decode import sampler as sampler_module
from qwen_ds.decode.engine import DecodingEngine, packed
from qwen_ds.decode.grammar import GrammarCompiler
from qwen_ds.decode.graphs import GraphedModel
from qwen_ds.decode.kv_pages import PagedStore
from qwen_ds.decode.request import Request
from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.decode.scheduler import EngineLimits
from qwen_ds.decode.stop import StopRule
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.modeling import QWenLMHeadModel
from qwen_ds.model.packing import alpha_of_prompt, kv_shape
from serve.engine.adapted import (
    AdaptedModule,
    LoraPart,
    OwnEmbeddingRows,
    OwnHeadRows,
    OwnTensors,
)
from serve.engine.adapters import AdaptedModel, ServedAdapters
from tests.decode.recording import record
from tests.decode.test_engine import WORDS
from tests.moved import tensors
from tests.waiting import name_of, reason_to_wait

APART, CPU, ROWS = torch.device("meta"), torch.device("cpu"), 32
CONFIG = QWenConfig(
    vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, kv_channels=16,
    intermediate_size=64, seq_length=64, use_dynamic_ntk=True, use_logn_attn=True,
)  # fmt: skip


class Waits(TorchDispatchMode):
    """Copies that are waited for, and whatever looks at values, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.pinned: list[Tensor] = []
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, name_of(func)
        out = func(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            source = args[0] if name == "_to_copy" else args[1]
            places = {source.device, out.device}
            does_wait = not kwargs.get("non_blocking", len(args) > 2 and args[2])
            if places == {CPU, APART} and (
                out.device == CPU or does_wait or not self.knows(source)
            ):
                self.found.append(f"{name}: a copy that is waited for")
        elif any(x.device == APART for x in tensors((args, kwargs))) and (
            reason := reason_to_wait(func, args, kwargs)
        ):
            self.found.append(f"{name}: {reason}")
        return out

    def knows(self, source: Tensor) -> bool:
        return any(source is one for one in self.pinned)

    def pin(self, tensor: Tensor) -> Tensor:
        self.pinned.append(tensor.clone())
        return self.pinned[-1]

    def read(self, tensor: Tensor) -> list[int]:
        """Token 65 for all rows, and 65 for whatever else is asked of them."""
        assert tensor.device == APART
        self.reads += 1
        return [65] * tensor.numel()


def unmodified(make: Callable[..., Any]) -> Callable[..., Any]:
    """The maker of a tensor of a class of its own, which no dispatch mode may make."""

    def made(*size: int) -> Any:
        with _disable_current_modes():
            return make(*size)

    return made


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    found = Waits()
    make = torch.tensor

    def tensor(*args: Any, **options: Any) -> Tensor:
        if options.get("device") == APART:
            found.found.append("torch.tensor: a copy that is waited for")
        return make(*args, **options)

    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(paged_attention, "causal_lower_right", unmodified(causal_lower_right))
    monkeypatch.setattr(transfers, "pinned", found.pin)
    monkeypatch.setattr(sampler_module, "read", found.read)
    yield found
    grammar_module._table.cache_clear()
    sampler_module._groups.cache_clear()


def adapted(model: QWenLMHeadModel) -> AdaptedModel:
    """Two adapters with all that an adapter may have."""
    served = ServedAdapters(["a", "b"])
    for name, module in list(model.named_modules()):
        if not name.endswith(("c_attn", "wte", "lm_head", "ln_f")):
            continue
        changed = AdaptedModule(module, served.step, is_head=name == "lm_head")
        weight = module.get_parameter("weight")
        rows = {n: ([3, 4], weight[:2]) for n in (1, 2)}
        if name.endswith("c_attn"):
            pair = weight.new_empty(4, weight.shape[1]), weight.new_empty(4, weight.shape[0])
            changed.parts.append(LoraPart.of({1: pair, 2: pair}, 2, weight))
        elif name.endswith("wte"):
            changed.parts.append(OwnEmbeddingRows.of(rows, 2, weight))
        elif name == "lm_head":
            changed.parts.append(OwnHeadRows.of(rows, weight))
        else:
            changed.own = OwnTensors({1: {"weight": weight}})
        model.set_submodule(name, changed)
    return AdaptedModel(packed(model), served)


def engine_apart(with_adapters: bool = False, is_graphed: bool = False) -> DecodingEngine:
    with APART:
        model = QWenLMHeadModel._from_config(CONFIG, dtype=torch.bfloat16).eval()
    store = PagedStore(kv_shape(CONFIG, torch.bfloat16, APART), 600, 16)
    forward: Any = packed(model)
    names, numbers = (), None
    if with_adapters:
        forward = adapted(model)
        names, numbers = forward.adapters.names, forward.adapters.numbers
    if is_graphed:
        forward = GraphedModel(forward, store, ROWS, numbers, capture=record)
    limits, alpha_of = EngineLimits(ROWS, 600, 1000), partial(alpha_of_prompt, CONFIG)
    return DecodingEngine(forward, store, WORDS, limits, alpha_of, names)


COMPILER = GrammarCompiler(WORDS.token_bytes, 500, (499,))
KINDS: dict[str, Callable[[int], dict[str, Any]]] = {
    "greedy": lambda i: {},
    "stops": lambda i: {"stop": StopRule((7, 499), ((65, 66),)), "stop_strings": ("AB",)},
    "top_k": lambda i: {"do_sample": True, "temperature": 0.5 + i / 9, "seed": i},
    "top_p": lambda i: {"do_sample": True, "top_p": 0.5 + i / 99, "top_k": 0, "seed": i},
    "min_p": lambda i: {"do_sample": True, "min_p": i / 40, "top_p": 1.0, "top_k": 0},
    "penalties": lambda i: {
        "repetition_penalty": 1 + i / 9, "presence_penalty": i / 99, "frequency_penalty": 0.1,
        "logit_bias": ((i, 1.0), (65, 0.5)), "min_tokens": 3, "stop": StopRule((7, 499)),
    },
    "logprobs": lambda i: {"logprobs": (None, 0, 2)[i % 3]},
    "grammar": lambda i: {"grammar": COMPILER.regex("A*" if i % 2 else "[A-F]*")},
    "adapters": lambda i: {"adapter": (None, "a", "b")[i % 3]},
    "long": lambda i: {"length": 60 + 3 * i},
    "all": lambda i: KINDS[list(KINDS)[i % 9]](i),
}  # fmt: skip


def request(length: int = 9, **given: Any) -> Request:
    names = given.keys() & {"stop_strings", "grammar", "adapter"}
    own = {name: given.pop(name) for name in names}
    stop = given.pop("stop", StopRule())
    sampling = SamplingParams(max_new_tokens=6, **given)
    return Request([65, *range(2, length + 1)], sampling, stop, **own)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_waits_once_for_the_device(waits: Waits, kind: str) -> None:
    check_steps(kind, waits)


@pytest.mark.parametrize("kind", ["long", "all"])
def test_a_step_that_is_a_graph_waits_once_for_the_device(waits: Waits, kind: str) -> None:
    check_steps(kind, waits, is_graphed=True)


def check_steps(kind: str, waits: Waits, is_graphed: bool = False) -> None:
    """Answer 32 requests, of which some come later, and read once where there are tokens."""
    engine = engine_apart(kind in ("adapters", "all"), is_graphed)
    waits.found.clear()
    for i in range(ROWS // 2):
        engine.submit(request(**KINDS[kind](i)))
    steps = []
    while engine.is_busy:
        waits.reads = 0
        with waits:
            updates = engine.step()
        assert all(update.error is None for update in updates)
        assert waits.found == []
        assert waits.reads == bool(updates)
        steps.append(len(updates))
        if len(steps) == 2:
            for i in range(ROWS // 2, ROWS):
                engine.submit(request(**KINDS[kind](i)))
    assert max(steps) == ROWS
