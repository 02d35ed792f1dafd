"""Who asks: ComfyUI's user of a request and of a queued prompt. One user's photos and training runs are hidden from others."""

# pyright: reportMissingImports=false

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

from aiohttp import web
from server import PromptServer

USER = "facelora_user"
"""The name of the user who queued a prompt, in its extra data."""
_asking: ContextVar[str | None] = ContextVar("asking", default=None)
"""The user whose request is being answered."""


def user_of(request: web.Request) -> str | None:
    """Return ComfyUI's id of the user; None for an unknown user. Without --multi-user, everyone is the same user."""
    try:
        return PromptServer.instance.user_manager.get_request_user_id(request)
    except KeyError:
        return None


def asking_user() -> str | None:
    """Return the user whose request is being answered, or None outside a request."""
    return _asking.get()


@web.middleware
async def note_user(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Note the user of each request until it is answered."""
    _asking.set(user_of(request))
    return await handler(request)


def sign(queued: Any) -> Any:
    """Add the user to a queued prompt, because ComfyUI doesn't record who queued it."""
    if isinstance(queued, dict) and isinstance(extra := queued.setdefault("extra_data", {}), dict):
        extra[USER] = asking_user()
    return queued
