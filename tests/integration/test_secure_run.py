"""A run under secure aggregation: losses, removals and resuming give the bits of plain sums."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_federation as small

from fedkola import removal, wire
from fedkola.errors import CohortTooSmall
from fedkola.knowledge.forget import Request
from fedkola.ledger import Ledger
from fedkola.privacy.member import ASK, REVEAL

FAST = 'knowledge.lanes=["analytic", "router"]'
SECURE = "privacy.secure_sum=true"
PATIENT = Request(kind="patient", site="north", name="north-p3")
Answer = Callable[[bytes], bytes]


def lost(step: str, *, times: int) -> Callable[[Answer], Answer]:
    """A site whose answer to this plain or masked step is lost on its way the first ``times``."""

    def wrap(answer: Answer) -> Answer:
        left = [times]

        def reply(message: bytes) -> bytes:
            asked = wire.unpack_broadcast(message)
            if asked.step == ASK:
                asked = wire.unpack_broadcast(asked.tensors["question"].numpy().tobytes())
            found = answer(message)
            if asked.step == step and left[0]:
                left[0] -= 1
                return b"garbage"
            return found

        return reply

    return wrap


def finished(folder: Path, *settings: str, **more: Any) -> str:
    return small.fingerprint(small.run(small.assemble(folder, FAST, *settings, **more)))


def test_a_site_lost_in_the_middle_is_voted_out_as_in_a_plain_run(tmp_path: Path):
    wrap = {"east": lost("fill", times=1)}
    plain = finished(tmp_path / "plain", wrap=wrap)
    wrap = {"east": lost("fill", times=1)}
    assert finished(tmp_path / "masked", SECURE, wrap=wrap) == plain


def test_a_site_lost_before_the_reveal_is_in_the_sum(tmp_path: Path):
    plain = finished(tmp_path / "plain")
    wrap = {"east": lost(REVEAL, times=100)}
    assert finished(tmp_path / "masked", SECURE, wrap=wrap) == plain


def test_too_few_reveals_stop_the_run_and_it_resumes_to_the_same_bits(tmp_path: Path):
    plain = finished(tmp_path / "plain")
    wrap = {name: lost(REVEAL, times=1000) for name in ("east", "west")}
    with pytest.raises(CohortTooSmall, match="nothing is decoded"):
        finished(tmp_path / "masked", SECURE, wrap=wrap)
    assert finished(tmp_path / "masked", SECURE) == plain


def test_a_removal_takes_out_the_same_integers(tmp_path: Path):
    states = []
    for kind, more in (("plain", ()), ("masked", (SECURE,))):
        federation = small.assemble(tmp_path / kind, FAST, *more)
        small.run(federation)
        with Ledger.open(tmp_path / kind) as ledger:
            receipt = removal.remove(federation, ledger, PATIENT, recount=True)
            assert (receipt.recount, receipt.records > 0) == (True, True)
            state, _ = removal.load_state(federation, ledger)
        states.append(small.cells(state))
    assert states[0] == states[1]


def test_new_versions_of_records_replace_old_ones_alike(tmp_path: Path):
    versions = small.revised(small.data())
    plain = finished(tmp_path / "plain", sites=versions)
    assert finished(tmp_path / "masked", SECURE, sites=versions) == plain


def test_what_a_masked_run_sends_has_the_lengths_of_any_other(tmp_path: Path):
    """Another seed of the same plan draws other integers; only they differ."""

    def lengths(folder: Path, data: dict[str, Any]) -> list[tuple[str, int, int]]:
        seen: list[tuple[str, int, int]] = []

        def watch(answer: Answer) -> Answer:
            def reply(message: bytes) -> bytes:
                found = answer(message)
                seen.append((wire.unpack_broadcast(message).step, len(message), len(found)))
                return found

            return reply

        settings = ("algorithm.name=fedit", SECURE)
        small.run(
            small.assemble(folder, *settings, sites=data, wrap=dict.fromkeys(small.SITES, watch))
        )
        return seen

    data = small.data()
    swapped = {
        name: data[other] for name, other in zip(data, [*list(data)[1:], "north"], strict=True)
    }
    one = lengths(tmp_path / "one", data)
    assert lengths(tmp_path / "two", swapped) == one
    assert any(step == ASK for step, _, _ in one)
