"""The ASGI application."""

from __future__ import annotations

from fastapi import FastAPI

from llmserve.server.errors import add_error_handlers
from llmserve.server.metrics import Metrics
from llmserve.server.middleware import AuthMiddleware, RequestMiddleware
from llmserve.server.routes import create_router
from llmserve.server.settings import ServerSettings
from llmserve.server.state import ServingState


def create_app(state: ServingState, settings: ServerSettings, metrics: Metrics) -> FastAPI:
    """Put the application together.

    Args:
        state: Says what serves; whoever starts the server changes it.
        settings: Limits and keys.
        metrics: What /metrics shows; also the observer of the ``OpenAIServing`` in ``state``.
    """
    # No generated documentation: the routes take bodies that FastAPI knows nothing of.
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.include_router(create_router(state, settings, metrics))
    add_error_handlers(app)
    if settings.api_keys:
        app.add_middleware(AuthMiddleware, api_keys=settings.api_keys)
    # Added last, so outermost: everything else happens under its request id.
    app.add_middleware(RequestMiddleware, state=state)
    return app
