"""``nautile sandbox image``: build, list and remove images, and see what sandboxes have fetched of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nautile.sandbox.images import ImageStore

__all__ = ["app"]

app = typer.Typer(help="Images: build, list, rm.", no_args_is_help=True, rich_markup_mode=None)

_STORE = typer.Option(help="A directory, or http(s)://HOST/BUCKET. Default: ~/.local/share/nautile/images.")
_CREDENTIALS = typer.Option(help="A file with two lines, key and secret, for a store that wants signed requests.")


def _store(where: str | None, credentials: Path | None) -> ImageStore:
    from nautile.sandbox.errors import ImageRefused  # noqa: PLC0415
    from nautile.sandbox.images import Credentials, ImageStore  # noqa: PLC0415

    if credentials is None:
        return ImageStore(where)
    words = credentials.read_text(encoding="utf-8").split()
    if len(words) not in (2, 3):
        raise ImageRefused(
            str(credentials), "it does not hold a key and a secret", "write them on two lines; a region may follow"
        )
    return ImageStore(where, credentials=Credentials(*words))


@app.command()
def build(  # noqa: PLR0913  # one parameter an option
    name: Annotated[str, typer.Argument(help="The image's name.")],
    source: Annotated[str, typer.Argument(help="A directory, a tar, an OCI layout, or debian:SUITE+PACKAGE.")],
    *,
    base: Annotated[str | None, typer.Option(help="An image whose layers are below.")] = None,
    workspace: Annotated[list[str] | None, typer.Option(help="A further layer: the work. May be given again.")] = None,
    toolkit: Annotated[list[str] | None, typer.Option(help="A further layer: tools. May be given again.")] = None,
    store: Annotated[str | None, _STORE] = None,
    credentials: Annotated[Path | None, _CREDENTIALS] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the image as JSON.")] = False,
) -> None:
    """Build an image of content-addressed layers; what is in the store already is not stored again.

    Example: nautile sandbox image build python debian:bookworm+python3-minimal --toolkit ./tools
    """
    sources = [("workspace" if base else "base", source)]
    sources += [("workspace", one) for one in workspace or []] + [("toolkit", one) for one in toolkit or []]
    made = _store(store, credentials).build(name, sources, base=base)
    if json_:
        typer.echo(json.dumps(dataclasses.asdict(made)))
        return
    for part in made.parts:
        typer.echo(f"{part.role:9} {part.index[:12]} {part.size / 2**20:9.1f} MiB  {part.machine or ''}")
    typer.echo(f'{name} is {made.size / 2**20:.1f} MiB. Next: nautile sandbox run --image {name} "ls /"')


@app.command("list")
def list_(
    *,
    store: Annotated[str | None, _STORE] = None,
    credentials: Annotated[Path | None, _CREDENTIALS] = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object an image.")] = False,
) -> None:
    """List the images of a store, and how much of each was fetched lazily by sandboxes of this machine.

    Example: nautile sandbox image list
    """
    images = _store(store, credentials)
    found = images.list()
    for one in found:
        fetched = images.fetched(one.name)
        if json_:
            typer.echo(json.dumps({**dataclasses.asdict(one), "bytes": one.size, "fetched": dataclasses.asdict(fetched)}))
            continue
        share = fetched.bytes / max(fetched.size, 1)
        roles = "+".join(part.role for part in one.parts)
        typer.echo(f"{one.name:24} {one.digest[:12]} {one.size / 2**20:9.1f} MiB  fetched {share:6.1%}  {roles}")
    if not found and not json_:
        typer.echo(f"no image in {images.where}; nautile sandbox image build --help")


@app.command()
def rm(
    name: Annotated[str, typer.Argument(help="The image's name.")],
    *,
    store: Annotated[str | None, _STORE] = None,
    credentials: Annotated[Path | None, _CREDENTIALS] = None,
) -> None:
    """Remove an image, and the layers that no other one has.

    Example: nautile sandbox image rm python
    """
    freed = _store(store, credentials).remove(name)
    typer.echo(f"removed {name}: {freed / 2**20:.1f} MiB freed")
