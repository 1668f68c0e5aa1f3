"""A server process with a scripted engine, for tests of signals: ``python serve_scripted.py DELAY DRAIN`` prints its port."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from nautile.server import ServerOptions, Service
from nautile.server.serving import listen, serve
from server.scripted import Script, ScriptedEngine

if __name__ == "__main__":
    engine = ScriptedEngine(default=Script("</think>" + "word " * 20, delay=float(sys.argv[1])))
    listener = listen("127.0.0.1", 0)
    print(listener.getsockname()[1], flush=True)
    serve(Service(engine, "scripted", ServerOptions(drain=float(sys.argv[2]), log_format="json")), listener)
    print("closed" if engine.closed else "left open", len(engine.cancelled), flush=True)
