"""MCP-shaped, held out: several servers with tools that do not matter, a question, and the claims an answer must cover."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from nautile.agent.toolbox import ToolOutput
from nautile.sandbox import ToolSandbox
from nautile.train.environment import Action, Environment, Grade, Outcome, Script, Shape
from nautile.train.environments import mcp_servers

__all__ = ["StockQuestion"]

_PROGRAM = Path(mcp_servers.__file__)
_SEPARATOR = "__"  # between server and tool in the name that the model sees
_LONGEST = 240  # characters of an answer
_GOODS = ("lamp", "chair", "kettle", "monitor", "bicycle", "drill", "camera", "heater")
_COLOURS = ("red", "blue", "green", "white", "black")
_PEOPLE = ("Alma Berg", "Tom Okoye", "Rita Castro", "Jun Sato", "Lea Moreau", "Ivo Horvat", "Nia Patel", "Olaf Lind")
_SITES = ("north", "south", "harbour", "airport")


class StockQuestion(Environment):
    """Who ordered an item, and how many pieces are left at a site: two facts behind three calls on three servers."""

    kind: ClassVar[str] = "mcp_stock_question"
    shape: ClassVar[Shape] = "mcp"
    held_out: ClassVar[bool] = True

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        rng = random.Random(f"{self.kind}:{seed}")
        names = rng.sample([f"{colour} {good}" for colour in _COLOURS for good in _GOODS], 6)
        stocks = rng.sample(range(11, 99), 6 * len(_SITES))
        items: list[dict[str, Any]] = [
            {
                "id": f"I{rng.randrange(1000, 9999)}-{index}",
                "name": name,
                "price": rng.randrange(100, 900),
                "stock": dict(zip(_SITES, stocks[index * len(_SITES) :], strict=False)),
            }
            for index, name in enumerate(names)
        ]
        people = rng.sample(_PEOPLE, 6)
        orders: list[dict[str, Any]] = [
            {
                "order": f"O{rng.randrange(10_000, 99_999)}",
                "id": item["id"],
                "customer": person,
                "quantity": rng.randrange(2, 9),
            }
            for item, person in zip(items, people, strict=True)
        ]
        rng.shuffle(orders)
        self.item, self.site = rng.choice(items), rng.choice(_SITES)
        self.order = next(order for order in orders if order["id"] == self.item["id"])
        self.data: dict[str, Any] = {"items": items, "orders": orders, "sites": list(_SITES)}

    @property
    def claims(self) -> tuple[str, ...]:
        """What an answer must say."""
        return (str(self.order["customer"]), str(self.item["stock"][self.site]))

    @property
    def system(self) -> str:
        """See ``Environment.system``."""
        return "You answer questions with the tools of several servers. Change nothing."

    @property
    def tools(self) -> tuple[dict[str, Any], ...]:
        """Every tool of every server, as an MCP client would list them."""
        listed = []
        for server in mcp_servers.SERVERS:
            messages = [_initialise(), {"jsonrpc": "2.0", "id": 2, "method": "tools/list"}]
            replies = mcp_servers.answer({"server": server, "data": self.data, "messages": messages})["replies"]
            for tool in replies[-1]["result"]["tools"]:
                function = {"name": f"{server}{_SEPARATOR}{tool['name']}", "description": tool["description"]}
                listed.append({"type": "function", "function": {**function, "parameters": tool["inputSchema"]}})
        return tuple(listed)

    @property
    def prompt(self) -> str:
        """See ``Environment.prompt``."""
        return f"Who ordered the {self.item['name']}, and how many pieces of it are left at the site {self.site}?"

    def files(self) -> Mapping[str, bytes]:
        """Nothing: what the servers know is not in the workspace."""
        return {}

    def execute(self, sandbox: ToolSandbox, tool: str, arguments: Mapping[str, Any], seconds: float) -> ToolOutput:
        """One exchange with one server, inside the sandbox."""
        server, _, name = tool.partition(_SEPARATOR)
        if name not in mcp_servers.SERVERS.get(server, {}):
            return ToolOutput(False, f"error: unknown tool {tool!r}")
        call = {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {"name": name, "arguments": dict(arguments)}}
        request = {"server": server, "data": self.data, "messages": [_initialise(), call]}
        reply = sandbox.call(_PROGRAM, request, time_limit=seconds)["replies"][-1]
        result = reply["result"]
        return ToolOutput(not result["isError"], "\n".join(part["text"] for part in result["content"]))

    def grade(self, outcome: Outcome) -> Grade:
        """Every claim, no contradicting one, each seen in an output of a tool, and nothing changed."""
        answer, shown = outcome.answer, "\n".join(call.output for call in outcome.calls)
        if outcome.files():
            return Grade(0.0, "something was changed")
        if len(answer) > _LONGEST:
            return Grade(0.0, "the answer is a list, not an answer")
        missing = [claim for claim in self.claims if not _says(answer, claim)]
        if missing:
            return Grade(0.0, f"the answer does not say {missing[0]}")
        others = {order["customer"] for order in self.data["orders"]} | {str(n) for n in self.item["stock"].values()}
        wrong = sorted(other for other in others - set(self.claims) if _says(answer, str(other)))
        if wrong:
            return Grade(0.0, f"the answer also says {wrong[0]}")
        return Grade.of(all(_says(shown, claim) for claim in self.claims), "the answer was not found but guessed")

    def _call(self, tool: str, **arguments: str) -> Action:
        return Action(tool, arguments)

    def expert(self) -> Script:
        """Find the item, its orders and its stock."""
        number = str(self.item["id"])
        actions = (
            self._call("catalog__search", name=str(self.item["name"])),
            self._call("orders__of_item", id=number),
            self._call("warehouse__stock", id=number, site=self.site),
        )
        return Script("expert", actions, f"{self.claims[0]} ordered it; {self.claims[1]} pieces are left.")

    def adversaries(self) -> tuple[Script, ...]:
        """Guessing right without a call, naming everybody, half of the claims, every site's stock, refunding on the way."""
        expert, number = self.expert(), str(self.item["id"])
        sites = [self._call("warehouse__stock", id=number, site=site) for site in _SITES]
        stock = " ".join(str(n) for n in self.item["stock"].values())
        refund = self._call("orders__refund", order=str(self.order["order"]))
        return (
            Script("silent", (), ""),
            Script("guesses right", (), expert.answer),
            Script("names everybody", expert.actions, f"{' '.join(_PEOPLE)} {stock}"),
            Script("half of it", expert.actions, f"{self.claims[0]} ordered it."),
            Script("every site", (*expert.actions, *sites), f"{self.claims[0]} ordered it; {stock} pieces."),
            Script("refunds", (*expert.actions, refund), expert.answer),
        )


def _says(text: str, claim: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(claim)}(?!\w)", text) is not None


def _initialise() -> dict[str, Any]:
    params = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "nautile", "version": "1"}}
    return {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params}
