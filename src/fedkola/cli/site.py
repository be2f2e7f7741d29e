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


@app.command(
    epilog=examples(
        "fedkola site report runs/demo/sites/north",
        "fedkola site report runs/demo/sites/north --data notes.csv --record id --text note",
    )
)
def report(
    store: Annotated[Path, typer.Argument(help="The site's own folder in a run.")],
    data: Annotated[str, typer.Option(help="File of the records, to quote their texts.")] = "",
    text: Annotated[str, typer.Option(help="Its column of texts.")] = "text",
    record: Annotated[str, typer.Option(help="Its column that names records.")] = "record",
    out: Annotated[
        Path | None, typer.Option(help="Where the page goes; its JSON lies beside it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write what the last scan found about a site's records, in words, for their owner."""
    from fedkola.evaluation import quality_report
    from fedkola.evaluation.tasks import tables

    texts: dict[str, str] = {}
    if data:
        columns = tables.read(Path(data)).columns
        for name in (record, text):
            if name not in columns:
                raise DataError(f"{data} has no column {name!r}, only {', '.join(columns)}")
        pairs = zip(columns[record], columns[text], strict=True)
        texts = {str(name): str(said) for name, said in pairs}
    doc = quality_report.examine(store, texts=texts)
    page = out or Path(f"{store.name}-quality.html")
    if page.suffix != ".html":
        raise DataError(f"--out {page} is no page; give a name that ends in .html")
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(quality_report.render(doc), encoding="utf-8")
    beside = page.with_suffix(".json")
    beside.write_text(
        json.dumps(plain(doc), ensure_ascii=False, allow_nan=False, indent=1) + "\n",
        encoding="utf-8",
    )
    if as_json:
        print_json({"page": str(page), **doc})
        return
    print(quality_report.headline(doc))
    print(f"report: {page}, {beside}")


@app.command(
    epilog=examples(
        "fedkola site keep runs/demo/sites/north note-17 note-23",
        "fedkola site keep runs/demo/sites/north --code LABEL_DISAGREES",
        "fedkola site keep runs/demo/sites/north note-17 --take-back",
    )
)
def keep(
    store: Annotated[Path, typer.Argument(help="The site's own folder in a run.")],
    records: Annotated[list[str] | None, typer.Argument(help="Records to keep.")] = None,
    code: Annotated[str, typer.Option(help="All records with this finding.")] = "",
    take_back: Annotated[
        bool, typer.Option("--take-back", help="Let the evidence decide again.")
    ] = False,
) -> None:
    """Learn from these records whatever a scan finds; the owner's word holds for every scan."""
    from fedkola.quality import kept

    chosen = list(records or [])
    if code:
        rows: Any = kept.findings(store).get("findings", [])
        chosen += [row["record"] for row in rows if row["code"] == code]
    if not chosen:
        raise DataError("no record was given or found; name records, or --code of a finding")
    kept.decide(store, chosen, "" if take_back else kept.KEEP)
    verb = "left to the evidence again" if take_back else "kept"
    print(f"{len(chosen):,} record{'s' if len(chosen) != 1 else ''} {verb}")


@app.command(epilog=examples("fedkola site undo runs/demo/sites/north"))
def undo(
    store: Annotated[Path, typer.Argument(help="The site's own folder in a run.")],
) -> None:
    """Undo the last scan: nothing that it left out stays left out. Decisions stay."""
    from fedkola.quality import kept

    before = len(kept.left_out(store))
    kept.leave_out(store, ())
    print(f"{before - len(kept.left_out(store)):,} records are learnt from again")


@app.command(
    epilog=examples("fedkola site checked runs/demo/sites/north checked.csv --label right")
)
def checked(
    store: Annotated[Path, typer.Argument(help="The site's own folder in a run.")],
    data: Annotated[Path, typer.Argument(help="Table of records and the labels that are right.")],
    record: Annotated[str, typer.Option(help="Its column that names records.")] = "record",
    label: Annotated[str, typer.Option(help="Its column of right labels.")] = "label",
) -> None:
    """Note records that a person has checked: scans are calibrated by them, not fitted to them."""
    from fedkola.evaluation.tasks import tables
    from fedkola.quality import kept

    columns = tables.read(data).columns
    for name in (record, label):
        if name not in columns:
            raise DataError(f"{data} has no column {name!r}, only {', '.join(columns)}")
    pairs = zip(columns[record], columns[label], strict=True)
    found = {str(name): str(right) for name, right in pairs}
    kept.check(store, found)
    print(f"{len(found):,} checked records, {len(kept.checked(store)):,} in all")


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
