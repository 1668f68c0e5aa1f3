"""The verb, the doctor and the MCP server, as their users meet them."""

import asyncio
import json
import sys
from pathlib import Path

import pytest
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client

from nautile.agent import toolbox
from nautile.cli import main
from nautile.sandbox import InvalidRequest, SandboxError, Unsupported
from nautile.sandbox.tools import open_tools
from sandbox.conftest import client_code

PROGRAM = Path(toolbox.__file__)


def test_run_gives_output_and_status(capfd):
    assert main(["sandbox", "run", "echo out; echo err >&2; exit 3", "--kind", "function"]) == 3
    assert capfd.readouterr() == ("out\n", "err\n")
    assert main(["sandbox", "run", "sleep 9", "--kind", "function", "--timeout", "0.2"]) == 137
    assert "killed after 0.2 s" in capfd.readouterr().err
    assert main(["sandbox", "run", "echo {}", "--kind", "function", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["stdout"] == "{}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "true", "--kind", "docker"], "choose one of"),
        (["run", "true", "--kind", "vm", "--log", "/tmp/x"], "use kind='container'"),
        (["run", "true", "--memory", "0"], "memory is 0"),
        (["run", "true", "--allow", "http://x"], "write HOST:PORT"),
        (["run", "true", "--workspace", "/nowhere"], "not a directory"),
        (["log", "show", "/nowhere"], "holds no trajectory log"),
        (["mcp", "--kind", "function"], "give --workspace"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(capfd, arguments, said):
    assert main(["sandbox", *arguments]) == 1
    error = capfd.readouterr().err
    assert said in error and error.count("\n") == 1 and "Traceback" not in error


def test_doctor_tries_everything(capfd, crun):
    assert main(["sandbox", "doctor", "--json"]) == 0
    found = {one["part"]: one for one in json.loads(capfd.readouterr().out)}
    assert set(found) == {"seccomp", "limits", "function", "container", "microvm", "vm"}
    assert found["function"]["state"] == found["container"]["state"] == "ok"
    assert 0 < found["function"]["seconds"] < 300
    for kind in ("microvm", "vm"):  # degraded where only emulation boots a guest, missing without QEMU
        assert found[kind]["state"] == "ok" or found[kind]["remedy"]
        assert (found[kind]["state"] == "missing") == (found[kind]["seconds"] is None)


def test_doctor_says_what_is_missing(capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["sandbox", "doctor"]) in (0, 1)  # a keeper that runs already has its crun
    assert "apt-get install bubblewrap" in capfd.readouterr().out


def test_a_log_is_shown_verified_replayed_and_drawn(capfd, tmp_path):
    log = tmp_path / "log"
    assert main(["sandbox", "run", "echo first; exit 2", "--kind", "function", "--log", str(log)]) == 2
    capfd.readouterr()
    assert main(["sandbox", "log", "show", str(log)]) == 0
    assert "exit 2" in capfd.readouterr().out
    assert main(["sandbox", "log", "verify", str(log)]) == 0
    assert capfd.readouterr().out == "1 operations, the chain holds\n"
    assert main(["sandbox", "log", "replay", str(log)]) == 0
    assert capfd.readouterr().out == "$ echo first; exit 2\nfirst\n[exit 2]\n"
    assert main(["sandbox", "log", "replay", str(log), "--reexecute"]) == 0
    assert main(["sandbox", "log", "show", str(log), "--html", str(tmp_path / "page.html")]) == 0
    assert "echo first; exit 2" in (tmp_path / "page.html").read_text()
    data = bytearray((log / "log").read_bytes())
    data[300] ^= 1
    (log / "log").write_bytes(data)
    capfd.readouterr()
    assert main(["sandbox", "log", "verify", str(log)]) == 1
    assert "was changed" in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["function", "container"])
def test_the_agents_tools_work_in_any_substrate(kind, tmp_path, crun):
    (tmp_path / "notes").write_text("one\ntwo\n")
    tools = open_tools(tmp_path, kind)
    try:
        request = {"tool": "edit", "arguments": {"path": "notes", "old": "two", "new": "three"}}
        assert tools.call(PROGRAM, request, time_limit=60) == {"ok": True, "output": "edited notes line 2"}
        assert (tmp_path / "notes").read_text() == "one\nthree\n"
        shell = {"tool": "run", "arguments": {"command": "cat notes; id -u; cat /etc/shadow"}, "time_limit": 60}
        assert "three\n1000" in tools.call(PROGRAM, shell, time_limit=90)["output"]
        slow = tmp_path.parent / f"slow_{kind}.py"
        slow.write_text("import time; time.sleep(60)")
        with pytest.raises(SandboxError, match=r"did not answer within 0.5 s"):
            tools.call(slow, {}, time_limit=0.5)
        slow.write_text("print('[]')")
        with pytest.raises(SandboxError, match="not an object"):
            tools.call(slow, {}, time_limit=60)
    finally:
        tools.close()
    with pytest.raises(InvalidRequest):
        open_tools(tmp_path / "none", kind)


def test_an_mcp_client_gets_a_sandbox(crun):
    async def talk():
        arguments = ["-c", client_code("import sys; from nautile.cli import main; sys.exit(main())"), "sandbox", "mcp"]
        async with (
            stdio_client(StdioServerParameters(command=sys.executable, args=arguments)) as (reader, writer),
            ClientSession(reader, writer) as session,
        ):
            await session.initialize()
            names = {tool.name for tool in (await session.list_tools()).tools}

            async def call(name, **given):
                answer = await session.call_tool(name, given)
                return answer.content[0].text, bool(getattr(answer, "is_error", getattr(answer, "isError", None)))

            return names, [
                await call("write", path="a/b", content="hej\n"),
                await call("run", command="cat a/b; echo no >&2; exit 4"),
                await call("read", path="a/b"),
                await call("list", path="/workspace/a"),
                await call("read", path="/etc/shadow"),
            ]

    names, answers = asyncio.run(asyncio.wait_for(talk(), 60))
    assert names == {"run", "read", "write", "list"}
    assert answers[0] == ("wrote 4 bytes to a/b", False)
    assert answers[1] == ("hej\nstderr:\nno\n[exit 4]", False)
    assert answers[2][0] == "hej\n" and answers[3][0].split() == ["file", "4", "b"]
    assert answers[4][1] and "does not exist" in answers[4][0]


def test_the_unsupported_error_carries_its_parts():
    error = Unsupported("function", "files", "why", "remedy")
    assert (error.substrate, error.feature, error.why, error.remedy) == ("function", "files", "why", "remedy")
    assert str(error) == "function: no files: why; remedy"
