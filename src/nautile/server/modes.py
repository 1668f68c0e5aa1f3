"""Thinking and effort in every form that clients send them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nautile.server.errors import invalid, unprocessable

__all__ = ["EFFORTS", "effort_of", "template_options", "thinking_of"]

EFFORTS = {
    **dict.fromkeys(("none", "minimal", "low"), "low"),
    **dict.fromkeys(("medium", "high", "xhigh"), "high"),
    **dict.fromkeys(("ultra", "max"), "max"),
}


def effort_of(value: Any, param: str = "reasoning_effort") -> str | None:
    """V4's effort for a name that any of the APIs uses; None for None. Raises ApiError."""
    if value is None:
        return None
    if not isinstance(value, str) or value not in EFFORTS:
        raise unprocessable(f"{param} must be one of {', '.join(EFFORTS)}, got {value!r}", param)
    return EFFORTS[value]


def thinking_of(value: Any) -> bool | None:
    """The ``thinking`` object {"type": "enabled" | "disabled" | "adaptive"}, or a plain boolean; None for None."""
    if value is None or isinstance(value, bool):
        return value
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind not in ("enabled", "disabled", "adaptive"):
        raise unprocessable('thinking must be {"type": "enabled"}, "disabled" or "adaptive"', "thinking")
    return bool(kind != "disabled")


def template_options(value: Any) -> tuple[bool | None, str | None]:
    """Thinking and effort of ``chat_template_kwargs``, as vLLM and SGLang take them."""
    if value is None:
        return None, None
    if not isinstance(value, Mapping):
        raise invalid("chat_template_kwargs must be an object", "chat_template_kwargs")
    thinking = value.get("thinking", value.get("enable_thinking"))
    if thinking is not None and not isinstance(thinking, bool):
        raise unprocessable("chat_template_kwargs.thinking must be true or false", "chat_template_kwargs")
    return thinking, effort_of(value.get("reasoning_effort"), "chat_template_kwargs.reasoning_effort")
