"""What a request must have before anything answers it: the token in its address, and no sign of another site."""

import hmac
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOCAL = ("127.0.0.1", "localhost")
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; style-src 'self' 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'",
    "Referrer-Policy": "no-referrer",  # The address has the token.
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """An application below /TOKEN/ that only pages of its own address reach, under one of the host names."""

    def __init__(self, app: ASGIApp, token: str, hosts: Collection[str] = LOCAL) -> None:
        self._app, self._token, self._hosts = app, token, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        _, given, *rest = [*scope["path"].split("/", 2), ""]
        if refused := self._why_refused(Headers(scope=scope), given):
            return await PlainTextResponse(refused, 403, HEADERS)(scope, receive, send)
        root = f"{scope.get('root_path', '')}/{self._token}"
        if len(scope["path"].split("/", 2)) < 3:  # Relative addresses of the page begin below /TOKEN/.
            to = {"Location": f"{root}/", **HEADERS}
            return await PlainTextResponse("", 307, to)(scope, receive, send)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-cache")
            await send(message)

        inner = {**scope, "path": f"/{rest[0]}", "raw_path": None, "root_path": ""}
        await self._app(inner, receive, answer)

    def _why_refused(self, headers: Headers, token: str) -> str:
        """Return why a request with these headers and this token is refused; empty if it isn't."""
        host = headers.get("host", "")
        if host.rpartition(":")[0] not in self._hosts and host not in self._hosts:
            return "This page has another address."  # A name of another site that leads here (DNS rebinding).
        if headers.get("origin", f"http://{host}") != f"http://{host}":
            return "Other pages may not use this one."
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return "Other pages may not use this one."
        if not hmac.compare_digest(token.encode(), self._token.encode()):
            return "Open the whole address that the command printed."
        return ""
