"""Every process that answers takes its own GPU before it does anything else with one."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qwen_ds.model.device import take_device
from serve import chat
from serve.api import worker
from serve.api.worker import EngineSettings
from serve.engine import beams, loading
from serve.files.sources import find_source
from serve.options import AnswerOptions
from serve.talk.interrupts import Interrupts
from serve.talk.options import ChatOptions


class Loaded(Exception):
    """The weights are about to be read."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The calls of a machine with two GPUs, up to the one that reads the weights."""
    found: list[object] = []

    def load_base(*_: object) -> object:
        raise Loaded

    for place, name, fake in (
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 2),
        (torch.cuda, "set_device", lambda device: found.append(("device", str(device)))),
        (torch.backends.cuda, "enable_cudnn_sdp", lambda on: found.append(("cudnn", on))),
        (loading, "load_base", load_base),
        (beams, "load_base", load_base),
    ):
        monkeypatch.setattr(place, name, fake)
    return found


def engine_of_the_server(folder: str) -> None:
    settings = EngineSettings(folder, {}, "auto", "auto", False, 4, 64, None, None)
    worker._load(Pipe()[0], settings, 1)


def prediction(folder: str) -> None:
    find_source(folder, AnswerOptions()).open()


def beam_prediction(folder: str) -> None:
    find_source(folder, AnswerOptions(num_beams=2)).open()


def talk(folder: str) -> None:
    chat.open_talker(ChatOptions(model=folder), Interrupts())


@pytest.mark.parametrize("begin", [engine_of_the_server, prediction, beam_prediction, talk])
def test_a_process_takes_its_own_gpu_before_the_weights(
    begin: Callable[[str], None],
    calls: list[object],
    small_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engines of a server have numbers, and no launcher; the other commands have ranks."""
    rank = "0" if begin is engine_of_the_server else "1"
    launched = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Loaded):
        begin(str(small_dir))
    assert calls == [("device", "cuda:1"), ("cudnn", False)]


def test_the_model_goes_to_the_gpu_that_was_taken(
    calls: list[object], small_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[object] = []

    def to(place: object) -> SimpleNamespace:
        places.append(place)
        if isinstance(place, torch.device):
            raise Loaded
        return model

    model = SimpleNamespace(dtype=torch.bfloat16, to=to)
    monkeypatch.setattr(loading, "load_base", lambda *_: model)
    with pytest.raises(Loaded):
        engine_of_the_server(str(small_dir))
    assert places == [torch.bfloat16, torch.device("cuda", 1)]


def test_a_cpu_is_no_gpu(calls: list[object]) -> None:
    assert take_device("cpu") == torch.device("cpu")
    assert calls == []
