"""``nautile sandbox``: try a sandbox, see what works here, read trajectory logs, offer a sandbox over MCP."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from nautile.cli import image as image_verbs

__all__ = ["app"]

app = typer.Typer(
    help="Sandboxes: run, doctor, log, mcp, images; a fleet: edge, gateway, token, fleet.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
log = typer.Typer(help="Trajectory logs: show, replay, verify.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(log, name="log")
app.add_typer(image_verbs.app, name="image")

_MARKS = {"ok": "ok      ", "degraded": "degraded", "missing": "missing "}


@app.command()
def doctor(json_: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False) -> None:
    """Try each substrate: ok, degraded or missing, its measured time, and what mends it.

    Exit status 1 if neither function nor container works. Example: nautile sandbox doctor
    """
    from nautile.sandbox.doctor import examine  # noqa: PLC0415

    found = []
    for finding in examine():
        found.append(finding)
        if not json_:
            took = f"{finding.seconds * 1000:7.0f} ms" if finding.seconds is not None else " " * 10
            typer.echo(f"{finding.part:10} {_MARKS[finding.state]} {took}  {finding.detail}")
            if finding.remedy:
                typer.echo(f"{'':10} -> {finding.remedy}")
    if json_:
        typer.echo(json.dumps([dataclasses.asdict(one) for one in found]))
    if not any(one.part in ("function", "container") and one.state == "ok" for one in found):
        raise typer.Exit(1)


@app.command()
def run(  # noqa: PLR0913  # one parameter an option
    command: Annotated[str, typer.Argument(help="What to run, as for sh -c.")],
    *,
    kind: Annotated[str, typer.Option(help="function, container, microvm or vm.")] = "container",
    image: Annotated[
        Path | None, typer.Option(help="A directory with a root file system, or an image's name. Default: the host's /usr.")
    ] = None,
    emulate: Annotated[bool, typer.Option("--emulate", help="Let QEMU emulate the processor where KVM does not work.")] = False,
    workspace: Annotated[Path | None, typer.Option(help="A directory to bind at /workspace, read and write.")] = None,
    allow: Annotated[list[str] | None, typer.Option(help="HOST:PORT that may be reached; may be given again.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds.")] = 60.0,
    memory: Annotated[int, typer.Option(help="Memory limit in MiB.")] = 512,
    log: Annotated[Path | None, typer.Option(help="A directory for the trajectory log.")] = None,
    stdin: Annotated[bool, typer.Option("--stdin", "-i", help="Give the command this program's input.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Run one command in a new sandbox; its exit status is the command's.

    Example: nautile sandbox run "python3 -c 'print(6*7)'" --kind function
    """
    from nautile.sandbox import MIB, Limits, Sandbox  # noqa: PLC0415

    given = sys.stdin.buffer.read(64 * MIB + 1) if stdin else b""
    with Sandbox.create(
        kind,
        image=image,
        limits=Limits(memory=memory * MIB),
        network=allow,
        allow_emulation=emulate,
        workspace=workspace,
        log=log,
    ) as sandbox:
        result = sandbox.run(command, timeout, given)
    if json_:
        keys = ("exit_code", "stdout", "stderr", "truncated", "timed_out", "infrastructure_error", "memory_killed", "seconds")
        typer.echo(json.dumps({key: getattr(result, key) for key in keys}))
    else:
        sys.stdout.buffer.write(result.stdout_bytes)
        sys.stdout.flush()
        sys.stderr.buffer.write(result.stderr_bytes)
        for said in (result.infrastructure_error, f"killed after {timeout:g} s" if result.timed_out else None):
            if said:
                typer.echo(f"nautile: {said}", err=True)
    if result.infrastructure_error or result.exit_code:
        raise typer.Exit(1 if result.infrastructure_error else result.exit_code)


@app.command()
def kernel() -> None:
    """Download the kernel of virtual machines (Debian's cloud kernel, through apt) into the cache; nothing is installed.

    Example: nautile sandbox kernel
    """
    from nautile.sandbox.errors import SubstrateUnavailable  # noqa: PLC0415
    from nautile.sandbox.guest.kernel import KernelMissing, fetch  # noqa: PLC0415

    try:
        typer.echo(f"kernel for guests: {fetch().version}")
    except KernelMissing as error:
        raise SubstrateUnavailable("microvm", str(error), "then run this again") from None


@app.command()
def stop() -> None:
    """End every container of this user, and every machine that outlives its client, with the processes that keep them.

    Example: nautile sandbox stop
    """
    from nautile.sandbox.container import KeeperClient  # noqa: PLC0415
    from nautile.sandbox.guest.hosted import stop_hosts  # noqa: PLC0415

    keeper = KeeperClient()
    was = keeper.running
    keeper.stop()
    was = bool(stop_hosts()) or was
    typer.echo("stopped" if was else "nothing was running")


@app.command()
def mcp(
    *,
    kind: Annotated[str, typer.Option(help="function or container.")] = "container",
    workspace: Annotated[Path | None, typer.Option(help="A directory to bind at /workspace, read and write.")] = None,
    allow: Annotated[list[str] | None, typer.Option(help="HOST:PORT that may be reached; may be given again.")] = None,
) -> None:
    """Offer one sandbox as tools to an MCP client on stdin and stdout: run, read, write, list.

    Example, in a client's configuration: "command": "nautile", "args": ["sandbox", "mcp"]
    """
    from nautile.sandbox.mcp_server import serve  # noqa: PLC0415

    serve(kind, workspace, allow)


@app.command()
def edge(  # noqa: PLR0913  # one parameter an option
    name: Annotated[str, typer.Argument(help="Its name: it is part of the ids of its sandboxes, and stays the same.")],
    *,
    state: Annotated[Path, typer.Option(help="Its directory, kept from run to run.")],
    listen: Annotated[str, typer.Option(help="HOST:PORT, or unix:PATH for gateways of this machine.")] = "127.0.0.1:0",
    secret_file: Annotated[Path | None, typer.Option(help="A file with the secret that gateways show. TCP needs one.")] = None,
    capacity: Annotated[int, typer.Option(help="Sandboxes at once.")] = 4000,
    kinds: Annotated[list[str] | None, typer.Option("--kind", help="What it offers; default: function, container.")] = None,
    emulate: Annotated[bool, typer.Option("--emulate", help="Machines may be emulated.")] = False,
    pool: Annotated[int, typer.Option(help="Containers with default limits that are made ahead.")] = 0,
    images: Annotated[
        Path | None, typer.Option(help="Whose directories may be named as images. Default: the image store.")
    ] = None,
    orphan: Annotated[float, typer.Option(help="Seconds that sandboxes live on when the edge is killed.")] = 600.0,
    leave: Annotated[bool, typer.Option("--leave", help="Leave sandboxes to the next run instead of closing them.")] = False,
    evict: Annotated[bool, typer.Option("--evict", help="Kill an earlier run that still holds the state.")] = False,
) -> None:
    """Own this machine's sandboxes for a fleet. Prints "ready URL"; ends at SIGTERM.

    Example: nautile sandbox edge n1 --state /var/lib/nautile --listen 10.0.0.5:7070 --secret-file secret
    """
    from nautile.sandbox.fleet.admission import Admission  # noqa: PLC0415
    from nautile.sandbox.fleet.edge import EdgeConfig  # noqa: PLC0415
    from nautile.sandbox.fleet.serving import serve_edge  # noqa: PLC0415

    offered = tuple(kinds or ("function", "container"))
    config = EdgeConfig(
        name, state, Admission(capacity), orphan, pool=pool, images=images, kinds=offered, allow_emulation=emulate
    )
    serve_edge(config, listen, _secret(secret_file), leave, evict)


@app.command()
def gateway(
    tokens: Annotated[Path, typer.Argument(help="The file of tokens and projects; see: nautile sandbox token.")],
    *,
    edges: Annotated[list[str] | None, typer.Option("--edge", help="An edge's URL; may be given again.")] = None,
    edges_file: Annotated[Path | None, typer.Option(help="A file with one edge's URL a line; may change.")] = None,
    listen: Annotated[str, typer.Option(help="HOST:PORT.")] = "127.0.0.1:0",
    secret_file: Annotated[Path | None, typer.Option(help="A file with the secret of the edges.")] = None,
    choices: Annotated[int, typer.Option(help="How many edges at random the least loaded is taken of.")] = 2,
) -> None:
    """Place sandboxes on edges, for those who have a token. Prints "ready URL". Start as many as you like.

    Example: nautile sandbox gateway tokens.json --edge http://10.0.0.5:7070 --secret-file secret --listen 0.0.0.0:7000
    """
    from nautile.sandbox.fleet.gateway import GatewayConfig  # noqa: PLC0415
    from nautile.sandbox.fleet.serving import serve_gateway  # noqa: PLC0415
    from nautile.sandbox.fleet.watcher import Edges  # noqa: PLC0415

    serve_gateway(GatewayConfig(tokens, choices), Edges(tuple(edges or ()), edges_file), listen, _secret(secret_file))


@app.command()
def token(
    project: Annotated[str, typer.Argument(help="Whose: steps between slashes; limits hold for all below.")],
    *,
    file: Annotated[Path, typer.Option(help="The file of tokens and projects; made if it is not there.")],
    sandboxes: Annotated[int | None, typer.Option(help="How many sandboxes the project may have at once.")] = None,
    memory: Annotated[int | None, typer.Option(help="The sum of their memory limits, in MiB.")] = None,
) -> None:
    """Make a token of a fleet's project and print it; the file keeps only its hash.

    Example: nautile sandbox token lab/anna --file tokens.json --sandboxes 100
    """
    from nautile.sandbox import MIB  # noqa: PLC0415
    from nautile.sandbox.fleet.quota import Quota, issue  # noqa: PLC0415

    typer.echo(issue(file, project, Quota(sandboxes, None if memory is None else memory * MIB)))


@app.command()
def fleet(
    url: Annotated[str, typer.Argument(help="A gateway.")],
    *,
    token_file: Annotated[Path, typer.Option(help="A file with your token.")],
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a fleet's edges and your project's sandboxes.

    Example: nautile sandbox fleet http://10.0.0.1:7000 --token-file token
    """
    from nautile.sandbox.fleet.client import Fleet  # noqa: PLC0415

    asked = Fleet(url, token_file.read_text().strip(), patience=5.0)
    seen, mine = asked.ask("GET", "/v1/fleet"), asked.ask("GET", "/v1/sandboxes")
    if json_:
        typer.echo(json.dumps({**seen, **mine}))
        return
    for one in seen["edges"]:
        typer.echo(f"{one['name']:20} {one['live']:6} of {one['capacity']:6}  {', '.join(one['kinds'])}")
    if seen["silent"]:
        typer.echo(f"{seen['silent']} edges do not answer")
    for one in mine["sandboxes"]:
        typer.echo(f"{one['id']:40} {one['state']:5} {one['kind']:10} idle {one['idle']:.0f} s  {one['log'] or ''}".rstrip())


def _secret(file: Path | None) -> str | None:
    from nautile.sandbox import InvalidRequest  # noqa: PLC0415

    if file is None:
        return None
    secret = file.read_text().strip()
    if len(secret) < 16:
        raise InvalidRequest(f"{file}: a secret has at least 16 characters: head -c 24 /dev/urandom | base64 > {file}")
    return secret


@log.command()
def show(
    place: Annotated[Path, typer.Argument(help="The log's directory.")],
    *,
    html: Annotated[Path | None, typer.Option(help="Write one HTML page here instead.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object an operation.")] = False,
) -> None:
    """Print a trajectory, one line an operation.

    Example: nautile sandbox log show runs/17 --html trajectory.html
    """
    from nautile.sandbox.log import load  # noqa: PLC0415
    from nautile.sandbox.view import lines, page  # noqa: PLC0415

    contents = load(place)
    if html is not None:
        html.write_text(page(place, contents), encoding="utf-8")
        typer.echo(f"wrote {html}")
    elif json_:
        for operation in contents.operations:
            typer.echo(json.dumps(dataclasses.asdict(operation)))
    else:
        for line in lines(contents):
            typer.echo(line)


@log.command()
def verify(place: Annotated[Path, typer.Argument(help="The log's directory.")]) -> None:
    """Check every frame, the hash chain, the parents and the blobs.

    Example: nautile sandbox log verify runs/17
    """
    from nautile.sandbox.log import verify as check  # noqa: PLC0415

    operations, unknown = check(place)
    typer.echo(f"{operations} operations, the chain holds" + (f"; {unknown} without a result" if unknown else ""))


@log.command()
def replay(
    place: Annotated[Path, typer.Argument(help="The log's directory.")],
    *,
    reexecute: Annotated[bool, typer.Option("--reexecute", help="Run everything again in a new sandbox and compare.")] = False,
) -> None:
    """Print what a session printed, from the log alone; with --reexecute run it again and compare.

    Example: nautile sandbox log replay runs/17 --reexecute
    """
    from nautile.sandbox.log import expand, load  # noqa: PLC0415
    from nautile.sandbox.view import outcome, summary  # noqa: PLC0415

    contents = load(place)
    if reexecute:
        _reexecute(place)
        typer.echo(f"{len(contents.operations)} operations gave the same again")
        return
    for operation in contents.operations:
        typer.echo(f"$ {summary(operation)}")
        result = {} if operation.result is None else expand(place, contents.head, operation.result)
        for key in ("stdout", "stderr", "data"):
            value = result.get(key)
            if isinstance(value, bytes) and value:
                typer.echo(value.decode("utf-8", "replace").rstrip("\n"))
        if outcome(operation) not in ("exit 0", "done"):
            typer.echo(f"[{outcome(operation)}]")


def _reexecute(place: Path) -> None:
    from nautile.sandbox.recorded import repeat  # noqa: PLC0415

    repeat(place)
