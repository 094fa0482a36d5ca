"""The model card of an output: where it comes from, how it was trained, how good it is, and how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qwen_ds.data.rows.data_report import summary
from qwen_ds.disk.read import read_json
from qwen_ds.errors import UserError
from qwen_ds.export.base_check import base_name, hub_id
from qwen_ds.model.adapter import CONFIG_NAME
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.folder import legal_texts

CARD_NAME = "README.md"
RECIPE, DATA_REPORT = "recipe.yaml", "data_report.json"

_LOADING = {
    "qwen": """transformers, with Qwen-DS installed (no `trust_remote_code`):

```python
import qwen_ds  # registers the original Qwen
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (kind.from_pretrained("MODEL") for kind in (AutoModelForCausalLM, AutoTokenizer))
```

llama.cpp:

```bash
python convert_hf_to_gguf.py MODEL --outfile model.gguf
llama-server -m model.gguf
```

vLLM and SGLang no longer know this architecture. They load it in the Qwen2 format, which computes the same up to
{seq_length} tokens: `python launch/merge.py --base MODEL --format qwen2 --output NEW`.
""",
    "qwen2": """transformers, nothing else needed:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (kind.from_pretrained("MODEL") for kind in (AutoModelForCausalLM, AutoTokenizer))
chat = [{{"role": "user", "content": "你好"}}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs)[0]))
```

vLLM, SGLang, llama.cpp:

```bash
vllm serve MODEL
python -m sglang.launch_server --model-path MODEL
python convert_hf_to_gguf.py MODEL --outfile model.gguf && llama-server -m model.gguf
```

It is the original Qwen under Qwen2's names, the same function up to {seq_length} tokens. Longer texts need the qwen
format (`python launch/merge.py --base MODEL --from qwen2 --output NEW`). Its tokenizer gives Qwen's ids, with
two differences: a special token directly before U+0338 is found (Qwen brings the text to NFC first, which changes the
token's last character), and in a chat a message that begins with a line break (or blanks and one) shares a token with
the line break before it. Special tokens spelled in a message are special tokens.
""",
    "qwen2 adapter": """On its base in the Qwen2 format, here called BASE
(`python launch/merge.py --base QWEN --format qwen2 --output BASE`):

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), "MODEL")
```

{engines}""",
}
_LORA_ENGINES = """vLLM, SGLang, llama.cpp:

```bash
vllm serve BASE --enable-lora --max-lora-rank {rank} --lora-modules adapter=MODEL
python -m sglang.launch_server --model-path BASE --lora-paths adapter=MODEL
python convert_lora_to_gguf.py MODEL --base BASE --outfile model.gguf
```
"""
_MERGED_ENGINES = """vLLM, SGLang and llama.cpp take an adapter for plain LoRA of one rank and alpha; this one {has}.
Merge it for them: `python launch/merge.py --base QWEN --adapter ADAPTER --format qwen2 --output NEW`, where ADAPTER is
the one that this one was made from.
"""


@dataclass(frozen=True, slots=True)
class Origin:
    """What an output was made from, and into."""

    base: Path
    adapters: tuple[Path, ...]
    format: str  # of the output, as the user calls it
    weights: tuple[float, ...] | None = None
    dtype: str = "keep"
    notes: tuple[str, ...] = ()


def write_card(folder: Path, origin: Origin) -> None:
    """Write README.md into `folder`, which is complete but for its card.

    The folder's own name is not in it: it may be given another one, and a hub gives it another one anyway.
    """
    is_adapter = (folder / CONFIG_NAME).is_file()
    config = read_json(folder / (CONFIG_NAME if is_adapter else "config.json"))
    kind = (
        "qwen2 adapter"
        if is_adapter
        else "qwen2"
        if config.get("model_type") == "qwen2"
        else "qwen"
    )
    parts = [_front_matter(folder, origin, kind), _title(origin), _sources(folder, origin)]
    for made in origin.adapters or (origin.base,):
        if (run := _run_of(made)) is not None:
            parts += _training(run)
    length = (
        QWenConfig.from_dict(config).seq_length
        if kind == "qwen"
        else config.get("max_position_embeddings")
    )
    loading = _LOADING[kind].format(seq_length=length, engines=_engines(config))
    parts.append(f"## How to load it\n\nMODEL is this folder, or its id on the hub.\n\n{loading}")
    (folder / CARD_NAME).write_text("\n".join(parts), encoding="utf-8")
    (folder / CARD_NAME).chmod(0o644)


def _engines(adapter: dict[str, Any]) -> str:
    """What other engines do with an adapter: they ignore what they do not know, and compute something else."""
    has = {
        "is DoRA": adapter.get("use_dora"),
        "has several ranks or alphas": adapter.get("rank_pattern") or adapter.get("alpha_pattern"),
    }
    odd = [what for what, found in has.items() if found]
    return (
        _MERGED_ENGINES.format(has=odd[0]) if odd else _LORA_ENGINES.format(rank=adapter.get("r"))
    )


def _front_matter(folder: Path, origin: Origin, kind: str) -> str:
    """The hub's metadata. A base that is no hub id has no entry: the hub would refuse the card."""
    legal = sorted(
        legal_texts(folder), key=lambda name: re.search("licen[cs]e", name, re.IGNORECASE) is None
    )
    fields: dict[str, Any] = {
        "language": ["zh", "en"],
        "library_name": "peft" if kind == "qwen2 adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": [
            "qwen",
            *(["qwen2"] if kind != "qwen" else []),
            *(["lora"] if origin.adapters else []),
        ],
    }
    if legal:
        fields |= {"license": "other", "license_name": "see-license-file", "license_link": legal[0]}
    if (base := hub_id(origin.base)) is not None:
        fields["base_model"] = base
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---\n"


def _title(origin: Origin) -> str:
    base = base_name(origin.base)
    return "# " + " + ".join([base, *map(_name_of, origin.adapters)]) + "\n"


def _name_of(adapter: Path) -> str:
    """An adapter's folder is called "adapter"; its run has a name of its own."""
    run = _run_of(adapter)
    return adapter.resolve().name if run is None else run.name


def _sources(folder: Path, origin: Origin) -> str:
    # Names, not paths: where files lay on somebody's machine is nobody else's business.
    lines = [f"- Base: {base_name(origin.base)}"]
    for i, adapter in enumerate(origin.adapters):
        weight = "" if origin.weights is None else f", weight {origin.weights[i]:g}"
        lines.append(f"- Adapter: {_name_of(adapter)}{weight}")
    lines.append(f"- Format: {origin.format}")
    if origin.dtype != "keep":
        lines.append(f"- Dtype: all weights brought to {origin.dtype}")
    lines += [f"- Note: {note}" for note in origin.notes]
    if not (folder / CONFIG_NAME).is_file():
        lines.append("- Checksums of all files, and the proof's figures: `merge_report.json`")
    if legal := legal_texts(folder):
        lines.append(
            f"- The base's terms hold for it too: {', '.join(f'[{name}](<{name}>)' for name in legal)}"
        )
    return "\n".join(lines) + "\n"


def _run_of(made: Path) -> Path | None:
    """The run that an adapter or a fully trained model came out of: it holds the recipe."""
    above = list(made.absolute().parents)[:3]  # RUN/adapter, RUN/checkpoints/step_000382/adapter
    return next(
        (
            folder
            for folder in above
            if (folder / RECIPE).is_file() and (folder / DATA_REPORT).is_file()
        ),
        None,
    )


def _training(run: Path) -> Iterator[str]:
    recipe = _without_places((run / RECIPE).read_text(encoding="utf-8"))
    yield f"## Training\n\nWith Qwen-DS, by this recipe:\n\n```yaml\n{recipe.rstrip()}\n```\n"
    try:
        lines = summary(read_json(run / DATA_REPORT))
    except (
        UserError,
        KeyError,
        TypeError,
        ZeroDivisionError,
    ):  # of another version; a card is not worth the merge
        lines = [f"see {DATA_REPORT} of the run"]
    yield "## Data\n\n" + "".join(f"- {line}\n" for line in lines)
    scores = [
        block for file in sorted(run.glob("**/metrics.json")) if (block := _scores(run, file))
    ]
    if scores:
        yield "## Evaluation\n\n" + "\n".join(scores)


def _without_places(recipe: str) -> str:
    """The recipe with absolute paths cut to their last part: the rest is somebody's machine."""

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [cut(inner) for inner in value]
        return Path(value).name if isinstance(value, str) and re.match(r"[/~]", value) else value

    return yaml.safe_dump(cut(yaml.safe_load(recipe)), sort_keys=False, allow_unicode=True)


def _scores(run: Path, file: Path) -> str | None:
    """The scores of one evaluation as a table; None where the file is no evaluation's."""
    try:
        report = read_json(file)
    except UserError:
        return None
    rows = [
        f"| {profile} | {measure} | {value['f'] if isinstance(value, dict) else value:.4f} |"
        for profile, measures in report.items()
        if isinstance(measures, dict) and "rouge-l" in measures
        for measure, value in measures.items()
    ]
    if not rows:
        return None
    data = ", ".join(Path(str(path)).name for path in report.get("data") or [])
    what = f"{file.relative_to(run).as_posix()}: {report.get('rows')} rows" + (
        f" of {data}" if data else ""
    )
    # A run's folder may hold scores of its base, or of another model, beside its own.
    if (model := report.get("model")) is not None:
        adapter = report.get("adapter")
        what += f" by {base_name(str(model))}" + (
            f" + {_name_of(Path(str(adapter)))}" if adapter else ""
        )
    sampling = json.dumps(report.get("sampling"))
    return "\n".join(
        [f"{what}; sampling {sampling}\n", "| profile | measure | F |", "|---|---|---|", *rows, ""]
    )
