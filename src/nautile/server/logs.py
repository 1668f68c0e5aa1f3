"""Structured logs: one line an event, as JSON or for a terminal. Nothing global is configured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TextIO

import structlog

__all__ = ["make_logger"]


def make_logger(style: str, stream: TextIO) -> structlog.typing.FilteringBoundLogger:
    """A logger that writes ``style`` ("json" or "console") lines to ``stream``."""
    rendering: list[Any] = [structlog.processors.JSONRenderer(ensure_ascii=False)]
    if style == "console":
        rendering = [_escaped, structlog.dev.ConsoleRenderer(colors=stream.isatty())]
    logger: structlog.typing.FilteringBoundLogger = structlog.wrap_logger(
        structlog.PrintLogger(stream),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            *rendering,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(20),
        cache_logger_on_first_use=False,
    )
    return logger


@dataclass(frozen=True, repr=False)
class _Quoted:
    """A text that is shown as Python writes it: in quotes, and nothing in it does anything to a terminal."""

    text: str

    def __repr__(self) -> str:
        return repr(self.text)


def _escaped(logger: Any, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """What clients and the model wrote cannot drive the terminal. structlog quotes values with spaces, and no others."""
    for name, value in event.items():
        if name == "exception":  # has lines, and may quote anything
            event[name] = "".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in value)
        elif isinstance(value, str) and not value.isprintable():
            event[name] = _Quoted(value)
    return event
