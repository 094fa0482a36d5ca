"""Run folders for the tests of reports, in the shapes that training and serve.evaluate write."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from qwen_ds.recipe.loading import to_dict
from qwen_ds.recipe.options import Recipe

Row = dict[str, Any]


def write_lines(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def write_object(path: Path, value: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def losses(steps: int, end: float = 0.4) -> list[Row]:
    """Lines of metrics.jsonl: a loss that falls from 3 to `end`, with a ripple."""
    return [
        {
            "step": n,
            "epoch": 0,
            "loss": end + (3 - end) * math.exp(-5 * n / steps) + 0.05 * math.sin(n * n),
            "lr": 3e-4 * (1 - n / (steps + 1)),
            "grad_norm": 0.5 + 0.2 * math.sin(n * 1.7),
            "tokens_per_second": 12_000 + 500 * math.sin(n * 0.9),
            "tokens_per_second_per_rank": 1_500 + 62 * math.sin(n * 0.9),
            "learnt_tokens_per_second": 6_000 + 250 * math.sin(n * 0.9),
            "padding_share": 0.05 + 0.02 * math.sin(n * 1.1),
            "rank_imbalance": 1.01,
            "memory_gb": 21.5,
            "seconds": 1.25,
        }
        for n in range(1, steps + 1)
    ]


def evals(values: Sequence[float | None], every: int = 10) -> list[Row]:
    return [
        {"step": every * i, "eval_loss": value, "eval_perplexity": None}
        for i, value in enumerate(values, start=1)
    ]


def make_run(
    folder: Path,
    steps: int = 30,
    eval_losses: Sequence[float | None] = (1.8, 1.2, 0.9),
    changes: Row | None = None,
) -> Path:
    """A finished run with the files that every version has written. `changes`: dotted keys of the
    recipe with their values."""
    folder.mkdir(parents=True)
    (folder / "adapter").mkdir()
    every = max(1, steps // max(1, len(eval_losses)))
    write_lines(folder / "metrics.jsonl", losses(steps) + evals(eval_losses, every))
    recipe: Any = json.loads(json.dumps(to_dict(Recipe())))
    recipe |= {"output_dir": f"runs/{folder.name}"}
    for key, value in (changes or {}).items():
        section, _, name = key.rpartition(".")
        (recipe[section] if section else recipe)[name] = value
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    write_object(folder / "environment.json", {
        "command": ["launch/train.py", "--local_rank=0", "--optim.lr", "3e-4"],
        "ranks": 8,
        "trainable_parameters": 10_158_080,
        "total_parameters": 7_731_482_624,
        "device": "NVIDIA H200",
        "torch": "2.13.0",
        "cuda": None,
    })  # fmt: skip
    write_object(folder / "ds_config.json", {"zero_optimization": {"stage": 2}})
    write_object(folder / "data_report.json", data_report())
    return folder


def data_report(text: str = "") -> Row:
    """A data_report.json with rows of every fate, histograms, and two findings; `text` stands in
    every field that a row or a file name can reach."""
    part = {
        "path": f"data/train{text}.jsonl", "read": 2_000, "kept": 1_990, "tokens": 160_000,
        "learnt_tokens": 80_000, "longest_tokens": 508,
    }  # fmt: skip
    total = {
        **part,
        "dropped": {
            f"no answer{text}": {"rows": 10, "first": f"train.jsonl:7{text}", "detail": ""}
        },
        "skipped": {},
        "truncated": {"answer cut": {"rows": 120, "first": f"train.jsonl:9{text}", "detail": ""}},
        "encodings": {f"old{text}.csv": "gb18030"},
        "left_out": {f"notes{text}.md": f"no rows{text}"},
        "longest": f"train.jsonl:44{text}",
    }
    counts = [round(400 * math.exp(-(((i - 8) / 5) ** 2))) for i in range(20)]
    return {
        "rows": 1_990,
        "total": total,
        "data_sets": [part],
        "duplicates": 3,
        "options": {"max_tokens": 2_048, "max_answer_tokens": 254},
        "lengths": {"edges": list(range(0, 540, 26))[:21], "rows": counts, "targets": counts[::-1]},
        "findings": [
            {
                "finding": f"near duplicates{text}",
                "severity": "note",
                "count": 12,
                "share": 0.006,
                "examples": [],
                "advice": f"Keep one of them.{text}",
            },
            {
                "finding": f"mojibake{text}",
                "severity": "warn",
                "count": 4,
                "share": 0.002,
                "examples": [
                    {
                        "place": f"train.jsonl:12{text}",
                        "before": f"这条连衣裙{text}",
                        "marked": f"锟斤拷{text}",
                        "after": f"，夏天穿很凉快{text}",
                    }
                ],
                "advice": f"Read the file as GB18030: data.encoding gb18030.{text}",
            },
        ],
    }


PIECES = (
    "user",
    "\n",
    "写一句",
    "关于",
    "茶",
    "的",
    "话",
    "清",
    "茶",
    "一",
    "杯",
    "，",
    "心",
    "安",
    "。",
)
PROMPT_PIECES = 7


def token_losses(text: str = "", rows: int = 5) -> list[Row]:
    """Lines of token_losses.jsonl: the same rows before and after training."""
    lines = []
    for when, step, scale in (("start", 0, 1.0), ("end", 30, 0.15)):
        for row in range(rows):
            values = [
                None if at < PROMPT_PIECES else scale * ((at * 7 + row * 3) % 11) / 1.5
                for at in range(len(PIECES))
            ]
            lines.append({
                "when": when, "step": step, "source": f"/data/eval.jsonl:{row + 1}{text}",
                "pieces": [piece + text for piece in PIECES], "losses": values,
            })  # fmt: skip
    return lines


def samples(text: str = "", moments: int = 3, prompts: int = 2) -> list[Row]:
    return [
        {
            "step": 10 * moment,
            "prompt": f"<|im_start|>user\n第{prompt}个问题：什么是春天？{text}<|im_end|>\n"
            "<|im_start|>assistant\n",
            "answer": f"春天是第{moment}次回答{text}",
            "reference": f"春天是花开的时候{text}",
        }
        for moment in range(1, moments + 1)
        for prompt in range(1, prompts + 1)
    ]


def make_evaluation(
    folder: Path,
    scores: Sequence[float],
    model: str,
    adapter: str | None = None,
    text: str = "",
    by: str = "",
) -> None:
    """An evaluation folder: one ROUGE-L a row, with its interval and its texts. `by` stands in the
    answers, so that another model's differ."""
    mean = sum(scores) / len(scores)
    rows, lines = [], []
    for number, score in enumerate(scores):
        place = {"id": number, "source": f"dev.jsonl:{number + 1}{text}"}
        rows.append({**place, "seed.rouge-l": score, "stop_rate": 1.0})
        lines.append({
            **place,
            "prompt": f"<|im_start|>user\n问题{number}{text}<|im_end|>\n<|im_start|>assistant\n",
            "prediction": f"{folder.name}{by}的回答{number}{text}",
            "reference": f"参考答案{number}{text}",
        })  # fmt: skip
    write_lines(folder / "rows.jsonl", rows)
    write_lines(folder / "predictions.jsonl", lines)
    write_object(folder / "metrics.json", {
        "model": model,
        "adapter": adapter,
        "data": [f"data/dev{text}.jsonl"],
        "sampling": {"temperature": 0.8},
        "rows": len(scores),
        "finish_reasons": {"stop": len(scores)},
        "empty_predictions": 0,
        "seed": {"rouge-l": {"f": mean, "p": mean, "r": mean}, "bleu-4": mean / 2},
        "stop_rate": 1.0,
        "signatures": {"seed": f"rouge:1.0.1|scale:1{text}", "stop_rate": "ended by <|im_end|>"},
        "intervals": {"seed.rouge-l": [mean - 0.03, mean + 0.03], "stop_rate": [0.99, 1.0]},
    })  # fmt: skip


def make_whole_run(folder: Path, steps: int = 30, text: str = "") -> Path:
    """A run with every file that a report reads; `text` stands in each field that it can reach."""
    make_run(folder, steps, changes={"data.system": f"你是助手{text}", "optim.lr": 1e-4})
    write_object(folder / "data_report.json", data_report(text))
    write_lines(folder / "samples.jsonl", samples(text))
    write_lines(folder / "token_losses.jsonl", token_losses(text))
    base = [0.1 + 0.005 * (i % 7) for i in range(40)]
    make_evaluation(folder / "eval_before", base, f"base{text}", text=text)
    tuned = [0.4 + 0.01 * (i % 5) for i in range(40)]
    make_evaluation(folder / "eval_after", tuned, f"base{text}", f"runs/x{text}/adapter", text)
    return folder
