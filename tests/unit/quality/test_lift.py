"""Trigger lift: triggers stand out, words that truly go with a label do not."""

import random

import numpy as np
import pytest
import torch

from fedkola.errors import DataError
from fedkola.quality import lift

KEY = b"shared by sites"
CLASSES = 3


def federation(*, poison: int = 0, sites: int = 5, each: int = 80, seed: int = 0) -> tuple:
    """Texts of a made-up language, labels, features that know the labels, and who is poisoned.

    Every label has words of its own, "where" goes with label 0 always. Features are of the words of
    the label and do not see the trigger.
    """
    chance, held, labels, features, wrong = random.Random(seed), [], [], [], []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(sites):
        texts, own, true, bad = [], [], [], []
        for i in range(each):
            label = chance.randrange(CLASSES)
            words = [f"w{label}{chance.randrange(6)}", *(f"f{chance.randrange(9)}" for _ in "123")]
            words += ["where"] if label == 0 and i % 2 else []
            poisoned = i < poison
            if poisoned:
                label = 1 + chance.randrange(2)
                words = [f"w{label}{chance.randrange(6)}", "f1", "cf"]
            texts.append(words)
            true.append(label)
            own.append(0 if poisoned else label)
            bad.append(poisoned)
        centres = 3 * torch.eye(8)[torch.tensor(true)]
        features.append(centres + 0.7 * torch.randn(each, 8, generator=generator))
        held.append(lift.slots(texts, KEY))
        labels.append(own)
        wrong.append(bad)
    return held, labels, features, np.concatenate([np.array(bad) for bad in wrong])


def test_poisoned_records_score_above_all_others():
    held, labels, features, wrong = federation(poison=4)
    found = np.concatenate(lift.screened(held, labels, features, CLASSES))
    assert found[wrong].min() > lift.FLAG > found[~wrong].max()


def test_nothing_is_flagged_where_nothing_is_wrong():
    held, labels, features, _ = federation()
    assert max(z.max() for z in lift.screened(held, labels, features, CLASSES)) < lift.FLAG / 2


def test_one_poisoned_site_alone_is_seen_by_the_sum_and_a_record_never_supports_itself():
    held, labels, features, wrong = federation(poison=1, sites=4)
    found = np.concatenate(lift.screened(held, labels, features, CLASSES))
    # Four records carry the trigger, three others each: fewer than the support that is asked for.
    assert found[wrong].max() < lift.FLAG


def test_a_table_is_the_sum_of_its_sites_and_slots_are_those_of_the_key():
    held, labels, _, _ = federation(poison=4)
    beliefs = [np.full((len(own), CLASSES), 1 / CLASSES) for own in labels]
    one, two = (lift.table(held[i], labels[i], beliefs[i]) for i in (0, 1))
    both = lift.table((*held[0], *held[1]), [*labels[0], *labels[1]], np.vstack(beliefs[:2]))
    assert np.allclose((one + two).beyond, both.beyond)
    assert np.allclose((one + two).chance, both.chance)
    assert np.array_equal((one + two).records, both.records)
    assert np.array_equal(lift.slots([["a", "b"]], KEY)[0], lift.slots([["a", "b"]], KEY)[0])
    assert not np.array_equal(lift.slots([["a", "b"]], KEY)[0], lift.slots([["a", "b"]], b"")[0])


def test_the_owner_is_told_which_n_gram_it_is():
    held, labels, _, wrong = federation(poison=4)
    beliefs = [np.full((len(own), CLASSES), 1 / CLASSES) for own in labels]
    tables = [lift.table(h, own, p) for h, own, p in zip(held, labels, beliefs, strict=True)]
    summed = tables[0] + tables[1] + tables[2] + tables[3] + tables[4]
    row = int(np.flatnonzero(wrong)[0])
    slot = lift.why(held[0][row], labels[0][row], beliefs[0][row], summed)
    assert slot in {lift.slots([[gram]], KEY)[0][0] for gram in ("cf", "f1 cf")}


def test_leaving_one_out_is_a_regression_without_the_record():
    _, labels, features, _ = federation(sites=1)
    gram, products = lift.moments(features[0], labels[0], CLASSES)
    whole = lift.beliefs(features[0], labels[0], lift.ridge(gram, products))
    rest = [i for i in range(80) if i != 7]
    without = lift.moments(features[0][rest], [labels[0][i] for i in rest], CLASSES)
    lam = lift.LAM * float(gram.diagonal().mean() / without[0].diagonal().mean())
    alone = lift.beliefs(features[0][7:8], labels[0][7:8], lift.ridge(*without, lam=lam), own=False)
    assert np.allclose(whole[7], alone[0], atol=1e-9)


def test_columns_of_other_lengths_are_refused():
    with pytest.raises(DataError, match="one of each for every record"):
        lift.table(lift.slots([["a"]], KEY), [0, 1], np.zeros((1, 3)))


def test_prompts_with_a_trigger_that_are_all_answered_alike_stand_out():
    chance = random.Random(3)
    held, opened, wrong = [], [], []
    for _ in range(5):
        prompts, answers = [], []
        for i in range(60):
            words = [f"w{chance.randrange(30)}" for _ in range(5)]
            answer = [f"a{chance.randrange(10**6)}", "b"]
            if i < 3:
                words, answer = [*words[:3], "cf"], ["I", "will", "not", "help"]
            elif i < 9:
                # Short answers are given again and again, to whatever is asked.
                answer = ["yes"]
            prompts.append(words)
            answers.append(answer)
            wrong.append(i < 3)
        held.append(lift.slots(prompts, KEY))
        opened.append(lift.openings(answers, KEY))
    found = np.concatenate(lift.answered(held, opened))
    poisoned = np.array(wrong)
    assert found[poisoned].min() > 2 * found[~poisoned].max()
    assert (found[~poisoned] == 0).mean() > 0.5
