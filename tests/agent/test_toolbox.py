"""The tools: their exact texts, their limits, and what they refuse. Training depends on every text here."""

import json
import os
import re
import resource
import subprocess
import sys
import time

import pytest

from agent.processes import gone, nap
from nautile.agent import toolbox
from nautile.agent.toolbox import execute
from nautile.agent.tools import TOOL_NAMES, TOOLS


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "a.txt").write_text("alpha\nbeta x\ngamma x")
    (root / "sub" / "b.py").write_text("def x():\n    pass\n")
    (root / "empty").write_text("")
    (root / "bin").write_bytes(b"text\0more\n")
    (tmp_path / "secret").write_text("secret\n")
    (root / "out").symlink_to(tmp_path / "secret")
    return root


@pytest.mark.parametrize(
    ("name", "arguments", "output"),
    [
        ("list", {}, "a.txt\nbin\nempty\nout\nsub/"),
        ("list", {"path": "sub"}, "b.py"),
        ("read", {"path": "a.txt"}, "1: alpha\n2: beta x\n3: gamma x"),
        ("read", {"path": "a.txt", "offset": 2, "limit": 1}, "2: beta x\n... 1 more lines"),
        ("read", {"path": "./sub/../a.txt", "offset": "3"}, "3: gamma x"),
        ("read", {"path": "empty"}, "(empty)"),
        ("grep", {"pattern": "x"}, "a.txt:2: beta x\na.txt:3: gamma x\nsub/b.py:1: def x():"),
        ("grep", {"pattern": "x", "path": "sub"}, "sub/b.py:1: def x():"),
        ("grep", {"pattern": "x", "path": "a.txt"}, "2: beta x\n3: gamma x"),
        ("grep", {"pattern": "a.*a"}, "no matches"),
        ("count", {"pattern": "x"}, "3"),
        ("count", {"pattern": "", "path": "a.txt"}, "3"),
        ("count", {"pattern": "zz", "path": "a.txt"}, "0"),
        ("edit", {"path": "a.txt", "old": "beta", "new": "BETA\n"}, "edited a.txt line 2"),
        ("run", {"command": "echo hi; echo no >&2"}, "hi\nno"),
        ("run", {"command": "true"}, "(no output)"),
        ("run", {"command": "echo bye; exit 3"}, "bye\n[exit 3]"),
        ("run", {"command": "exit 3"}, "[exit 3]"),
    ],
)
def test_outputs(root, name, arguments, output):
    assert execute(name, arguments, root) == (True, output)


@pytest.mark.parametrize(
    ("name", "arguments", "output"),
    [
        ("list", {"path": "a.txt"}, "a.txt is not a directory"),
        ("read", {"path": "none"}, "none does not exist"),
        ("read", {"path": "sub"}, "sub is a directory"),
        ("read", {"path": "bin"}, "bin is a binary file"),
        ("grep", {"pattern": "t", "path": "bin"}, "bin is a binary file"),
        ("read", {"path": "a.txt", "offset": 9}, "a.txt has 3 lines"),
        ("read", {"path": "a.txt", "offset": 0}, "offset and limit start at 1"),
        ("read", {"path": "a\0"}, "a path cannot hold a NUL character"),
        ("read", {"path": "../secret"}, "../secret is outside the workspace"),
        ("read", {"path": "out"}, "out is outside the workspace"),
        ("list", {"path": "/"}, "/ is outside the workspace"),
        ("edit", {"path": "out", "old": "secret", "new": "x"}, "out is outside the workspace"),
        ("edit", {"path": "a.txt", "old": "x", "new": "y"}, "old text found 2 times"),
        ("edit", {"path": "a.txt", "old": "nothing", "new": "y"}, "old text not found"),
        ("edit", {"path": "a.txt", "old": "", "new": "y"}, "old text is empty"),
        ("read", {}, "missing argument 'path'"),
        ("read", {"path": "a.txt", "offset": "two"}, "argument 'offset' must be an integer"),
        ("read", {"path": "a.txt", "offset": True}, "argument 'offset' must be an integer"),
        ("read", {"path": 3}, "argument 'path' must be a string"),
        ("read", {"path": "a.txt", "lines": 3}, "unknown argument 'lines'; known are path, offset, limit"),
        ("read", ["a.txt"], "arguments must be an object"),
        ("write", {}, "unknown tool 'write'; tools are list, read, grep, count, edit, run"),
        ("restore", {"path": "a.txt"}, "unknown tool 'restore'; tools are list, read, grep, count, edit, run"),
    ],
)
def test_errors(root, name, arguments, output):
    assert execute(name, arguments, root) == (False, f"error: {output}")


def test_schemas_match_the_tools(root):
    assert tuple(toolbox._TOOLS) == TOOL_NAMES
    for tool in TOOLS:
        function = tool["function"]
        signature = toolbox._TOOLS[function["name"]][1]
        assert list(function["parameters"]["properties"]) == list(signature)
        assert function["parameters"]["required"] == [key for key, default in signature.items() if default is ...]


def test_limits(tmp_path):
    for number in range(203):
        (tmp_path / f"{number:03}").write_text("")
    assert execute("list", {}, tmp_path).output.splitlines()[199:] == ["199", "... 3 more"]
    (tmp_path / "000").write_text("x\n" * 45 + "y" * 300 + "\n")
    assert execute("read", {"path": "000"}, tmp_path).output.splitlines()[-2:] == ["40: x", "... 6 more lines"]
    assert execute("read", {"path": "000", "offset": 46}, tmp_path).output == "46: " + "y" * 200 + "..."
    assert execute("grep", {"pattern": "x"}, tmp_path).output.splitlines()[-2:] == ["000:20: x", "... 25 more matches"]
    output = execute("run", {"command": "printf %03000d 0"}, tmp_path).output
    assert output == "0" * 2000 + "\n... 1000 more characters"


def test_a_pattern_across_chunks_of_an_endless_line_is_found(tmp_path):
    (tmp_path / "long").write_bytes(b"a" * (toolbox._CHUNK - 3) + b"needle" + b"b" * toolbox._CHUNK + b"\nneedle\n")
    assert execute("count", {"pattern": "needle"}, tmp_path).output == "2"
    assert execute("count", {"pattern": "b" * 1000}, tmp_path).output == "1"
    assert execute("count", {"pattern": ""}, tmp_path).output == "2"


def test_search_skips_links_git_and_binaries(root):
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("x\n")
    (root / "loop").symlink_to(root)
    (root / "again").symlink_to(root / "a.txt")
    assert execute("count", {"pattern": "x"}, root).output == "3"


def test_a_pipe_is_refused_not_waited_for(root):
    os.mkfifo(root / "pipe")
    assert execute("read", {"path": "pipe"}, root).output == "error: pipe is not a regular file"


def test_edit_keeps_mode_and_leaves_no_temporary_file(root):
    (root / "a.txt").chmod(0o751)
    before = sorted(root.iterdir())
    assert execute("edit", {"path": "a.txt", "old": "gamma", "new": "g"}, root).ok
    assert (root / "a.txt").read_text() == "alpha\nbeta x\ng x"
    assert (root / "a.txt").stat().st_mode & 0o777 == 0o751
    assert sorted(root.iterdir()) == before


def test_edit_refuses_a_huge_file(root):
    with (root / "huge").open("wb") as stream:
        stream.write(b"text " * 2000)
        stream.truncate(toolbox.EDIT_LIMIT + 1)
    assert execute("edit", {"path": "huge", "old": "a", "new": "b"}, root).output == "error: huge is too large to edit"


@pytest.mark.parametrize(
    ("size", "tool", "arguments", "output"),
    [
        (2**28, "read", {"path": "big"}, "1: " + ("begin " * 2000)[:200] + "..."),
        (2**28, "count", {"pattern": "begin", "path": "big"}, "1"),
        pytest.param(2**30, "read", {"path": "big"}, "1: " + ("begin " * 2000)[:200] + "...", marks=pytest.mark.slow),
        (2**30, "edit", {"path": "big", "old": "a", "new": "b"}, "error: big is too large to edit"),
    ],
)
def test_a_huge_file_takes_no_memory(tmp_path, size, tool, arguments, output):
    """A sparse file that begins like text: one endless line. The address space is 200 MB, so loading it would be an error."""
    with (tmp_path / "big").open("wb") as stream:
        stream.write(b"begin " * 2000)
        stream.truncate(size)
    done = subprocess.run(
        [sys.executable, "-I", "-S", toolbox.__file__, str(tmp_path)],
        input=json.dumps({"tool": tool, "arguments": arguments}),
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (200 * 2**20, 200 * 2**20)),
    )
    assert json.loads(done.stdout)["output"] == output


def test_a_command_that_never_ends_is_killed_with_its_children(root):
    began = time.monotonic()
    output = begun(f"{nap(7101)} & sh -c '{nap(7102)}; true' & echo on; wait", root)
    assert re.fullmatch(r"on\n\[killed after \S+ s\]", output)
    assert time.monotonic() - began < 120
    assert gone(nap(7101), nap(7102))


def begun(command, root):
    """What a command that never ends gives: within a longer time where a machine is too busy for it to begin in a short one."""
    for limit in (0.3, 3.0, 60.0):
        ok, output = execute("run", {"command": command}, root, limit)
        assert not ok and output.endswith(f"[killed after {limit:g} s]")
        if not output.startswith("["):
            break
    return output


def test_endless_output_is_capped_as_it_comes(root):
    output = begun("yes", root)
    assert len(output) < 2100 and output.startswith("y\ny\n")


def test_what_a_command_leaves_behind_ends_with_it(root):
    began = time.monotonic()
    assert execute("run", {"command": f"{nap(7103)} & echo done"}, root, 300.0).output == "done"
    assert time.monotonic() - began < 120
    assert gone(nap(7103))


def test_alone_it_also_ends_what_left_the_process_group(root):
    request = {"tool": "run", "arguments": {"command": f"setsid {nap(7104)} & echo done"}, "time_limit": 300}
    done = subprocess.run(
        [sys.executable, "-I", "-S", toolbox.__file__, str(root)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == {"ok": True, "output": "done"}
    assert gone(nap(7104))
