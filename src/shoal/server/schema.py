"""The base of the request schemas: strict types, and one error message for each kind of mistake."""

from __future__ import annotations

import difflib
import math
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from shoal.errors import InvalidRequest
from shoal.server.compatibility import UNSUPPORTED, unsupported, without_ignored


def _whole_number(value: Any) -> Any:
    """JSON knows one kind of number, and some clients write 1 as 1.0."""
    return int(value) if type(value) is float and value.is_integer() else value


Int = Annotated[int, BeforeValidator(_whole_number), Field(ge=-(2**63), le=2**63 - 1)]


class Schema(BaseModel):
    """Strict: no text for a number, no boolean for a number, no field nobody knows."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


SchemaT = TypeVar("SchemaT", bound=Schema)


def parse(schema: type[SchemaT], payload: dict[str, Any]) -> SchemaT:
    """The request as `schema`; a known field that is null counts as absent.

    Raises InvalidRequest: the first mistake, with the field as `param`, or what is not supported.
    """
    known = schema.model_fields
    kept = {
        name: value
        for name, value in without_ignored(payload, known).items()
        if value is not None or name not in known
    }
    try:
        return schema.model_validate(kept)
    except ValidationError as error:
        raise _invalid(schema, error.errors(include_url=False)[0]) from None


def request_body(schema: type[Schema]) -> dict[str, Any]:
    """The OpenAPI description of a route that reads `schema` itself."""
    described = schema.model_json_schema()
    definitions = described.pop("$defs", {})
    content = {"application/json": {"schema": _inline(described, definitions)}}
    return {"requestBody": {"required": True, "content": content}}


def _inline(node: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_inline(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _inline(definitions[node["$ref"].rpartition("/")[2]], definitions)
    return {key: _inline(value, definitions) for key, value in node.items()}


def _invalid(schema: type[Schema], mistake: ErrorDetails) -> InvalidRequest:
    param = _path(mistake["loc"])
    match mistake["type"]:
        case "extra_forbidden":
            return _unknown_field(schema, mistake["loc"], param)
        case "missing":
            return InvalidRequest(f"'{param}' is missing", param=param, code="missing_field")
        case "value_error":
            message = str(mistake["ctx"]["error"])
        case _:
            message = f"{mistake['msg'].lower()}, got {_shown(mistake['input'])}"
    if not param:
        return InvalidRequest(message)
    return InvalidRequest(f"'{param}': {message}", param=param, code="invalid_value")


def _unknown_field(schema: type[Schema], loc: tuple[int | str, ...], param: str) -> InvalidRequest:
    if loc[-1] in UNSUPPORTED:
        return unsupported(param)
    message = f"unknown field '{param}'"
    if len(loc) == 1:
        near = difflib.get_close_matches(str(loc[0]), list(schema.model_fields), n=1)
        message += f"; did you mean '{near[0]}'?" if near else ""
    return InvalidRequest(message, param=param, code="unknown_field")


def _path(loc: tuple[int | str, ...]) -> str:
    """`messages[2].role`, as OpenAI names it."""
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _shown(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "a number out of range"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
