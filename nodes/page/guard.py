"""What a request must have before anything answers it: a token or a login, and no sign of another site."""

import hmac
from collections.abc import Callable, Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOCAL = ("127.0.0.1", "localhost")
THIS_COMPUTER = ("127.0.0.1", "::1")
POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; style-src 'self' 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'; object-src 'none'; frame-ancestors {}"
)
HEADERS = {
    "Referrer-Policy": "no-referrer",  # The address may have the token.
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}
ELSEWHERE, FOREIGN = "This page has another address.", "Other pages may not use this one."


class Guard:
    """An application below /TOKEN/ that only pages of its own address reach, under a name of this computer."""

    framed_by = "'none'"
    """The pages that may have this one in a frame."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        own = {**HEADERS, "Content-Security-Policy": POLICY.format(self.framed_by)}
        headers, path = Headers(scope=scope), self._inside(scope)
        if refused := self._why_refused(scope, headers):
            return await PlainTextResponse(refused, 403, own)(scope, receive, send)
        if not path:  # Relative addresses of the page begin below its own.
            to = {"Location": f"{scope['path'].rpartition('/')[2]}/", **own}
            return await PlainTextResponse("", 307, to)(scope, receive, send)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(own)
                headers.setdefault("Cache-Control", "no-cache")
            await send(message)

        await self._app({**scope, "path": path, "raw_path": None, "root_path": ""}, receive, answer)

    def _inside(self, scope: Scope) -> str:
        """Return the address in the application; empty if the / after the page's own address is missing."""
        _, _, *rest = scope["path"].split("/", 2)
        return f"/{rest[0]}" if rest else ""

    def _why_refused(self, scope: Scope, headers: Headers) -> str:
        """Return why a request with these headers is refused; empty if it isn't."""
        host = headers.get("host", "")
        if not _is_local(host):
            return ELSEWHERE  # A name of another site that leads here (DNS rebinding).
        _, given, *_ = [*scope["path"].split("/", 2), ""]
        # Whoever has the token may also follow a link to the page.
        is_opened = scope["method"] == "GET" and headers.get("sec-fetch-dest") == "document"
        if headers.get("origin", f"http://{host}") != f"http://{host}" or not (is_opened or _is_same_site(headers)):
            return FOREIGN
        if not hmac.compare_digest(given.encode(), self._token.encode()):
            return "Open the whole address that the command printed."
        return ""


class LoginGuard(Guard):
    """An application that another program serves, for who has signed in there; without a login, on this computer alone.

    The program routes /…/{path:path} to it. `login` returns whether cookies are those of somebody who has signed in, and None
    if the program asks for no login.
    """

    framed_by = "'self'"

    def __init__(self, app: ASGIApp, login: Callable[[Mapping[str, str]], bool | None]) -> None:
        self._app, self._login = app, login

    def _inside(self, scope: Scope) -> str:
        return f"/{scope['path_params']['path']}"

    def _why_refused(self, scope: Scope, headers: Headers) -> str:
        host = headers.get("host", "")
        has_signed_in = self._login(HTTPConnection(scope).cookies)
        if has_signed_in is None and not (_is_local(host) and (scope.get("client") or [""])[0] in THIS_COMPUTER):
            return ELSEWHERE
        if headers.get("origin", f"http://{host}") not in (f"http://{host}", f"https://{host}"):
            return FOREIGN
        if not _is_same_site(headers):
            return FOREIGN
        return "Sign in first." if has_signed_in is False else ""


def _is_local(host: str) -> bool:
    return host in LOCAL or host.rpartition(":")[0] in LOCAL


def _is_same_site(headers: Headers) -> bool:
    return headers.get("sec-fetch-site", "none") in ("none", "same-origin")
