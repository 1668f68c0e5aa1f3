"""OpenAI's own client against a real server: every endpoint it has for text, sync, async, streamed, with its helpers."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest
from pydantic import BaseModel

from server.live import Live, serving
from server.scripted import Gate, Script, calls
from waiting import soon

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CHAT_TOOL = {"type": "function", "function": {"name": "weather", "description": "Weather of a city.", "parameters": PARAMETERS}}
TOOL = {"type": "function", "name": "weather", "description": "Weather of a city.", "parameters": PARAMETERS}
HI = [{"role": "user", "content": "hi"}]
WEATHER = {"Paris": "rain", "Oslo": "snow"}


class Reading(BaseModel):
    """What the parse helpers are to give."""

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
    with openai.OpenAI(base_url=live.url + "/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


def loop_script(live: Live) -> None:
    """Two turns with a call each, then the answer."""
    live.engine.say(
        "Paris first</think>" + calls(("weather", {"city": "Paris"})),
        "now Oslo</think>" + calls(("weather", {"city": "Oslo"})),
        "both known</think>Paris: rain. Oslo: snow.",
    )


# Chat


def test_chat(client, live):
    live.engine.say(Script("because</think>Hello", cached=4))
    answer = client.chat.completions.create(model="m", messages=[{"role": "developer", "content": "Be brief."}, *HI], seed=7)
    assert answer.choices[0].message.content == "Hello" and answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.reasoning_content == "because"
    assert answer.usage.prompt_tokens == len(live.engine.requests[0].prompt_ids)
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    assert answer.usage.completion_tokens_details.reasoning_tokens == 2
    assert live.engine.requests[0].sampling.seed == 7


def test_chat_stream(client, live):
    live.engine.say("because</think>Hello you")
    chunks = list(client.chat.completions.create(model="m", messages=HI, stream=True, stream_options={"include_usage": True}))
    said = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in said) == "Hello you"
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in said) == "because"
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_chat_stream_helper(client, live):
    live.engine.say("think</think>One." + calls(("weather", {"city": "Paris"})))
    with client.chat.completions.stream(model="m", messages=HI, tools=[CHAT_TOOL]) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_completion().choices[0].message
    assert {"content.delta", "content.done", "tool_calls.function.arguments.done"} <= kinds
    assert message.content == "One." and json.loads(message.tool_calls[0].function.arguments) == {"city": "Paris"}


def test_chat_tool_loop(client, live):
    loop_script(live)
    messages = [{"role": "user", "content": "Paris and Oslo?"}]
    while calls_made := (
        message := client.chat.completions.create(model="m", messages=messages, tools=[CHAT_TOOL]).choices[0].message
    ).tool_calls:
        messages.append(message)
        for call in calls_made:
            city = json.loads(call.function.arguments)["city"]
            messages.append({"role": "tool", "tool_call_id": call.id, "content": WEATHER[city]})
    assert message.content == "Paris: rain. Oslo: snow." and len(live.engine.requests) == 3
    check_loop(live)


def check_loop(live: Live) -> None:
    """Each prompt goes on from the one before and its answer, reasoning included."""
    prompts = [live.engine.prompt(number) for number in range(3)]
    assert prompts[1].startswith(prompts[0] + "Paris first</think>\n\n<")
    assert prompts[2].startswith(prompts[1] + "now Oslo</think>\n\n<")
    assert "<tool_result>rain</tool_result>" in prompts[1] and "<tool_result>snow</tool_result>" in prompts[2]


def test_chat_parse(client, live):
    live.engine.say('hm</think>{"city": "Oslo", "degrees": -3}')
    answer = client.chat.completions.parse(model="m", messages=HI, response_format=Reading)
    assert answer.choices[0].message.parsed == Reading(city="Oslo", degrees=-3)


def test_chat_logprobs_and_stop(client, live):
    live.engine.say("hm</think>one two END three")
    answer = client.chat.completions.create(model="m", messages=HI, logprobs=True, top_logprobs=2, stop=["END"])
    assert answer.choices[0].message.content == "one two "
    tokens = answer.choices[0].logprobs.content
    assert "".join(token.token for token in tokens).startswith("one two") and all(
        len(token.top_logprobs) == 2 for token in tokens
    )


def test_chat_async(live):
    async def both() -> list[str]:
        async with openai.AsyncOpenAI(base_url=live.url + "/v1", api_key="any", max_retries=0) as client:
            live.engine.say("</think>whole", "</think>in pieces")
            whole = await client.chat.completions.create(model="m", messages=HI)
            stream = await client.chat.completions.create(model="m", messages=HI, stream=True)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
            return [whole.choices[0].message.content, "".join(pieces)]

    assert asyncio.run(both()) == ["whole", "in pieces"]


# Plain completions and models


def test_completions(client, live):
    live.engine.say("upon a time", "upon a time")
    answer = client.completions.create(model="m", prompt="Once ", max_tokens=20)
    assert answer.choices[0].text == "upon a time" and answer.choices[0].finish_reason == "stop"
    assert live.engine.prompt().endswith("Once ")
    chunks = list(client.completions.create(model="m", prompt="Once ", max_tokens=20, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "upon a time"


def test_models(client):
    assert [model.id for model in client.models.list()] == ["scripted"]
    assert client.models.retrieve("scripted").id == "scripted"


# Responses


def test_responses(client, live):
    live.engine.say(Script("because</think>Hello", cached=4))
    answer = client.responses.create(model="m", input="hi", instructions="Be brief.", store=False)
    assert answer.output_text == "Hello" and answer.status == "completed"
    assert answer.output[0].content[0].text == "because"
    assert answer.usage.input_tokens_details.cached_tokens == 4 and answer.usage.output_tokens_details.reasoning_tokens == 2


def test_responses_stream(client, live):
    live.engine.say("because</think>Hello you")
    events = list(client.responses.create(model="m", input="hi", stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Hello you"
    assert events[0].type == "response.created" and events[-1].type == "response.completed"
    assert events[-1].response.output_text == "Hello you"


def test_responses_stream_helper(client, live):
    live.engine.say("think</think>One." + calls(("weather", {"city": "Paris"})))
    with client.responses.stream(model="m", input="hi", tools=[TOOL]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert "response.function_call_arguments.done" in kinds and "response.reasoning_text.delta" in kinds
    assert final.output_text == "One." and final.output[-1].arguments == '{"city": "Paris"}'


def test_responses_tool_loop(client, live):
    loop_script(live)
    items: list = [{"role": "user", "content": "Paris and Oslo?"}]
    while True:
        answer = client.responses.create(model="m", input=items, tools=[TOOL])
        items += answer.output
        made = [item for item in answer.output if item.type == "function_call"]
        if not made:
            break
        items += [
            {"type": "function_call_output", "call_id": call.call_id, "output": WEATHER[json.loads(call.arguments)["city"]]}
            for call in made
        ]
    assert answer.output_text == "Paris: rain. Oslo: snow." and len(live.engine.requests) == 3
    check_loop(live)


def test_responses_parse(client, live):
    live.engine.say('hm</think>{"city": "Oslo", "degrees": -3}', 'hm</think>{"city": "Oslo", "degrees": -3}')
    assert client.responses.parse(model="m", input="hi", text_format=Reading).output_parsed == Reading(city="Oslo", degrees=-3)
    with client.responses.stream(model="m", input="hi", text_format=Reading) as stream:
        assert stream.get_final_response().output_parsed == Reading(city="Oslo", degrees=-3)


def test_responses_count_and_what_is_not_stored(client, live):
    counted = client.responses.input_tokens.count(model="m", input="hi", instructions="Be brief.", tools=[TOOL]).input_tokens
    live.engine.say("</think>Hello")
    answer = client.responses.create(model="m", input="hi", instructions="Be brief.", tools=[TOOL])
    assert len(live.engine.requests) == 1 and counted == answer.usage.input_tokens
    with pytest.raises(openai.NotFoundError, match="stores no responses"):
        client.responses.retrieve(answer.id)


def test_responses_async(live):
    async def both() -> list[str]:
        async with openai.AsyncOpenAI(base_url=live.url + "/v1", api_key="any", max_retries=0) as client:
            live.engine.say("</think>whole", "</think>in pieces")
            whole = await client.responses.create(model="m", input="hi")
            async with client.responses.stream(model="m", input="hi") as stream:
                pieces = [event.delta async for event in stream if event.type == "response.output_text.delta"]
            return [whole.output_text, "".join(pieces)]

    assert asyncio.run(both()) == ["whole", "in pieces"]


# Errors


def test_errors_are_the_clients_own(client, live):
    with pytest.raises(openai.BadRequestError, match="stores no conversations"):
        client.responses.create(model="m", input="hi", previous_response_id="resp_1")
    with pytest.raises(openai.UnprocessableEntityError, match="temperature"):
        client.chat.completions.create(model="m", messages=HI, temperature=5)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")
    live.engine.say(Script("</think>x", fail="the card fell off"))
    with pytest.raises(openai.APIError, match="the card fell off"):
        list(client.chat.completions.create(model="m", messages=HI, stream=True))


def test_leaving_a_stream_frees_the_sequence(client, live):
    live.engine.say(Script("word " * 50, gate=Gate(9)))
    with client.responses.create(model="m", input="hi", stream=True) as stream:
        for event in stream:
            if event.type == "response.reasoning_text.delta":
                break
    soon(lambda: len(live.engine.cancelled) == 1)
    assert live.engine.given[live.engine.cancelled[0]] <= 9
