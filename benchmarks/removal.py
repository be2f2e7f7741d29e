"""How long a removal takes at full size, and whether what remains equals never having had it.

Runs the chapter stream once (46,881 descriptions, 12 sites, p = 4096), then forgets one site and
one patient of another. Every other site answers every cell concerned, and sums its journal again
for the comparison. Writes ``benchmarks/results/removal.json`` and prints it. Run:
``python benchmarks/removal.py`` (some ten minutes on two cores; a folder of cached features may
follow).
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from fedkola import removal, server
from fedkola.evaluation import dynamic, machine, oneshot, tasks
from fedkola.evaluation.setups import SETUPS
from fedkola.federation import load_state
from fedkola.knowledge.forget import Request
from fedkola.ledger import Ledger

SITE, OTHER = "meadow-women-children", "riverside-oncology"
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    setup = SETUPS["icd-chapters"]
    plan = dynamic.plan(setup, setup.sizes["standard"], "fedkola", 1, 0.0)
    cache = Path(sys.argv[1]) if sys.argv[1:] else None
    found = []
    with TemporaryDirectory() as name:
        federation = server.assemble(plan, tasks.load(plan), Path(name), cache=cache)
        with Ledger.open(Path(name), create=True) as ledger:
            server.run(
                federation,
                ledger,
                observe=lambda number, state: {},
                progress=lambda report: print(f"round {report.round}", flush=True),
            )
            patient = federation.stream.sites[OTHER].patients[0]
            for request in (
                Request(kind="site", site=SITE),
                Request(kind="patient", site=OTHER, name=patient),
            ):
                receipt = removal.remove(federation, ledger, request, recount=True)
                state, _ = load_state(federation, ledger)
                found.append(
                    {
                        "kind": receipt.kind,
                        "records": receipt.records,
                        "cells": len(receipt.cells),
                        "seconds": round(receipt.seconds, 2),
                        "journals_give_the_same_integers": receipt.recount,
                        "one_shot_sum_of_the_rest_is_equal": oneshot.compare(
                            federation, state
                        ).equal,
                    }
                )
                print(json.dumps(found[-1]), flush=True)
    result = {"machine": machine.describe(), "features": 4096, "removals": found}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "removal.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
