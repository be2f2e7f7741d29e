"""The verbs of ``fedkola bank`` that rewrite or copy it: compact, archive, merge, export."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fedkola.cli.opened import features, listing, open_bank, print_cells
from fedkola.cli.text import AsJson, Folder, examples, print_json, print_table

app = typer.Typer()


@app.command(
    "compact",
    epilog=examples(
        "fedkola bank compact runs/demo",
        "fedkola bank compact runs/demo --eps 0.05 --json",
    ),
)
def bank_compact(
    folder: Folder,
    eps: Annotated[
        float,
        typer.Option(min=0, max=1, help="Relative error up to which LoRA modules may be fused."),
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Add cells up, which changes no answer, and fuse near or idle LoRA modules.

    The error of fusing is known before it is made. Parts move to cold storage,
    where removals and questions about the past find them.
    """
    from fedkola.evaluation import session as sessions

    with open_bank(folder) as opened:
        before = listing(opened)
    session = sessions.resume(folder, cache=features(folder))
    with session.ledger:
        sessions.compact(session, eps=eps)
    with open_bank(folder) as opened:
        after = listing(opened)
    document = {"before": _sizes(before), "after": _sizes(after), "fused": after["fused"]}
    if as_json:
        print_json(document)
        return
    _print_sizes(document)
    for fused in after["fused"]:
        print(f"fused: {', '.join(fused['modules'])}, relative error {fused['error']:.2%}")


@app.command(
    "archive",
    epilog=examples(
        "fedkola bank archive runs/demo",
        "fedkola bank archive runs/demo --purge",
    ),
)
def bank_archive(
    folder: Folder,
    purge: Annotated[
        bool, typer.Option("--purge", help="Delete cold storage; the record of its cells stays.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Move cells that no present answer reads to cold storage, or give cold storage up.

    After a purge the past within added-up cells cannot be asked any more, and a
    removal that touches them asks their sites to sum their journals again.
    """
    from fedkola.evaluation import session as sessions

    with open_bank(folder) as opened:
        before = listing(opened)
    session = sessions.resume(folder, cache=features(folder))
    with session.ledger:
        sessions.archive(session, purge=purge)
    with open_bank(folder) as opened:
        after = listing(opened)
    document = {"before": _sizes(before), "after": _sizes(after)}
    if as_json:
        print_json(document)
        return
    _print_sizes(document)


@app.command(
    "merge",
    epilog=examples(
        "fedkola bank merge runs/east runs/west --into runs/both",
        "fedkola bank merge runs/east runs/west --into runs/both --json",
    ),
)
def bank_merge(
    one: Annotated[Path, typer.Argument(metavar="A", help="Folder of a run.")],
    other: Annotated[Path, typer.Argument(metavar="B", help="Folder of another run.")],
    into: Annotated[Path, typer.Option(help="A new folder for the merged run.")],
    as_json: AsJson = False,
) -> None:
    """Merge the banks of two runs into a third; what one of them forgot stays forgotten.

    Both need the same task, base model and recipes. A cell that both changed in
    different ways is refused.
    """
    from fedkola.evaluation import merging
    from fedkola.evaluation import session as sessions

    state = merging.merge_runs(one, other, into)
    session = sessions.resume(into, cache=features(into))
    with session.ledger:
        sessions.publish(session, state)
    with open_bank(into) as opened:
        document = listing(opened)
    if as_json:
        print_json(document)
        return
    print_cells(document)
    print(f"run folder: {into}")


@app.command(
    "export",
    epilog=examples(
        "fedkola bank export runs/demo --to adapters/demo",
        "fedkola bank export runs/demo --to adapters/lungs --module icd10cm/chapter-10",
    ),
)
def bank_export(
    folder: Folder,
    to: Annotated[Path, typer.Option(help="A new folder to write.")],
    modules: Annotated[
        list[str] | None,
        typer.Option("--module", help="Only this module or scope; repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the adapters as a folder that peft loads, with head, router and provenance."""
    from fedkola.evaluation import session as sessions

    session = sessions.resume(folder, cache=features(folder))
    with session.ledger:
        written = sessions.export(session, to, modules=modules or ())
    names = sorted(str(p.relative_to(written)) for p in written.rglob("*") if p.is_file())
    if as_json:
        print_json({"folder": str(written), "files": names})
        return
    print(f"exported to {written}: {', '.join(names)}")
    print("it is a copy: what is forgotten later stays in it")


def _sizes(document: Mapping[str, Any]) -> dict[str, Any]:
    """How large a listed bank is, hot and cold."""
    return {
        "hot_cells": len(document["cells"]),
        "hot_bytes": sum(cell["bytes"] for cell in document["cells"]),
        "cold_cells": sum(cell["status"] == "archived" for cell in document["cold"]),
        "cold_bytes": document["cold_bytes"],
        "purged_cells": sum(cell["status"] == "purged" for cell in document["cold"]),
        "slots": sum(module["slot"] is not None for module in document["modules"])
        + len(document["fused"]),
    }


def _print_sizes(document: Mapping[str, Any]) -> None:
    before, after = document["before"], document["after"]
    print_table(
        "",
        ("", "before", "after"),
        [
            ("hot cells", str(before["hot_cells"]), str(after["hot_cells"])),
            ("hot MB", f"{before['hot_bytes'] / 1e6:.2f}", f"{after['hot_bytes'] / 1e6:.2f}"),
            ("cold cells", str(before["cold_cells"]), str(after["cold_cells"])),
            ("cold MB", f"{before['cold_bytes'] / 1e6:.2f}", f"{after['cold_bytes'] / 1e6:.2f}"),
            ("purged cells", str(before["purged_cells"]), str(after["purged_cells"])),
            ("slots taken", str(before["slots"]), str(after["slots"])),
        ],
        right=("before", "after"),
    )
