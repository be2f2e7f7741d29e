"""A plan as TOML, as settings of the command line, and as a document of JSON values.

A key that does not exist is refused with the nearest one that does, a value of the wrong type with
what was expected; nothing is guessed.
"""

import glob
import hashlib
import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from math import isinf
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from fedkola.errors import Incompatible, PlanError, UnknownKey
from fedkola.plan.tree import Model, Plan

_SECTIONS: Mapping[str, type] = get_type_hints(Plan)
_HINTS: Mapping[str, Mapping[str, Any]] = {
    name: get_type_hints(section) for name, section in _SECTIONS.items()
}
_KEYS = tuple(f"{section}.{key}" for section, hints in _HINTS.items() for key in hints)
_OVERRIDE = re.compile(
    r"""\s*(?P<section>[\w-]+)\.(?P<key>[\w-]+)
        (?:\.(?P<entry>"[^"]*"|'[^']*'|[^=]+?))?\s*=(?P<value>.*)""",
    re.VERBOSE | re.DOTALL,
)


def load(path: Path | str) -> Plan:
    """The plan in a TOML file.

    Relative files of [task], and a model folder that exists, are taken from the folder of the plan
    file. Raises PlanError if the file cannot be read or its content is not a plan.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise PlanError(
            f"plan file {path} cannot be read ({error.strerror}); give the path of a TOML file"
        ) from error
    except UnicodeDecodeError as error:
        raise PlanError(f"plan file {path} is not UTF-8 text; save it as UTF-8") from error
    try:
        doc = as_dict(parse(text))
    except UnknownKey as error:
        raise UnknownKey(f"{path}: {error}") from error
    except Incompatible as error:
        raise Incompatible(f"{path}: {error}") from error
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error
    folder = str(path.resolve().parent)
    for key in ("train", "test", "folder"):
        if doc["task"][key]:
            doc["task"][key] = _beside(folder, doc["task"][key])
    model = doc["model"]["name"]
    if model != Model().name and os.path.isdir(os.path.join(folder, model)):
        doc["model"]["name"] = os.path.normpath(os.path.join(folder, model))
    return from_dict(doc)


def parse(text: str) -> Plan:
    """The plan in a TOML text; paths stay as they are written. Raises PlanError."""
    try:
        doc = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PlanError(f"the plan is not TOML: {error}") from error
    return from_dict(doc)


def dump(plan: Plan) -> str:
    """TOML with every key written out; ``parse(dump(plan)) == plan``."""
    lines = []
    for section, values in as_dict(plan).items():
        lines.append(f"[{section}]")
        for key, value in values.items():
            # TOML has no null: the one value that is left out is None, which is then the default.
            if value is not None:
                is_number = _HINTS[section][key] in (float, float | None)
                lines.append(f"{key} = {value if is_number else _toml(value)}")
        lines.append("")
    return "\n".join(lines)


def override(plan: Plan, settings: Sequence[str]) -> Plan:
    """The plan with settings of the form ``section.key=value`` applied in order.

    Values are TOML; text needs no quotes and a list may be written ``a,b``. One entry of a map is
    ``scenario.noisy.north=0.3``, a whole map ``scenario.noisy={north = 0.3}``. The result is
    checked once, after the last setting. Raises UnknownKey or PlanError.
    """
    doc = as_dict(plan)
    for setting in settings:
        match = _OVERRIDE.fullmatch(setting)
        if match is None:
            if re.match(r"[\w-]+\s*=", setting):
                raise _unknown(setting.partition("=")[0].strip())
            raise PlanError(
                f"setting {setting!r} was given; expected section.key=value, such as cohort.size=8"
            )
        section, key, entry = match["section"], match["key"], match["entry"]
        name = f"{section}.{key}"
        if name not in _KEYS:
            raise _unknown(name)
        hint, value = _HINTS[section][key], match["value"].strip()
        if entry is None:
            doc[section][key] = _literal(value, hint)
        elif get_origin(hint) is Mapping:
            inner = get_args(hint)[1]
            doc[section][key][entry.strip().strip("\"'")] = _literal(value, inner)
        else:
            raise UnknownKey(f"unknown key {name}.{entry}; nearest is {name}")
    return from_dict(doc)


def digest(plan: Plan) -> str:
    """SHA-256, in hex, of the canonical JSON of the resolved plan."""
    text = json.dumps(
        as_dict(plan), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()


def as_dict(plan: Plan) -> dict[str, dict[str, Any]]:
    """The plan as JSON values, section by section; an infinite number is the text "inf"."""
    return {
        section: {key: _plain(getattr(getattr(plan, section), key)) for key in _HINTS[section]}
        for section in _SECTIONS
    }


def from_dict(doc: Mapping[str, Any]) -> Plan:
    """The plan in a document such as ``as_dict`` writes; absent keys take their defaults.

    Raises UnknownKey naming the nearest key, or PlanError for a wrong type or range.
    """
    sections: dict[str, Any] = {}
    for section, values in doc.items():
        if section not in _SECTIONS:
            raise _unknown(section)
        if not isinstance(values, Mapping):
            raise PlanError(f"{section} was given {values!r}; expected a section [{section}]")
        for key in values:
            if key not in _HINTS[section]:
                raise _unknown(f"{section}.{key}")
        read = {
            key: _read(value, _HINTS[section][key], f"{section}.{key}")
            for key, value in values.items()
        }
        sections[section] = _SECTIONS[section](**read)
    return Plan(**sections)


def _beside(folder: str, value: str) -> str:
    # In a pattern the folder stands for itself, whatever characters its name holds.
    if any(character in value for character in "*?["):
        folder = glob.escape(folder)
    return os.path.normpath(os.path.join(folder, value))


def _toml(value: Any) -> str:
    if isinstance(value, str):
        # JSON's escapes are TOML's; only DEL is allowed bare in the one and not in the other.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        pairs = (f"{_toml(key)} = {_toml(value[key])}" for key in sorted(value))
        return "{" + ", ".join(pairs) + "}"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and isinf(value):
        return "inf" if value > 0 else "-inf"
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _literal(text: str, hint: Any) -> Any:
    """What a setting's text means where ``hint`` is expected; text that means nothing stays."""
    if hint == float | None and text.lower() == "none":
        return None
    try:
        read = tomllib.loads(f"x = {text}")
    except tomllib.TOMLDecodeError:
        read = {}
    # More keys than one mean that the text held line breaks: it is no TOML value.
    value = read["x"] if len(read) == 1 else text
    if hint is str and not isinstance(value, str):
        return text
    if get_origin(hint) is tuple and not isinstance(value, list):
        return [part.strip() for part in text.split(",") if part.strip()]
    return value


def _read(value: Any, hint: Any, name: str) -> Any:
    """``value`` as the type of the key ``name``; raises PlanError."""
    if isinstance(hint, UnionType):
        return None if value is None else _read(value, get_args(hint)[0], name)
    if get_origin(hint) is Mapping:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise _wrong(name, value, "a table such as {north = 1}")
        inner = get_args(hint)[1]
        return {
            _text(key, name): _read(item, inner, f"{name}.{key}") for key, item in value.items()
        }
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise _wrong(name, value, 'a list of texts such as ["a", "b"]')
        return tuple(_read(item, str, name) for item in value)
    if hint is bool:
        if not isinstance(value, bool):
            raise _wrong(name, value, "true or false")
        return value
    if hint is int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise _wrong(name, value, "a whole number")
        return int(value)
    if hint is float:
        if value in ("inf", "-inf"):
            return float(value)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise _wrong(name, value, "a number")
        try:
            return float(value)
        except OverflowError as error:
            raise _wrong(name, value, "a number below 1.8e308") from error
    if not isinstance(value, str):
        raise _wrong(name, value, "text in quotes")
    return _text(value, name)


def _text(value: str, name: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _wrong(name, value, "text that UTF-8 can write") from error
    return value


def _wrong(name: str, value: Any, expected: str) -> PlanError:
    return PlanError(f"{name} was given {value!r} ({type(value).__name__}); expected {expected}")


def _unknown(name: str) -> UnknownKey:
    if "." not in name and _closeness(name, best := max(_SECTIONS, key=_by(name))) >= 0.6:
        return UnknownKey(f"unknown section {name}; nearest is {best}")
    return UnknownKey(f"unknown key {name}; nearest is {max(_KEYS, key=_by(name))}")


def _by(name: str) -> Any:
    return lambda candidate: _closeness(name, candidate)


def _closeness(given: str, candidate: str) -> float:
    """Likeness of the whole names, or of their last parts: a key may be right and its section
    wrong."""
    whole = SequenceMatcher(None, given, candidate).ratio()
    last = SequenceMatcher(None, given.split(".")[-1], candidate.split(".")[-1]).ratio()
    return max(whole, last - 0.01)
