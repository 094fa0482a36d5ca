"""Who computes the pieces of a run's blocks: the choice, the line about it, the same gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.testing import assert_close

from qwen_ds import dist
from qwen_ds.model import pieces
from qwen_ds.model.loading import load_base
from qwen_ds.plan.resolve import resolve
from qwen_ds.plan.run import Base, Machine, Run
from qwen_ds.recipe.loading import load_recipe
from qwen_ds.train import screen, setup, survey
from qwen_ds.train.loss import TrainingModel
from tests.model import fake_liger

CPU = Machine(1, 1, False, 8e9, "of free memory for each rank")
GPU = replace(CPU, on_gpu=True, memory=80e9, memory_source="that are free on the GPU")
LIGER = replace(GPU, liger="0.8.5")
ZERO_3 = ["--deepspeed", "ds_configs/zero3.json"]
Decide = Callable[..., Run]


@pytest.fixture
def decided(small_dir: Path) -> Decide:
    def decide(machine: Machine, *options: str) -> Run:
        given = ["--model.path", str(small_dir), "--model.dtype", "float32"]
        given += ["--model.activation_checkpointing", "none", *options]
        return resolve(load_recipe(given), machine, Base.read(small_dir), rows=False)

    return decide


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fake_liger.install(monkeypatch)
    # The weights of these runs, which have one process, are whole at every stage.
    monkeypatch.setattr(setup, "partitioned_loading", lambda *_: nullcontext())
    yield


def loaded(run: Run) -> nn.Module:
    return setup.load_model(run, torch.device("cpu")).training.train()


def filled_by_liger(model: nn.Module) -> bool:
    found = {m.pieces is pieces.EAGER for m in model.modules() if isinstance(m, pieces.Pieced)}
    assert len(found) == 1
    return found == {False} and not fake_liger.calls


@pytest.mark.parametrize(
    ("machine", "options", "version", "line"),
    [
        (LIGER, ZERO_3, "0.8.5", "pieces    liger-kernel 0.8.5: norm and gate; torch: rotation"),
        (LIGER, ["--model.compile", "false"], "0.8.5", "pieces    liger-kernel 0.8.5: norm and"),
        (LIGER, ["--lora.variant", "dora"], "0.8.5", "pieces    liger-kernel 0.8.5: norm and"),
        (
            GPU,
            ["--model.compile", "false"],
            None,
            "pieces    torch; expected one version of liger-kernel on every rank",
        ),
        (
            replace(LIGER, can_compile=False),
            ZERO_3,
            None,
            "pieces    torch; liger-kernel needs a C compiler",
        ),
        (
            replace(LIGER, fast_bf16=False),
            [*ZERO_3, "--model.dtype", "bfloat16"],
            None,
            "pieces    torch; liger-kernel needs model.dtype float16",
        ),
        (replace(LIGER, fast_bf16=False), ZERO_3, "0.8.5", "pieces    liger-kernel 0.8.5: norm"),
        (CPU, [], None, None),
    ],
)
def test_liger_kernel_fills_the_pieces_of_a_gpu_that_compiles_nothing(
    machine: Machine, options: list[str], version: str | None, line: str | None,
    decided: Decide, installed: None,
) -> None:  # fmt: skip
    run = decided(machine, *options)
    assert run.liger == version
    assert filled_by_liger(loaded(run)) == (version is not None)
    said = screen.pieces_lines(run)
    assert len(said) == (line is not None) and all(each.startswith(line or "") for each in said)


@pytest.mark.parametrize(
    ("options", "in_base", "kept"),
    [
        ("--lora.dropout 0", 0.0, False),
        ("--lora.dropout 0.1", 0.0, True),
        ("--lora.dropout 0", 0.1, True),
        ("--method full", 0.0, False),
    ],
)
def test_generators_are_kept_for_a_recomputation_that_draws(
    options: str, in_base: float, kept: bool, decided: Decide, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU keeping them copies their states to and fro at each block."""
    given: list[dict[str, Any]] = []

    def load(*of_base: Any) -> Any:
        model = load_base(*of_base)
        model.config.attn_dropout_prob = in_base
        model.activation_checkpointing_enable = lambda **settings: given.append(settings)
        return model

    monkeypatch.setattr(setup, "load_base", load)
    loaded(decided(CPU, *options.split(), "--model.activation_checkpointing", "all"))
    (settings,) = given
    assert settings["activation_checkpointing_kwargs"]["preserve_rng_state"] == kept


@pytest.mark.parametrize(("method", "graphs"), [("lora", 5), ("full", 4)])
def test_compiled_pieces_give_the_same_gradients(method: str, graphs: int, decided: Decide) -> None:
    """Norm, gate, rotation and loss are compiled once for all blocks, but for the norm before the
    first map that is trained."""
    options = ["--model.dtype", "float32", "--model.attention", "sdpa", "--method", method]
    wanted = gradients(loaded(decided(CPU, *options)))
    torch._dynamo.reset()
    counters.clear()
    found = gradients(loaded(decided(CPU, *options, "--model.compile", "pieces")))
    assert counters["stats"]["unique_graphs"] == graphs
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * gradient.abs().max().item())


@pytest.mark.parametrize("options", [[], [*ZERO_3, "--model.compile", "true"]])
def test_what_torch_compiles_is_left_to_it(options: list[str], decided: Decide) -> None:
    run = decided(LIGER, *options)
    assert run.recipe.model.compile is True and run.liger is None
    assert screen.pieces_lines(run) == []


def test_the_start_screen_has_the_line(decided: Decide, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "kernels", lambda *_: "flash")
    monkeypatch.setattr(screen, "device_name", lambda _: "a GPU")
    monkeypatch.setattr(screen, "data_summary", lambda _: ["2 rows"])
    monkeypatch.setattr(screen, "disk_use", lambda *_: "little")
    rows = SimpleNamespace(lens=np.array([3, 4]), report={})
    sampler = SimpleNamespace(steps_per_epoch=1, budget=2048)
    data: Any = SimpleNamespace(train=rows, eval=None, sampler=sampler, findings=[])
    model: Any = SimpleNamespace(count="few")
    said = screen.start_screen(decided(LIGER, *ZERO_3), model, data, None).splitlines()
    (place,) = [i for i, line in enumerate(said) if line.startswith("pieces    liger-kernel 0.8.5")]
    assert said[place - 1].startswith("attention sdpa, by flash")
    assert not [line for line in said if "batch.tokens_per_micro_batch" in line]
    sampler.budget = 1024
    said = screen.start_screen(decided(LIGER, *ZERO_3), model, data, None).splitlines()
    (line,) = [line for line in said if "batch.tokens_per_micro_batch" in line]
    assert line.startswith("chosen    batch.tokens_per_micro_batch is 1024: up to 2,048 would ")


@pytest.fixture
def gather(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Any], type], None]:
    """Let `survey` see a machine with everything; the others have what is given, in place of what
    has its type."""
    monkeypatch.setattr(survey, "liger_version", lambda: "0.8.5")
    monkeypatch.setattr(survey, "can_compile", lambda _: True)
    monkeypatch.setattr(survey, "has_bf16_units", lambda _: True)
    monkeypatch.setattr(survey.start, "can_quantise_weights", lambda _: False)
    monkeypatch.setattr(survey, "is_bf16_faster", lambda: True)
    monkeypatch.setattr(survey, "is_eager_faster", lambda _: True)
    monkeypatch.setattr(dist, "ranks_per_machine", lambda: [2])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (8 << 30, 9 << 30))

    def among(others: list[Any], kind: type) -> None:
        monkeypatch.setattr(
            dist, "gather", lambda mine: [mine, *others] if isinstance(mine, kind) else [mine]
        )

    return among


@pytest.mark.parametrize(
    ("device", "others", "expected"),
    [
        ("cuda", ["0.8.5"], "0.8.5"),
        ("cuda", ["0.9.0"], None),
        ("cuda", [None], None),
        ("cpu", [], None),
    ],
)
def test_all_ranks_use_it_or_none(
    device: str, others: list[str | None], expected: str | None, gather: Callable
) -> None:
    """On GPUs, in one version, so that all compute alike."""
    gather(others, str)
    assert survey.survey(torch.device(device)).liger == expected


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("other", [True, False])
def test_bf16_is_fast_where_it_is_on_every_rank(
    device: str, other: bool, gather: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU by its units, on a CPU as measured."""
    monkeypatch.setattr(survey, "has_bf16_units", lambda _: device == "cuda")
    monkeypatch.setattr(survey, "is_bf16_faster", lambda: device == "cpu")
    gather([other], bool)
    assert survey.survey(torch.device(device)).fast_bf16 == other


def gradients(model: nn.Module) -> dict[str, Tensor]:
    assert isinstance(model, TrainingModel)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # as if trained
            generator = torch.Generator().manual_seed(len(name))
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    ids_BT = torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    model(ids_BT, ids_BT).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_with_liger_kernel_has_the_same_gradients(
    recompute: str, method: str, decided: Decide, installed: None
) -> None:
    """LoRA on every linear map, with dropout; what is written in place is read by nobody else."""
    options = ["--model.activation_checkpointing", recompute, "--method", method, *ZERO_3]
    options += ["--lora.targets", "c_attn", "c_proj", "w1", "w2", "--lora.dropout", "0.1"]
    wanted = gradients(loaded(decided(replace(GPU, can_compile=False), *options)))
    assert not fake_liger.calls
    found = gradients(loaded(decided(LIGER, *options)))
    assert found.keys() == wanted.keys() and fake_liger.calls.count("gate's gradient") > 0
    # Frozen norms get no gradient, and none is computed.
    assert ("norm weight's gradient" in fake_liger.calls) == (method == "full")
    for name, gradient in wanted.items():
        assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * gradient.abs().max().item())
