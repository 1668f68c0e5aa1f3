"""Real agents, installed at fixed versions under build/clients, away from the project's own environment."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CLIENTS", "JAVASCRIPT", "ROOT", "Client", "install", "install_packages"]

ROOT = Path(__file__).parents[2] / "build" / "clients"


@dataclass(frozen=True)
class Client:
    """A client's package, its version, and its program."""

    package: str
    version: str
    program: str
    registry: str  # "npm" or "pip"


CLIENTS = {
    "mini-swe-agent": Client("mini-swe-agent", "2.4.6", "mini", "pip"),
    "claude-code": Client("@anthropic-ai/claude-code", "2.1.197", "claude", "npm"),
    "opencode": Client("opencode-ai", "1.18.33", "opencode", "npm"),
    "codex": Client("@openai/codex", "0.169.0", "codex", "npm"),
}
JAVASCRIPT = ("openai@7.57.0", "@anthropic-ai/sdk@1.12.0")


def install(name: str) -> Path:
    """The client's program, installed if that version is not there yet. Raises RuntimeError with what to do about it."""
    client = CLIENTS[name]
    place = ROOT / f"{name}-{client.version}"
    program = place / ("bin" if client.registry == "pip" else "node_modules/.bin") / client.program
    if program.exists():
        return program
    place.mkdir(parents=True, exist_ok=True)
    if client.registry == "pip":
        run([sys.executable, "-m", "venv", str(place)])
        run([str(place / "bin/python"), "-m", "pip", "install", "-q", f"{client.package}=={client.version}", "mcp"])
    else:
        install_packages(place, f"{client.package}@{client.version}")
    return program


def install_packages(place: Path, *packages: str) -> None:
    """Packages of npm in a directory of their own. Raises RuntimeError with what to do about it."""
    if shutil.which("npm") is None:
        raise RuntimeError(f"{', '.join(packages)} come from npm, which is missing: apt-get install nodejs npm")
    place.mkdir(parents=True, exist_ok=True)
    run(["npm", "install", "--silent", "--prefix", str(place), *packages])


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {(done.stderr or done.stdout)[-2000:]}")
