"""Endpoints that load and unload tasks of a running server, compatible with vLLM's, for LoRA and full modules alike.

They exist only with `server.modules_dir`. vLLM's names are kept: `lora_name` is a task, `lora_path` a decode module's folder.
"""

import asyncio
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse

from pshare_jax.server.openai.bodies import read_body
from pshare_jax.server.openai.fields import check_task_name
from pshare_jax.server.openai.schema import RequestBody, body_schema
from pshare_jax.server.tasks.table import TaskTable


class UnloadBody(RequestBody):
    """POST /v1/unload_lora_adapter."""

    lora_name: str


class LoadBody(RequestBody):
    """POST /v1/load_lora_adapter."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False

    @classmethod
    def checks(cls) -> dict[str, Any]:
        """The name's check."""
        return {"lora_name": check_task_name}


def add_task_routes(app: FastAPI, tasks: TaskTable, max_body_bytes: int) -> None:
    """Adds the endpoints to the application."""

    @app.post("/v1/load_lora_adapter", openapi_extra=body_schema(LoadBody))
    async def load(http: Request) -> Response:
        body, _ = await read_body(http, LoadBody, max_body_bytes)
        http.state.log_fields.update(task=body.lora_name)
        await asyncio.wrap_future(tasks.load(body.lora_name, body.lora_path, body.load_inplace))
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter", openapi_extra=body_schema(UnloadBody))
    async def unload(http: Request) -> Response:
        body, _ = await read_body(http, UnloadBody, max_body_bytes)
        http.state.log_fields.update(task=body.lora_name)
        await asyncio.wrap_future(tasks.unload(body.lora_name))
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
