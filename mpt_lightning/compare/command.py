"""`mpt compare`."""

from argparse import Namespace
from pathlib import Path

from rich.console import Console

from mpt_lightning.compare.plan import read_comparison
from mpt_lightning.compare.report import Report
from mpt_lightning.compare.results import Store
from mpt_lightning.errors import MPTError


def compare(options: Namespace) -> bool:
    """Run what has no result yet, report, and return whether all runs succeeded; see `mpt compare --help`."""
    if options.jobs is not None and options.jobs < 1:
        raise MPTError(f"--jobs must be at least 1, got {options.jobs}.")
    comparison, console = read_comparison(options.file), Console()
    if not console.is_terminal:
        console = Console(width=200)  # a file has no window that the lines must fit
    output = Path(options.output or f"runs/compare/{comparison.name}")
    if options.report and not output.is_dir():
        raise MPTError(f"There are no results in {output}; run the comparison without --report, or set --output.")
    store = Store(output, comparison.name)
    if not options.report:
        # Imported here, since torch takes seconds and a report does not need it.
        from mpt_lightning.compare.run import run_all

        run_all(comparison, store, console, options.jobs)
    report = Report(comparison, store)
    report.print(console)
    console.print(f"wrote {', '.join(map(str, report.write(output)))}", highlight=False)
    return not report.failures
