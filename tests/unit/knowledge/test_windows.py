"""A site compares its windows with what sums have taught, and remembers what it found."""

import json

import pytest
import torch
from small_bank import WIDTH, catalogue, embeddings, sealed

from fedkola.knowledge import journal, novelty, statistics, views, windows
from fedkola.knowledge.bank import Bank
from fedkola.knowledge.journal import Entry
from fedkola.knowledge.novelty import Thresholds
from fedkola.knowledge.router import Part
from fedkola.knowledge.views import Rule
from fedkola.knowledge.windows import CONFLICT, HIT, STALE, Finding, Known, Window
from fedkola.types import Dataset

LABELS = {"heart-1": "heart", "heart-2": "heart", "lung-1": "lung", "lung-2": "lung"}
SCOPES = ("heart", "lung")
CODES = {"heart": ["heart-1", "heart-2"], "lung": ["lung-1", "lung-2"]}
SWAPPED = {"heart-1": "heart-2", "heart-2": "heart-1"}


def known(**changes) -> Known:
    """Heart in its first version and lung in its second, 80 records each."""
    parts = []
    for scope, module in (("heart", "heart@1"), ("lung", "lung@2")):
        codes = CODES[scope] * 40
        rows = torch.zeros(80, dtype=torch.int64)
        words = statistics.router(embeddings(codes, seed=len(scope)), rows, num_rows=1)
        parts.append(Part(module=module, labels=("all",), words=words, weight=1.0))
    values = {
        "reference": novelty.reference(parts, width=WIDTH),
        "learnt": Thresholds(),
        "versions": {"heart": 1, "lung": 2},
        "sealed": {(1, "heart"): 1, (1, "lung"): 1, (2, "lung"): 2},
        "usual": torch.tensor([[70, 80], [0, 0]]),
        "view": "abc",
    }
    return Known(**{**values, **changes})


def window(codes: list[str], *, scope: str = "heart", looks: list[str] | None = None, seed=5):
    z = embeddings(looks or codes, seed=seed)
    records = tuple(f"r{i}" for i in range(len(codes)))
    return Window(scope=scope, records=records, nodes=tuple(codes), z=z)


def asking() -> windows.Answers:
    bank = Bank()
    for scope, codes in CODES.items():
        bank = sealed(bank, scope, 1, codes, codes * 40, seed=3)
    found = windows.answers(views.compute(bank, catalogue(LABELS), Rule(), now=1), 0)
    assert found is not None
    return found


def entry(round: int, scope: str, codes: list[str], *, seed: int = 1) -> Entry:
    return Entry(
        round=round,
        scope=scope,
        records=tuple(f"{round}-{i}" for i in range(len(codes))),
        patients=tuple("p" for _ in codes),
        labels=tuple(codes),
        windows=(round,) * len(codes),
        z=embeddings(codes, seed=seed),
    )


def test_what_a_vote_carries_down_survives_the_wire():
    sent = known()
    back = windows.from_tensors(windows.to_tensors(sent, SCOPES), SCOPES)
    assert back.reference is not None
    assert sent.reference is not None
    assert back.reference.modules == ("heart@1", "lung@2")
    assert (back.versions, back.sealed, back.view) == (sent.versions, sent.sealed, "abc")
    assert torch.equal(back.usual, sent.usual)
    z = embeddings(CODES["heart"] * 4, seed=2)
    for left, right in zip(
        novelty.distances(back.reference, z), novelty.distances(sent.reference, z), strict=True
    ):
        assert left.observed == pytest.approx(right.observed, rel=1e-5)
        assert left.sampling == pytest.approx(right.sampling)


def test_before_the_first_module_nothing_is_carried_and_nothing_is_judged():
    empty = known(reference=None, versions={}, sealed={}, view="")
    back = windows.from_tensors(windows.to_tensors(empty, SCOPES), SCOPES)
    assert back.reference is None
    judged = windows.judge(window(["heart-1"] * 40), back)
    assert judged.finding == Finding(scope="heart", records=40)
    assert judged.finding.note == ""


def test_a_window_of_its_declared_scope_is_a_hit():
    judged = windows.judge(window(CODES["heart"] * 20), known())
    assert (judged.finding.decision, judged.finding.nearest) == (HIT, "heart@1")
    assert not judged.finding.misfit


def test_a_window_that_does_not_fit_is_told_to_its_owner_and_stays_where_it_was_declared():
    found = windows.judge(window(CODES["heart"] * 20, looks=CODES["lung"] * 20), known()).finding
    assert (found.decision, found.nearest, found.misfit) == (HIT, "lung@2", True)
    assert "declared heart" in found.note
    assert "lung@2" in found.note


def test_labels_that_turned_contradict_the_view():
    codes = CODES["heart"] * 20
    turned = window([SWAPPED[code] for code in codes], looks=codes)
    same = window(codes)
    for asked, decision in ((turned, CONFLICT), (same, HIT)):
        judged = windows.judge(
            asked, known(), allowed=CODES["heart"], asking=asking(), usual=70 / 80
        )
        assert judged.finding.decision == decision
        assert judged.finding.asked == 40
    assert windows.judge(turned, known(), allowed=CODES["heart"], asking=None).finding.asked == 0


def test_a_window_of_a_single_class_is_judged_like_any_other():
    turned = window(["heart-2"] * 40, looks=["heart-1"] * 40)
    right = window(["heart-1"] * 40)
    found = [
        windows.judge(w, known(), allowed=CODES["heart"], asking=asking(), usual=0.9).finding
        for w in (turned, right)
    ]
    assert [f.decision for f in found] == [CONFLICT, HIT]


def test_labels_that_the_view_has_never_seen_are_no_disagreement():
    judged = windows.judge(
        window(["heart-9"] * 40, looks=["heart-1"] * 40),
        known(),
        allowed=[*CODES["heart"], "heart-9"],
        asking=asking(),
        usual=0.9,
    )
    assert (judged.finding.decision, judged.finding.asked) == (HIT, 0)
    assert judged.agreed == (None,) * 40


def test_a_laggard_that_repeats_its_own_superseded_labels_waits_instead_of_contradicting():
    codes = CODES["lung"] * 20
    old = {"lung-1": "lung-2", "lung-2": "lung-1"}  # before version 2, the codes meant the other
    late = window([old[code] for code in codes], scope="lung", looks=codes)
    mine = entry(1, "lung", CODES["lung"] * 10)
    before = windows.node_means([mine], {"lung-1": "lung-2", "lung-2": "lung-1"})
    judged = windows.judge(
        late, known(), allowed=CODES["lung"], asking=asking(), earlier=before, usual=0.9
    )
    assert judged.finding.decision == STALE
    assert "superseded" in judged.finding.note


def test_records_that_their_own_site_revised_do_not_contradict():
    codes = CODES["heart"] * 20
    data = Dataset(
        records=tuple(f"r{i}" for i in range(40)),
        texts=("",) * 40,
        labels=tuple(SWAPPED[code] for code in codes),
        patients=("p",) * 40,
        windows=(3,) * 40,
    )
    for revised, asked, decision in (((), 40, CONFLICT), (data.records, 0, HIT)):
        ((_, judged),) = windows.survey(
            data,
            lambda some: embeddings(codes, seed=5),
            catalogue=catalogue(LABELS),
            known=known(),
            asking=asking(),
            history=(),
            revised=revised,
        )
        assert (judged.finding.asked, judged.finding.decision) == (asked, decision)


def test_only_a_site_that_gave_the_present_version_nothing_can_be_a_laggard():
    first, second = entry(1, "lung", ["lung-1"]), entry(2, "lung", ["lung-1"])
    assert windows.superseded(known(), [first], "lung") == (first,)
    assert windows.superseded(known(), [first, second], "lung") == ()
    assert windows.superseded(known(), [], "lung") == ()


def test_thresholds_are_taught_by_windows_of_the_versions_in_force():
    history = [entry(1, "heart", CODES["heart"] * 5), entry(1, "lung", CODES["lung"] * 5)]
    found = windows.accepted(known(), history)
    assert [distance.module for distance in found] == ["heart@1"]
    assert windows.accepted(known(reference=None), history) == ()


def test_what_was_found_is_kept_for_the_owner_and_for_the_fill(tmp_path):
    turned = window(["heart-2"] * 40, looks=["heart-1"] * 40)
    judged = windows.judge(turned, known(), allowed=CODES["heart"], asking=asking(), usual=0.9)
    windows.remember(tmp_path, 3, [(turned, judged)])
    assert windows.findings(tmp_path, 3) == {"heart": judged.finding}
    assert windows.findings(tmp_path, 4) == {}
    (row,) = json.loads((tmp_path / "findings" / "000003.json").read_text())["windows"]
    assert "contradict heart" in row["note"]
    windows.remember(tmp_path, 3, [])
    assert windows.findings(tmp_path, 3) == {}


def test_agreement_is_counted_by_record_so_that_a_removal_takes_it_back(tmp_path):
    codes = CODES["heart"] * 20
    asked = window([*codes[:30], *(SWAPPED[code] for code in codes[30:])], looks=codes)
    judged = windows.judge(asked, known(), allowed=CODES["heart"], asking=asking(), usual=0.0)
    windows.remember(tmp_path, 1, [(asked, judged)])
    whole = Entry(
        round=1,
        scope="heart",
        records=asked.records,
        patients=("p",) * 40,
        labels=asked.nodes,
        windows=(1,) * 40,
        z=asked.z,
    )
    right, wrong = (
        {r for r, agreed in zip(asked.records, judged.agreed, strict=True) if agreed is answer}
        for answer in (True, False)
    )
    assert len(right) > 20
    assert len(wrong) >= 5
    assert windows.agreement(tmp_path, known(), [whole]) == {"heart": (len(right), 40)}
    by_label = windows.wrong_before(tmp_path, [whole])
    assert sum(missed for missed, _ in by_label.values()) == len(wrong)
    gone = {"r0", "r39"}
    rest = journal.keep(whole, without=gone)
    assert windows.agreement(tmp_path, known(), [rest]) == {"heart": (len(right - gone), 38)}
    windows.retain(tmp_path, records=set(asked.records) - gone)
    text = (tmp_path / "findings" / "000001.json").read_text()
    assert '"r0"' not in text
    assert '"r39"' not in text
    assert '"r1"' in text
    # A version that was superseded says nothing about the one in force.
    newer = known(versions={"heart": 2, "lung": 2})
    assert windows.agreement(tmp_path, newer, [rest]) == {}


def test_a_kept_view_is_used_for_the_view_it_is_and_no_other(tmp_path):
    found = asking()
    assert windows.read_answers(tmp_path, found.view) is None
    windows.keep_answers(tmp_path, found)
    back = windows.read_answers(tmp_path, found.view)
    assert back is not None
    assert back.nodes == found.nodes
    assert torch.equal(back.weights, found.weights)
    assert windows.read_answers(tmp_path, "another") is None
    assert windows.read_answers(tmp_path, "") is None
    (tmp_path / "view.safetensors").write_bytes(b"cut off")
    assert windows.read_answers(tmp_path, found.view) is None


def test_a_label_is_doubted_only_if_it_used_to_agree():
    words = {
        windows.LABEL_WRONG: torch.tensor([20, 20, 20, 20]),
        windows.LABEL_ASKED: torch.tensor([20, 20, 20, 20]),
        windows.LABEL_ASKERS: torch.tensor([3, 3, 3, 2]),
        # In turn: mostly right before; never asked before; as often wrong as right; two holders.
        windows.WRONG_BEFORE: torch.tensor([4, 0, 5, 0]),
        windows.ASKED_BEFORE: torch.tensor([10, 0, 10, 10]),
    }
    assert windows.doubtful(words, k_min=3) == [0]
