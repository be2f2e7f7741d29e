"""What a page is made of."""

from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str
    folded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    name: str
    caption: str
    drawing: Markup


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading, sentences, drawings and tables, in this order; ``code`` is a command to type."""

    id: str
    head: str
    says: tuple[str, ...]
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    code: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    name: str
    title: str
    question: str
    headline: str
    sections: tuple[Section, ...]
