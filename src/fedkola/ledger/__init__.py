"""The record of a run: a SQLite file with one transaction per round, beside a folder of tensors.

``kill -9`` at any instant leaves round n or round n+1. Tensors are written first, each to a file
named by the hash of its content, flushed and renamed; the transaction that names them comes last.
Knowledge events are append-only and chained by hash, so an altered one is found by ``verify``.

The folder of a run holds one run::

    ledger.db            runs, rounds, events, blobs, removals (WAL, synchronous=FULL)
    blobs/<sha-256>      safetensors files of one tensor "x"
"""

from fedkola.ledger.book import Ledger
from fedkola.ledger.rows import EventRow, RoundRow, RunRow, Saved

__all__ = ["EventRow", "Ledger", "RoundRow", "RunRow", "Saved"]
