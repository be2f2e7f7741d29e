from collections import Counter

from fedkola.knowledge.availability import cohort, online

ROSTER = ("north", "east", "south", "west")


def asked(round: int, **changes: object) -> tuple[str, ...]:
    settings = {"size": 0, "seed": 7, "late": {}, "left": {}, **changes}
    return cohort(ROSTER, round=round, **settings)


def test_a_late_site_answers_from_its_round_on():
    late = {"east": 3}

    assert [online(late, "east", number) for number in (1, 2, 3, 4)] == [False, False, True, True]
    assert online(late, "north", 1)


def test_a_site_that_leaves_is_asked_up_to_its_last_round():
    left = {"south": 2}

    assert asked(2, left=left) == ROSTER
    assert asked(3, left=left) == ("north", "east", "west")


def test_everybody_there_is_asked_in_the_order_of_the_roster():
    assert asked(1, late={"north": 2}) == ("east", "south", "west")
    assert asked(1, size=9) == ROSTER


def test_a_sample_depends_on_seed_and_round_alone():
    samples = [asked(number, size=2) for number in range(1, 41)]

    assert samples == [asked(number, size=2) for number in range(1, 41)]
    assert all(len(sample) == 2 for sample in samples)
    assert samples != [asked(number, size=2, seed=8) for number in range(1, 41)]
    assert min(Counter(site for sample in samples for site in sample).values()) > 8


def test_a_sample_is_drawn_from_sites_that_are_there():
    assert asked(1, size=2, late={"north": 5}, left={"west": 0}) == ("east", "south")


def test_nobody_there_is_an_empty_cohort():
    assert asked(1, late=dict.fromkeys(ROSTER, 2)) == ()
