"""What a site refuses under MaskedSum: one test for each row of the table, also after a restart."""

import json
import os
import signal
import stat
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import masked_sites as sites
import pytest
import torch
from masked_sites import ASK, REVEAL, Masked, message

from fedkola import wire
from fedkola.errors import CohortTooSmall, GridOverflow, PrivacyError
from fedkola.privacy import frames, keys
from fedkola.privacy.member import Rules
from fedkola.types import Aggregate, Reply, Update

ADDENDS = [sites.addend([i, -i], weight=i) for i in range(5)]


@pytest.fixture
def run(tmp_path: Path) -> Masked:
    return sites.masked(tmp_path, ADDENDS)


def summed(run: Masked, **asked: int) -> Aggregate:
    return run.clients.sum(run.names, sites.question(run.names, **asked))


def refusal(run: Masked, name: str, content: bytes) -> str:
    return wire.unpack_reply(run.sites[name].answer(content)).refused


def signed(run: Masked, kind: str, frame: bytes, *before: bytes) -> bytes:
    message = frames.signed(kind, run.enrolled.roster, *before, frame)
    return run.enrolled.key.sign(message)


def survivors(run: Masked, name: str, x: int, indices: list[int]) -> bytes:
    """A list of survivors as the server would sign it."""
    asked, _, _ = run.sites[name].last(REVEAL)
    frame = frames.pack_sites(x, indices)
    return message(asked, frame=frame, signature=signed(run, "survivors", frame))


def asked_again(run: Masked, name: str, **changes: object) -> bytes:
    """The last ask with another frame, signed by the server; or with another question."""
    asked, _, _ = run.sites[name].last(ASK)
    question = changes.pop("question", asked.tensors["question"].numpy().tobytes())
    frame = frames.Ask.unpack(asked.tensors["frame"].numpy().tobytes())
    digest = frames.hashlib.sha256(question).digest()
    frame = replace(frame, question=digest, **changes).pack()
    epoch = run.clients._epoch
    signature = signed(run, "ask", frame, frames.offers_hash(epoch.offers))
    return message(asked, frame=frame, signature=signature, question=question)


# --- keys and terms -------------------------------------------------------------------------------


def test_an_offer_of_a_stranger_is_refused(run: Masked):
    summed(run)
    asked, _, _ = run.sites["site-000"].last("ms1/share")
    ((offer, _, _), *_) = frames.unpack_offers(asked.tensors["frame"].numpy().tobytes())
    body = replace(offer, site=5).pack()
    frame = frames.pack_offers({5: body + bytes(64)})
    assert refusal(run, "site-000", message(asked, frame=frame)) == "unknown_site"


def test_an_offer_that_was_altered_is_refused(run: Masked):
    summed(run)
    asked, _, _ = run.sites["site-000"].last("ms1/share")
    frame = bytearray(asked.tensors["frame"].numpy().tobytes())
    frame[2 + 150] ^= 1
    assert refusal(run, "site-000", message(asked, frame=bytes(frame))) == "bad_signature"


@pytest.mark.parametrize("step", ["ms1/open", ASK, REVEAL])
def test_what_the_server_did_not_sign_is_refused(run: Masked, step: str):
    summed(run)
    asked, _, _ = run.sites["site-001"].last(step)
    assert refusal(run, "site-001", message(asked, signature=bytes(64))) == "bad_signature"


def test_a_question_that_is_not_the_signed_one_is_refused(run: Masked):
    summed(run)
    asked, _, _ = run.sites["site-001"].last(ASK)
    other = wire.pack_broadcast(sites.question(run.names, round=9))
    assert refusal(run, "site-001", message(asked, question=other)) == "bad_signature"


def test_a_site_of_another_roster_is_refused(tmp_path: Path, run: Masked):
    summed(run)
    asked, _, _ = run.sites["site-000"].last("ms1/share")
    offers = frames.unpack_offers(asked.tensors["frame"].numpy().tobytes())
    key = keys.identity(run.folder / "site-001" / "secure_sum" / "identity.key")
    changed = {offer.site: body + signature for offer, body, signature in offers}
    body = replace(offers[1][0], roster_hash=bytes(32)).pack()
    changed[1] = body + key.sign(body)
    frame = frames.pack_offers(changed)
    assert refusal(run, "site-000", message(asked, frame=frame)) == "roster_mismatch"


def test_a_site_never_exchanges_a_pinned_roster(run: Masked):
    roster = run.enrolled.roster
    others = [(name, bytes(32)) for name in roster.names]
    with pytest.raises(PrivacyError, match="pins another roster") as refused:
        keys.pin(run.folder / "site-000" / "site.toml", keys.roster(roster.run, bytes(32), others))
    assert refused.value.code == "roster_mismatch"


@pytest.mark.parametrize(
    ("rules", "code"),
    [
        (replace(sites.RULES, plan_hash=bytes(32)), "plan_mismatch"),
        (replace(sites.RULES, manifest_hash=bytes(32)), "manifest_mismatch"),
    ],
)
def test_a_site_of_another_plan_or_model_is_left_out(run: Masked, rules: Rules, code: str):
    enrolled = replace(run.enrolled, rules=rules)
    odd = run.sites["site-003"]
    odd.member = enrolled.member("site-003", run.folder / "site-003")
    found = summed(run)
    assert found.cohort == ("site-000", "site-001", "site-002", "site-004")
    assert run.clients.tally().refused == {"site-003": code}
    # And it refuses itself where the server would have taken all.
    asked, _, _ = run.sites["site-000"].last("ms1/share")
    opened, _, _ = odd.last("ms1/open")
    mine = wire.unpack_reply(odd.answer(wire.pack_broadcast(opened))).words["frame"]
    whole = mine.numpy().tobytes()
    all_offers = {
        offer.site: body + signature
        for offer, body, signature in frames.unpack_offers(asked.tensors["frame"].numpy().tobytes())
    }
    frame = frames.pack_offers(all_offers | {3: whole})
    assert refusal(run, "site-003", message(asked, frame=frame)) == code


def test_a_question_under_another_plan_is_refused(run: Masked):
    summed(run)
    content = asked_again(run, "site-002", x=1, plan_hash=bytes(32))
    assert refusal(run, "site-002", content) == "plan_mismatch"


def test_a_tensor_of_another_shape_than_the_models_is_refused(tmp_path: Path):
    rules = replace(sites.RULES, shapes={"theta": (4,)})
    run = sites.masked(tmp_path, ADDENDS, rules=rules)
    with pytest.raises(CohortTooSmall, match="none of the 5"):
        summed(run)
    assert set(run.clients.tally().refused.values()) == {"manifest_mismatch"}


# --- counts ---------------------------------------------------------------------------------------


def test_a_sum_over_two_sites_is_neither_asked_nor_answered(run: Masked):
    pair = run.names[:2]
    with pytest.raises(CohortTooSmall, match="2 sites asked"):
        run.clients.sum(pair, sites.question(pair))
    summed(run)
    content = asked_again(run, "site-001", x=1, sites=(0, 1))
    assert refusal(run, "site-001", content) == "cohort_too_small"


def test_colluders_raise_the_least_number_of_sites(tmp_path: Path):
    run = sites.masked(tmp_path, ADDENDS, rules=replace(sites.RULES, colluders=4))
    with pytest.raises(CohortTooSmall, match="needs 6"):
        summed(run)


def test_a_cohort_without_enough_holders_is_refused(run: Masked):
    summed(run)
    content = asked_again(run, "site-001", x=1, sites=(0, 1, 2))
    assert refusal(run, "site-001", content) == "below_threshold"
    run.sites["site-001"].refused.clear()
    assert refusal(run, "site-001", survivors(run, "site-001", 0, [0, 1, 2])) == "below_threshold"


def test_a_site_that_answered_must_be_counted(run: Masked):
    run.sites["site-004"].away = {REVEAL}
    summed(run)
    run.sites["site-004"].away = set()
    asked, _, _ = run.sites["site-000"].last(REVEAL)
    frame = frames.pack_sites(0, [0, 1, 2, 3])
    content = message(asked, frame=frame, signature=signed(run, "survivors", frame))
    assert refusal(run, "site-004", content) == "not_a_survivor"


def test_a_site_that_did_not_answer_reveals_nothing(run: Masked):
    summed(run)
    assert refusal(run, "site-000", survivors(run, "site-000", 1, [0, 1, 2, 3])) == "not_a_survivor"


# --- one exchange, one sum ------------------------------------------------------------------------


@pytest.mark.parametrize("restarted", [False, True])
def test_never_both_secrets_of_one_site(run: Masked, restarted: bool):
    summed(run)
    if restarted:
        run.restart("site-000")
    assert refusal(run, "site-000", survivors(run, "site-000", 0, [0, 1, 2, 3])) == "both_secrets"


@pytest.mark.parametrize("restarted", [False, True])
def test_other_survivors_are_refused_once_it_revealed(tmp_path: Path, restarted: bool):
    """In a sparse graph other survivors may differ by sites of which it holds no share."""
    addends = [sites.addend([i]) for i in range(65)]
    run = sites.masked(tmp_path, addends, exchanges=1)
    summed(run)
    near = run.clients._epoch.partners(run.enrolled.roster)[0] | {0}
    far = next(i for i in range(65) if i not in near)
    if restarted:
        run.restart("site-000")
    others = [i for i in range(65) if i != far]
    assert refusal(run, "site-000", survivors(run, "site-000", 0, others)) == "survivors_changed"


@pytest.mark.parametrize("restarted", [False, True])
def test_the_same_messages_get_the_same_bytes(run: Masked, restarted: bool):
    summed(run)
    if restarted:
        run.restart("site-002")
    site = run.sites["site-002"]
    for step in ("ms1/open", ASK, REVEAL):
        _, content, answer = site.last(step)
        assert site.answer(content) == answer


@pytest.mark.parametrize("restarted", [False, True])
def test_another_question_under_a_used_number_is_refused(run: Masked, restarted: bool):
    summed(run)
    other = wire.pack_broadcast(sites.question(run.names, round=2))
    content = asked_again(run, "site-002", question=other)
    if restarted:
        run.restart("site-002")
    assert refusal(run, "site-002", content) == "exchange_reused"


def test_the_same_question_is_refused_once_its_answer_is_gone(run: Masked):
    """A mask must not hide a second answer, as after a removal."""
    summed(run)
    _, first, _ = run.sites["site-002"].last(ASK)
    summed(run, round=2)
    assert refusal(run, "site-002", first) == "exchange_reused"


def test_epochs_do_not_run_backwards(run: Masked):
    summed(run)
    asked, _, _ = run.sites["site-000"].last("ms1/open")
    for opening in (
        frames.Opening(epoch=0, first=9, count=4),
        frames.Opening(epoch=1, first=2, count=4),
    ):
        frame = opening.pack()
        content = message(asked, frame=frame, signature=signed(run, "open", frame))
        assert refusal(run, "site-000", content) == "exchange_reused"


def test_a_second_list_of_offers_is_refused(run: Masked):
    """A channel key seals one message."""
    summed(run)
    asked, _, _ = run.sites["site-000"].last("ms1/share")
    offers = frames.unpack_offers(asked.tensors["frame"].numpy().tobytes())
    fewer = {o.site: body + signature for o, body, signature in offers if o.site != 4}
    content = message(asked, frame=frames.pack_offers(fewer))
    assert refusal(run, "site-000", content) == "exchange_reused"


def test_an_exchange_beyond_the_epoch_is_refused(run: Masked):
    summed(run)
    assert refusal(run, "site-000", asked_again(run, "site-000", x=99)) == "no_epoch"


# --- values ---------------------------------------------------------------------------------------


def test_addends_that_may_leave_the_word_are_refused(run: Masked):
    asked = sites.question(run.names, word=16, bits=14)
    with pytest.raises(GridOverflow, match="5 addends of 14 bits"):
        run.clients.sum(run.names, asked)
    summed(run)
    content = asked_again(run, "site-000", x=1, question=wire.pack_broadcast(asked))
    assert refusal(run, "site-000", content) == "grid_overflow"
    bounded = replace(asked, grid=replace(asked.grid, bounded=True))
    assert run.clients.sum(run.names, bounded).words["x"].tolist() == [10, -10]


@pytest.mark.parametrize(("value", "code"), [(float("nan"), "not_finite"), (1e30, "grid_overflow")])
def test_values_off_the_grid_stay_at_their_site(run: Masked, value: float, code: str):
    def words(question: bytes) -> dict[str, torch.Tensor]:
        x = torch.tensor([value])
        update = Update(client="site-001", tensors={"x": x}, weight=1, metrics={"n": 0})
        return wire.words(update, wire.unpack_broadcast(question).grid, run.names)

    run.sites["site-001"].words = words
    found = summed(run)
    assert found.cohort == ("site-000", "site-002", "site-003", "site-004")
    assert run.clients.tally().refused == {"site-001": code}


def test_noise_sized_for_more_sites_is_not_revealed(run: Masked):
    run.sites["site-003"].away = {ASK}
    asked = replace(sites.question(run.names), guards=({"name": "noise", "absent": 0},))
    with pytest.raises(CohortTooSmall, match="nothing is decoded"):
        run.clients.sum(run.names, asked)
    assert set(run.sites["site-000"].refused) == {"noise_short"}
    enough = replace(asked, round=2, guards=({"name": "noise", "absent": 1},))
    assert len(run.clients.sum(run.names, enough).cohort) == 4


def test_a_question_in_the_clear_is_refused(run: Masked):
    plain = wire.pack_broadcast(sites.question(run.names))
    assert refusal(run, "site-000", plain) == "UpdateHidden"


def test_single_answers_do_not_exist(run: Masked):
    with pytest.raises(PrivacyError, match="only sums exist"):
        run.clients.each(run.names, sites.question(run.names))


# --- shares at the server -------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["replayed", "reordered", "altered", "unsigned"])
def test_a_wrong_share_leaves_its_site_out_of_the_reveal(run: Masked, what: str):
    summed(run)
    site = run.sites["site-001"]
    _, _, before = site.last(REVEAL)
    answer, member = site.answer, site.member
    key = keys.identity(run.folder / "site-001" / "secure_sum" / "identity.key")

    def wrong(message: bytes) -> bytes:
        good = wire.unpack_reply(answer(message))
        if wire.unpack_broadcast(message).step != REVEAL:
            return wire.pack_reply(good)
        body = good.words["frame"].numpy().tobytes()[:-64]
        if what == "replayed":
            whole = wire.unpack_reply(before).words["frame"].numpy().tobytes()
        elif what == "unsigned":
            whole = body + bytes(64)
        else:
            entries = [body[36 + 69 * i : 36 + 69 * (i + 1)] for i in range(5)]
            if what == "reordered":
                entries.reverse()
            else:
                entries[0] = entries[0][:3] + bytes(66)
            body = body[:36] + b"".join(entries)
            whole = body + key.sign(frames.signed("revealed", run.enrolled.roster, body))
        frame = torch.frombuffer(bytearray(whole), dtype=torch.uint8)
        return wire.pack_reply(replace(good, words={"frame": frame}))

    assert site.member is member
    run.clients._inner._sites["site-001"] = wrong
    if what == "altered":
        with pytest.raises(PrivacyError, match="contradict"):
            summed(run, round=2)
    else:
        assert summed(run, round=2).words["x"].tolist() == [10, -10]
        code = {"replayed": "bad_share", "unsigned": "bad_signature"}.get(what, "WireError")
        assert run.clients.tally().refused == {"site-001": code}


def test_offers_that_differ_between_sites_keep_shares_closed(run: Masked):
    """A server that shows one site other offers gets shares that nobody can open."""
    summed(run)
    asked, _, _ = run.sites["site-000"].last("ms1/relay")
    sealed = bytearray(asked.tensors["frame"].numpy().tobytes())
    sealed[40] ^= 1
    assert refusal(run, "site-000", message(asked, frame=bytes(sealed))) == "bad_signature"


def test_a_late_answer_of_a_lost_site_stays_masked(tmp_path: Path):
    """Its pair masks can be removed by then, its own mask cannot."""
    zeros = [sites.addend([0] * 20_000, word=16) for _ in range(4)]
    run = sites.masked(tmp_path, zeros)
    late = run.sites["site-002"]
    late.away = {ASK}
    asked = sites.question(run.names, word=16)
    run.clients.sum(run.names, asked)
    late.away = set()
    _, content, _ = run.sites["site-000"].last(ASK)
    sent = wire.unpack_reply(late.answer(content)).words["payload"]
    counts = torch.bincount(sent.to(torch.int64), minlength=256).double()
    chi = float(((counts - len(sent) / 256) ** 2 / (len(sent) / 256)).sum())
    assert 170 < chi < 360  # 255 degrees of freedom, far tails
    assert refusal(run, "site-002", survivors(run, "site-000", 0, [0, 1, 3])) == "not_a_survivor"


# --- what is kept and what is sent ----------------------------------------------------------------


def test_secrets_are_readable_by_their_owner_alone(run: Masked):
    summed(run)
    folder = run.folder / "site-000" / "secure_sum"
    files = {path.name.split("-")[0] for path in folder.iterdir()}
    assert files == {"identity.key", "epoch.json", "log.jsonl", "answer"}
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    run.sites["site-000"].member.finish()
    assert {path.name for path in folder.iterdir()} == {"identity.key"}


def test_an_epoch_secret_is_gone_when_the_next_one_opens(run: Masked):
    path = run.folder / "site-000" / "secure_sum" / "epoch.json"
    summed(run)
    first = json.loads(path.read_text())["secret"]
    run.clients.sum(run.names[:4], sites.question(run.names[:4]))
    assert json.loads(path.read_text())["secret"] != first
    assert refusal(run, "site-000", survivors(run, "site-000", 0, [0, 1, 2, 3])) == "not_a_survivor"


def test_no_field_of_a_message_tells_of_the_data(tmp_path: Path):
    weight, metric = 0x0123456789ABCDEF >> 8, -0x00FEDCBA98765432
    runs = []
    for kind, values in (("one", range(5)), ("two", range(1000, 1005))):
        addends = [sites.addend([v, 7 * v], word=64, weight=weight, n=metric) for v in values]
        runs.append(sites.masked(tmp_path / kind, addends))
    lengths, unmasked = [], []
    for run in runs:
        run.sites["site-003"].away = {REVEAL}
        found = run.clients.sum(run.names, sites.question(run.names, word=64))
        assert int(found.words["weight"]) == 5 * weight
        heard = [h for site in run.sites.values() for h in site.heard]
        lengths.append([(h[0].step, len(h[1]), len(h[2])) for h in heard])
        answers = [wire.unpack_reply(h[2]) for h in heard if h[0].step == ASK]
        unmasked.append([a.words["frame"].numpy().tobytes()[36:] for a in answers])
        sent = b"".join(h[1] + h[2] for h in heard)
        for value in (weight, metric, 5 * weight):
            assert struct.pack("<q", value) not in sent
    assert lengths[0] == lengths[1]
    assert unmasked[0] == unmasked[1]


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{helpers!r}]
import masked_sites as sites
run = sites.masked(Path({folder!r}), [sites.addend([i, -i], weight=i) for i in range(5)])
site, answer = run.sites["site-000"], run.sites["site-000"].answer
def answered(message):
    found = answer(message)
    step = sites.wire.unpack_broadcast(message).step
    Path({folder!r}, step.replace("/", "-")).write_bytes(message)
    Path({folder!r}, step.replace("/", "-") + ".answer").write_bytes(found)
    if step == {step!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    return found
run.clients._inner._sites["site-000"] = answered
run.clients.sum(run.names, sites.question(run.names))
"""


@pytest.mark.parametrize("step", [ASK, REVEAL])
def test_a_killed_site_repeats_its_bytes_and_keeps_its_word(tmp_path: Path, step: str):
    helpers = str(Path(sites.__file__).parent)
    script = KILLED.format(helpers=helpers, folder=str(tmp_path), step=step)
    done = subprocess.run([sys.executable, "-c", script], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    run = sites.masked(tmp_path, ADDENDS)
    site = run.sites["site-000"]
    name = step.replace("/", "-")
    content = (tmp_path / name).read_bytes()
    assert site.answer(content) == (tmp_path / f"{name}.answer").read_bytes()
    if step == REVEAL:
        asked = wire.unpack_broadcast(content)
        frame = frames.pack_sites(0, [0, 1, 2, 3])
        other = message(asked, frame=frame, signature=signed(run, "survivors", frame))
        assert refusal(run, "site-000", other) == "both_secrets"
    # The server was killed too: it opens another epoch and gets the sum.
    assert summed(run).words["x"].tolist() == [10, -10]


def test_answers_of_other_shapes_are_left_out(run: Masked):
    run.sites["site-002"].addend = sites.addend([1, 2, 3])
    found = summed(run)
    assert found.cohort == ("site-000", "site-001", "site-003", "site-004")
    assert found.words["x"].tolist() == [8, -8]
    assert run.clients.tally().refused == {"site-002": "WireError"}


def test_a_site_that_answers_garbage_is_lost_like_any_other(run: Masked):
    inner = run.clients._inner
    inner._sites["site-001"] = lambda message: wire.pack_reply(
        Reply(client="site-001", question=wire.question(message), word=8)
    )
    found = summed(run)
    assert found.words["x"].tolist() == [9, -9]
    assert run.clients.tally().refused == {"site-001": "WireError"}


def test_a_key_file_that_holds_no_key_is_named_and_never_replaced(tmp_path):
    path = tmp_path / "identity.key"
    path.write_bytes(b"short")
    with pytest.raises(PrivacyError, match="5 bytes, a private key has 32; restore it"):
        keys.identity(path)
    assert path.read_bytes() == b"short"
