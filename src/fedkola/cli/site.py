"""The group ``fedkola site``: what a site can do alone, before it joins and after."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fedkola.cli.text import AsJson, examples, plain, print_json, print_table
from fedkola.errors import DataError

app = typer.Typer(help="Look at a site's own records.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    pass


@app.command(
    epilog=examples(
        "fedkola site check notes.csv",
        "fedkola site check notes.csv --text note --label code --time seen --labels codes.txt",
        'fedkola site check "parts/*.jsonl" --text question --label answer --out card.html',
        "fedkola site check notes.csv --tolerate 0.01 --no-quotes --json",
    )
)
def check(
    data: Annotated[
        str, typer.Argument(help="A file of records, or a pattern: .csv .tsv .jsonl .parquet, .gz.")
    ],
    text: Annotated[str, typer.Option(help="Column of the texts (or questions).")] = "text",
    label: Annotated[
        str, typer.Option(help="Column of the labels (or answers); empty where there is none.")
    ] = "label",
    record: Annotated[str, typer.Option(help="Column that names records; empty: their line.")] = "",
    when: Annotated[str, typer.Option("--time", help="Column of their dates.")] = "",
    labels: Annotated[
        Path | None, typer.Option(help="The labels that count, one a line, or a table of code.")
    ] = None,
    encoding: Annotated[str, typer.Option(help="Encoding of the files.")] = "utf-8",
    first_year: Annotated[int, typer.Option(min=0, max=9999, help="No date is earlier.")] = 0,
    tolerate: Annotated[
        float, typer.Option(min=0, max=1, help="Share of rows that may be to fix.")
    ] = 0.0,
    quotes: Annotated[bool, typer.Option(help="Whether the card quotes records.")] = True,
    out: Annotated[
        Path | None, typer.Option(help="Where the card goes; its JSON lies beside it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check records before anything is learnt from them, and write a data card; exit 0 or 3.

    Exit 3 says that more rows than tolerated cannot be used or should not be learnt from: for
    pipelines. Nothing leaves this machine and no record is changed.
    """
    from fedkola.evaluation import card

    registry = card.catalogue(labels, encoding=encoding) if labels else None
    doc = card.examine(
        data,
        card.Columns(text=text, label=label, record=record, time=when),
        now=time.time(),
        registry=registry,
        encoding=encoding,
        first_year=first_year,
        tolerate=tolerate,
        quotes=quotes,
    )
    page = out or Path(f"{Path(doc['files'][0]['name']).name.split('.')[0]}-card.html")
    if page.suffix != ".html":
        raise DataError(f"--out {page} is no page; give a name that ends in .html")
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(card.render(doc), encoding="utf-8")
    beside = page.with_suffix(".json")
    beside.write_text(
        json.dumps(plain(doc), ensure_ascii=False, allow_nan=False, indent=1) + "\n",
        encoding="utf-8",
    )
    if as_json:
        print_json({"card": str(page), **doc})
    else:
        _print(doc)
        print(f"card: {page}, {beside}")
    if not doc["ok"]:
        raise typer.Exit(DataError.exit_code)


def _print(doc: Mapping[str, Any]) -> None:
    from fedkola.evaluation import card

    rows = [
        *((reason, "to fix", f"{number:,}", "") for reason, number in doc["unusable"].items()),
        *(
            (
                finding["code"],
                "to fix" if finding["fatal"] else "look",
                f"{finding['records']:,}",
                finding["meaning"],
            )
            for finding in doc["findings"]
        ),
    ]
    if rows:
        print_table("", ("reason", "", "records", "what it means"), rows, right=("records",))
    print(card.headline(doc))
