"""Processes of a test that begin with everything imported."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

from torch.multiprocessing.spawn import start_processes

__all__ = ["clean_context", "run_ranks"]

_IMPORTED = ["torch", "torch.distributed", "nautile.model.parallel", "nautile.train.distributed", "nautile.state"]


def clean_context() -> multiprocessing.context.BaseContext:
    """Processes forked from one that has imported the modules and done nothing else: it has no threads, as a test may have,
    and importing PyTorch, the longest part of a short process, is done once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    return context


def run_ranks(main: Callable[..., None], ranks: int, *arguments: Any) -> None:
    """``main(rank, ranks, *arguments)`` in as many processes; the first exception of one is raised here and ends the others."""
    clean_context()
    start_processes(main, args=(ranks, *arguments), nprocs=ranks, start_method="forkserver")
