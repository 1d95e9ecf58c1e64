"""Requests to an app in this process, over ASGI: no network and no server."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
from fastapi import FastAPI


def ask(app: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    """The app's answer to one request; what fails in a handler is an answer too."""

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://manta") as http:
            return await http.request(method, path, **options)

    return asyncio.run(run())
