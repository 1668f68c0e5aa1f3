"""Structured logs: one line an event, as JSON or for a terminal. Nothing global is configured."""

from __future__ import annotations

from typing import Any, TextIO

import structlog

__all__ = ["make_logger"]


def make_logger(style: str, stream: TextIO) -> structlog.typing.FilteringBoundLogger:
    """A logger that writes ``style`` ("json" or "console") lines to ``stream``."""
    renderer: Any = structlog.processors.JSONRenderer(ensure_ascii=False)
    if style == "console":
        renderer = structlog.dev.ConsoleRenderer(colors=stream.isatty())
    logger: structlog.typing.FilteringBoundLogger = structlog.wrap_logger(
        structlog.PrintLogger(stream),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(20),
        cache_logger_on_first_use=False,
    )
    return logger
