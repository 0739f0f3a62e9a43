"""Run comparisons of this folder on one model, and write their reports.

    python benchmarks/english/run.py few.yaml --backbone FOLDER_OR_HUB_ID --data-root DATA

The same command resumes after an interruption. Each file can be run by `mpt compare` as well, if it names a backbone and
`derive.py` can be imported.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mpt_lightning.compare.plan import Comparison, read_comparison
from mpt_lightning.compare.report import Report
from mpt_lightning.compare.results import Store
from mpt_lightning.compare.run import run_all

HERE = Path(__file__).parent
# glibc returns large blocks to the system, and half of a step on a CPU is then spent on getting them back.
MEMORY = dict.fromkeys(["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"], str(2**32))


def read(file: Path, backbone: str, data_root: str | None) -> Comparison:
    """Read a comparison, with the model and the data of all its runs."""
    comparison = read_comparison(str(file))
    shared: dict[str, Any] = {"model.backbone": backbone, "data.data_root": data_root}
    for part in (comparison, *comparison.prepare.values()):
        part.arguments = shared | part.arguments
    return comparison


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="comparisons, in this folder or as paths")
    parser.add_argument("--backbone", required=True, help="Hub id or folder of the masked model")
    parser.add_argument("--data-root", help="folder that replaces the Hub (default: the Hub)")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/english"), help="folder of the runs")
    args = parser.parse_args(arguments)
    os.environ |= MEMORY
    console = Console(width=120)
    for name in args.files:
        file = name if name.exists() else HERE / name
        comparison = read(file, args.backbone, args.data_root)
        store = Store(args.output / file.stem, file.stem)
        run_all(comparison, store, console, args.jobs)
        report = Report(comparison, store)
        console.print(report.markdown(), markup=False)


if __name__ == "__main__":
    main()
