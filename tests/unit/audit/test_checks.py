"""Masked bytes show nothing, and each fault that would show something is caught."""

from pathlib import Path

import numpy as np
import pytest
import small_federation as small

from fedkola.audit import checks, transcript, view
from fedkola.audit.checks import Checks, Masked
from fedkola.audit.intervals import auc_interval
from fedkola.audit.view import View
from fedkola.errors import DataError
from fedkola.privacy import masks

SETTINGS = ("algorithm.name=fedit", "audit.record=true", 'audit.rounds=["all"]')


def recorded(folder: Path, *settings: str, **sites: object) -> View:
    federation = small.assemble(folder, *SETTINGS, *settings, **sites)
    small.run(federation)
    return view.view(
        transcript.read(folder),
        view.observer("server", tuple(federation.sites)),
        stores={},
        final={},
    )


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> View:
    return recorded(tmp_path_factory.mktemp("masked"), "privacy.secure_sum=true")


def test_a_masked_run_passes_every_check_and_the_checks_pass_their_control(masked: View):
    found = Checks(seeds=2000).examine(masked)
    assert found.updates == 15
    assert {name: m.value for name, m in found.measures.items()} == {
        "violations": 0.0,
        **dict.fromkeys(checks.CHECKS, 0.0),
    }


def test_a_plain_run_has_no_masks_to_check(tmp_path: Path):
    with pytest.raises(DataError, match="the run was plain"):
        Checks().examine(recorded(tmp_path))


def like(word: int = 32, bits: int = 24, *, size: int = 16384, seed: int = 0) -> Masked:
    generator = np.random.default_rng(seed)
    return Masked(
        site="a",
        exchange=1,
        word=word,
        bits=bits,
        shapes=(("x", (size * 8 // word,)),),
        payload=generator.integers(0, 256, size, dtype=np.uint8),
        side=generator.integers(0, 256, 8, dtype=np.uint8),
    )


@pytest.mark.parametrize(("word", "bits"), [(16, 12), (16, 16), (32, 24), (32, 32), (64, 64)])
def test_the_control_finds_every_planted_fault_in_every_ring(word: int, bits: int):
    assert Checks().control([like(word, bits)]) == 1.0


def test_the_search_opens_a_folded_mask_and_gives_the_update_bit_for_bit():
    one = like(16, 12)
    count = len(one.payload) // 2
    update = np.random.default_rng(5).integers(-2047, 2048, count).astype(np.int16)
    words = masks.to_bytes(update.view(np.uint16), 16)
    taped = checks._with(one, checks._added(words, checks.folded(54321, one), 16))
    seed = checks.search(taped)
    assert seed == 54321
    opened = masks.from_bytes(taped.payload, 16) - masks.from_bytes(checks.folded(seed, one), 16)
    assert np.array_equal(opened.view(np.int16), update)


def test_the_same_search_finds_nothing_on_our_masks():
    one = like(16, 12)
    words = masks.from_bytes(one.payload, 16) * 0
    words = words.copy()
    masks.add_streams(words, plus=[bytes(range(32))])
    assert checks.search(checks._with(one, masks.to_bytes(words, 16))) is None


def test_a_classifier_of_two_masked_runs_guesses_and_of_two_plain_ones_knows(
    masked: View, tmp_path: Path
):
    others = {site: small.records(f"{site}-other") for site in small.SITES}
    other = recorded(tmp_path, "privacy.secure_sum=true", sites=others)
    first, second = (list(checks.masked_answers(v)) for v in (masked, other))
    scores = checks.distinguished(first, second)
    # Masks are drawn anew on every call: five standard deviations of guessing over these blocks.
    m, n = map(len, scores)
    assert abs(auc_interval(*scores).value - 0.5) < 5 * ((m + n + 1) / (12 * m * n)) ** 0.5 < 0.16
    small_words = [
        [checks._with(like(16, 12), checks._addend(like(16, bits), seed=i)) for i in range(10)]
        for bits in (10, 12)
    ]
    told = auc_interval(*checks.distinguished(*small_words))
    assert (told.value, told.low > 0.6) == (1.0, True)


def test_a_field_in_clear_beside_the_masks_is_a_violation(masked: View):
    answers = list(checks.masked_answers(masked))
    assert Checks(seeds=1).count(answers)["clear"] == 0
    spoilt = [checks._with(answers[0], fields=("loss",)), *answers[1:]]
    assert Checks(seeds=1).count(spoilt)["clear"] == 1
    assert Checks(seeds=1).count(spoilt)["fields"] == 1
