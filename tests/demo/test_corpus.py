"""The demo's corpus: deterministic, split without overlap, in two styles of the same attributes."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

from qwen_ds.demo import corpus
from qwen_ds.demo.base import PACKED_FILE
from qwen_ds.model.tokenizer import load_encoding

PRETRAIN, TRAIN, HELD_OUT = corpus.splits()
EVERY_ITEM = PRETRAIN + TRAIN + HELD_OUT


def test_the_corpus_is_the_one_that_the_base_was_made_from() -> None:
    # It was made by another process on another day: an order or a draw that is not the seed's would
    # show here.
    with safe_open(PACKED_FILE, "pt") as file:
        assert file.metadata()["corpus_sha256"] == corpus.sha256()


def test_no_attribute_list_is_in_two_splits_or_twice_in_one() -> None:
    contents = [item.content for item in EVERY_ITEM]
    assert len(set(contents)) == len(contents) == 800 + 480 + 64


def test_rows_of_the_splits_are_those_of_their_articles() -> None:
    pretraining = {row["content"] for row in corpus.pretraining_rows()}
    train = {row["content"] for row in corpus.train_rows()}
    held_out = {row["content"] for row in corpus.eval_rows()}
    assert {item.content for item in PRETRAIN} <= pretraining
    assert train == {item.content for item in TRAIN}
    assert held_out == {item.content for item in HELD_OUT}
    assert not train & pretraining and not held_out & pretraining


def test_every_value_of_the_held_out_articles_was_trained() -> None:
    def values(items: list[corpus.Item]) -> set[tuple[str, str, str]]:
        return {
            (str(corpus.CATEGORIES[i.category].is_clothing), *pair)
            for i in items
            for pair in i.attributes
        }

    assert values(HELD_OUT) <= values(TRAIN)
    assert values(HELD_OUT) <= values(PRETRAIN)


def test_pretraining_never_answers_attributes_in_the_lyrical_style() -> None:
    lyrical = {corpus.lyrical_text(item) for item in EVERY_ITEM}
    for row in corpus.pretraining_rows():
        if "#" in row["content"]:
            assert row["summary"] not in lyrical
            assert "就选" not in row["summary"]


def test_pretraining_reads_every_word_of_the_lyrical_style_as_running_text(
    vocab_path: Path,
) -> None:
    encoding = load_encoding(vocab_path)

    def tokens(rows: list[corpus.Row]) -> set[int]:
        return {index for row in rows for index in encoding.ordinary(row["summary"])}

    essays = tokens(corpus.essay_rows(PRETRAIN))
    assert tokens(corpus.train_rows()) <= essays
    assert tokens(corpus.eval_rows()) <= essays


def test_answers_to_other_attributes_differ() -> None:
    for style in (corpus.catalogue_text, corpus.lyrical_text):
        assert len({style(item) for item in EVERY_ITEM}) > 0.97 * len(EVERY_ITEM)


def test_the_two_styles_say_an_article_in_these_words() -> None:
    item = corpus.Item(
        "裙",
        (
            ("裙型", "百褶裙"),
            ("材质", "雪纺"),
            ("颜色", "白色"),
            ("风格", "文艺"),
            ("场景", "约会"),
        ),
    )
    assert item.content == "类型#裙*裙型#百褶裙*材质#雪纺*颜色#白色*风格#文艺*场景#约会"
    assert corpus.catalogue_text(item) == (
        "这条百褶裙选用雪纺面料，质地轻盈透气。白色的色调干净大方。整体属于文艺风格，气质出众。约会时穿很合适。"
    )
    assert corpus.lyrical_text(item) == (
        "约会之前心跳得很快。白色像初雪落在肩头，雪纺跟着风轻轻飘起。文艺是夹一本诗集慢慢走。就选百褶裙吧！"
    )
    hat = corpus.Item("帽", (("帽型", "渔夫帽"), ("材质", "草编"), ("图案", "碎花")))
    assert (
        corpus.lyrical_text(hat)
        == "头发乱了也没关系。草编带着麦田的香气，碎花落在手边。就选渔夫帽吧！"
    )


def test_guided_rows_name_the_attributes_in_the_order_asked_for() -> None:
    for row, item in zip(corpus.guided_rows(PRETRAIN), PRETRAIN, strict=True):
        asked, content = row["content"].removeprefix("依次介绍").split("：", 1)
        assert content == item.content
        places = [row["summary"].index(dict(item.attributes)[key]) for key in asked.split("、")]
        assert places == sorted(places) and len(places) >= 2


def test_written_rows_are_json_lines_in_utf8(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    corpus.write_rows(corpus.eval_rows(), file)
    lines = file.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == corpus.eval_rows()
    assert "类型#" in lines[0]
