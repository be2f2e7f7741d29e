"""The document of a real run: what its bank went through is there, and on the page."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import small_private as private
from small_federation import assemble, catalogue, data, revised

from fedkola import server
from fedkola.evaluation import perplexity, report, scoring, story
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


def told(folder: Path, *settings: str) -> dict[str, Any]:
    """The document of a run that trains a whole model."""
    federation = private.federation(folder, "run.rounds=2", *settings)

    def observe(number: int, state: Any) -> Mapping[str, float]:
        return perplexity.measure(federation, state, number)

    with Ledger.open(folder, create=True) as ledger:
        state = server.run(federation, ledger, observe=observe, progress=lambda row: None)
        return story.document(federation, ledger, state)


def test_a_run_whose_records_were_all_there_is_told_by_rounds(tmp_path: Path):
    document = told(tmp_path)
    assert document["turn"] == "round"
    assert [(w["number"], w["name"], "sealed" in w) for w in document["windows"]] == [
        (1, "", False),
        (2, "", False),
    ]
    assert document["headline"].startswith("In 2 rounds, 3 sites that never shared a record")
    page = report.render(document | {"samples": [SAMPLE, SAMPLE | {"round": 2}]})
    assert "What happened, round by round" in page
    assert "2 rounds: who answered" in page
    assert "window" not in re.sub(r"<style>.*</style>|<details>.*</details>", "", page, flags=re.S)
    assert "Cells sealed" not in page
    assert page.count("<td>… of a cold</td>") == 2


SAMPLE = {"round": 1, "prompts": ["The signs"], "texts": ["… of a cold"]}


def test_the_report_says_what_hid_the_answers_of_sites_and_what_did_not(tmp_path: Path):
    noisy = told(tmp_path / "noisy")
    last = noisy["windows"][-1]["epsilon"]
    assert 0 < last <= 2
    assert "no secure aggregation: the machine that adds can see" in noisy["privacy"]
    assert (
        "Noise is added at every site before anything leaves: it hides one patient of a site from "
        f"everyone else by epsilon 2 and delta 0.001 over the whole run, of which {last:.3g} is "
        "spent at most." in noisy["privacy"]
    )
    masked = ("privacy.secure_sum=true", "privacy.epsilon=inf", 'site.waive=["gate_span"]')
    masked = (*masked, 'site.embedding="presence-disclosed"')
    hidden = told(tmp_path / "masked", *masked)
    assert "Secure aggregation hides what one site sent" in hidden["privacy"]
    assert "No noise is added, and no bound is claimed against anyone" in hidden["privacy"]
    assert "epsilon" not in hidden["windows"][-1]
