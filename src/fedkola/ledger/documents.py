"""Documents as canonical JSON, and numbers as the ledger keeps them."""

import json
from collections.abc import Mapping
from typing import Any

from fedkola.errors import LedgerError


def strict(document: Any, what: str) -> str:
    return canonical(document, what, finite=True)


def canonical(document: Any, what: str, *, finite: bool = False) -> str:
    """JSON with sorted keys and without spaces."""
    try:
        text = json.dumps(
            document,
            sort_keys=True,
            separators=(",", ":"),
            ensure_ascii=False,
            allow_nan=not finite,
            default=_mapping,
        )
        text.encode()
    except (TypeError, ValueError) as error:
        raise LedgerError(
            f"{what} cannot be written as JSON: {error}; give texts, numbers, lists and maps"
        ) from error
    return text


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} has no JSON form")


def binary(plan_hash: str) -> bytes:
    try:
        return bytes.fromhex(plan_hash)
    except ValueError as error:
        raise LedgerError(f"plan hash {plan_hash!r} was given; expected hex digits") from error


def micros(seconds: float) -> int:
    return round(seconds * 1_000_000)
