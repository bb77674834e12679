"""/openapi.json: the server's interface, written from the types that parse requests and encode answers.

Knows no handler: a test checks that every route is in it, and a fuzzer that the server keeps to it.
"""

from __future__ import annotations

from typing import Any

import msgspec

from toolkit.engine.frontend.control import OPERATIONS, ControlAnswer
from toolkit.engine.frontend.errors import ErrorBody
from toolkit.engine.frontend.protocol import IGNORED, OFF, ChatRequest, CompletionRequest
from toolkit.engine.frontend.responses import ChatAnswer, TextAnswer

Schema = dict[str, Any]

_REF = "#/components/schemas/"
# What any request may be answered, beside its own answer.
_ERRORS = {
    "400": "field, value and rule of what is wrong with the request", "401": "wrong or missing API key",
    "404": "no such model", "413": "the body is too large", "503": "loading, overloaded or failed: see /health",
}  # fmt: skip
_CONTROL_ERRORS = {"409": "the state of the ranks does not allow it", "504": "a rank did not reply"}
GETS = {
    "/live": "200 from the process's first moment", "/health": "200 when completions are served, else 503",
    "/metrics": "Prometheus metrics", "/v1/models": "the one model", "/openapi.json": "this document",
    "/get_server_info": "configuration; memory by kind and state of every rank",
    "/eplb": "state and totals of rebalancing experts",
}  # fmt: skip


def document(model: str) -> Schema:
    """OpenAPI 3.1. ``model``: the one name that requests may give."""
    bodies: list[type] = [ChatRequest, CompletionRequest, *{body for _, body in OPERATIONS.values()}]
    _, schemas = msgspec.json.schema_components(
        [*bodies, ChatAnswer, TextAnswer, ControlAnswer, ErrorBody], ref_template=_REF + "{name}"
    )
    for request in (ChatRequest, CompletionRequest):
        schema = schemas[request.__name__]
        schema["properties"] = _unserved(request) | schema["properties"] | {"model": {"enum": [model, None]}}
        schema["additionalProperties"] = False
    paths: Schema = {path: {"get": _get(path, summary)} for path, summary in GETS.items()}
    for path, (_, body) in OPERATIONS.items():
        paths[path] = {"post": _post(body, ControlAnswer, _ERRORS | _CONTROL_ERRORS, required=False)}
    paths["/v1/chat/completions"] = {"post": _post(ChatRequest, ChatAnswer, _ERRORS)}
    paths["/v1/completions"] = {"post": _post(CompletionRequest, TextAnswer, _ERRORS)}
    info = {"title": "WideEP toolkit", "version": "1", "description": "OpenAI's completions, and SGLang's controls."}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": schemas}}


def _unserved(request: type[msgspec.Struct]) -> Schema:
    """Fields that are taken and change nothing: with any value, or with the values that mean "off"."""
    off = {name: {"enum": [*values, None]} for name, values in OFF.items() if name not in request.__struct_fields__}
    return {name: {} for name in sorted(IGNORED)} | off


def _get(path: str, summary: str) -> Schema:
    media = "text/plain" if path == "/metrics" else "application/json"
    responses: Schema = {"200": {"description": summary, "content": {media: {"schema": {}}}}}
    if path == "/health":
        responses["503"] = {"description": "loading or failed", "content": {media: {"schema": {}}}}
    else:
        responses |= _errors({"401": _ERRORS["401"]})
    return {"summary": summary, "responses": responses}


def _post(
    body: type[msgspec.Struct], answer: type[msgspec.Struct], errors: dict[str, str], required: bool = True
) -> Schema:
    content: Schema = {"application/json": {"schema": {"$ref": _REF + answer.__name__}}}
    if "stream" in body.__struct_fields__:
        # of no type: some readers hold the whole stream against it, others each event
        content["text/event-stream"] = {"schema": {"description": "A chunk as JSON in each event, [DONE] in the last"}}
    return {
        "summary": (body.__doc__ or "").strip().split("\n")[0],
        "requestBody": {
            "required": required,
            "content": {"application/json": {"schema": {"$ref": _REF + body.__name__}}},
        },
        "responses": {"200": {"description": "done", "content": content}} | _errors(errors),
    }


def _errors(descriptions: dict[str, str]) -> Schema:
    content = {"application/json": {"schema": {"$ref": _REF + ErrorBody.__name__}}}
    return {status: {"description": text, "content": content} for status, text in descriptions.items()}
