"""What every route needs: the engine, the metrics, the limits. Held by the app, passed on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request

from shoal.engine.api import AsyncEngine
from shoal.errors import UnknownModel
from shoal.server.json_body import read_json
from shoal.server.metrics import Metrics
from shoal.server.responses import Responses
from shoal.server.schema import Schema, parse

SchemaT = TypeVar("SchemaT", bound=Schema)


@dataclass(frozen=True)
class Service:
    engine: AsyncEngine
    metrics: Metrics
    max_body_bytes: int
    responses: Responses

    async def read(self, request: Request, schema: type[SchemaT]) -> SchemaT:
        """The request's body. Raises InvalidRequest, UnknownModel, ClientDisconnect."""
        return self.parse(schema, await self.read_json(request))

    async def read_json(self, request: Request) -> dict[str, Any]:
        """Raises InvalidRequest, ClientDisconnect."""
        return await read_json(request, self.max_body_bytes)

    def parse(self, schema: type[SchemaT], payload: dict[str, Any]) -> SchemaT:
        """Raises InvalidRequest, UnknownModel."""
        asked = parse(schema, payload)
        name: Any = getattr(asked, "model", None)
        if name is not None:
            self.check_model(name)
        return asked

    def check_model(self, name: str) -> None:
        served = self.engine.info.name
        if name != served:
            raise UnknownModel(
                f"the model '{name:.200}' is not served here; this server has '{served}'",
                param="model",
            )


def service_of(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service
