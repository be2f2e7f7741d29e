"""The release gate: a model leaves the federation with a signed certificate, or not at all.

A signed audit must stand behind it: young, its attacks past their controls, single answers at the
null, sums within bounds, and hashes that match the ledger. The certificate says what was claimed
and found, and the hash of every file; it is signed with the coordinator's key (Ed25519) and becomes
an event of the ledger's chain, so that a release can neither be denied nor altered.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from math import isinf
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedkola.audit.verdict import MARGIN, SCHEMA
from fedkola.errors import ReleaseRefused
from fedkola.ledger import Ledger
from fedkola.plan import Release
from fedkola.privacy import keys

KIND = "RELEASE"
KEY = "release.key"
CERTIFICATE = "certificate.json"
DAY = 86400.0


def release(
    write: Callable[[Path], object],
    to: Path,
    document: Mapping[str, Any],
    bounds: Release,
    *,
    ledger: Ledger,
    key: Ed25519PrivateKey,
    now: float,
) -> dict[str, Any]:
    """Write the model into ``to`` with ``certificate.json`` beside it, and return the certificate.

    ``document`` is that of ``audit.json``. Raises ReleaseRefused with the measure, its value and
    its bound; nothing is written then.
    """
    require(document, bounds, ledger=ledger, key=key, now=now)
    row = ledger.run()
    write(to)
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
        "files": files(to),
        "at": now,
    }
    signed = sign(certificate, key)
    (to / CERTIFICATE).write_text(json.dumps(signed, indent=1, sort_keys=True) + "\n")
    event = {"kind": KIND, "subject": row.id, "body": signed}
    ledger.append(row.id, row.round, [event], now=now)
    return signed


def require(
    document: Mapping[str, Any],
    bounds: Release,
    *,
    ledger: Ledger,
    key: Ed25519PrivateKey,
    now: float,
) -> None:
    """Raise ReleaseRefused for the first demand that an audit does not meet."""
    row = ledger.run()
    if document.get("schema") != SCHEMA:
        raise _refused("schema of the audit", document.get("schema"), SCHEMA)
    if not verify(document) or document["key"] != _public(key):
        raise _refused("signature of the audit", "not this run's", "this run's key")
    age = (now - float(document["at"])) / DAY
    if age > bounds.age_days:
        raise _refused("age of the audit in days", age, bounds.age_days)
    _claimed(document["defences"], bounds)
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


def sign(document: Mapping[str, Any], key: Ed25519PrivateKey) -> dict[str, Any]:
    """The document with ``key``, the public half, and ``signature``, of all else."""
    told = {name: value for name, value in document.items() if name != "signature"}
    told["key"] = _public(key)
    return {**told, "signature": key.sign(_canonical(told)).hex()}


def verify(certificate: Mapping[str, Any]) -> bool:
    """Whether the signature is that of the key which the document names."""
    told = {name: value for name, value in certificate.items() if name != "signature"}
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(certificate["key"]))
        public.verify(bytes.fromhex(certificate["signature"]), _canonical(told))
    except (InvalidSignature, ValueError, KeyError):
        return False
    return True


def checked(folder: Path, *, key: str = "") -> dict[str, Any]:
    """The certificate of a released folder, every file hashed anew.

    Raises ReleaseRefused for a file that is not the one released, another signer than ``key`` (its
    public half in hex; "" is any), or no certificate.
    """
    try:
        found: dict[str, Any] = json.loads((folder / CERTIFICATE).read_text("utf-8"))
        told = dict(found["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReleaseRefused(
            f"{folder} holds no certificate that can be read ({error!r}); give a folder that "
            "`fedkola release` wrote"
        ) from error
    if not verify(found) or (key and found["key"] != key):
        raise _refused("signer of the certificate", found.get("key"), key or "its own key")
    for name, digest in files(folder).items():
        if told.pop(name, "") != digest:
            raise _refused(f"hash of {name}", digest[:23], "that of the certificate")
    if told:
        raise _refused(f"file {min(told)}", "absent", "there")
    return found


def files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder but the certificate, by its path inside."""
    return {
        path.relative_to(folder).as_posix(): f"sha256:{_digest(path)}"
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != CERTIFICATE
    }


def key(folder: Path) -> Ed25519PrivateKey:
    """The coordinator's key, made at the first use and readable by nobody else."""
    return keys.identity(folder / KEY)


# --- private --------------------------------------------------------------------------------------


def _claimed(against: Mapping[str, Any], bounds: Release) -> None:
    """The guarantee of the run; a run without one leaves only where the plan says inf."""
    epsilon, delta = against["epsilon"], against["delta"]
    if epsilon is None:
        if not isinf(bounds.epsilon):
            raise _refused("epsilon claimed", "none", f"{bounds.epsilon:g} (release.epsilon)")
        return
    if epsilon > bounds.epsilon:
        raise _refused("epsilon claimed", epsilon, bounds.epsilon)
    if delta > bounds.delta:
        raise _refused("delta claimed", f"{delta:g}", bounds.delta)


def _public(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes_raw().hex()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _within(document: Mapping[str, Any], bounds: Release) -> None:
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
        "again, run it with stronger defences, or change the bound in [release] knowingly"
    )


def _canonical(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
