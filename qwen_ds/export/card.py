"""The model card of an output: its origin, its training, its scores, and how to load it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import ModelCardData

from qwen_ds.data.rows.data_report import summary
from qwen_ds.disk.read import read_json
from qwen_ds.disk.write import write_text
from qwen_ds.errors import UserError
from qwen_ds.export.base_check import base_name, doubts, hub_id
from qwen_ds.export.card_scores import VeryModel, evaluations_of
from qwen_ds.export.stream.changes import Adapters
from qwen_ds.model.adapter import CONFIG_NAME
from qwen_ds.model.carry_over import legal_texts
from qwen_ds.model.config_check import checked_config
from qwen_ds.model.family import QWEN
from qwen_ds.terminal import one_line, visible

CARD_NAME = "README.md"
# The values that vLLM's --max-lora-rank may have.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
RECIPE, DATA_REPORT = "recipe.yaml", "data_report.json"

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,  # the card is Markdown; escaping for HTML would spoil names in it
)


def _as_words(text: object) -> str:
    """Text of others, such as a folder's name, as plain words in Markdown: no markup, one line."""
    return re.sub(r"([\\`*<>\[\]|!#])", r"\\\1", one_line(text))


def _as_code(text: str) -> str:
    """A block of YAML, in a fence that nothing in it can close."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}yaml\n{visible(text)}\n{fence}"


_TEMPLATES.filters |= {"words": _as_words, "code": _as_code}


def write_card(
    folder: Path,
    base: Path,
    adapters: Adapters,
    format: str,
    dtype: str = "keep",
    sums: tuple[str | None, str | None] = (None, None),
) -> None:
    """Write README.md into `folder`, which is complete but for its card.

    The folder's own name is not in it: people rename folders, and hubs do anyway. `format` and
    `dtype` of the folder are as the user chose them; `sums` are the checksums of its weights and of
    its base's (`model_sha256`), as far as they are known.
    """
    is_adapter = (folder / CONFIG_NAME).is_file()
    config = read_json(folder / (CONFIG_NAME if is_adapter else "config.json"))
    kind = "adapter" if is_adapter else str(config.get("model_type", QWEN.model_type))
    made = [adapter.folder for adapter in adapters.members]
    runs = [run for place in made or [base] if (run := _run_of(place)) is not None]
    is_plain = len(made) < 2 and adapters.weights is None and dtype == "keep"
    very_model = VeryModel(base, made, is_plain, *sums)
    by = " + ".join([base_name(base), *map(_name_of, made)])
    legal = legal_texts(folder)
    seq_length = config.get("max_position_embeddings")
    if kind == QWEN.model_type:
        seq_length = checked_config(config, folder / "config.json", QWEN.config_class).seq_length
    card = _TEMPLATES.get_template("card.md.j2").render(
        kind=kind,
        metadata=_metadata(legal, base, bool(made), kind),
        # Names, not paths: where things lie on somebody's machine is nobody else's business.
        base=base_name(base),
        adapters=[_name_of(adapter) for adapter in made],
        weights=adapters.weights,
        format=format,
        dtype=dtype,
        notes=doubts(base, adapters.members),
        legal=legal,
        runs=[
            _training(run) | {"evaluations": evaluations_of(run, very_model, by)} for run in runs
        ],
        seq_length=seq_length,
        rank=config.get("r"),
        vllm_rank=next((rank for rank in VLLM_RANKS if rank >= config.get("r", 1)), None),
        rslora=bool(config.get("use_rslora")),
        unlike_lora=_unlike_plain_lora(config),
    )
    write_text(folder / CARD_NAME, card)


def _unlike_plain_lora(adapter: dict[str, Any]) -> str | None:
    """Why other engines cannot take this adapter: they ignore what they do not know."""
    if adapter.get("use_dora"):
        return "is DoRA"
    if adapter.get("rank_pattern") or adapter.get("alpha_pattern"):
        return "has several ranks or alphas"
    return None


def _metadata(legal: list[str], base: Path, is_tuned: bool, kind: str) -> str:
    """The hub's metadata. A base that is no hub id is left out: the hub would refuse the card."""
    tags = ["qwen"] + ["qwen2"] * (kind != QWEN.model_type) + ["lora"] * is_tuned
    licences = [name for name in legal if re.search("licen[cs]e", name, re.IGNORECASE)]
    terms: dict[str, Any] = {}
    if legal:
        link = (licences or legal)[0]
        terms = {"license": "other", "license_name": "see-license-file", "license_link": link}
    data = ModelCardData(
        language=["zh", "en"],
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=tags,
        base_model=hub_id(base),
        **terms,
    )
    return data.to_yaml()


def _name_of(adapter: Path) -> str:
    """The name of an adapter: its run's, since the folder itself is called "adapter"."""
    return (_run_of(adapter) or adapter.resolve()).name


def _run_of(made: Path) -> Path | None:
    """The folder of the run that an adapter or a fully trained model came out of."""
    above = list(made.absolute().parents)[:3]  # RUN/checkpoints/step_000382/adapter
    files = (RECIPE, DATA_REPORT)
    return next((f for f in above if all((f / name).is_file() for name in files)), None)


def _training(run: Path) -> dict[str, Any]:
    """Recipe and data of a run."""
    try:
        data = summary(read_json(run / DATA_REPORT))
    # A report of another version: no reason to lose the merge.
    except (UserError, KeyError, TypeError, ZeroDivisionError):
        data = [f"see {DATA_REPORT} of the run"]
    recipe = (run / RECIPE).read_text(encoding="utf-8")
    return {"recipe": _without_places(recipe).rstrip(), "data": data}


def _without_places(recipe: str) -> str:
    """The recipe with absolute paths cut to their last part, which says nothing of the machine."""

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [cut(inner) for inner in value]
        return Path(value).name if isinstance(value, str) and re.match(r"[/~]", value) else value

    return yaml.safe_dump(cut(yaml.safe_load(recipe)), sort_keys=False, allow_unicode=True)
