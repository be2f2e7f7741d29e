"""Every observer is given what it saw, and nothing else."""

from dataclasses import replace
from pathlib import Path

import pytest
import small_federation as small
import torch

from fedkola.audit import transcript, view
from fedkola.audit.evidence import Sighting
from fedkola.audit.sizes import Sizes
from fedkola.audit.view import View
from fedkola.errors import DataError, UnknownName
from fedkola.federation import Federation
from fedkola.privacy import behind
from fedkola.training.model import encode

SETTINGS = ("algorithm.name=fedit", "audit.record=true", 'audit.rounds=["all"]')
N = len(small.SITES)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Federation, dict[str, torch.Tensor]]:
    federation = small.assemble(tmp_path_factory.mktemp("run"), *SETTINGS)
    return federation, dict(small.run(federation).weights)


def seen(run: tuple[Federation, dict[str, torch.Tensor]], who: str) -> View:
    federation, final = run
    recording = transcript.read(federation.folder)
    return view.view(
        recording,
        view.observer(who, tuple(federation.sites)),
        stores={name: site.store for name, site in federation.sites.items()},
        final=final,
    )


def named(found: tuple[Sighting, ...], round: int, who: str) -> Sighting:
    (one,) = [s for s in found if (s.round, s.who) == (round, who)]
    return one


@pytest.mark.parametrize("who", ["wire", "server"])
def test_wire_and_server_read_every_answer_and_every_sum_of_a_plain_run(run, who: str):
    found = view.sightings(seen(run, who))
    assert {(s.round, s.who) for s in found} == {
        (round, name) for round in (1, 2, 3) for name in (*small.SITES, "sum")
    }
    one = named(found, 2, "sum")
    assert one.sites == N
    after = named(found, 3, "sum").before
    for name, value in one.change.items():
        assert torch.allclose(one.before[name] + value, after[name], atol=1e-6)
    assert one.protocol["name"] == "FedIT"


def test_a_network_under_tls_sees_lengths_that_say_nothing_and_no_content(run):
    found = seen(run, "tls")
    assert {frame.at for frame in found.frames} == {"wire"}
    assert {frame.peer for frame in found.frames} == set(small.SITES)
    assert (view.sightings(found), found.final) == ((), {})
    evidence = Sizes().examine(found)
    assert evidence.control.passed
    assert evidence.measures["violations"].value == 0
    padded = [
        replace(f, size=f.size + (f.direction == "up" and f.round == 2 and f.peer == "west"))
        for f in found.frames
    ]
    assert Sizes().examine(replace(found, frames=tuple(padded))).measures["violations"].value == 1
    with pytest.raises(DataError, match="none went to two sites"):
        Sizes().examine(replace(found, frames=found.frames[:1]))


def test_client_is_another_word_for_site():
    assert str(view.observer("client:west", ("west",))) == "site:west"


def test_single_changes_weigh_up_to_the_sum(run):
    found = view.sightings(seen(run, "server"))
    federation = run[0]
    counts = {
        name: sum(window == 1 for window in site.knowledge.versions().windows)
        for name, site in federation.sites.items()
    }
    for name, value in named(found, 1, "sum").change.items():
        singles = sum(counts[s] * named(found, 1, s).change[name] for s in counts)
        assert torch.allclose(singles / sum(counts.values()), value, atol=1e-6)


def test_a_site_sees_its_own_frames_and_reads_the_others_from_consecutive_questions(run):
    own = seen(run, "site:west")
    assert {frame.peer for frame in own.frames} == {"west"}
    assert set(own.secrets) == {"west"}
    found = view.sightings(own)
    assert {(s.round, s.who, s.sites) for s in found} == {(r, "others", N - 1) for r in (1, 2, 3)}
    # Sites of one weight: what it reads is the mean over the others.
    server = view.sightings(seen(run, "server"))
    alike = torch.nn.functional.cosine_similarity
    for name, value in named(found, 1, "others").change.items():
        others = [named(server, 1, s).change[name] for s in small.SITES if s != "west"]
        mean = torch.stack(others).mean(0)
        assert not mean.any() or alike(value.flatten(), mean.flatten(), dim=0) > 0.95


def test_a_coalition_takes_its_own_part_out_of_the_sum(run):
    found = view.sightings(seen(run, "coalition:west,east"))
    assert {s.who for s in found} == {"north", "south", "centre", "others"}
    others, server = named(found, 1, "others"), view.sightings(seen(run, "server"))
    assert others.sites == N - 2
    federation = run[0]
    rest = ("north", "south", "centre")
    counts = {
        name: sum(window == 1 for window in federation.sites[name].knowledge.versions().windows)
        for name in rest
    }
    for name, value in others.change.items():
        mean = sum(counts[s] * named(server, 1, s).change[name] for s in rest)
        assert torch.allclose(mean / sum(counts.values()), value, atol=1e-6)


def test_the_holder_of_the_model_sees_the_last_weights_alone(run):
    holder = seen(run, "model")
    assert (holder.frames, dict(holder.secrets)) == ((), {})
    (only,) = view.sightings(holder)
    assert only.who == "model"
    assert all(torch.equal(value, run[1][name]) for name, value in only.before.items())


def test_the_truth_is_the_token_ids_that_each_site_trained_on(run):
    federation = run[0]
    found = view.sightings(seen(run, "server"))
    stores = {name: site.store for name, site in federation.sites.items()}
    truth = view.truth(stores, found, small.SITES)
    site = federation.sites["north"]
    rows = encode(federation.foundation, site.knowledge.at(2).texts)
    assert truth[2, "north"] == tuple(map(tuple, rows))
    assert sorted(truth[2, "sum"]) == sorted(row for name in small.SITES for row in truth[2, name])
    for path in (site.store / behind.FOLDER).iterdir():
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_run_that_is_not_recorded_leaves_no_truth_behind(tmp_path: Path):
    federation = small.assemble(tmp_path, "algorithm.name=fedit")
    small.run(federation)
    assert all(not (s.store / behind.FOLDER).exists() for s in federation.sites.values())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("eve", "wire, server, tls, site:NAME, coalition:A,B or model"),
        ("site", "site takes one site, as site:NAME"),
        ("site:a,b", "site takes one site"),
        ("server:north", "server takes no names"),
        ("coalition", "coalition takes sites"),
        ("site:nowhere", "no site 'nowhere' in this run; it has north, west"),
        ("coalition:west,nowhere", "no site 'nowhere'"),
    ],
)
def test_an_observer_that_is_not_there_is_refused(given: str, says: str):
    with pytest.raises(UnknownName, match=says):
        view.observer(given, ("west", "north"))


@pytest.fixture(scope="module")
def hidden(tmp_path_factory: pytest.TempPathFactory):
    """The same run under secure aggregation."""
    federation = small.assemble(
        tmp_path_factory.mktemp("hidden"), *SETTINGS, "privacy.secure_sum=true"
    )
    return federation, dict(small.run(federation).weights)


def test_under_secure_aggregation_the_sum_is_the_same_and_single_answers_are_noise(run, hidden):
    plain, masked = (view.sightings(seen(one, "server")) for one in (run, hidden))
    assert {(s.round, s.who) for s in masked} == {(s.round, s.who) for s in plain}
    for name, value in named(plain, 1, "sum").change.items():
        assert torch.equal(named(masked, 1, "sum").change[name], value)
    alike = torch.nn.functional.cosine_similarity
    for site in small.SITES:
        parts: list[list[torch.Tensor]] = [[], []]
        for round in (1, 2, 3):
            for part, one in zip(parts, (plain, masked), strict=True):
                change = named(one, round, site).change
                part += [change[name].flatten() for name in sorted(change)]
        left, right = map(torch.cat, parts)
        # Masks are drawn anew on every call: all rounds of a site, 5.5 standard deviations.
        assert abs(float(alike(left, right, dim=0))) < 5.5 / len(left) ** 0.5 < 0.2
        assert not torch.allclose(left, right)


def test_a_coalition_reads_the_honest_rest_of_a_masked_sum(run, hidden):
    plain, masked = (
        named(view.sightings(seen(one, "coalition:west,east")), 2, "others")
        for one in (run, hidden)
    )
    assert masked.sites == plain.sites == N - 2
    for name, value in plain.change.items():
        assert torch.equal(masked.change[name], value)


def test_a_site_reads_as_much_of_a_masked_run_as_of_a_plain_one(run, hidden):
    plain, masked = (view.sightings(seen(one, "site:west")) for one in (run, hidden))
    assert [(s.round, s.who, s.sites) for s in masked] == [(s.round, s.who, s.sites) for s in plain]
