"""The document of a real run: what its bank went through is there, and on the page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from small_federation import assemble, catalogue, data, revised

from fedkola import server
from fedkola.evaluation import report, scoring, story
from fedkola.ledger import Ledger


def test_a_run_tells_where_its_knowledge_comes_from_and_what_was_revised(tmp_path: Path):
    federation = assemble(
        tmp_path, sites=revised(data()), labels=catalogue(heart_1=(3.0, ("heart-2",)))
    )

    def observe(number: int, state: Any) -> Mapping[str, float]:
        test = scoring.askable(federation.stream.test, number)
        found = scoring.accuracy(federation, state, test, window=number)
        row: dict[str, float] = {
            "top1": found.top1,
            "top5": found.top5,
            "asked": found.asked,
            "nodes": found.nodes,
        }
        for scope, (right, asked) in found.concepts.items():
            row |= {f"right/{scope}": right, f"asked/{scope}": asked}
        return row

    with Ledger.open(tmp_path, create=True) as ledger:
        state = server.run(federation, ledger, observe=observe, progress=lambda row: None)
        document = story.document(federation, ledger, state)
    versions = document["lineage"]["versions"]
    assert [(v["id"], v["opened"], v["closed"]) for v in versions] == [
        ("heart@1", 1, None),
        ("lung@1", 2, None),
        ("bone@1", 3, None),
    ]
    assert versions[0]["marks"] == [(1, "sealed"), (2, "changed"), (2, "sealed")]
    said = [(change["round"], change["about"]) for change in document["lineage"]["changes"]]
    assert (3, "heart-1") in said  # a label whose end has come
    assert (2, "heart") in said  # old versions taken back
    page = report.render(document)
    assert "closed at 3, replaced by heart-2" in page
    assert page.count('class="life"') == 3
