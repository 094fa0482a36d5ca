"""Clients that people have: openai's, LangChain's and its agent, and a fuzzer of the document."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import openai
import pytest
from langchain.agents import create_agent
from langchain_core.messages import ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

from qwen_ds.model.react import STOP
from serve.api.jobs import ENGINE_GONE, Job, JobError
from tests.serve.api.running import Running
from tests.serve.api.scripted import scripted_server

QUESTION = [{"role": "user", "content": "你好"}]


@pytest.mark.job
def test_openais_client_gets_answers_streams_and_errors(server: Running) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["qwen", "alias"]
    given = {"model": "qwen", "messages": QUESTION, "temperature": 0, "max_completion_tokens": 9}
    whole = client.chat.completions.create(**given, logprobs=True, top_logprobs=2)
    answer = whole.choices[0].message.content
    assert whole.usage is not None and whole.usage.completion_tokens == 9
    assert whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs.content or ()) == 9
    chunks = list(client.chat.completions.create(**given, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer

    async def asynchronous() -> str:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            found = await client.chat.completions.create(**given)
            return str(found.choices[0].message.content)

    assert asyncio.run(asynchronous()) == answer
    completion = client.completions.create(model="qwen", prompt="a", max_tokens=3, temperature=0)
    assert completion.choices[0].text
    with pytest.raises(openai.NotFoundError, match="there is no model 'nix'"):
        client.chat.completions.create(**given | {"model": "nix"})
    with pytest.raises(openai.BadRequestError, match="context is 8192 tokens"):
        client.chat.completions.create(**given | {"max_completion_tokens": 9000})


def test_openais_client_tries_again_after_an_engine_has_died(vocab_path: Path) -> None:
    tries: list[int] = []

    def says(job: Job) -> list[str] | JobError:
        tries.append(1)
        return JobError(ENGINE_GONE, "gone") if len(tries) == 1 else ["well"]

    with scripted_server(vocab_path, says) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        found = client.chat.completions.create(model="qwen", messages=QUESTION)
    assert found.choices[0].message.content == "well" and len(tries) == 2


def test_an_agent_of_langchain_with_a_tool_runs_to_its_end(vocab_path: Path) -> None:
    asked: list[str] = []

    @tool
    def weather(city: str) -> str:
        """The weather of a city."""
        asked.append(city)
        return "28℃"

    def says(job: Job) -> list[str]:
        assert STOP in job.stops
        if not asked:
            call = 'Thought: look\nAction: weather\nAction Input: {"city": "上海"}'
            return [call[i : i + 5] for i in range(0, len(call), 5)]
        return [" I now know the final answer.\nFinal Answer: ", "上海28", "℃。"]

    for streams in (False, True):
        asked.clear()
        with scripted_server(vocab_path, says) as (url, pool):
            model = ChatOpenAI(
                model="qwen", base_url=f"{url}/v1", api_key="none", streaming=streams
            )
            agent = create_agent(model, [weather])
            found = agent.invoke({"messages": [{"role": "user", "content": "上海天气？"}]})
        messages = found["messages"]
        assert asked == ["上海"] and messages[-1].content == "上海28℃。"
        assert [m.content for m in messages if isinstance(m, ToolMessage)] == ["28℃"]
        assert len(pool.jobs_seen) == 2


@pytest.mark.job
def test_langchain_gets_answers_and_streams_of_a_real_engine(server: Running) -> None:
    model = ChatOpenAI(
        model="small", base_url=f"{server.url}/v1", api_key="none", temperature=0,
        max_completion_tokens=12,
    )  # fmt: skip
    model.model_name = server.client.get("/v1/models").json()["data"][0]["id"]
    whole = model.invoke("你好").content
    assert whole and "".join(str(chunk.content) for chunk in model.stream("你好")) == whole


@pytest.mark.job
def test_the_document_describes_every_route(server: Running) -> None:
    document = server.client.get("/openapi.json").json()
    chat = document["paths"]["/v1/chat/completions"]["post"]
    fields = chat["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert {"messages", "tools", "stream", "max_completion_tokens"} <= fields.keys()
    assert "$ref" not in json.dumps(fields)
    assert {"/nlg/text_generate", "/tokenize", "/metrics", "/health"} <= document["paths"].keys()
