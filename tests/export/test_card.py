"""The model card: metadata as the hub reads it, the run that it tells of, and code that runs."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
import shutil
import tomllib
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from qwen_ds.disk.digest import model_sha256
from qwen_ds.disk.weights import file_sha256
from qwen_ds.export.card_scores import VeryModel, sampling_in_words
from qwen_ds.export.formats import find_format
from qwen_ds.export.qwen2.adapter import convert_adapter
from qwen_ds.recipe.loading import write_recipe
from qwen_ds.recipe.options import Recipe
from serve.options import EvaluateOptions, SamplingOptions, parse
from tests.export.folders import merge_with, peft_adapter

TALLY = {"rows": 2, "first": "train.json:7", "detail": ""}
PART = {
    "read": 12, "kept": 10, "tokens": 1000, "learnt_tokens": 400, "longest_tokens": 90,
    "longest": "train.json:3",
    "dropped": {"empty answer": TALLY}, "skipped": {}, "truncated": {},
}  # fmt: skip
MERGED = "of the output"
SCORES = {
    "rouge-1": {"f": 0.31, "p": 0.3, "r": 0.32},
    "rouge-l": {"f": 0.25, "p": 0.2, "r": 0.3},
    "bleu-4": 0.0801,
}


@pytest.fixture
def run(golden: Path, cached_base: Path, tmp_path: Path) -> Path:
    """A run folder as training and evaluation of `cached_base` leave it."""
    folder = tmp_path / "runs" / "adgen"
    shutil.copytree(golden / "lora" / "adapter", folder / "adapter")
    write_recipe(Recipe(), folder / "recipe.yaml")
    report = {"parts": [PART], "total": PART, "duplicates": 3, "eval": None}
    (folder / "data_report.json").write_text(json.dumps(report))
    (folder / "eval").mkdir()
    evaluation = {
        "model": str(cached_base),
        "adapter": str(folder / "adapter"),
        "adapter_sha256": file_sha256(folder / "adapter" / "adapter_model.safetensors"),
        "model_sha256": model_sha256(cached_base),
        "data": ["/somewhere/dev.json"],
        "rows": 100,
        "sampling": {"do_sample": False},
        "seed": SCORES,
        "stop_rate": 0.5,
        "signatures": {"seed": "rouge 1.0.1", "stop_rate": "share of stop"},
        "intervals": {"seed.rouge-l": [0.2, 0.3]},
    }
    (folder / "eval" / "metrics.json").write_text(json.dumps(evaluation))
    return folder


def test_weights_are_told_and_nobody_s_paths(
    cached_base: Path, run: Path, golden: Path, tmp_path: Path
) -> None:
    write_recipe(
        dataclasses.replace(Recipe(), output_dir="/home/me/runs/adgen"), run / "recipe.yaml"
    )
    adapters = [run / "adapter", golden / "lora" / "adapter"]
    merge_with(cached_base, adapters, tmp_path / "out", weights=[0.7, 0.3], dtype="float16")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "- Adapter: adgen, weight 0.7\n- Adapter: adapter, weight 0.3\n" in text
    assert "- Dtype: all weights brought to float16\n" in text
    assert "output_dir: adgen\n" in text and "/home/me" not in text and str(tmp_path) not in text
    assert "## Evaluation" not in text, "no evaluation has put the two together"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, True),
        ({"model": "/moved/base", "adapter": "/moved/adapter"}, True),  # the same weights
        ({"adapter": None, "adapter_sha256": None}, False),  # the base's own scores
        ({"model_sha256": "0" * 64}, False),  # another base of the same name
        ({"model_sha256": None}, False),  # an endpoint, or an earlier release
        ({"adapter": None, "adapter_sha256": None, "model_sha256": MERGED}, True),
        ({"adapter_sha256": "0" * 64}, False),  # trained again since
        ({"adapter_sha256": None}, False),
    ],
)
def test_scores_are_those_of_this_very_model(
    cached_base: Path, run: Path, tmp_path: Path, change: dict[str, object], told: bool
) -> None:
    scored = json.loads((run / "eval" / "metrics.json").read_text())
    if change.get("model_sha256") == MERGED:
        merge_with(cached_base, [run / "adapter"], tmp_path / "first")
        change = change | {"model_sha256": model_sha256(tmp_path / "first")}
    (run / "eval" / "metrics.json").write_text(json.dumps(scored | change))
    merge_with(cached_base, [run / "adapter"], tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert ("eval/metrics.json: 100 rows of dev.json by Qwen/Qwen-7B-Chat + " in text) == told
    assert ("## Evaluation" in text) == told and ("; greedy\n" in text) == told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "greedy, at most 128 new tokens"),
        (["--num_beams", "4"], "the best of 4 beams, at most 128 new tokens"),
        (
            ["--do_sample", "true", "--top_k", "0", "--max_new_tokens", "9"],
            "drawn with temperature 0.8, top_p 0.8, top_k 0, seed 42, at most 9 new tokens",
        ),
        (
            ["--repetition_penalty", "1.1", "--stop", "完", "--json_schema", "{}"],
            'greedy, at most 128 new tokens, repetition_penalty 1.1, stop ["完"], '
            "held to a JSON schema",
        ),
    ],
)
def test_the_way_of_answering_is_told_in_words(words: list[str], told: str) -> None:
    options = parse(EvaluateOptions, "", ["--output_dir", "o", *words])
    names = [field.name for field in dataclasses.fields(SamplingOptions)]
    sampling = {name: vars(options)[name] for name in (*names, "num_beams")}
    assert sampling_in_words(sampling) == told


def test_a_conversion_shows_the_scores_of_what_was_converted(small_dir: Path) -> None:
    own, other = {"model_sha256": model_sha256(small_dir)}, {"model_sha256": "0" * 64}
    model = VeryModel(small_dir, [], is_plain=True)
    assert model.is_shown_by(own) and not model.is_shown_by(other)
    assert not model.is_before(own), "nothing was put on it"


def test_scores_of_the_base_stand_beside_its_own_where_both_are_of_the_same_rows(
    cached_base: Path, run: Path, tmp_path: Path
) -> None:
    after = json.loads((run / "eval" / "metrics.json").read_text())
    base = {"adapter": None, "adapter_sha256": None, "stop_rate": 0.0625}
    (run / "before").mkdir()
    text = {}
    for name, change in (("same", {}), ("other", {"rows": 99})):
        (run / "before" / "metrics.json").write_text(json.dumps(after | base | change))
        merge_with(cached_base, [run / "adapter"], tmp_path / name)
        text[name] = (tmp_path / name / "README.md").read_text(encoding="utf-8")
    assert "| measure | before | after | 95 % interval |" in text["same"]
    assert "| stop_rate | 0.0625 | 0.5000 |  |" in text["same"]
    assert "| seed.rouge-l | 0.2500 | 0.2500 | 0.2000 to 0.3000 |" in text["same"]
    assert "| stop_rate | 0.5000 |  |" in text["other"] and "0.0625" not in text["other"]


@pytest.mark.parametrize(
    ("rank", "words"),
    [(1, "rank 1 "), (4, "rank 8 "), (200, "rank 256 "), (257, "rank 320 "), (513, "up to 512")],
)
def test_vllm_is_told_a_rank_that_it_allows(
    cached_base: Path, tmp_path: Path, rank: int, words: str
) -> None:
    peft_adapter(cached_base, tmp_path / "adapter", r=rank)
    convert_adapter(cached_base, tmp_path / "adapter", tmp_path / "lora")
    text = (tmp_path / "lora" / "README.md").read_text(encoding="utf-8")
    assert words in text and ("--enable-lora" in text) == (rank <= 512)
    assert "this adapter's is 513" in text or rank <= 512


def test_llama_cpp_is_offered_what_it_computes_alike(cached_base: Path, tmp_path: Path) -> None:
    """Its converter knows alpha / r alone."""
    for name, rslora in (("plain", False), ("rs", True)):
        peft_adapter(cached_base, tmp_path / name, use_rslora=rslora)
        convert_adapter(cached_base, tmp_path / name, tmp_path / f"{name}-qwen2")
    plain, rs = (
        (tmp_path / f"{name}-qwen2" / "README.md").read_text(encoding="utf-8")
        for name in ("plain", "rs")
    )
    assert "convert_lora_to_gguf" in plain and "`</s>`" in plain and "NFC" in plain
    assert "convert_lora_to_gguf" not in rs and "--enable-lora" in rs and "merge it for llama" in rs


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"use_dora": True}, "this one is DoRA"),
        ({"rank_pattern": {"attn.c_proj": 2}}, "this one has several ranks or alphas"),
        ({"alpha_pattern": {"attn.c_proj": 2}}, "this one has several ranks or alphas"),
        ({}, None),
    ],
)
def test_engines_that_know_plain_lora_alone_are_offered_nothing_else(
    cached_base: Path, tmp_path: Path, options: dict[str, object], what: str | None
) -> None:
    peft_adapter(cached_base, tmp_path / "adapter", task_type=None, **options)
    convert_adapter(cached_base, tmp_path / "adapter", tmp_path / "lora")
    text = (tmp_path / "lora" / "README.md").read_text(encoding="utf-8")
    assert ("--enable-lora" in text) == (what is None) and (what is None or what in text)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["task_type"], config["base_model_name_or_path"]) == (
        "CAUSAL_LM",
        "Qwen-7B-Chat-qwen2",
    )
    assert (tmp_path / "lora" / "NOTICE").is_file() and "[NOTICE](<NOTICE>)" in text


@pytest.fixture
def cached_base(small_dir: Path, tmp_path: Path) -> Path:
    """The base where huggingface_hub puts what it fetched."""
    base = tmp_path / "hub" / "models--Qwen--Qwen-7B-Chat" / "snapshots" / "0123abc"
    shutil.copytree(small_dir, base)
    (base / "NOTICE").write_text("notice")
    (base / "Tongyi Qianwen LICENSE AGREEMENT.txt").write_text("terms")
    return base


@pytest.mark.parametrize("target", ["qwen", "qwen2"])
def test_the_card_tells_where_the_model_comes_from(
    cached_base: Path, run: Path, tmp_path: Path, target
) -> None:
    merge_with(cached_base, [run / "adapter"], tmp_path / "out", to=find_format("qwen", target))
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "Qwen/Qwen-7B-Chat"
    assert (card.data.license, card.data.license_link) == (
        "other",
        "Tongyi Qianwen LICENSE AGREEMENT.txt",
    )
    assert card.data.library_name == "transformers" and "lora" in card.data.tags
    assert "\n# Qwen/Qwen-7B-Chat + adgen\n" in text
    assert "- Base: Qwen/Qwen-7B-Chat\n- Adapter: adgen\n" in text
    for name in ("NOTICE", "Tongyi Qianwen LICENSE AGREEMENT.txt"):
        assert f"[{name}](<{name}>)" in text
        assert (tmp_path / "out" / name).read_bytes() == (cached_base / name).read_bytes()
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert yaml.safe_load(recipe) == yaml.safe_load((run / "recipe.yaml").read_text())
    assert (
        "10 rows of 12 read, 1,000 tokens (400 targets)" in text
        and "2 dropped: empty answer" in text
    )
    assert "eval/metrics.json: 100 rows of dev.json" in text
    assert "| seed.rouge-l | 0.2500 | 0.2000 to 0.3000 |\n| seed.bleu-4 | 0.0801 |  |" in text
    assert str(tmp_path) not in text  # nobody's paths


def test_a_base_from_a_folder_and_no_run_leave_nothing_to_invent(small_qwen2: Path) -> None:
    card = ModelCard.load(small_qwen2 / "README.md")
    assert card.data.base_model is None and card.data.license is None
    assert "## Training" not in card.text and "## Evaluation" not in card.text
    assert "same function up to 64 tokens" in card.text


def test_a_data_report_of_another_version_costs_no_merge(
    small_dir: Path, run: Path, tmp_path: Path
) -> None:
    (run / "data_report.json").write_text("[1]")
    (run / "eval" / "metrics.json").write_text("{")
    merge_with(small_dir, [run / "adapter"], tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "see data_report.json of the run" in text and "## Evaluation" not in text


def python_blocks(folder: Path) -> list[str]:
    return re.findall(
        r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )


def test_the_code_in_the_cards_runs(
    small_dir: Path,
    golden: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = Path(shutil.copytree(small_dir, tmp_path / "base"))
    generation = json.loads((base / "generation_config.json").read_text()) | {"max_new_tokens": 4}
    (base / "generation_config.json").write_text(json.dumps(generation))
    monkeypatch.chdir(tmp_path)
    adapter = golden / "lora" / "adapter"
    merge_with(base, [adapter], tmp_path / "merged")
    merge_with(base, [], tmp_path / "base-qwen2", to=find_format("qwen", "qwen2"))
    convert_adapter(base, adapter, tmp_path / "lora")
    for folder in ("merged", "base-qwen2", "lora"):
        (code,) = python_blocks(tmp_path / folder)
        found: dict[str, object] = {}
        exec(code.replace("MODEL", folder).replace("BASE", "base-qwen2"), found)
        assert found["model"] is not None
    assert "<|im_start|>assistant\n" in capsys.readouterr().out


def test_the_commands_in_the_cards_are_this_project_s_own(
    small_qwen2: Path, golden: Path, small_dir, tmp_path
) -> None:
    """Those of other engines cannot be run here; ours must at least name options that there are."""
    convert_adapter(small_dir, golden / "lora" / "adapter", tmp_path / "lora")
    merge_with(small_dir, [golden / "lora" / "adapter"], tmp_path / "merged")
    launch = runpy.run_path(str(Path(__file__).parents[2] / "launch" / "merge.py"))
    actions = launch["command_line"]()._actions
    known = {option for action in actions for option in action.option_strings}
    for folder in (small_qwen2, tmp_path / "lora", tmp_path / "merged"):
        (line,) = re.findall(
            r"`python launch/merge\.py (.*?)`", (folder / "README.md").read_text(encoding="utf-8")
        )
        assert set(re.findall(r"--\w+", line)) <= known
    assert "--max-lora-rank 8 " in (tmp_path / "lora" / "README.md").read_text(encoding="utf-8")


def test_every_template_is_part_of_the_package() -> None:
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["qwen_ds.export"]
    folder = root / "qwen_ds" / "export"
    shipped = {path for pattern in patterns for path in folder.glob(pattern)}
    assert {path for path in folder.iterdir() if path.suffix == ".j2"} == shipped
    assert len(shipped) == 5
