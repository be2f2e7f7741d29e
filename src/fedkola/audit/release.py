"""The release gate: a model leaves the federation with a signed certificate, or not at all.

An audit document must stand behind it: attacks that passed their controls, single answers at the
null, sums within bounds, and hashes that match the ledger. The certificate says what was claimed
and found; it is signed with the coordinator's key (Ed25519) and becomes an event of the ledger's
chain, so that a release can neither be denied nor altered.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedkola.audit.verdict import MARGIN, SCHEMA
from fedkola.errors import ReleaseRefused
from fedkola.ledger import Ledger
from fedkola.privacy import keys

KIND = "RELEASE"
KEY = "release.key"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What may be found at most: exact recovery of sequences and presence AUC in sums, each by the
    upper end of its interval, and the epsilon that membership and canaries refute."""

    sequences: float = 0.05
    presence_auc: float = 0.6
    canary_epsilon: float = 1.0


def release(
    write: Callable[[Path], None],
    to: Path,
    document: Mapping[str, Any],
    bounds: Bounds,
    *,
    ledger: Ledger,
    key: Ed25519PrivateKey,
    now: float,
) -> dict[str, Any]:
    """Write the model into ``to`` with ``certificate.json`` beside it, and return the certificate.

    ``document`` is that of ``audit.json``. Raises ReleaseRefused with the measure, its value and
    its bound; nothing is written then.
    """
    require(document, bounds, ledger=ledger)
    row = ledger.run()
    certificate = {
        "run": row.id,
        "round": row.round,
        "plan": document["plan"],
        "transcript": document["transcript"],
        "audit": f"sha256:{hashlib.sha256(_canonical(document)).hexdigest()}",
        "epsilon": document["defences"]["epsilon"],
        "delta": document["defences"]["delta"],
        "embedding": document["defences"]["embedding"],
        "verdicts": dict(document["verdicts"]),
        "at": now,
        "key": key.public_key().public_bytes_raw().hex(),
    }
    signed = {**certificate, "signature": key.sign(_canonical(certificate)).hex()}
    write(to)
    (to / "certificate.json").write_text(json.dumps(signed, indent=1, sort_keys=True) + "\n")
    event = {"kind": KIND, "subject": row.id, "body": signed}
    ledger.append(row.id, row.round, [event], now=now)
    return signed


def require(document: Mapping[str, Any], bounds: Bounds, *, ledger: Ledger) -> None:
    """Raise ReleaseRefused for the first demand that an audit does not meet."""
    row = ledger.run()
    if document.get("schema") != SCHEMA:
        raise _refused("schema of the audit", document.get("schema"), SCHEMA)
    if document["plan"] != f"sha256:{row.plan_hash}":
        raise _refused("plan of the audit", document["plan"][:23], f"sha256:{row.plan_hash[:16]}")
    heads = [saved.sampler.get("transcript") for saved in ledger.rounds(row.id)]
    if not heads or document["transcript"] != f"sha256:{heads[-1]}":
        raise _refused("transcript of the audit", document["transcript"][:23], "the ledger's")
    for attack in document["attacks"]:
        control = attack["positive_control"]
        if not control["passed"]:
            raise _refused(f"control of {attack['name']}", control["value"], control["floor"])
    verdicts, against = document["verdicts"], document["defences"]
    needed = ["attributable", "sum_sequences"]
    needed += ["transcript"] if against["secure_sum"] != "off" else []
    for concern in needed:
        if verdicts[concern] == "not_run":
            raise _refused(concern, "not_run", "an attack that was made")
    for concern in ("attributable", "transcript"):
        if verdicts[concern] not in ("at_null", "not_run"):
            raise _refused(concern, verdicts[concern], "at_null")
    _within(document, bounds)


def verify(certificate: Mapping[str, Any]) -> bool:
    """Whether the signature is that of the key which the certificate names."""
    told = {name: value for name, value in certificate.items() if name != "signature"}
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(certificate["key"]))
        public.verify(bytes.fromhex(certificate["signature"]), _canonical(told))
    except (InvalidSignature, ValueError, KeyError):
        return False
    return True


def key(folder: Path) -> Ed25519PrivateKey:
    """The coordinator's key, made at the first use and readable by nobody else."""
    return keys.identity(folder / KEY)


# --- private --------------------------------------------------------------------------------------


def _within(document: Mapping[str, Any], bounds: Bounds) -> None:
    claimed = document["defences"]["epsilon"]
    most = min(bounds.canary_epsilon, claimed if claimed is not None else bounds.canary_epsilon)
    for attack in document["attacks"]:
        found = attack["metrics"]
        if attack["concern"] == "sum_sequences" and "exact" in found:
            null = found["exact"].get("null", 0.0)
            if found["exact"]["high"] > max(bounds.sequences, null + MARGIN):
                raise _refused("sequences recovered", found["exact"]["high"], bounds.sequences)
        if attack["concern"] == "sum_presence" and attack["verdict"] != "disclosed":
            high = found.get("presence_auc", {}).get("high", 0.0)
            if high > bounds.presence_auc:
                raise _refused("presence AUC", high, bounds.presence_auc)
        if "epsilon" in found and found["epsilon"]["low"] > most:
            raise _refused("empirical epsilon", found["epsilon"]["low"], most)


def _refused(measure: str, value: object, bound: object) -> ReleaseRefused:
    shown = f"{value:.3f}" if isinstance(value, float) else str(value)
    return ReleaseRefused(
        f"{measure} is {shown}, the bound is {bound}; the model stays where it is: audit the run "
        "again with stronger defences, or change the bound knowingly"
    )


def _canonical(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
