"""`vpmoe browse` and `vpmoe site`: the store as pages, on a server or in files."""

import contextlib
from pathlib import Path

import click

from vpmoe_assets.commands.common import (
    experiment_in_force,
    experiment_option,
    json_option,
    open_store,
    print_json,
    user_errors,
)

_PATIENCE_S = 60.0
"""How long a site waits for what present code would make."""


@click.command()
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    help="Port, 0 for one that is free; by default $VPMOE_BROWSE_PORT, or 3100.",
)
@click.option(
    "--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Address to listen on."
)
@click.option("--expose", is_flag=True, help="Allow an address that other machines can reach.")
@click.option("--open", "open_browser", is_flag=True, help="Open a browser.")
@click.option(
    "--until-idle", type=click.FloatRange(0), metavar="SECONDS", help="End after so long without a reader."
)
@click.option("--beside", is_flag=True, help="End with the process that started it.")
@json_option
def browse(
    port: int | None,
    host: str,
    expose: bool,
    open_browser: bool,
    until_idle: float | None,
    beside: bool,
    as_json: bool,
) -> None:
    """Serve read-only pages over the store, until Ctrl-C.

    What is stale and why, the ladder, every artifact with its numbers, plots, checks, statements, files and
    record, its lineage as a graph, and any two compared. Pages need no JavaScript and nothing from elsewhere.
    Whoever reaches the port can read the store, so only this machine can, unless --expose allows another
    address. Links from Dagster's UI lead to the usual port.

    \b
    Examples:
      vpmoe browse
      vpmoe browse --port 8000 --open
      vpmoe browse --json --until-idle 60      # its URL for a script; it ends when nobody reads on
    """  # noqa: D301
    from vpmoe_assets.browse import server
    from vpmoe_assets.browse.links import port as usual_port

    with user_errors(ValueError, server.ServerError):
        served = server.Server(
            open_store(),
            host,
            usual_port() if port is None else port,
            expose=expose,
            until_idle=until_idle,
            beside=beside,
        )
        with served.listening() as listener:
            if as_json:
                print_json({"url": served.url, "store": str(served.store.root)})
            else:
                click.echo(f"{served.url} shows {served.store.root}; Ctrl-C ends it")
            if open_browser:
                click.launch(served.url)
            served.run(listener)


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.argument("assets", nargs=-1, metavar="[ASSET]...")
@experiment_option
@json_option
def site(directory: Path, assets: tuple[str, ...], experiment: str | None, as_json: bool) -> None:
    """Write the pages into DIRECTORY as files with relative links, for a paper's appendix.

    Without ASSETs every asset of the experiment; with them the latest version of each, and of all that they
    came from. Small files (reports, plots, metrics, records) are put beside the pages. A site that was there
    before is replaced; another directory's files are not.

    \b
    Examples:
      vpmoe site appendix
      vpmoe site appendix vpmoe_stage1 ladder_report -e full
    """  # noqa: D301
    from vpmoe_assets.browse.comparison import Comparison
    from vpmoe_assets.browse.pages import Pages
    from vpmoe_assets.browse.site import SiteError, chosen, refuse_inside, write_site

    store, name = open_store(), experiment_in_force(experiment)
    with user_errors(SiteError):
        refuse_inside(directory, store.root)
        pages = Pages(store, Comparison(store, patience_s=_PATIENCE_S, find=_find))
        heads = chosen(pages.catalog, name, assets)
        if not heads:
            raise SiteError(
                f"experiment {name} has no artifacts in {store.root}; `vpmoe ls -e NAME` shows another's"
            )
        written = write_site(pages, directory, heads)
    if as_json:
        print_json({"directory": str(directory), "pages": written.pages, "files": written.files})
    else:
        click.echo(f"{directory / 'index.html'}: {written.pages} pages, {written.files} files")


def _find(experiment: str) -> None:
    """Find out what present code would make of an experiment, where there is one of that name."""
    from vpmoe_assets.commands.present import present_of

    with contextlib.suppress(click.ClickException):
        present_of(experiment)
