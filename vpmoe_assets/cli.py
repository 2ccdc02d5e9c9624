"""The command `vpmoe`: what there is, where it came from, whether it is still intact.

Only click is imported here and in the command modules; whatever is heavier waits until a command needs it.
"""

import os
from typing import Any

import click

from trainer.contract.pipe import leave_unprinted
from trainer.contract.printed import print_whatever_comes
from vpmoe_assets.commands.accept import accept
from vpmoe_assets.commands.adopt import adopt
from vpmoe_assets.commands.attest import attest
from vpmoe_assets.commands.browse import browse, site
from vpmoe_assets.commands.card import card
from vpmoe_assets.commands.data import data
from vpmoe_assets.commands.diff import diff
from vpmoe_assets.commands.forget import forget
from vpmoe_assets.commands.gc import gc
from vpmoe_assets.commands.index import index
from vpmoe_assets.commands.jobs import reap
from vpmoe_assets.commands.lineage import lineage
from vpmoe_assets.commands.ls import ls
from vpmoe_assets.commands.make import make
from vpmoe_assets.commands.new import new
from vpmoe_assets.commands.path import path
from vpmoe_assets.commands.pin import pin, unpin
from vpmoe_assets.commands.plan import plan
from vpmoe_assets.commands.report_events import report_events
from vpmoe_assets.commands.reports import reports
from vpmoe_assets.commands.rerun import rerun
from vpmoe_assets.commands.show import show
from vpmoe_assets.commands.sql import sql
from vpmoe_assets.commands.upgrade import upgrade
from vpmoe_assets.commands.verify import verify
from vpmoe_assets.commands.watch import watch
from vpmoe_assets.commands.why import why
from vpmoe_assets.lineage.errors import LineageError


class _Group(click.Group):
    """A group whose user errors end in one line and exit code 1; where nobody reads on it ends quietly."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        print_whatever_comes()
        # Looking for plugins of pydantic reads the metadata of every installed package; none are wanted here.
        os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
        try:
            return super().main(*arguments, **options)
        except OSError as error:  # click's own, of what it could not print
            raise SystemExit(leave_unprinted(error)) from error

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        try:
            return super().make_context(*arguments, **options)
        except OSError as error:  # of --help and --version
            raise SystemExit(leave_unprinted(error)) from error

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise SystemExit(leave_unprinted(error)) from error
        except (LineageError, OSError) as error:
            raise _harmless(click.ClickException(" ".join(str(error).split()))) from error
        except click.ClickException as error:
            _harmless(error)
            raise


def _harmless(error: click.ClickException) -> click.ClickException:
    """Return an error without credentials in its message: what a terminal shows, a CI job keeps."""
    from trainer.contract.credentials import clean_error

    clean_error(error)
    return error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="vpmoe")
def main() -> None:
    """Look at artifacts and their lineage, verify and accept them, ask questions in SQL, build data.

    ASSET is the bare name for the current experiment ($VPMOE_EXPERIMENT, default smoke; -e for another),
    optionally with @VERSION. Every command takes --json and has examples under --help.
    """


for _command in (
    ls,
    why,
    plan,
    make,
    new,
    show,
    lineage,
    path,
    diff,
    verify,
    rerun,
    forget,
    pin,
    unpin,
    gc,
    card,
    attest,
    adopt,
    accept,
    upgrade,
    sql,
    index,
    data,
    reports,
    watch,
    reap,
    browse,
    site,
    report_events,
):
    main.add_command(_command)

if __name__ == "__main__":
    main()
