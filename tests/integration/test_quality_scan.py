"""A scan through real sites: sums alone, the same under masks, acting only through an open gate."""

import json
from dataclasses import replace
from random import Random

import pytest
import torch
from tests.helpers import small_federation as small

from fedkola import plan as plans
from fedkola.cli import main
from fedkola.errors import DataError, Incompatible
from fedkola.quality import kept
from fedkola.server import check

CODES = small.CODES[:3]
SCAN = (
    "algorithm.name=quality_scan",
    "quality.mode=filter",
    "quality.refits=2",
    "quality.trusted_min=20",
    "quality.regions=16",
    "quality.min_peers=2",
)


def _sites(*, noise: float, num: int = 80):  # type: ignore[no-untyped-def]
    """Records of three labels whose words give them away; and which of them are wrong."""
    sites, wrong, right = {}, {}, {}
    for site in small.SITES:
        chance = Random(f"scan/{site}")
        rows = []
        for i in range(num):
            true = chance.choice(CODES)
            given = true
            if chance.random() < noise:
                given = chance.choice([code for code in CODES if code != true])
            words = [
                *chance.choices(small.FILLER, k=2),
                *chance.choices(small.OWN_WORDS[true], k=4),
            ]
            rows.append((f"{site}-{i}", " ".join(words), given, f"{site}-p{i}", 1))
            right[f"{site}-{i}"] = true
            wrong[f"{site}-{i}"] = given != true
        columns = list(zip(*rows, strict=True))
        sites[site] = small.Dataset(
            records=columns[0],
            texts=columns[1],
            labels=columns[2],
            patients=columns[3],
            windows=columns[4],
        )
    return sites, wrong, right


def _assembled(  # type: ignore[no-untyped-def]
    folder, *settings: str, noise: float, checked: int = 20, labels=None
):
    sites, wrong, right = _sites(noise=noise)
    federation = small.assemble(folder, *SCAN, *settings, sites=sites, labels=labels, rounds=1)
    for name, site in federation.sites.items():
        kept.check(site.store, {f"{name}-{i}": right[f"{name}-{i}"] for i in range(checked)})
    return federation, wrong


def _left_out(federation) -> set[str]:  # type: ignore[no-untyped-def]
    return set().union(*(kept.left_out(site.store) for site in federation.sites.values()))


def test_wrong_records_are_left_out_and_right_ones_stay(tmp_path):
    federation, wrong = _assembled(tmp_path, noise=0.3)
    state = small.run(federation)
    gone = _left_out(federation)
    assert state.report["open"] == 1
    share = sum(wrong.values()) / len(wrong)
    assert 0.05 < state.report["noise_low"] <= share
    assert sum(wrong[r] for r in gone) / len(gone) > 0.8
    scanned = [record for record in wrong if int(record.split("-")[1]) >= 20]
    assert sum(wrong[r] for r in gone) / sum(wrong[r] for r in scanned) > 0.5
    assert state.report["acted"] == len(gone)


def test_clean_records_are_all_kept(tmp_path):
    federation, _ = _assembled(tmp_path, noise=0.0)
    state = small.run(federation)
    assert state.report["open"] == 0
    assert _left_out(federation) == set()
    assert "nothing is acted on" in state.why


def test_without_checked_records_nothing_is_acted_on(tmp_path):
    federation, _ = _assembled(tmp_path, noise=0.3, checked=0)
    state = small.run(federation)
    assert _left_out(federation) == set()
    assert state.why.startswith("0 trusted records")


def test_a_scan_has_the_same_bits_under_masks(tmp_path):
    plain, _ = _assembled(tmp_path / "plain", noise=0.3)
    masked, _ = _assembled(tmp_path / "masked", "privacy.secure_sum=true", noise=0.3)
    assert small.fingerprint(small.run(plain)) == small.fingerprint(small.run(masked))
    for name, site in plain.sites.items():
        theirs = kept.findings(masked.sites[name].store)
        assert kept.findings(site.store) == theirs


def test_what_the_catalogue_says_of_labels_is_counted_once_whoever_answers(tmp_path):
    said = {code: "\n".join(small.OWN_WORDS[code]) for code in CODES}
    told = replace(small.catalogue(), texts=said)
    named, _ = _assembled(tmp_path / "named", "quality.names=true", noise=0.0, labels=told)
    plain, _ = _assembled(tmp_path / "plain", noise=0.0, labels=told)
    with_names, without = small.run(named).sums["counts"], small.run(plain).sums["counts"]
    assert (with_names - without).tolist() == [2 * 15] * 3 + [0] * 6


def test_the_owner_decides_before_the_evidence(tmp_path):
    federation, _ = _assembled(tmp_path / "first", noise=0.3)
    small.run(federation)
    gone = sorted(_left_out(federation))[0]
    again, _ = _assembled(tmp_path / "second", noise=0.3)
    site = gone.split("-")[0]
    kept.decide(again.sites[site].store, [gone], kept.KEEP)
    small.run(again)
    assert gone not in _left_out(again)
    rows = kept.findings(again.sites[site].store)["findings"]
    row = next(row for row in rows if row["record"] == gone)
    assert (row["action"], row["by"], row["pinned"]) == ("keep", "owner", True)


def test_a_bank_learns_from_the_records_that_are_kept(tmp_path):
    federation, _ = _assembled(tmp_path, "algorithm.name=fedkola", noise=0.3)
    state = small.run(federation)
    gone = _left_out(federation)
    held = {r for site in federation.sites.values() for r, _ in _owners(site.store)}
    assert gone
    assert not held & gone
    assert held
    assert len(state.bank.cells) > 0


def _owners(store):  # type: ignore[no-untyped-def]
    from fedkola.knowledge import journal

    return journal.owners(store)


def test_the_findings_say_why_in_words(tmp_path):
    federation, _ = _assembled(tmp_path, noise=0.3)
    small.run(federation)
    document = kept.findings(federation.sites["north"].store)
    assert json.loads(json.dumps(document)) == document
    row = next(row for row in document["findings"] if row["code"] == "LABEL_DISAGREES")
    assert row["label"] in row["sentence"]
    assert row["action"] == "filter"


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (("algorithm.name=fedit", "quality.mode=filter"), "read by fedkola and quality_scan"),
        (("quality.mode=filter", "quality.absorb=true"), "quality.absorb is read by quality_scan"),
        (("quality.mode=report", "privacy.epsilon=3.0"), "every exchange of a scan is a query"),
    ],
)
def test_a_scan_that_nobody_runs_or_pays_for_is_refused(settings, why):
    with pytest.raises(Incompatible, match=why):
        check(plans.override(plans.Plan(), list(settings)))


def test_scores_do_not_depend_on_how_sites_hold_the_records(tmp_path):
    """The same records at other sites give the same summed statistics."""
    sites, _, right = _sites(noise=0.3)
    names = list(sites)
    turned = {name: replace(sites[names[i - 1]]) for i, name in enumerate(names)}
    states = []
    for folder, held in (("as-is", sites), ("turned", turned)):
        federation = small.assemble(tmp_path / folder, *SCAN, sites=held, rounds=1)
        for site in federation.sites.values():
            mine = [r for r in site.knowledge.until(1).records if int(r.split("-")[1]) < 20]
            kept.check(site.store, {r: right[r] for r in mine})
        states.append(small.run(federation))
    assert states[0].report == states[1].report
    assert all(torch.equal(states[0].sums[k], states[1].sums[k]) for k in states[0].sums)


def _site(capsys, *arguments: object) -> tuple[int, str, str]:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit) as ended:
        main(["site", *map(str, arguments)])
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def test_the_owner_reads_a_report_keeps_a_record_and_undoes_the_scan(tmp_path, capsys):
    federation, _ = _assembled(tmp_path / "run", noise=0.3)
    small.run(federation)
    store = federation.sites["north"].store
    page = tmp_path / "north.html"
    rc, shown, _ = _site(capsys, "report", store, "--out", page)
    document = json.loads(page.with_suffix(".json").read_text())
    assert rc == 0
    assert f"{document['left_out']:,} are left out of learning" in " ".join(shown.split())
    html = page.read_text()
    first = next(group for group in document["groups"] if group["code"] == "LABEL_DISAGREES")
    assert first["examples"][0]["sentence"] in html
    assert "<script" not in html
    gone = sorted(kept.left_out(store))
    assert _site(capsys, "keep", store, gone[0])[0] == 0
    assert gone[0] not in kept.left_out(store)
    rc, shown, _ = _site(capsys, "undo", store)
    assert f"{len(gone) - 1:,} records are learnt from again" in shown
    assert kept.left_out(store) == frozenset()


def test_a_site_that_was_never_scanned_has_no_report(tmp_path, capsys):
    rc, _, why = _site(capsys, "report", tmp_path)
    assert rc == DataError.exit_code
    assert "holds no findings" in " ".join(why.split())


def test_checked_labels_come_from_a_table(tmp_path, capsys):
    table = tmp_path / "checked.csv"
    table.write_text("record,label\nn-1,heart-1\nn-2,heart-2\n")
    rc, shown, _ = _site(capsys, "checked", tmp_path / "site", table)
    assert (rc, "2 checked records, 2 in all" in shown) == (0, True)
    assert kept.checked(tmp_path / "site") == {"n-1": "heart-1", "n-2": "heart-2"}
