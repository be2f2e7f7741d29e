"""The command line without a run: help, refusals, the doctor, and what is printed how."""

import errno
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from fedkola import __version__, cli, errors
from fedkola.cli import doctor, rounds, text
from fedkola.types import Report

COMMAND = Path(sys.executable).with_name("fedkola")


def ended(*words: str) -> int:
    """The exit code of the command line with these words."""
    with pytest.raises(SystemExit) as end:
        cli.main(list(words))
    return int(end.value.code or 0)


def report(**changes: object) -> Report:
    values: dict[str, object] = {
        "round": 2,
        "cohort": ("east", "north", "south"),
        "refused": {"east": "StepFailed"},
        "metrics": {"top1": 0.41234, "nodes": 33.0, "right/icd10cm/chapter-1": 7.0},
        "bytes_down": 2_000_000,
        "bytes_up": 1_500_000,
        "seconds": 31.04,
        "cpu_seconds": 60.0,
    }
    return Report(**{**values, **changes})  # type: ignore[arg-type]


def test_help_answers_without_importing_torch():
    program = (
        "import sys\nfrom fedkola.cli import main\n"
        "try: main(['run', '--help'])\nexcept SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'sqlalchemy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "fedkola run plan.toml --set cohort.size=8" in done.stdout


def test_every_verb_has_examples_that_name_it():
    group = get_command(cli.app)
    groups = ("bank", "bench", "model", "site")
    verbs = {f"fedkola {name}": verb for name, verb in group.commands.items() if name not in groups}
    for outer in groups:
        inner = group.commands[outer].commands
        verbs |= {f"fedkola {outer} {name}": verb for name, verb in inner.items()}
    assert len(verbs) == 31
    for name, verb in verbs.items():
        head, *lines = verb.epilog.split("\n\n")
        assert head == "Examples:"
        assert lines
        assert all(name in line for line in lines)


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]):
    assert ended("--version") == 0
    assert capsys.readouterr().out == f"fedkola {__version__}\n"


def test_a_wrong_command_line_exits_2(capsys: pytest.CaptureFixture[str]):
    assert ended("rnu", "plan.toml") == 2
    assert ended("bank", "forget", "runs/demo") == 2
    assert "--site" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.FedKolaError)
    ],
)
def test_every_error_ends_as_one_line_and_its_exit_code(
    error: type[errors.FedKolaError],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    broken = typer.Typer()

    @broken.command()
    def fail() -> None:
        raise error("3 was given; expected 4; add 1")

    monkeypatch.setattr(cli, "app", broken)
    assert ended() == error.exit_code
    assert capsys.readouterr().err == f"{error.__name__}: 3 was given; expected 4; add 1\n"


def test_a_disk_that_is_full_outside_the_ledger_is_named_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    broken = typer.Typer()

    @broken.command()
    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/r/report.html")

    monkeypatch.setattr(cli, "app", broken)
    assert ended() == 8
    said = capsys.readouterr().err
    assert said.startswith("LedgerError: runs/r/report.html cannot be written (No space left")


def test_a_defect_keeps_its_traceback_and_exits_1(tmp_path: Path):
    program = (
        "from fedkola.cli import doctor, main\n"
        "def broken(*_): raise ZeroDivisionError('a defect')\n"
        "doctor.EXAMINATIONS = (broken,)\nmain(['doctor'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.strip().endswith("ZeroDivisionError: a defect")


# --- doctor ---------------------------------------------------------------------------------------


@pytest.fixture
def cached_bytecode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)


@pytest.mark.usefixtures("cached_bytecode")
def test_the_doctor_finds_a_healthy_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        cli.main(["doctor", "--folder", str(tmp_path / "runs"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert end.value.code in (0, None)
    assert found["ok"] is True
    names = [check["name"] for check in found["checks"]]
    assert names == [
        "python",
        "bytecode",
        "torch",
        "arithmetic",
        "model",
        "codes",
        "disk",
        "write",
    ]
    assert list(tmp_path.iterdir()) == []


def test_the_doctor_says_what_to_do_and_exits_7(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(doctor, "EXAMINATIONS", (doctor.examine_python,))
    assert ended("doctor") == 7
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ok    python: 3.")
    assert lines[1].startswith("FAIL  bytecode: not cached")
    assert lines[1].endswith("; unset PYTHONDONTWRITEBYTECODE")


def test_the_doctor_finds_a_full_disk_and_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(doctor, "FREE_BYTES", 1 << 62)
    monkeypatch.setattr(tempfile, "tempdir", None)
    full, _ = doctor.examine_disk(tmp_path)
    assert "or use --folder" in full.todo
    _, unwritable = doctor.examine_disk(Path("/proc/self"))
    assert "no ledger can be written at /proc/self" in unwritable.found
    assert "run.folder" in unwritable.todo


def test_the_doctor_finds_another_model_than_the_packaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(doctor, "MINILM_HASH", "0" * 64)
    monkeypatch.setattr(doctor, "ICD_CODES", 5)
    model, codes = doctor.examine_data(tmp_path)
    assert model.found.endswith(", not 0000000000000000")
    assert codes.found == "ICD-10-CM with 46,881 entries, not 5"
    assert "pip install" in model.todo
    assert "pip install" in codes.todo


# --- what is printed ------------------------------------------------------------------------------


def test_a_round_is_one_line_with_its_refusals():
    assert rounds.as_line(report()) == (
        "round  2  3 asked 2 answered  31.0 s  top-1 0.412  known 33  refused: east (StepFailed)"
    )


def test_a_row_of_the_final_table_leaves_single_scopes_out():
    row = rounds.as_row(
        {"cohort": ["a", "b"], "refused": {}, "metrics": {"asked": 9, "asked/x": 4}}
    )
    assert row["asked"] == row["answered"] == "2"
    assert row["tested"] == "9"
    assert "asked/x" not in row


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (3, "3"),
        (3.0, "3"),
        (1.0, "1.000"),
        (0.41234, "0.412"),
        (12.3456, "12.35"),
        (math.inf, "inf"),
    ],
)
def test_numbers_are_short(value: float, shown: str):
    assert text.number(value) == shown


def test_nan_is_a_number_too():
    assert text.number(math.nan) == "nan"


def test_json_output_is_json_even_where_numbers_are_not(capsys: pytest.CaptureFixture[str]):
    text.print_json({"loss": math.nan, "rows": ({"top": math.inf}, 2)})
    assert json.loads(capsys.readouterr().out) == {"loss": None, "rows": [{"top": None}, 2]}


def test_without_a_terminal_progress_draws_nothing(capsys: pytest.CaptureFixture[str]):
    with rounds.drawn("demo", 8) as (note, progress):
        note("reading")
        progress(report())
    assert capsys.readouterr() == ("", "")


def test_control_c_before_anything_is_saved_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(typer.Exit) as end, rounds.resumable(tmp_path, "fedkola run --resume r"):
        raise KeyboardInterrupt
    assert end.value.exit_code == 130
    assert "give the same command again" in capsys.readouterr().err
