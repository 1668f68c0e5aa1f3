"""The process: a socket, uvicorn, and a shutdown that lets running requests finish."""

from __future__ import annotations

import ipaddress
import socket
import time
from types import FrameType

import uvicorn

from nautile.server.app import create_app
from nautile.server.service import ServerOptions, Service, ServiceError

__all__ = ["DrainingServer", "check_exposure", "draining_server", "listen", "serve"]

_CUT_SECONDS = 2  # between telling the engine to stop and closing connections


class DrainingServer(uvicorn.Server):
    """The first SIGTERM or Ctrl-C lets running requests finish, within ``drain`` seconds, and refuses new ones with 503; the
    second ends at once."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self._deadline: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The signal handler; it only takes notes."""
        if self.service.draining:
            self._deadline = time.monotonic()
        else:
            self.service.draining = True
            self._deadline = time.monotonic() + self.service.options.drain

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to leave now."""
        if self._deadline is not None and not self.should_exit:
            late = time.monotonic() >= self._deadline
            if late:
                self.service.engine.close()  # what still runs ends with an error event of its own
            if late or not self.service.in_flight:
                self.service.log.info("leaving", unfinished=self.service.in_flight)
                self.should_exit = True
        return await super().on_tick(counter)


def check_exposure(host: str, options: ServerOptions) -> None:
    """Raises ServiceError for an address that others can reach when there is no key."""
    if host == "localhost" or options.api_keys:
        return
    try:
        if ipaddress.ip_address(host.strip("[]")).is_loopback:
            return
    except ValueError:
        pass
    raise ServiceError(
        f"--host {host} can be reached from other machines: pass --api-key or --api-key-file, or leave --host out"
    )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises ServiceError with the system's reason."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=256)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ServiceError(f"cannot listen on {host} port {port}: {reason}; choose another with --host or --port") from None
    except (OverflowError, UnicodeError):
        raise ServiceError(f"cannot listen on {host} port {port}: a port lies between 0 and 65535") from None


def serve(service: Service, listener: socket.socket) -> None:
    """Serve until a signal ends it. The caller has checked the address with ``check_exposure``."""
    draining_server(service).run(sockets=[listener])


def draining_server(service: Service) -> DrainingServer:
    """The server of a service; ``run`` takes its sockets."""
    config = uvicorn.Config(
        create_app(service),
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        ws="none",
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=_CUT_SECONDS,
    )
    return DrainingServer(config, service)
