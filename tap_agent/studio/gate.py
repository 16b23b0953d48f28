"""Who may ask the server behind Studio, which has no password: a search can import code."""

from __future__ import annotations

import os

from starlette.applications import Starlette
from starlette.middleware import Middleware

from tap_agent.serving.origin import SameOrigin

ORIGINS = "https://smith.langchain.com,https://eu.smith.langchain.com"
"""the pages that are Studio; the variable `CORS_ALLOW_ORIGINS` names others"""
HOST = "TAP_STUDIO_HOST"
"""the variable with the address that the server listens on"""

app = Starlette(
    middleware=[
        Middleware(
            SameOrigin,
            host=os.environ.get(HOST, "127.0.0.1"),
            others=os.environ.get("CORS_ALLOW_ORIGINS", ORIGINS).split(","),
        )
    ]
)
"""what langgraph.json names"""
