import glob
import json
from math import inf
from pathlib import Path

import pytest

from fedkola.errors import Incompatible, PlanError, UnknownKey
from fedkola.plan import (
    Cohort,
    Knowledge,
    Plan,
    Scenario,
    Task,
    as_dict,
    digest,
    dump,
    from_dict,
    load,
    override,
    parse,
)


def test_an_empty_text_is_the_default_plan():
    assert parse("") == Plan()


def test_the_default_plan_reads_back_from_its_own_text():
    assert parse(dump(Plan())) == Plan()


def test_defaults_are_those_of_the_demo():
    plan = Plan()
    assert (plan.run.seed, plan.run.rounds, plan.run.folder) == (7, 0, "runs")
    assert (plan.model.name, plan.task.name, plan.algorithm.name) == (
        "minilm",
        "icd10cm",
        "fedkola",
    )
    assert (plan.task.sites, plan.task.windows, plan.cohort.minimum) == (12, 8, 3)
    assert (plan.knowledge.features, plan.knowledge.bits) == (4096, 4)
    assert plan.knowledge.lanes == ("analytic", "router")
    assert plan.knowledge.half_life is None
    assert plan.privacy.epsilon == inf


def test_a_plan_of_every_kind_of_value_is_read():
    plan = parse("""
        [task]
        name = "files"
        labels = ["a", "b"]
        unlabelled = true
        overlap = 0
        [scenario]
        noisy = {north = 0.3, "st. mary" = 1}
        [scenario.late]
        east = 4
        [knowledge]
        half_life = 2.5
        [privacy]
        epsilon = inf
    """)
    assert plan.task.labels == ("a", "b")
    assert plan.task.unlabelled is True
    assert plan.task.overlap == 0.0
    assert isinstance(plan.task.overlap, float)
    assert plan.scenario == Scenario(noisy={"north": 0.3, "st. mary": 1.0}, late={"east": 4})
    assert plan.knowledge.half_life == 2.5
    assert plan.privacy.epsilon == inf


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[privacy]\nepsilno = 3", "unknown key privacy.epsilno; nearest is privacy.epsilon"),
        ("[cohort]\nsizes = 3", "unknown key cohort.sizes; nearest is cohort.size"),
        ("[model]\nrank = 3", "unknown key model.rank; nearest is algorithm.rank"),
        ("[privcy]\nepsilon = 3", "unknown section privcy; nearest is privacy"),
        ("epsilon = 3", "unknown key epsilon; nearest is privacy.epsilon"),
    ],
)
def test_an_unknown_key_names_the_nearest(text: str, message: str):
    with pytest.raises(UnknownKey) as error:
        parse(text)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("text", "given", "expected"),
    [
        ("[cohort]\nsize = '8'", "'8' (str)", "a whole number"),
        ("[cohort]\nsize = 8.0", "8.0 (float)", "a whole number"),
        ("[cohort]\nsize = true", "True (bool)", "a whole number"),
        ("[algorithm]\nlr = 'fast'", "'fast' (str)", "a number"),
        ("[algorithm]\nlr = false", "False (bool)", "a number"),
        ("[privacy]\nsecure_sum = 1", "1 (int)", "true or false"),
        ("[run]\nname = 7", "7 (int)", "text in quotes"),
        ("[run]\nname = 2026-11-22", "datetime", "text in quotes"),
        ("[knowledge]\nlanes = 'router'", "'router' (str)", "a list of texts"),
        ("[knowledge]\nlanes = [1]", "1 (int)", "text in quotes"),
        ("[knowledge]\nhalf_life = []", "[] (list)", "a number"),
        ("[scenario]\nnoisy = 0.3", "0.3 (float)", "a table"),
        ("[scenario]\nlate = {north = 0.5}", "0.5 (float)", "a whole number"),
        ("privacy = 3", "3", "a section [privacy]"),
        ("run = []", "[]", "a section [run]"),
    ],
)
def test_a_wrong_type_says_what_was_given_and_what_was_expected(
    text: str, given: str, expected: str
):
    with pytest.raises(PlanError) as error:
        parse(text)
    assert given in str(error.value)
    assert f"expected {expected}" in str(error.value)


@pytest.mark.parametrize(
    "setting",
    [
        "run.rounds=-1",
        "run.seed=9223372036854775808",
        "run.name=../elsewhere",
        "run.name=",
        "model.max_tokens=0",
        "task.sites=0",
        "task.overlap=1.5",
        "task.test_share=-0.1",
        "task.partition=dirichlet:0",
        "task.partition=by-size",
        "task.encoding=utf-9",
        "scenario.noisy.north=1.01",
        "scenario.late.north=0",
        "cohort.minimum=0",
        "algorithm.lr=0",
        "algorithm.lr=inf",
        "algorithm.lr=nan",
        "knowledge.bits=0",
        "knowledge.half_life=0",
        "knowledge.coverage_min=nan",
        "privacy.epsilon=0",
        "privacy.epsilon=nan",
        "privacy.delta=2",
    ],
)
def test_a_value_out_of_range_is_refused_with_its_key(setting: str):
    with pytest.raises(PlanError) as error:
        override(Plan(), [setting])
    assert str(error.value).startswith(setting.partition("=")[0] + " was given")
    assert "expected" in str(error.value)


def test_a_plan_built_in_code_is_checked_too():
    with pytest.raises(PlanError, match=r"knowledge\.top_k was given 0"):
        Plan(knowledge=Knowledge(top_k=0))


def test_a_cohort_smaller_than_its_minimum_cannot_hold():
    with pytest.raises(Incompatible, match=r"cohort\.size 2 is below cohort\.minimum 3"):
        Plan(cohort=Cohort(size=2))
    assert Plan(cohort=Cohort(size=0)).cohort.minimum == 3


def test_settings_replace_single_values_and_text_needs_no_quotes():
    plan = override(
        Plan(),
        [
            "cohort.size=8",
            "algorithm.lr=1e-4",
            "model.name=models/my model",
            'task.text="finding"',
            "privacy.secure_sum=true",
            "privacy.epsilon=3",
            "task.label=7",
            "run.name = spring",
        ],
    )
    assert plan.cohort.size == 8
    assert plan.algorithm.lr == 1e-4
    assert plan.model.name == "models/my model"
    assert plan.task.text == "finding"
    assert plan.privacy.secure_sum is True
    assert plan.privacy.epsilon == 3.0
    assert plan.task.label == "7"
    assert plan.run.name == "spring"


def test_a_setting_holds_an_equals_sign_in_its_value():
    assert override(Plan(), ["task.label=a=b"]).task.label == "a=b"


def test_lists_are_set_as_toml_or_with_commas():
    for value in ('["analytic", "lora"]', "analytic,lora", "analytic, lora"):
        assert override(Plan(), [f"knowledge.lanes={value}"]).knowledge.lanes == (
            "analytic",
            "lora",
        )
    assert override(Plan(), ["knowledge.lanes=router"]).knowledge.lanes == ("router",)
    assert override(Plan(), ["task.labels="]).task.labels == ()


def test_maps_are_set_whole_or_entry_by_entry():
    plan = override(
        Plan(),
        ["scenario.noisy={north = 0.3}", "scenario.noisy.south=0.1", "scenario.late.east=4"],
    )
    assert plan.scenario.noisy == {"north": 0.3, "south": 0.1}
    assert plan.scenario.late == {"east": 4}
    assert override(plan, ["scenario.noisy={}"]).scenario.noisy == {}


def test_a_site_with_dots_in_its_name_can_be_set():
    assert override(Plan(), ['scenario.noisy."st. mary"=0.2']).scenario.noisy == {"st. mary": 0.2}
    assert override(Plan(), ["scenario.noisy.site.1=0.2"]).scenario.noisy == {"site.1": 0.2}


def test_none_takes_an_optional_value_away():
    aged = override(Plan(), ["knowledge.half_life=3"])
    assert aged.knowledge.half_life == 3.0
    assert override(aged, ["knowledge.half_life=none"]) == Plan()


def test_settings_are_checked_together_after_the_last():
    plan = override(Plan(), ["cohort.size=2", "cohort.minimum=2"])
    assert plan.cohort == Cohort(size=2, minimum=2)


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        (
            "privacy.epsilno=3",
            UnknownKey,
            "unknown key privacy.epsilno; nearest is privacy.epsilon",
        ),
        ("epsilon=3", UnknownKey, "unknown key epsilon; nearest is privacy.epsilon"),
        ("run.seed.a=3", UnknownKey, "unknown key run.seed.a; nearest is run.seed"),
        ("cohort.size", PlanError, "expected section.key=value, such as cohort.size=8"),
        ("", PlanError, "expected section.key=value"),
        ("cohort.size=eight", PlanError, "cohort.size was given 'eight' (str)"),
        ("cohort.size=8\nminimum=1", PlanError, "cohort.size was given"),
        ("scenario.noisy=north", PlanError, "expected a table"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(
    setting: str, error: type[PlanError], message: str
):
    with pytest.raises(error) as raised:
        override(Plan(), [setting])
    assert message in str(raised.value)


def test_files_of_the_task_are_found_beside_the_plan(tmp_path: Path):
    home = tmp_path / "study"
    (home / "model").mkdir(parents=True)
    file = home / "plan.toml"
    file.write_text(
        '[task]\nname = "files"\ntrain = "sites/*.csv"\ntest = "../test.csv"\n'
        '[model]\nname = "model"\n'
    )
    plan = load(file)
    assert plan.task.train == str(home / "sites" / "*.csv")
    assert plan.task.test == str(tmp_path / "test.csv")
    assert plan.model.name == str(home / "model")


def test_absolute_files_and_names_that_are_no_folder_stay(tmp_path: Path):
    file = tmp_path / "plan.toml"
    train = str(tmp_path / "elsewhere" / "train.csv")
    file.write_text(f"[task]\ntrain = {train!r}\n[model]\nname = 'org/some-model'\n")
    plan = load(file)
    assert plan.task.train == train
    assert plan.task.test == ""
    assert plan.model.name == "org/some-model"


def test_a_pattern_beside_a_plan_in_a_folder_with_brackets_still_finds_its_files(tmp_path: Path):
    home = tmp_path / "study [2]"
    home.mkdir()
    (home / "north.csv").write_text("text,label\n")
    (home / "plan.toml").write_text('[task]\ntrain = "*.csv"\n')
    assert glob.glob(load(home / "plan.toml").task.train) == [str(home / "north.csv")]


def test_a_plan_with_a_byte_order_mark_is_read(tmp_path: Path):
    file = tmp_path / "plan.toml"
    file.write_bytes(b"\xef\xbb\xbf[cohort]\r\nsize = 8\r\n")
    assert load(file).cohort.size == 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"\xff\xfe[", "is not UTF-8"),
        (b"[cohort", "is not TOML"),
        (b"[cohort]\nsize = 1\nsize = 2", "is not TOML"),
    ],
)
def test_a_file_that_is_no_plan_is_named(tmp_path: Path, content: bytes | None, message: str):
    file = tmp_path / "plan.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(PlanError) as error:
        load(file)
    assert str(file) in str(error.value)
    assert message in str(error.value)


def test_an_unknown_key_in_a_file_stays_an_unknown_key(tmp_path: Path):
    file = tmp_path / "plan.toml"
    file.write_text("[cohort]\nsizes = 3")
    with pytest.raises(UnknownKey, match=r"plan\.toml: unknown key cohort\.sizes"):
        load(file)


def test_the_digest_names_the_content_and_not_the_writing():
    assert digest(parse("[cohort]\nsize = 0")) == digest(Plan())
    assert digest(parse("[privacy]\nepsilon = 3")) == digest(parse("[privacy]\nepsilon = 3.0"))
    assert digest(override(Plan(), ["run.seed=8"])) != digest(Plan())
    one = Plan(scenario=Scenario(late={"a": 1, "b": 2}))
    other = Plan(scenario=Scenario(late={"b": 2, "a": 1}))
    assert digest(one) == digest(other)


def test_the_document_is_json_without_infinity():
    doc = as_dict(Plan(task=Task(labels=("a",))))
    assert doc["privacy"]["epsilon"] == "inf"
    assert from_dict(json.loads(json.dumps(doc, allow_nan=False))) == Plan(task=Task(labels=("a",)))


def test_text_that_utf_8_cannot_write_is_refused():
    with pytest.raises(PlanError, match="text that UTF-8 can write"):
        override(Plan(), ["task.text=\udcff"])


def test_scenarios_of_every_kind_compose_in_one_plan():
    plan = parse("""
        [task]
        period = "quarter"
        [scenario]
        availability = "markov"
        absent = 0.25
        spell = 2
        release = {north = 0, south = 2}
        access = {north = ["a", "b"], south = []}
    """)
    assert (plan.scenario.availability, plan.scenario.spell) == ("markov", 2.0)
    assert plan.scenario.access == {"north": ("a", "b"), "south": ()}
    assert override(plan, ["scenario.access.north=c,d"]).scenario.access["north"] == ("c", "d")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[scenario]\navailability = 'sometimes'", "full, bernoulli, markov, diurnal"),
        ("[task]\nperiod = 'month'", "year, quarter"),
        ("[scenario]\navailability = 'markov'\nabsent = 0.8\nspell = 3", "spell 4 or more"),
        ("[scenario]\navailability = 'markov'\nabsent = 1", "no length at all"),
    ],
)
def test_an_availability_that_cannot_be_is_refused(text: str, message: str):
    with pytest.raises(PlanError, match=message):
        parse(text)
