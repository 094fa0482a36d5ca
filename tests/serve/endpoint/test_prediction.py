"""Files answered by a server: complete, in order, the same bytes whatever happens on the way."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from qwen_ds.errors import Failed, UserError
from serve.endpoint import patience
from serve.files.prediction import predict
from serve.options import EvaluateOptions, PredictOptions, parse
from serve.scores.report import evaluate
from tests.jobs import ROOT, Job
from tests.serve.scripted_server import Body, Handler, answer_to, closed_url, scripted

ROWS = [{"messages": [{"role": "user", "content": f"row {i}"}], "id": f"r{i}"} for i in range(20)]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_WAIT", 0.02)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def words_for(url: str, rows: Path, output: Path, *more: str) -> list[str]:
    return ["--endpoint", url, "--input", str(rows), "--output", str(output), *more]


def run(url: str, rows: Path, output: Path, *more: str) -> bytes:
    options = parse(PredictOptions, "", words_for(url, rows, output, *more))
    predict(None, options.input, output, options)
    return output.read_bytes()


def number(body: Body) -> int:
    return int(body["messages"][-1]["content"].split()[-1]) if body else -1


def in_trouble(handler: Handler, body: Body, tries: int) -> bool:
    if not body or tries > number(body) % 3:
        return False
    if number(body) % 2:
        handler.reply(500, {})
    else:
        handler.break_off()
    return True


def dying(handler: Handler, body: Body, _: int) -> bool:
    if number(body) > 10:
        handler.reply(503, {})
    return number(body) > 10


def test_the_bytes_are_the_same_with_trouble_and_without(rows: Path, tmp_path: Path) -> None:
    with scripted() as server:
        expected = run(server.url, rows, tmp_path / "calm.jsonl")
        port = server.server_address[1]
    with scripted(in_trouble, port) as server:
        assert run(server.url, rows, tmp_path / "trouble.jsonl") == expected
    lines = [json.loads(line) for line in expected.splitlines()]
    assert [line["row_id"] for line in lines] == [row["id"] for row in ROWS]
    assert lines[3] == {
        "id": 3,
        "row_id": "r3",
        "source": f"{rows}:4",
        "prompt": "row 3",
        "prediction": answer_to({"messages": [{"content": "row 3"}]}),
        "reference": None,
        "finish_reason": "stop",
        "prompt_tokens": 5,
        "completion_tokens": len(lines[3]["prediction"]),
    }


def test_a_server_that_dies_loses_no_answer_and_the_same_command_goes_on(
    rows: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    more = ("--timeout_minutes", "0.005", "--concurrency", "1")
    with scripted() as server:
        expected = run(server.url, rows, tmp_path / "expected.jsonl")
        port = server.server_address[1]
    with scripted(dying, port), pytest.raises(Failed, match="the same command goes on from here"):
        run(server.url, rows, output, *more)
    assert not output.exists()
    with scripted(port=port) as server:
        assert run(server.url, rows, output, *more) == expected
        asked = sorted(map(number, server.bodies))
    assert asked == list(range(11, 20)), "those that were answered are not asked for again"


def test_a_resumed_run_mixes_no_models(rows: Path, tmp_path: Path) -> None:
    output, more = tmp_path / "out.jsonl", ("--timeout_minutes", "0.005", "--concurrency", "1")
    with scripted(dying) as server:
        with pytest.raises(Failed):
            run(server.url, rows, output, *more)
        server.models = ["other"]
        with pytest.raises(UserError, match='endpoint_model "qwen" instead of "other"'):
            run(server.url, rows, output, *more)
        with scripted() as other, pytest.raises(UserError, match="interrupted run with endpoint"):
            run(other.url, rows, output, *more)


def test_a_row_that_the_server_refuses_is_written_with_its_error(
    rows: Path, tmp_path: Path
) -> None:
    def refusing(handler: Handler, body: Body, _: int) -> bool:
        if number(body) == 7:
            handler.reply(400, {"error": {"message": "context length is 32 tokens"}})
        return number(body) == 7

    with scripted(refusing) as server:
        lines = [json.loads(x) for x in run(server.url, rows, tmp_path / "o").splitlines()]
    failed = lines.pop(7)
    assert (failed["id"], failed["prediction"], failed["finish_reason"]) == (7, "", "error")
    assert "answered 400 (context length is 32 tokens)" in failed["error"]
    assert len(lines) == 19 and not any("error" in line for line in lines)


@pytest.mark.job
def test_the_command_ends_in_one_line(rows: Path, tmp_path: Path) -> None:
    script, output = ROOT / "serve" / "predict.py", tmp_path / "out.jsonl"
    with scripted(lambda h, b, n: h.reply(401, {"error": {"message": "who?"}}) is None) as server:
        job = Job(words_for(server.url, rows, output), 1, script).wait(120)
    assert job.codes == [2]
    assert job.err.count("\n") == 1 and "answered 401 (who?); expected a key" in job.err
    _, url = closed_url()
    job = Job(words_for(url, rows, output, "--timeout_minutes", "0.01"), 1, script).wait(120)
    assert job.codes == [1]
    assert job.err.count("\n") == 1 and "the same command goes on from here" in job.err
    with scripted(port=int(url.split(":")[2].removesuffix("/v1"))):
        Job(words_for(url, rows, output), 1, script).wait(120).ok()
    assert len(output.read_text().splitlines()) == 20


@pytest.mark.job
def test_ctrl_c_waits_for_no_server(rows: Path, tmp_path: Path) -> None:
    with scripted() as server:
        server.seconds = 30.0
        words = words_for(server.url, rows, tmp_path / "out.jsonl")
        job = Job(words, 1, ROOT / "serve" / "predict.py")
        job.until(lambda: len(server.bodies) == 20).send(signal.SIGINT).wait(15)
    assert job.codes == [130]
    assert "stopped by SIGINT" in job.err and "Traceback" not in job.err


def test_an_evaluation_scores_what_a_server_answers(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"content": f"row {i}", "summary": "x"}) + "\n" for i in (1, 2))
    )
    with scripted(lambda h, b, n: number(b) == 2 and h.reply(422, {}) is None) as server:
        words = ["--endpoint", server.url, "--data", str(data), "--output_dir", str(tmp_path / "e")]
        report = evaluate(parse(EvaluateOptions, "", words))
        assert report is not None and report["model"] == server.url
    assert (report["rows"], report["empty_predictions"]) == (2, 1)
    assert report["finish_reasons"] == {"error": 1, "stop": 1}


def test_models_of_a_server_are_compared(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"content": "row {i}", "summary": "x"}}\n' for i in range(4)))
    with scripted() as server:
        server.models = ["base", "org/tuned"]
        compared = ["--compare", "base", "new=org/tuned", "--perplexity", "false"]
        words = ["--endpoint", server.url, *compared, "--data", str(data)]
        report = evaluate(parse(EvaluateOptions, "", [*words, "--output_dir", str(tmp_path / "e")]))
        assert [body["model"] for body in server.bodies] == ["base"] * 4 + ["org/tuned"] * 4
        assert not any("prompt" in body for body in server.bodies), "no losses are asked for"
    assert report is not None and report["models"] == ["base", "new"]
    told = json.loads((tmp_path / "e" / "new" / "metrics.json").read_text(encoding="utf-8"))
    assert told["endpoint_model"] == "org/tuned" and told["model_sha256"] is None
