"""Writes docs/reference from the code: errors, plan keys, algorithms and the command line.

``python docs/generate.py`` writes the pages, ``--check`` writes nothing and fails on a page that
is not up to date. What the code cannot say (why an error comes, what a key is for) stands in
``docs/reference/words.toml``; a name without words is an error here, so nothing goes undocumented.
"""

import argparse
import importlib
import inspect
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

from fedkola import errors, plan

REFERENCE = Path(__file__).parent / "reference"
NOTE = "<!-- Written by `make docs`. Change the code or words.toml, not this page. -->\n"
Words = Mapping[str, Mapping[str, str]]


class Undocumented(Exception):
    pass


def main() -> int:
    parser = argparse.ArgumentParser(description="Write docs/reference from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing, fail on stale pages")
    check = parser.parse_args().check
    stale = [path for path, text in pages().items() if not up_to_date(path, text)]
    for path in stale:
        print(f"{'stale' if check else 'written'}: {path.relative_to(REFERENCE.parent.parent)}")
        if not check:
            path.write_text(text := pages()[path], encoding="utf-8")
            assert up_to_date(path, text)
    if check and stale:
        print("run `make docs` and commit the pages")
    return int(check and bool(stale))


def pages() -> dict[Path, str]:
    """Every generated page: file -> content. Raises Undocumented for a name without words."""
    words = tomllib.loads((REFERENCE / "words.toml").read_text(encoding="utf-8"))
    return {
        REFERENCE / "errors.md": error_page(words),
        REFERENCE / "plan.md": plan_page(words),
        REFERENCE / "algorithms.md": algorithm_page(),
        REFERENCE / "cli.md": cli_page(),
        REFERENCE / "benchmarks.md": benchmark_page(),
    }


def up_to_date(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text


# --- errors ---------------------------------------------------------------------------------------


def error_classes() -> list[type[errors.FedKolaError]]:
    """Every error of fedkola, in the order of the file, the root left out."""
    found = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.FedKolaError)
    ]
    return [value for value in found if value is not errors.FedKolaError]


def error_page(words: Words) -> str:
    tree = inspect.cleandoc(errors.__doc__ or "").split("::\n", 1)[1]
    lines = [
        NOTE,
        "# Errors",
        "",
        "Everything fedkola raises on purpose, and the exit code of the command that met it. 0 is",
        "success, 1 a defect of ours with its traceback, 2 also a wrong command line. A message",
        "says what was given, what was expected and what to do.",
        "",
        "```",
        inspect.cleandoc(tree),
        "```",
    ]
    for error in error_classes():
        lines += ["", f"## {error.__name__}", ""]
        lines += [f"Exit code {error.exit_code}. {word(words, 'errors', error.__name__)}"]
    return "\n".join(lines) + "\n"


# --- plan -----------------------------------------------------------------------------------------


def plan_keys() -> Iterator[tuple[str, str, str]]:
    """(section.key, type, default) of every key, in the order of the tree."""
    for section, part in get_type_hints(plan.Plan).items():
        hints = get_type_hints(part)
        for key in fields(part):
            default = key.default if key.default_factory is MISSING else key.default_factory()
            yield f"{section}.{key.name}", type_name(hints[key.name]), toml_value(default)


def plan_page(words: Words) -> str:
    lines = [
        NOTE,
        "# Plan keys",
        "",
        "A plan is a TOML file with the sections below; every key has a default, so a plan holds",
        "only what differs. An unknown key is refused with the nearest one that exists. On the",
        "command line `--set section.key=value` changes one key. The plan, with every default",
        "written out, and its hash are kept in the ledger of the run.",
    ]
    section = ""
    for name, kind, default in plan_keys():
        if name.split(".")[0] != section:
            section = name.split(".")[0]
            lines += ["", f"## [{section}]", "", word(words, "sections", section), ""]
            lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        meaning = word(words, "plan", name)
        lines.append(f"| `{name}` | {kind} | `{default}` | {meaning} |")
    return "\n".join(lines) + "\n"


def type_name(hint: Any) -> str:
    simple = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    if hint in simple:
        return simple[hint]
    text = str(hint).replace("collections.abc.", "")
    named = {
        "tuple[str, ...]": "list of texts",
        "Mapping[str, float]": "table of numbers",
        "Mapping[str, int]": "table of whole numbers",
        "Mapping[str, str]": "table of texts",
        "Mapping[str, tuple[str, ...]]": "table of lists of texts",
        "float | None": "number, or absent",
    }
    return named[text]


def toml_value(value: Any) -> str:
    if value is None:
        return "absent"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return "{}" if isinstance(value, Mapping) else f"{value}"


# --- algorithms -----------------------------------------------------------------------------------


def benchmark_page() -> str:
    """The tables that `fedkola bench` wrote, as they stand in benchmarks/results."""
    results = REFERENCE.parent.parent / "benchmarks" / "results"
    tables = sorted(path for path in results.glob("*.md") if not path.stem.endswith("-quick"))
    lines = [
        NOTE,
        "# Benchmarks",
        "",
        "Copied from `benchmarks/results`, where the JSON beside each table holds every seed.",
    ]
    for table in tables:
        lines += [
            "",
            *(
                f"#{line}" if line.startswith("# ") else line
                for line in table.read_text("utf-8").rstrip().splitlines()
            ),
        ]
    return "\n".join(lines) + "\n"


def algorithm_page() -> str:
    table = importlib.import_module("fedkola.algorithms").ALGORITHMS
    lines = [
        NOTE,
        "# Algorithms",
        "",
        "One file is one method, server half first. *Asks for* is the privacy statement: `sum`",
        "reads sums over cohorts and nothing else, `each` reads single updates.",
    ]
    for name, algorithm in table.items():
        lines += ["", f"## {name}", "", *paragraphs(sys.modules[algorithm.__module__].__doc__)]
        lines += ["", f"Asks for: `{algorithm.needs.value}`. Source: `{source(algorithm)}`."]
    return "\n".join(lines) + "\n"


def source(algorithm: type) -> str:
    return "src/" + algorithm.__module__.replace(".", "/") + ".py"


def paragraphs(docstring: str | None) -> list[str]:
    """A docstring as Markdown: the update rules of a paper and indented blocks become code."""
    lines: list[str] = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(docstring or "")):
        rows = [row for row in block.replace("\b", "").splitlines() if row.strip()]
        if rows and (rows[0].startswith("server:") or all(row.startswith("  ") for row in rows)):
            lines += ["```text", *inspect.cleandoc("\n" + "\n".join(rows)).splitlines(), "```", ""]
        elif len(rows) > 1 and all(row.startswith("  ") for row in rows[1:]):
            code = inspect.cleandoc("\n" + "\n".join(rows[1:])).splitlines()
            lines += [plain(rows[0]), "", "```text", *code, "```", ""]
        elif rows:
            lines += [re.sub(r"::$", ":", plain(row)) for row in rows] + [""]
    return lines[:-1]


def plain(line: str) -> str:
    return re.sub(r":\w+:`([^`]+)`", r"`\1`", line).replace("``", "`")


# --- command line ---------------------------------------------------------------------------------


def commands() -> Iterator[tuple[str, Any]]:
    """(verb, command) of the command line, groups before their members."""
    from typer.main import get_command

    from fedkola.cli import app

    def walk(prefix: str, command: Any) -> Iterator[tuple[str, Any]]:
        if prefix:
            yield prefix, command
        for name, below in getattr(command, "commands", {}).items():
            if not below.hidden:
                yield from walk(f"{prefix} {name}".strip(), below)

    yield from walk("", get_command(app))


def cli_page() -> str:
    lines = [
        NOTE,
        "# Command line",
        "",
        "`fedkola VERB --help` prints the same with examples. Exit codes: [errors](errors.md).",
    ]
    for verb, command in commands():
        lines += ["", f"## fedkola {verb}", ""]
        lines += paragraphs(command.help)
        rows = [row for row in map(parameter, command.params) if row]
        if rows:
            lines += ["", "| argument or option | default | meaning |", "|---|---|---|", *rows]
        if shown := examples(command.epilog):
            lines += ["", "```console", *shown, "```"]
    return "\n".join(lines) + "\n"


def parameter(given: Any) -> str:
    """One row of the table of a command, or nothing for what every command has."""
    if given.name in ("help", "install_completion", "show_completion"):
        return ""
    is_option = given.param_type_name == "option"
    name = (
        " / ".join([*given.opts, *given.secondary_opts])
        if is_option
        else (given.metavar or given.name.upper())
    )
    needed = "required" if given.required else default_text(given.default)
    text = " ".join((getattr(given, "help", None) or "").split()).replace("|", "\\|")
    return f"| `{name}` | {needed} | {text} |"


def examples(epilog: str | None) -> list[str]:
    """The commands of an epilog that starts with "Examples:", one a line, bullets or not."""
    lines = [line.strip() for line in (epilog or "").splitlines() if line.strip()]
    shown = [re.sub(r"^[*-] +`(.+)`$", r"\1", line) for line in lines[1:]]
    return [f"$ {line}" for line in shown] if lines[:1] == ["Examples:"] else []


def default_text(value: Any) -> str:
    if value is None or callable(value) or value in ("", [], ()) or "UNSET" in repr(value):
        return "-"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def word(words: Words, table: str, name: str) -> str:
    try:
        return words[table][name]
    except KeyError:
        raise Undocumented(
            f'{name} has no words; add a line "{name}" to [{table}] of docs/reference/words.toml'
        ) from None


if __name__ == "__main__":
    sys.exit(main())
