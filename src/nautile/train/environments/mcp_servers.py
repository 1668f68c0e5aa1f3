"""Small MCP servers in one file that needs only the standard library; it runs inside the sandbox, one exchange a process.

The request is ``{"server", "data", "messages"}``: JSON-RPC messages of the Model Context Protocol for one server. The answer
holds the replies. A server that changes something writes into the workspace.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["SERVERS", "answer"]

_PROTOCOL = "2025-06-18"
Data = Mapping[str, Any]
Tool = tuple[str, dict[str, str], Callable[[Data, Mapping[str, Any]], str]]


def _search(data: Data, arguments: Mapping[str, Any]) -> str:
    wanted = str(arguments["name"]).lower()
    found = [f"{item['id']}: {item['name']}" for item in data["items"] if wanted in item["name"].lower()]
    return "\n".join(found) or "nothing found"


def _price(data: Data, arguments: Mapping[str, Any]) -> str:
    return str(_item(data, arguments["id"])["price"])


def _stock(data: Data, arguments: Mapping[str, Any]) -> str:
    stock = _item(data, arguments["id"])["stock"]
    if arguments["site"] not in stock:
        raise KeyError(f"no site {arguments['site']}; sites are {', '.join(stock)}")
    return str(stock[arguments["site"]])


def _sites(data: Data, arguments: Mapping[str, Any]) -> str:
    return "\n".join(data["sites"])


def _orders(data: Data, arguments: Mapping[str, Any]) -> str:
    found = [f"{o['order']}: {o['customer']}, {o['quantity']} pieces" for o in data["orders"] if o["id"] == arguments["id"]]
    return "\n".join(found) or "no orders"


def _refund(data: Data, arguments: Mapping[str, Any]) -> str:
    with Path("refunds.txt").open("a", encoding="utf-8") as file:
        file.write(f"{arguments['order']}\n")
    return f"refunded {arguments['order']}"


def _forecast(data: Data, arguments: Mapping[str, Any]) -> str:
    return "cloudy, 14 degrees"


def _events(data: Data, arguments: Mapping[str, Any]) -> str:
    return "no events"


def _item(data: Data, number: Any) -> dict[str, Any]:
    for item in data["items"]:
        if item["id"] == number:
            return dict(item)
    raise KeyError(f"no item {number}")


SERVERS: dict[str, dict[str, Tool]] = {
    "catalog": {
        "search": ("Find items by a part of their name.", {"name": "string"}, _search),
        "price": ("Price of an item in euros.", {"id": "string"}, _price),
    },
    "warehouse": {
        "sites": ("Names of all sites.", {}, _sites),
        "stock": ("Pieces of an item at a site.", {"id": "string", "site": "string"}, _stock),
    },
    "orders": {
        "of_item": ("Orders of an item with customer and quantity.", {"id": "string"}, _orders),
        "refund": ("Refund an order.", {"order": "string"}, _refund),
    },
    "weather": {"forecast": ("Tomorrow's weather in a city.", {"city": "string"}, _forecast)},
    "calendar": {"events": ("Events of a day.", {"day": "string"}, _events)},
}


def _schema(properties: Mapping[str, str]) -> dict[str, Any]:
    return {"type": "object", "properties": {k: {"type": v} for k, v in properties.items()}, "required": list(properties)}


def _listed(server: str) -> list[dict[str, Any]]:
    tools = SERVERS[server].items()
    return [{"name": name, "description": text, "inputSchema": _schema(schema)} for name, (text, schema, _) in tools]


def _called(server: str, data: Data, params: Mapping[str, Any]) -> dict[str, Any]:
    try:
        _, schema, function = SERVERS[server][params["name"]]
        given = params.get("arguments", {})
        missing = [name for name in schema if not isinstance(given.get(name), str)]
        if missing:
            raise KeyError(f"argument {missing[0]} must be a string")
        text, failed = function(data, given), False
    except KeyError as error:
        text, failed = f"error: {error.args[0]}", True
    return {"content": [{"type": "text", "text": text}], "isError": failed}


def _reply(server: str, data: Data, message: Mapping[str, Any]) -> dict[str, Any] | None:
    if "id" not in message:
        return None  # a notification
    head = {"jsonrpc": "2.0", "id": message["id"]}
    match message.get("method"):
        case "initialize":
            info = {"name": server, "version": "1"}
            return {**head, "result": {"protocolVersion": _PROTOCOL, "capabilities": {"tools": {}}, "serverInfo": info}}
        case "tools/list":
            return {**head, "result": {"tools": _listed(server)}}
        case "tools/call":
            return {**head, "result": _called(server, data, message["params"])}
    return {**head, "error": {"code": -32601, "message": "unknown method"}}


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """The replies of one server to the messages of one exchange."""
    replies = [_reply(request["server"], request["data"], message) for message in request["messages"]]
    return {"ok": True, "replies": [reply for reply in replies if reply is not None]}


if __name__ == "__main__":
    json.dump(answer(json.load(sys.stdin)), sys.stdout)
