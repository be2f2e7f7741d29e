"""The command line: run a plan, ask its bank, make it forget, export it.

Every error that fedkola raises on purpose ends as one line ``ErrorName: message`` on stderr and as
the exit code of its branch. Results go to stdout, ``--json`` makes them one JSON object; progress
is drawn on stderr and only for a terminal. Whatever imports torch is imported inside a verb, so
that ``--help`` answers at once. Each module below holds some of the verbs, or what they share.
"""

import errno
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from fedkola import __version__
from fedkola.cli import audit, bank, bench, doctor, forget, models, running, site, upkeep
from fedkola.errors import FedKolaError, LedgerError

# What a disk says when it is full, over quota, read-only or not ours.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)

app = typer.Typer(
    help="Keep a foundation model's knowledge current across institutions that cannot share data.",
    epilog="Start with: fedkola doctor, then fedkola demo. Each verb has examples in its --help.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# A part without a name adds its verbs to the group itself, in this order.
bank.app.add_typer(forget.app)
bank.app.add_typer(upkeep.app)
app.add_typer(running.app)
app.add_typer(doctor.app)
app.add_typer(audit.app)
app.add_typer(bank.app, name="bank")
app.add_typer(models.app, name="model")
app.add_typer(site.app, name="site")
app.add_typer(bench.app, name="bench")


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point; ``arguments`` None reads those of the process. Always exits."""
    try:
        app(args=arguments)
    except FedKolaError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    except OSError as error:
        if error.errno not in _DISK:
            raise
        print(
            f"LedgerError: {error.filename or 'a file'} cannot be written ({error.strerror}); "
            "every committed round is safe: make room or change the owner, and try again",
            file=sys.stderr,
        )
        raise SystemExit(LedgerError.exit_code) from error


def _version(asked: bool) -> None:
    if asked:
        print(f"fedkola {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
