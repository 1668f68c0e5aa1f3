"""Real agents finish a small task against the server, whose model is a script. `make test-clients`; not part of `make test`.

What is proved is the protocol: that the agent understands every answer, that its tools run with the arguments that the model
wrote, and that each prompt goes on from the one before it, reasoning included, so that the cache holds. The transcript goes
to bench/results/clients/.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clients.installed import CLIENTS, JAVASCRIPT, ROOT, install, install_packages
from clients.recorder import Recorder, scrubbed
from nautile import __version__
from nautile.engine.request import Request
from server.live import Live, serving
from server.scripted import Script, calls

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "clients"
TASK = "greet.py says hello. Make it say goodbye, then stop."
BEFORE, AFTER = 'print("hello")\n', 'print("goodbye")\n'
LAST = "greet.py now says goodbye."


class Scripted:
    """A model that follows a list of outputs, one a turn of the main conversation, and names sessions when asked to."""

    def __init__(self, live: Live, outputs: Sequence[str]) -> None:
        self.live, self.outputs = live, list(outputs)
        self.turns: list[tuple[str, str]] = []  # prompt and output
        live.engine.answer = self

    def __call__(self, request: Request) -> Script:
        assert self.live.engine.tokenizer is not None
        prompt = self.live.engine.tokenizer.decode(request.prompt_ids)
        if "## Tools" not in prompt:  # a request for a title, or a summary
            return Script("short</think>Greeting" if prompt.endswith("<think>") else "Greeting")
        output = self.outputs[min(len(self.turns), len(self.outputs) - 1)]
        self.turns.append((prompt, output))
        return Script(output)

    def kept(self) -> list[bool]:
        """Whether each later prompt begins with the one before it and what the model then wrote."""
        pairs = zip(self.turns, self.turns[1:], strict=False)
        return [later.startswith(prompt + output) for (prompt, output), (later, _) in pairs]


def when_and_what() -> dict[str, str]:
    """The date, and the server that was tested."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent, check=True
    )
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"date": date, "commit": commit.stdout.strip(), "server": __version__}


class Session:
    """One client at work in a directory of its own, with no environment but what it needs."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name, self.program = name, install(name)
        self.work, self.home = directory / "work", directory / "home"
        self.work.mkdir()
        self.home.mkdir()
        self.recorder = Recorder()
        (self.work / "greet.py").write_text(BEFORE)

    def run(self, arguments: Sequence[str], **environment: str) -> str:
        """The client's output. Fails with it when the client fails."""
        env = {"PATH": os.environ["PATH"], "HOME": str(self.home), "TERM": "dumb", **environment}
        command = [str(self.program), *arguments]
        done = subprocess.run(
            command, check=False, cwd=self.work, env=env, capture_output=True, text=True, timeout=180, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, f"{self.name} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def record(self, script: Scripted, said: Any) -> None:
        """Write what happened to bench/results/clients/."""
        places = {str(self.work): "<work>", str(self.home): "<home>", script.live.url: "<server>"}
        result = {
            "client": CLIENTS[self.name].package,
            "version": CLIENTS[self.name].version,
            **when_and_what(),
            "task": TASK,
            "file_before": BEFORE,
            "file_after": (self.work / "greet.py").read_text(),
            "model_turns": [output for _, output in script.turns],
            "prompt_goes_on_from_the_one_before": script.kept(),
            "exchanges": self.recorder.transcript(places),
            "client_said": said,
        }
        RESULTS.mkdir(parents=True, exist_ok=True)
        text = json.dumps(scrubbed(result, places), ensure_ascii=False, indent=1) + "\n"
        (RESULTS / f"{self.name}.json").write_text(text)

    def check(self, script: Scripted) -> None:
        """The file was edited, nothing was refused, every prompt went on from the one before."""
        assert (self.work / "greet.py").read_text() == AFTER
        assert all(exchange["status"] == 200 for exchange in self.recorder.exchanges if exchange["request"]["method"] == "POST")
        assert len(script.turns) == len(script.outputs)
        assert all(script.kept())


def test_mini_swe_agent(tmp_path):
    session = Session("mini-swe-agent", tmp_path)
    with serving(wrap=session.recorder.around) as live:
        script = Scripted(
            live,
            [
                "Look first.</think>I look." + calls(("bash", {"command": "cat greet.py"})),
                "One word.</think>I edit." + calls(("bash", {"command": "sed -i s/hello/goodbye/ greet.py && cat greet.py"})),
                "Done.</think>" + calls(("bash", {"command": "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"})),
            ],
        )
        trajectory = tmp_path / "trajectory.json"
        base = f"model.model_kwargs.api_base={live.url}/v1"
        session.run(
            ["-m", "openai/nano", "-c", "mini.yaml", "-c", base, "-t", TASK, "-y", "--exit-immediately", "-o", str(trajectory)],
            OPENAI_API_KEY="any",
            MSWEA_CONFIGURED="true",
            MSWEA_COST_TRACKING="ignore_errors",
            LITELLM_LOCAL_MODEL_COST_MAP="True",
        )
        info = json.loads(trajectory.read_text())["info"]
        assert info["exit_status"] == "Submitted"
        session.record(script, {"exit_status": info["exit_status"], "api_calls": info["model_stats"]["api_calls"]})
        session.check(script)


def test_claude_code(tmp_path):
    session = Session("claude-code", tmp_path)
    path = str(session.work / "greet.py")
    with serving(wrap=session.recorder.around) as live:
        script = Scripted(
            live,
            [
                "Look first.</think>I look." + calls(("Read", {"file_path": path})),
                "One word.</think>" + calls(("Edit", {"file_path": path, "old_string": "hello", "new_string": "goodbye"})),
                f"Done.</think>{LAST}",
            ],
        )
        said = session.run(
            ["-p", TASK, "--output-format", "json", "--allowedTools", "Read,Edit"],
            ANTHROPIC_BASE_URL=live.url,
            ANTHROPIC_AUTH_TOKEN="any",
            CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
            IS_SANDBOX="1",
        )
        answer = json.loads(said)
        assert answer["result"] == LAST and not answer["is_error"] and answer["num_turns"] == 3
        session.record(
            script, {key: answer[key] for key in ("result", "num_turns", "stop_reason", "permission_denials", "usage")}
        )
        session.check(script)


def test_opencode(tmp_path):
    session = Session("opencode", tmp_path)
    path = str(session.work / "greet.py")
    with serving(wrap=session.recorder.around) as live:
        script = Scripted(
            live,
            [
                "Look first.</think>I look." + calls(("read", {"filePath": path})),
                "One word.</think>" + calls(("edit", {"filePath": path, "oldString": "hello", "newString": "goodbye"})),
                f"Done.</think>{LAST}",
            ],
        )
        provider = {
            "npm": "@ai-sdk/openai-compatible",
            "name": "Nautile",
            "options": {"baseURL": f"{live.url}/v1", "apiKey": "any"},
            "models": {"nano": {"name": "nano", "reasoning": True, "interleaved": {"field": "reasoning_content"}}},
        }
        configuration = {"provider": {"nautile": provider}, "model": "nautile/nano", "autoupdate": False, "share": "disabled"}
        (session.work / "opencode.json").write_text(json.dumps(configuration))
        said = session.run(
            ["run", "--format", "json", TASK], OPENCODE_DISABLE_MODELS_FETCH="1", OPENCODE_DISABLE_AUTOUPDATE="1"
        )
        events = [json.loads(line) for line in said.splitlines()]
        texts = [event["part"]["text"] for event in events if event["type"] == "text"]
        tools = [(event["part"]["tool"], event["part"]["state"]["status"]) for event in events if event["type"] == "tool_use"]
        assert texts[-1] == LAST and tools == [("read", "completed"), ("edit", "completed")]
        session.record(script, {"texts": texts, "tools": tools})
        session.check(script)


def test_codex(tmp_path):
    session = Session("codex", tmp_path)
    (session.home / ".codex").mkdir()
    with serving(wrap=session.recorder.around) as live:
        script = Scripted(
            live,
            [
                "Look first.</think>I look." + calls(("exec_command", {"cmd": "cat greet.py"})),
                "A tool in a namespace.</think>" + calls(("multi_agent_v1__close_agent", {"target": "nobody"})),
                "One word.</think>" + calls(("exec_command", {"cmd": "sed -i s/hello/goodbye/ greet.py && cat greet.py"})),
                f"Done.</think>{LAST}",
            ],
        )
        provider = (
            f'model_providers.nautile={{name="Nautile",base_url="{live.url}/v1",env_key="NAUTILE_KEY",wire_api="responses"}}'
        )
        options = ["--json", "--skip-git-repo-check", "-s", "danger-full-access", "-m", "nano", "-c", "model_provider=nautile"]
        said = session.run(["exec", *options, "-c", provider, TASK], NAUTILE_KEY="any")
        items = [json.loads(line)["item"] for line in said.splitlines() if '"item.completed"' in line]
        kinds = [(item["type"], item.get("exit_code")) for item in items]
        assert kinds.count(("command_execution", 0)) == 2 and items[-1]["text"] == LAST
        sent = session.recorder.exchanges[2]["request"]["body"]["input"]
        assert (
            "invalid agent id" in sent[-1]["output"] and sent[-2]["namespace"] == "multi_agent_v1"
        )  # the tool itself answered
        session.record(script, [item for item in items if item["type"] in ("command_execution", "agent_message", "reasoning")])
        session.check(script)


def test_javascript_sdks():
    place = ROOT / "javascript"
    install_packages(place, *JAVASCRIPT)
    script = place / "sdks.mjs"
    shutil.copy(Path(__file__).with_name("sdks.mjs"), script)
    with serving() as live:
        live.engine.default = Script("They ask.</think>I look." + calls(("weather", {"city": "Paris"})))
        done = subprocess.run(["node", str(script), live.url], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    call = ["weather", {"city": "Paris"}]
    assert json.loads(done.stdout) == {
        "chat": [*call, True],
        "responses": [*call, "I look."],
        "messages": [*call, ["thinking", "text", "tool_use"], "tool_use"],
    }
    versions = [package.rpartition("@")[::2] for package in JAVASCRIPT]
    result = {"client": dict(versions), **when_and_what(), "understood": json.loads(done.stdout)}
    (RESULTS / "javascript-sdks.json").write_text(json.dumps(result, indent=1) + "\n")
