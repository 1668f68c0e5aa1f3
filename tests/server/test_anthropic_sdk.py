"""Anthropic's own client against a real server: messages whole, streamed and with its helpers, a tool loop, counting."""

from __future__ import annotations

import asyncio

import anthropic
import pytest
from pydantic import BaseModel

from server.live import Live, serving
from server.scripted import Script, calls

TOOL = {
    "name": "weather",
    "description": "Weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
HI = [{"role": "user", "content": "hi"}]
WEATHER = {"Paris": "rain", "Oslo": "snow"}
THINK = {"type": "enabled", "budget_tokens": 1024}


class Reading(BaseModel):
    """What the parse helper is to give."""

    city: str
    degrees: int


@pytest.fixture(scope="module")
def server():
    with serving() as live:
        yield live


@pytest.fixture
def live(server: Live) -> Live:
    server.reset()
    return server


@pytest.fixture
def client(live: Live):
    with anthropic.Anthropic(base_url=live.url, api_key="any", max_retries=0, timeout=60) as client:
        yield client


def test_message(client, live):
    live.engine.say("Hello")
    answer = client.messages.create(model="claude-opus-4-8", max_tokens=100, messages=HI, system="Be brief.")
    assert answer.content[0].text == "Hello" and answer.stop_reason == "end_turn"
    assert answer.id == f"msg_{answer._request_id}"  # what the client shows to be looked up in the log


def test_thinking(client, live):
    live.engine.say(Script("because</think>Hello", cached=4))
    answer = client.messages.create(model="m", max_tokens=2000, messages=HI, thinking=THINK)
    assert [block.type for block in answer.content] == ["thinking", "text"]
    assert answer.content[0].thinking == "because" and answer.content[0].signature
    usage = answer.usage
    assert usage.cache_read_input_tokens == 4
    assert usage.input_tokens + 4 == len(live.engine.requests[0].prompt_ids)


def test_stream(client, live):
    live.engine.say("Hello you")
    events = list(client.messages.create(model="m", max_tokens=100, messages=HI, stream=True))
    assert "".join(event.delta.text for event in events if event.type == "content_block_delta") == "Hello you"
    assert events[0].type == "message_start" and events[-1].type == "message_stop"


def test_stream_helper(client, live):
    live.engine.say("because</think>One." + calls(("weather", {"city": "Paris"})))
    with client.messages.stream(model="m", max_tokens=2000, messages=HI, tools=[TOOL], thinking=THINK) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_message()
    assert {"thinking", "signature", "text", "input_json", "message_stop"} <= kinds
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    assert message.content[2].input == {"city": "Paris"} and message.stop_reason == "tool_use"
    assert message.usage.output_tokens > 0


def test_text_stream(client, live):
    live.engine.say("Hello you")
    with client.messages.stream(model="m", max_tokens=100, messages=HI) as stream:
        assert "".join(stream.text_stream) == "Hello you"


def test_tool_loop(client, live):
    live.engine.say(
        "Paris first</think>" + calls(("weather", {"city": "Paris"})),
        "now Oslo</think>" + calls(("weather", {"city": "Oslo"})),
        "both known</think>Paris: rain. Oslo: snow.",
    )
    messages: list = [{"role": "user", "content": "Paris and Oslo?"}]
    while True:
        answer = client.messages.create(model="m", max_tokens=2000, messages=messages, tools=[TOOL], thinking=THINK)
        messages.append({"role": "assistant", "content": answer.content})
        if answer.stop_reason != "tool_use":
            break
        results = [
            {"type": "tool_result", "tool_use_id": block.id, "content": WEATHER[block.input["city"]]}
            for block in answer.content
            if block.type == "tool_use"
        ]
        messages.append({"role": "user", "content": results})
    assert answer.content[-1].text == "Paris: rain. Oslo: snow."
    prompts = [live.engine.prompt(number) for number in range(3)]
    assert prompts[1].startswith(prompts[0] + "Paris first</think>\n\n<")
    assert prompts[2].startswith(prompts[1] + "now Oslo</think>\n\n<")
    assert "<tool_result>rain</tool_result>" in prompts[1] and "<tool_result>snow</tool_result>" in prompts[2]


def test_count_tokens(client, live):
    counted = client.messages.count_tokens(model="m", messages=HI, tools=[TOOL], system="Be brief.").input_tokens
    live.engine.say("Hello")
    client.messages.create(model="m", max_tokens=10, messages=HI, tools=[TOOL], system="Be brief.")
    assert counted == len(live.engine.requests[0].prompt_ids)


def test_parse(client, live):
    live.engine.say('{"city": "Oslo", "degrees": -3}')
    answer = client.messages.parse(model="m", max_tokens=100, messages=HI, output_format=Reading)
    assert answer.parsed_output == Reading(city="Oslo", degrees=-3)
    assert '"degrees"' in live.engine.prompt()


def test_async(live):
    async def both() -> list[str]:
        async with anthropic.AsyncAnthropic(base_url=live.url, auth_token="any", max_retries=0) as client:
            live.engine.say("whole", "in pieces")
            whole = await client.messages.create(model="m", max_tokens=50, messages=HI)
            async with client.messages.stream(model="m", max_tokens=50, messages=HI) as stream:
                pieces = [text async for text in stream.text_stream]
            return [whole.content[0].text, "".join(pieces)]

    assert asyncio.run(both()) == ["whole", "in pieces"]


def test_errors_are_the_clients_own(client, live):
    with pytest.raises(anthropic.BadRequestError, match="MCP"):
        client.messages.create(model="m", max_tokens=5, messages=HI, extra_body={"mcp_servers": [{"url": "x"}]})
    live.engine.say(Script("half", fail="the card fell off"))
    with pytest.raises(anthropic.APIStatusError, match="the card fell off"):
        list(client.messages.create(model="m", max_tokens=50, messages=HI, stream=True))
