"""Refusals and failures over HTTP, in the shape of OpenAI's error bodies. Their text is ours: no library's message leaves."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from convert.errors import InputError, ResourceError, TmqError

_MOST_FINDINGS = 256  # looked at; checking ends at the first one of each list
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


def unsupported(name: str, why: str = "is not supported by this server") -> "ApiError":
    """400 for a field that asks for what we do not do."""
    return ApiError(400, f"{name!r} {why}: remove it from the request.", param=name, code="unsupported_field")


class ApiError(HTTPException, TmqError):
    """An answer other than success. `param` names the field at fault, `code` is for programs.

    On the command line it is its message alone: bad input where the request was refused, a lack of resources where the
    server is full (429), failed (5xx) or gone.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.message, self.param, self.code = message, param, code
        lacking = status >= 500 or status == 429
        self.exit_code = ResourceError.exit_code if lacking else InputError.exit_code

    def __str__(self) -> str:
        return self.message

    @property
    def body(self) -> dict[str, Any]:
        kind = _KINDS.get(
            self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status_code, self.headers)


def unavailable(message: str) -> ApiError:
    """503: the engine is gone or the server is ending."""
    return ApiError(503, message, code="unavailable", headers={"Retry-After": "5"})


_BRANCHES = {"str", "int", "float", "bool", "none", "list", "dict", "literal"}


def _path(location: Sequence[str | int]) -> str:
    """A field's path without the names that unions put into it, such as "list[Message]" or "constrained-str"."""
    named = [p for p in location if isinstance(p, int) or re.fullmatch(r"[a-z][a-z0-9_]*", p)]
    return ".".join(str(p) for p in named if p != "body" and p not in _BRANCHES)


def describe(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """One 400 from the findings of pydantic: an unsupported field first, else the finding that lies deepest."""
    errors = errors[:_MOST_FINDINGS]
    for error in sorted(errors, key=lambda e: len(e["loc"])):
        if error["type"] not in ("extra_forbidden", "none_required"):
            continue
        if error["type"] == "none_required" and error["loc"][-1] in _BRANCHES | {"None"}:
            continue  # the null branch of a union, not a field that must be null
        name = ".".join(filter(None, [_path(error["loc"][:-1]), str(error["loc"][-1])[:64]]))
        return unsupported(name)

    def rank(error: Mapping[str, Any]) -> tuple[bool, int]:
        # In a union the branch of the right type says what is wrong; the others only say that they are other types.
        return not error["type"].endswith(("_type", "literal_error")), len(_path(error["loc"]).split("."))

    best = max(rank(e) for e in errors)
    found = [e for e in errors if rank(e) == best]
    name = _path(found[0]["loc"])
    if found[0]["type"] == "missing" and not name:
        return ApiError(400, "The request has no body: expected a JSON object.")
    said = "; or ".join(dict.fromkeys(e["msg"] for e in found if _path(e["loc"]) == name))
    return ApiError(400, f"{name}: {said}." if name else f"{said}.", param=name or None, code="invalid_value")
