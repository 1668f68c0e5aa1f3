"""HTTP: one engine behind the APIs that agents already speak."""

from nautile.server.app import create_app
from nautile.server.errors import ApiError
from nautile.server.service import ServerOptions, Service
from nautile.server.turn import Turn, TurnEvent, run

__all__ = ["ApiError", "ServerOptions", "Service", "Turn", "TurnEvent", "create_app", "run"]
