"""Adapters side by side: each row gets what peft computes for its own adapter alone, and rows of
the bare base get the base's bits."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qwen_ds.decode.engine import PackedStep, packed
from qwen_ds.decode.exceptions import UnknownAdapter
from qwen_ds.decode.kv import Segment
from qwen_ds.decode.kv_rows import ContiguousStore
from qwen_ds.decode.request import Completion, Request
from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.decode.stop import StopRule
from qwen_ds.errors import UserError
from qwen_ds.model.adapter import read_adapter
from qwen_ds.model.family import QWEN
from qwen_ds.model.modeling import QWenLMHeadModel
from serve.engine import adapted
from serve.engine.adapted import LoraPart, Tokens, lora_gather
from serve.engine.adapters import (
    DEFAULT,
    AdaptedModel,
    ServedAdapters,
    named_adapters,
    put_adapters,
)
from serve.engine.engine import ServingEngine, stream
from serve.engine.loading import load_engine

ALL = ["c_attn", "c_proj", "w1", "w2"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ALL, "r": 8},
    "rslora": {"target_modules": ALL, "r": 4, "use_rslora": True},
    "patterns": {
        "target_modules": ["c_attn", "w1"], "r": 2, "rank_pattern": {r"h\.1\..*c_attn": 7},
        "alpha_pattern": {"w1": 3.0}, "layers_to_transform": [0, 1],
    },
    "bias": {"target_modules": ["c_attn"], "bias": "lora_only"},
    "rows": {
        "target_modules": ["w2"],
        "trainable_token_indices": {"lm_head": [3, 71, 304], "transformer.wte": [304, 5, 88]},
    },
    "saved": {"target_modules": ["c_proj"], "modules_to_save": ["wte", "lm_head", "ln_1"]},
    "head": {"target_modules": ["c_attn", "lm_head"], "r": 3},
    "dora": {"target_modules": ["c_attn", "w1"], "use_dora": True, "bias": "all"},
}  # fmt: skip
PROMPTS = [
    [304, 5, 71, 9], [88, 2, 200, 17, 31, 306, 7], [305], list(range(40, 80)), [*range(90, 170), 5]
]  # fmt: skip
NEW_TOKENS = 6
CPU = torch.device("cpu")


def bare(folder: Path, dtype: torch.dtype = torch.float32) -> QWenLMHeadModel:
    model: QWenLMHeadModel = QWenLMHeadModel.from_pretrained(str(folder), dtype=dtype)
    return model


def make_adapter(base: Path, folder: Path, options: Mapping[str, Any], seed: int) -> Path:
    torch.manual_seed(seed)
    config = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 5, "lora_alpha": 12.0, **options})
    wrapped = get_peft_model(bare(base), config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def folders(small_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: make_adapter(small_dir, root / name, options, seed)
        for seed, (name, options) in enumerate(KINDS.items())
    }


Model = Callable[[list[int]], Tensor]


@pytest.fixture(scope="module")
def alone(small_dir: Path, folders: Mapping[str, Path]) -> dict[str | None, Model]:
    """Logits [T, V] of a row by itself, as peft loads each adapter."""

    def of(model: torch.nn.Module) -> Model:
        def logits(ids: list[int]) -> Tensor:
            with torch.inference_mode():
                found: Tensor = model(input_ids=torch.tensor([ids])).logits[0]
            return found

        return logits

    wrapped: dict[str | None, Model] = {
        name: of(PeftModel.from_pretrained(bare(small_dir), str(folder)).eval())
        for name, folder in folders.items()
    }
    return wrapped | {None: of(bare(small_dir))}


@pytest.fixture(params=[1 << 30, 0], ids=["side by side", "one by one"])
def side_by_side(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapted, "SIDE_BY_SIDE", request.param)


def recorded(
    engine: ServingEngine, rows: Sequence[tuple[list[int], str | None]], **limits: int
) -> list[Tensor]:
    """Logits [NEW_TOKENS, V] by which each row's greedy tokens were chosen, all rows together."""
    seen: list[list[Tensor]] = [[] for _ in rows]

    def choice(i: int) -> Callable[[Tensor], int]:
        def choose(logits_V: Tensor) -> int:
            seen[i].append(logits_V.clone())
            return int(logits_V.argmax())

        return choose

    decoding = engine.start(memory_gb=0.1, **limits)
    for i, (prompt, adapter) in enumerate(rows):
        sampling = SamplingParams(max_new_tokens=NEW_TOKENS)
        decoding.submit(Request(prompt, sampling, StopRule(), adapter, choice(i)))
    while decoding.is_busy:
        assert all(update.error is None for update in decoding.step())
    return [torch.stack(logits) for logits in seen]


def assert_as_alone(prompt: list[int], found_TV: Tensor, model: Model) -> None:
    """The same logits at each step, and so the same greedy tokens, as far as no two are as close
    as the tolerance."""
    tokens = found_TV.argmax(-1).tolist()
    expected_TV = model([*prompt, *tokens[:-1]])[len(prompt) - 1 :, : found_TV.shape[1]]
    torch.testing.assert_close(found_TV, expected_TV, rtol=1e-5, atol=3e-5)
    top = expected_TV.topk(2).values
    assert (top[:, 0] - top[:, 1]).min() > 1e-4
    assert expected_TV.argmax(-1).tolist() == tokens


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("side_by_side")
@pytest.mark.parametrize("prefill_tokens", [11, 4096])
def test_rows_of_all_adapters_and_the_base_in_one_step_are_answered_as_each_alone_by_peft(
    small_dir: Path,
    folders: Mapping[str, Path],
    alone: Mapping[str | None, Model],
    prefill_tokens: int,
) -> None:
    engine = load_engine(small_dir, adapters=folders)
    # seq_length is 64: beyond it `alone` would take alpha of a longer prompt at later tokens.
    rows = [(prompt, name) for prompt in PROMPTS[:4] for name in (None, *folders)]
    random.Random(1).shuffle(rows)
    found = recorded(engine, rows, slots=len(rows), prefill_tokens=prefill_tokens)
    for (prompt, name), logits_TV in zip(rows, found, strict=True):
        assert_as_alone(prompt, logits_TV, alone[name])
    # The adapters do differ, and few slots change nothing.
    first = {name: logits[0] for (prompt, name), logits in zip(rows, found, strict=True)}
    assert not any(torch.equal(first[None], first[name]) for name in folders)
    again = recorded(engine, rows, slots=5, prefill_tokens=prefill_tokens)
    for one, other in zip(found, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=3e-5)


def step_of(
    model: QWenLMHeadModel, rows: Sequence[tuple[list[int], str | None]], due: Sequence[int]
) -> PackedStep:
    """A first step that runs whole prompts, of which those in `due` want logits."""
    shape = QWEN.kv_shape(model.config, model.dtype, CPU)
    store = ContiguousStore(shape, 64)
    segments, ids, positions, last = [], list[int](), list[int](), []
    for prompt, _ in rows:
        row = store.open([])
        assert store.grow(row, len(prompt))
        segments.append(Segment(row, len(ids), len(prompt)))
        ids += prompt
        positions += range(len(prompt))
        last.append(len(ids) - 1)
    store.plan(segments)
    runs = tuple((name, len(prompt)) for prompt, name in rows)
    return PackedStep(
        torch.tensor([ids]), torch.tensor([positions]), 0,
        torch.tensor([last[i] for i in due]), runs, tuple((rows[i][1], 1) for i in due), store,
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("side_by_side")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_the_base_get_the_bits_of_a_model_without_adapters(
    small_dir: Path, folders: Mapping[str, Path], dtype: torch.dtype
) -> None:
    rows = [(prompt, name) for prompt in PROMPTS[:3] for name in (None, *folders, None)]
    due = [i for i in range(len(rows)) if i % 4 != 1]
    plain = bare(small_dir, dtype)
    expected_RV = packed(plain)(step_of(plain, rows, due))
    model = bare(small_dir, dtype)
    served = put_adapters(model, {n: read_adapter(f) for n, f in folders.items()}, QWEN)
    forward = AdaptedModel(packed(model), served)
    found_RV = forward(step_of(plain, rows, due))
    same_R = (found_RV == expected_RV).all(-1)
    assert same_R.tolist() == [rows[i][1] is None for i in due]
    none = [(prompt, None) for prompt, _ in rows]
    assert torch.equal(forward(step_of(plain, none, due)), expected_RV)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("side_by_side")
def test_a_step_of_fixed_shape_gives_the_same_by_the_same_operations_whoever_has_which_adapter(
    small_dir: Path, folders: Mapping[str, Path]
) -> None:
    model = bare(small_dir)
    served = put_adapters(model, {n: read_adapter(f) for n, f in folders.items()}, QWEN)
    forward = AdaptedModel(packed(model), served)
    names = [None, *folders]
    operations = []
    for seed in range(3):
        draw = random.Random(seed)
        rows = [([draw.randrange(300)], draw.choice(names)) for _ in range(12)]
        step = step_of(model, rows, range(12))
        expected_RV = forward(step)
        number_N = torch.tensor(served.numbers(step.adapters))
        with Operations() as seen:
            found_RV = forward(replace(step, adapters=number_N))
        torch.testing.assert_close(found_RV, expected_RV, rtol=1e-5, atol=3e-5)
        operations.append(seen.names)
    assert operations[0] == operations[1] == operations[2]
    assert not {"aten.nonzero.default", "aten._local_scalar_dense.default"} & set(operations[0])


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_gathered_matrices_give_what_peft_adds(
    small_dir: Path, folders: Mapping[str, Path]
) -> None:
    names, module = ["plain", "rslora", "patterns"], "transformer.h.1.attn.c_attn"
    model = bare(small_dir)
    put_adapters(model, {name: read_adapter(folders[name]) for name in names}, QWEN)
    changed = model.get_submodule(module)
    assert isinstance(changed, adapted.AdaptedModule)
    (part,) = changed.parts
    assert isinstance(part, LoraPart) and part.ranks == {1: 8, 2: 4, 3: 7}
    torch.manual_seed(0)
    x_ND, index_N = torch.randn(9, 64), torch.tensor([0, 3, 1, 2, 2, 0, 1, 3, 1])
    found_NO = lora_gather(x_ND, part.A_KRD, part.B_KRO, index_N)
    for number, name in enumerate(names, start=1):
        peft = PeftModel.from_pretrained(bare(small_dir), str(folders[name])).eval()
        linear = peft.get_submodule(f"base_model.model.{module}")
        base = peft.get_submodule(f"base_model.model.{module}.base_layer")
        expected_NO = linear(x_ND) - base(x_ND)
        its = index_N == number
        torch.testing.assert_close(found_NO[its], expected_NO[its], rtol=1e-5, atol=1e-5)
    assert not found_NO[index_N == 0].any()


def test_an_adapter_that_overflows_spoils_no_other_adapters_tokens() -> None:
    weight = torch.zeros(2, 4, dtype=torch.float16)
    huge, one = torch.full((1, 4), 6e4, dtype=torch.float16), weight.new_ones(1, 2)
    part = LoraPart.of({1: (weight.new_ones(1, 4), one), 2: (huge, one)}, 2, weight)
    out = weight.new_zeros(3, 2)
    tokens = Tokens(torch.tensor([1, 2, 0]), [(1, slice(0, 1)), (2, slice(1, 2))])
    part(torch.nn.Linear(4, 2), out, weight.new_ones(3, 4), tokens)
    assert out[:, 0].tolist() == [4.0, torch.inf, 0.0]


def test_a_scaling_that_overflows_the_dtype_is_refused(
    small_dir: Path, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    state = load_file(folders["plain"] / "adapter_model.safetensors")
    state = {name: t * 1e6 if "lora_B" in name else t for name, t in state.items()}
    save_file(state, tmp_path / "adapter_model.safetensors")
    config = folders["plain"] / "adapter_config.json"
    (tmp_path / config.name).write_bytes(config.read_bytes())
    with pytest.raises(UserError, match=r"lora_B.* overflows torch.float16; expected --dtype"):
        load_engine(small_dir, adapters={"big": tmp_path}, dtype="float16")
    assert load_engine(small_dir, adapters={"big": tmp_path}).adapters is not None


def completions(engine: ServingEngine, names: Sequence[str | None]) -> dict[int, Any]:
    sampling = SamplingParams(max_new_tokens=4)
    requests = [Request(PROMPTS[1], sampling, StopRule(), n) for n in names]
    return dict(stream(engine.start(), requests))


def test_an_unknown_adapter_fails_its_request_alone(
    small_dir: Path, folders: Mapping[str, Path]
) -> None:
    engine = load_engine(small_dir, adapters={n: folders[n] for n in ("plain", "saved")})
    found = completions(engine, ["plain", "nobody", None, "saved"])
    assert isinstance(found[1], UnknownAdapter)
    assert str(found[1]) == "the adapter is 'nobody'; expected one of: plain, saved"
    assert all(isinstance(found[i], Completion) for i in (0, 2, 3))
    without = completions(load_engine(small_dir), ["plain", None])
    assert str(without[0]) == "the adapter is 'plain'; expected one of: no adapter"
    assert without[1] == found[2]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["plain", "rows", "saved", "dora"])
def test_a_default_adapter_answers_requests_that_name_none(
    small_dir: Path, folders: Mapping[str, Path], name: str
) -> None:
    expected = completions(load_engine(small_dir, adapters={"it": folders[name]}), ["it"])[0]
    single = load_engine(small_dir, folders[name])
    assert completions(single, [None, DEFAULT]) == {0: expected, 1: expected}
    # It is the only one, so what it replaces is not there twice.
    plain = sum(p.nbytes for p in bare(small_dir).parameters())
    assert sum(p.nbytes for p in single.model.parameters()) == plain
    modules = single.model.modules()
    assert not any(m.own for m in modules if isinstance(m, adapted.AdaptedModule))
    both = load_engine(small_dir, adapters={DEFAULT: folders[name], "other": folders["rslora"]})
    other = completions(load_engine(small_dir, folders["rslora"]), [None])[0]
    assert completions(both, [None, "other", DEFAULT]) == {0: expected, 1: other, 2: expected}


def test_the_weights_of_the_base_are_there_once(
    small_dir: Path, folders: Mapping[str, Path]
) -> None:
    engine = load_engine(small_dir, adapters=folders)
    found = sum(p.nbytes for p in engine.model.parameters())
    assert found == sum(p.nbytes for p in bare(small_dir).parameters())


def test_a_forward_that_fails_leaves_no_adapter_acting() -> None:
    served = ServedAdapters(["a"])
    seen = []

    def fails(step: PackedStep) -> Tensor:
        for tokens in (served.step.tokens, served.step.due):
            assert tokens is not None
            ((number, where),) = tokens.groups
            assert isinstance(where, Tensor)
            seen.append((number, where.tolist()))
        raise torch.OutOfMemoryError

    runs = (("a", 3), (None, 2), ("a", 1), ("a", 1))
    zeros_1N, due_R, due = (
        torch.zeros(1, 7),
        torch.tensor([2, 4, 6]),
        (("a", 1), (None, 1), ("a", 1)),
    )
    step = PackedStep(zeros_1N, zeros_1N, 0, due_R, runs, due, None)  # type: ignore[arg-type]
    with pytest.raises(torch.OutOfMemoryError):
        AdaptedModel(fails, served)(step)
    assert seen == [(1, [0, 1, 2, 5, 6]), (1, [0, 2])]
    assert served.step.tokens is None and served.step.due is None


def test_adapters_are_named_on_the_command_line(tmp_path: Path) -> None:
    odd = tmp_path / "lr=1e-4"
    odd.mkdir()
    assert named_adapters([]) == {}
    assert named_adapters(["zh=runs/a", "en=runs/b=2"]) == {"zh": "runs/a", "en": "runs/b=2"}
    assert named_adapters(["runs/a"]) == {DEFAULT: "runs/a"}
    assert named_adapters([str(odd), f"x={odd}"]) == {DEFAULT: str(odd), "x": str(odd)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["=runs/a"], r"--adapter is '=runs/a'; expected NAME=DIR"),
        (["zh="], r"--adapter is 'zh='; expected NAME=DIR"),
        ([""], r"--adapter is ''; expected NAME=DIR"),
        (["zh=a", "zh=b"], r"two adapters are named zh, a and b; expected"),
        (["a", "b"], r"two adapters are named default, a and b; expected NAME=DIR"),
    ],
)
def test_adapters_without_a_name_of_their_own_are_refused(given: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        named_adapters(given)


def test_an_adapter_of_another_base_is_refused_before_the_weights_are_read(
    small_dir: Path,
    full_dir: Path,
    folders: Mapping[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serve.engine.loading.load_base", lambda *_: pytest.fail("read"))
    with pytest.raises(UserError, match=r"plain: .*an adapter of another base"):
        load_engine(full_dir, adapters={"plain": folders["plain"]})
    with pytest.raises(UserError, match="no such folder"):
        load_engine(small_dir, adapters={"plain": folders["plain"], "x": small_dir / "no"})
