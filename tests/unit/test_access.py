"""Access lists hold from the vote to the answer: a site is sent what it may have, nothing else."""

import json
from collections.abc import Callable
from pathlib import Path

import small_federation as small
import torch

from fedkola import wire
from fedkola.evaluation import scoring
from fedkola.federation import Federation
from fedkola.knowledge import bank as banks

FAST = ('knowledge.lanes=["analytic", "router"]', "knowledge.features=16")
COMMON = '["heart", "lung"]'


def watched(seen: dict[str, list], name: str) -> Callable:
    """Keeps the documents of the views that a site is sent."""

    def wrap(answer):  # type: ignore[no-untyped-def]
        def heard(message: bytes) -> bytes:
            asked = wire.unpack_broadcast(message)
            if asked.step == "publish":
                document = json.loads(bytes(asked.tensors["about"].numpy()))
                seen.setdefault(name, []).append(document)
            return answer(message)

        return heard

    return wrap


def ran(folder: Path, *settings: str) -> tuple[dict[str, list], Federation, object]:
    seen: dict[str, list] = {}
    wrap = {name: watched(seen, name) for name in small.SITES}
    federation = small.assemble(folder, *FAST, *settings, wrap=wrap)
    return seen, federation, small.run(federation)


def scopes(document: dict) -> set[str]:
    labels = {node.split("-")[0] for node in document["head"]["nodes"][0]}
    assert {module.split("@")[0] for module in document["modules"]} == labels
    assert {module.split("@")[0] for module in document["router"]} == labels
    return labels


def test_a_site_is_sent_the_view_of_what_it_may_hold(tmp_path: Path):
    lists = [f"scenario.access.{name}={COMMON}" for name in ("east", "west", "centre")]
    seen, federation, state = ran(tmp_path, *lists, "knowledge.k_min=2", "cohort.minimum=2")
    assert banks.held(state.bank, "north") is None
    assert banks.held(state.bank, "east") == ("heart@1", "lung@1")
    assert banks.find_module(state.bank, "bone@1").access == ("north", "south")
    assert scopes(seen["north"][-1]) == {"heart", "lung", "bone"}
    assert scopes(seen["east"][-1]) == {"heart", "lung"}
    assert state.calibration.records > 0
    # What a site answers with is what it was sent: nothing of bone for one that may not have it.
    reader = scoring.reader(federation)
    answers = {
        site: federation.algorithm.answer(state, reader, ["bo1ka bo1mo"], site=site)
        for site in ("", "north", "east")
    }
    assert torch.equal(answers[""], answers["north"])
    bone = [i for i, node in enumerate(reader.nodes) if node.startswith("bone")]
    assert torch.isinf(answers["east"][:, bone]).all()
    assert not torch.isinf(answers["north"][:, bone]).all()


def test_fewer_than_k_min_sites_of_one_held_set_share_what_all_of_them_may_have(tmp_path: Path):
    lists = [
        'scenario.access.east=["heart", "lung"]',
        'scenario.access.west=["heart", "bone"]',
        'scenario.access.centre=["heart"]',
    ]
    seen, _, _ = ran(tmp_path, *lists)
    # A sum over the two sites that may hold all, or over one of the others, would show too much.
    shared = {name: frozenset(scopes(documents[-1])) for name, documents in seen.items()}
    assert shared == dict.fromkeys(small.SITES, frozenset({"heart"}))


def test_without_access_lists_every_site_is_sent_everything(tmp_path: Path):
    seen, _, _ = ran(tmp_path)
    assert {frozenset(scopes(documents[-1])) for documents in seen.values()} == {
        frozenset({"heart", "lung", "bone"})
    }
