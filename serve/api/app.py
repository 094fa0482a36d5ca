"""The routes of the HTTP API."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from qwen_ds.errors import UserError
from serve.api.answering import CLIENT_LEFT, Answering, ClientGone, no_engine
from serve.api.bodies import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    OriginalBody,
    TokenizeBody,
    read_body,
)
from serve.api.chat import ChatRequest, functions_of, prompt_of, refuse_other_ends
from serve.api.completions import TextRequest
from serve.api.engines import EnginePool
from serve.api.errors import ApiError
from serve.api.metrics import Metrics
from serve.api.original import OriginalRoute
from serve.api.served import Served

Json = dict[str, Any]
Kind = TypeVar("Kind", bound=Body)
Result = TypeVar("Result")
_LARGE_BYTES = 1 << 16  # of a body: some milliseconds of parsing
_PAGE = Path(__file__).parent / "page" / "index.html"


@dataclass(frozen=True, slots=True)
class Front:
    """Everything that the routes need."""

    served: Served
    pool: EnginePool
    metrics: Metrics
    answering: Answering


def create_app(front: Front) -> FastAPI:
    """The app, whose engines are started and ended by its caller."""
    app = FastAPI(
        title="Qwen-DS", version=_version(), redirect_slashes=False, docs_url=None, redoc_url=None
    )
    _handle_errors(app)
    _add_answers(app, front)
    _add_tokens(app, front)
    _add_facts(app, front)
    return app


def _version() -> str:
    return importlib.metadata.version("qwen-ds")


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def of_api(request: Request, error: ApiError) -> Response:
        request.scope["passing"].error = error.logged()
        return JSONResponse(error.body(), error.status, error.headers())

    @app.exception_handler(UserError)
    async def of_user(request: Request, error: UserError) -> Response:
        return await of_api(request, ApiError(400, str(error)))

    @app.exception_handler(HTTPException)
    async def of_route(request: Request, error: HTTPException) -> Response:
        came = f"{request.method} {request.url.path}: {error.detail}"
        response = await of_api(request, ApiError(error.status_code, came))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(ClientGone)
    async def of_nobody(request: Request, error: ClientGone) -> Response:
        request.scope["passing"].error = CLIENT_LEFT
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def of_ours(request: Request, error: Exception) -> Response:
        return await of_api(request, ApiError(500, "internal server error; see the server's log"))


async def _body(request: Request, kind: type[Kind], default: bytes = b"") -> Kind:
    raw = await request.body() or default
    if len(raw) < _LARGE_BYTES:
        return read_body(kind, raw)
    return await run_in_threadpool(read_body, kind, raw)  # streams go on meanwhile


def _takes(kind: type[Body]) -> Json:
    """The part of the OpenAPI document for a route that reads its body by itself."""
    schema = kind.model_json_schema(ref_template=f"#/components/schemas/{kind.__name__}.{{model}}")
    definitions = schema.pop("$defs", {})
    _inline(schema, definitions)
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"content": content, "required": True}}


def _inline(value: Any, definitions: Json) -> None:
    """Put the definitions of a schema where they are used; they hold no rings."""
    members = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | list):
        return
    for member in members:
        if isinstance(member, dict) and "$ref" in member:
            member.update(definitions[member.pop("$ref").rpartition(".")[2]])
        _inline(member, definitions)


_ERRORS: dict[int | str, Json] = {
    status: {"description": about}
    for status, about in (
        (400, "the request cannot be answered"), (401, "a key is needed"),
        (403, "the page or name is not this server's own"), (404, "no such model"),
        (408, "the body came too slowly"), (413, "the body is too large"),
        (415, "the content type is not JSON's"), (499, "the client left"),
        (500, "the engine has failed"), (503, "too much to do, or no engine yet"),
        (504, "it took too long"),
    )
}  # fmt: skip


def _room(front: Front) -> int:
    """Tokens of keys and values that a request may have. ApiError 503: no engine is there."""
    if not front.pool.ready:
        raise no_engine()
    return front.pool.room


def _add_answers(app: FastAPI, front: Front) -> None:
    served, answering = front.served, front.answering

    @app.post("/v1/chat/completions", openapi_extra=_takes(ChatBody), responses=_ERRORS)
    async def chat(request: Request) -> Response:
        body = await _body(request, ChatBody)
        return await answering.respond(
            request, await run_in_threadpool(ChatRequest, body, served, _room(front))
        )

    @app.post("/v1/completions", openapi_extra=_takes(CompletionBody), responses=_ERRORS)
    async def completions(request: Request) -> Response:
        body = await _body(request, CompletionBody)
        return await answering.respond(
            request, await run_in_threadpool(TextRequest, body, served, _room(front))
        )

    @app.post("/nlg/text_generate", openapi_extra=_takes(OriginalBody), responses=_ERRORS)
    async def text_generate(request: Request) -> Response:
        """The original project's route, with its request, defaults and answer."""
        body = await _body(request, OriginalBody, b"{}")
        return await answering.respond(
            request, await run_in_threadpool(OriginalRoute, body, served, _room(front))
        )


def _add_tokens(app: FastAPI, front: Front) -> None:
    served = front.served

    @app.post("/tokenize", openapi_extra=_takes(TokenizeBody), responses=_ERRORS)
    async def tokenize(request: Request) -> Json:
        """The ids that a prompt or a chat becomes."""
        ids = await run_in_threadpool(_tokens, await _body(request, TokenizeBody), served)
        return {"count": len(ids), "max_model_len": served.context, "tokens": ids}

    @app.post("/detokenize", openapi_extra=_takes(DetokenizeBody), responses=_ERRORS)
    async def detokenize(request: Request) -> Json:
        body = await _body(request, DetokenizeBody)
        served.adapter_of(body.model)
        return {"prompt": served.text_of(body.tokens, "tokens")}


def _tokens(body: TokenizeBody, served: Served) -> list[int]:
    served.adapter_of(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "expected either prompt or messages", "prompt")
    if body.messages is None:
        return served.encoding.ordinary(body.prompt or "")
    chat = ChatBody(**body.model_dump(exclude={"prompt"}))
    refuse_other_ends(chat)
    asked = functions_of(chat)
    return prompt_of(served, body.messages, asked.functions).ids(served.encoding)


def _add_facts(app: FastAPI, front: Front) -> None:
    served, pool, began = front.served, front.pool, int(time.time())
    text = _PAGE.read_text(encoding="utf-8")
    headers = _page_headers(text)

    def card(name: str) -> Json:
        root = served.names[0]
        base = {"id": name, "object": "model", "created": began, "owned_by": "qwen-ds"}
        parent = root if name in served.adapters else None
        return base | {"root": root, "parent": parent, "max_model_len": served.context}

    @app.head("/v1/models", include_in_schema=False)
    @app.get("/v1/models")
    async def models() -> Json:
        names = (*served.names, *served.adapters)
        return {"object": "list", "data": [card(name) for name in names]}

    @app.head("/v1/models/{name:path}", include_in_schema=False)
    @app.get("/v1/models/{name:path}", responses=_ERRORS)
    async def model(name: str) -> Json:
        served.adapter_of(name)
        return card(name)

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses=_ERRORS)
    async def health() -> Response:
        """200 once every engine has loaded, as long as one is there."""
        ready = len(pool.ready)
        is_up = ready and pool.has_loaded and not front.answering.is_draining
        status = 200 if is_up else 503
        return JSONResponse({"engines": len(pool.engines), "ready": ready}, status)

    @app.head("/metrics", include_in_schema=False)
    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(front.metrics.text(), media_type=kind)

    @app.head("/version", include_in_schema=False)
    @app.get("/version")
    async def version() -> Json:
        return {"version": _version()}

    @app.head("/", include_in_schema=False)
    @app.get("/", response_class=HTMLResponse)
    async def page() -> Response:
        """The chat page."""
        return HTMLResponse(text, headers=headers)


def _page_headers(text: str) -> dict[str, str]:
    """The page's policy: it loads nothing from anywhere, and runs its own script alone."""
    sources = {}
    for kind in ("script", "style"):
        (inner,) = re.findall(f"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        sources[kind] = f"{kind}-src 'sha256-{digest}'"
    return {
        "content-security-policy": (
            f"default-src 'none'; {sources['script']}; {sources['style']}; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'"
        ),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
