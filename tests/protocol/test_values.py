"""Values of parameters: typed by the tag, repaired by the schema, always JSON."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nautile.protocol import parse
from nautile.protocol.values import allowed_types, typed_value
from protocol.completions import block, function, invoke, parameter

INTEGER, TEXT, FLAG, LIST = {"type": "integer"}, {"type": "string"}, {"type": "boolean"}, {"type": "array"}


def test_schemas_that_lead_back_to_themselves_cost_no_more_than_their_size() -> None:
    root: dict[str, object] = {"properties": {"a": {"anyOf": [{"$ref": "#/properties/a"}] * 300}}}
    begun = time.process_time()
    assert allowed_types({"$ref": "#/properties/a"}, root) is None
    root["$defs"] = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 40} for n in range(5)} | {"d5": INTEGER}
    assert allowed_types({"$ref": "#/$defs/d3"}, root) == {"integer"}
    assert allowed_types({"$ref": "#/$defs/d0"}, root) is None  # deeper than is followed
    assert time.process_time() - begun < 1


@pytest.mark.parametrize(
    ("raw", "marked", "schema", "value", "fault"),
    [
        ("x", "true", None, "x", None),
        ("5", "true", TEXT, "5", None),
        ("5", "true", INTEGER, 5, "repaired"),
        ("true", "true", FLAG, True, "repaired"),  # vLLM 41122: booleans sent as strings
        ("False", "true", FLAG, False, "repaired"),
        ('["a"]', "true", LIST, ["a"], "repaired"),
        ("five", "true", INTEGER, "five", "mismatch"),
        ("5", "false", None, 5, None),
        (" 5\n", "false", INTEGER, 5, None),
        ("5", "false", {"type": "number"}, 5, None),
        ("5.0", "false", INTEGER, 5, "repaired"),
        ("5.5", "false", INTEGER, 5.5, "mismatch"),
        ("5", "false", TEXT, "5", "repaired"),
        ('"5"', "false", INTEGER, 5, "repaired"),
        ('"5"', "false", TEXT, "5", None),
        ('"[1]"', "false", LIST, [1], "repaired"),
        ("True", "false", None, True, "repaired"),
        ("None", "false", {"type": ["string", "null"]}, None, "repaired"),
        ("True", "false", TEXT, "True", "repaired"),
        ("{'a': True}", "false", None, "{'a': True}", "repaired"),
        ('{"a": True, "b": "True"}', "false", None, {"a": True, "b": "True"}, "repaired"),
        ('{"a": "x\ny"}', "false", None, {"a": "x\ny"}, "repaired"),
        ("{a:1", "false", None, "{a:1", "repaired"),
        ("", "false", None, "", "repaired"),
        ("", "false", INTEGER, "", "mismatch"),
        ("NaN", "false", None, "NaN", "repaired"),
        ("[Infinity]", "false", None, "[Infinity]", "repaired"),
        ("[1] [2]", "false", LIST, "[1] [2]", "mismatch"),
        ('"\\ud83d\\ude00"', "false", None, "😀", None),
        ('"\\ud83d"', "false", None, "\ufffd", "repaired"),
        ("[" * 5000 + "]" * 5000, "false", None, "[" * 5000 + "]" * 5000, "repaired"),
        ("5", None, None, 5, "repaired"),
        ("v", "yes", None, "v", "repaired"),
        ("5", None, TEXT, "5", "repaired"),
        ("true", "false", {"enum": ["true", "false"]}, "true", "repaired"),
        ("3", "true", {"enum": [1, 2, 3]}, 3, "repaired"),
        ("3", "true", {"const": 3}, 3, "repaired"),
        ("3", "true", {"anyOf": [INTEGER, {"type": "null"}]}, 3, "repaired"),
        ("3", "true", {"anyOf": [INTEGER, {}]}, "3", None),
        ("3", "true", {"allOf": [{"type": ["string", "integer"]}, INTEGER]}, 3, "repaired"),
        ("null", "true", {"type": "integer", "nullable": True}, None, "repaired"),
        ("3", "true", {"$ref": "#/$defs/n"}, 3, "repaired"),
        ("3", "true", {"$ref": "#/$defs/missing"}, "3", None),
        ("3", "true", {"type": 7}, "3", None),
    ],
)
def test_value(raw, marked, schema, value, fault):
    text, found = typed_value(raw, marked, allowed_types(schema, {"$defs": {"n": INTEGER}}))
    assert (json.loads(text), found) == (value, fault)
    assert type(json.loads(text)) is type(value)


def test_digits_are_kept():
    for raw in ("123456789012345678901234567890.10", "9" * 6000):
        assert typed_value(raw, "false", None) == (raw, None)


def test_a_schema_that_refers_to_itself():
    loop = {"$ref": "#"}
    assert allowed_types(loop, loop) is None


@given(st.text(max_size=30), st.sampled_from(["true", "false", None, "x"]), st.sampled_from([None, INTEGER, TEXT, FLAG, LIST]))
@settings(max_examples=300)
def test_always_json(raw, marked, schema):
    text, fault = typed_value(raw, marked, allowed_types(schema))
    value = json.loads(text, parse_constant=pytest.fail)
    if marked == "true" and fault is None:
        assert value == raw


def test_faults_become_flags_of_the_call():
    tools = [function("f", n=INTEGER, s=TEXT)]
    message = parse(block(invoke("f", parameter("n", "5"), parameter("s", "5", "false"))), start="content", tools=tools)
    assert json.loads(message.tool_calls[0].arguments) == {"n": 5, "s": "5"}
    assert message.tool_calls[0].flags == ("repaired:n", "repaired:s")
