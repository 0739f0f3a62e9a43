"""Running what has no result yet, in processes that are reused."""

import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from mpt_lightning.compare.plan import Comparison, Run
from mpt_lightning.compare.results import Result, Store, failure
from mpt_lightning.compare.worker import Outcome, start, work

DIED = "its process died: out of memory, or ended from outside; with fewer --jobs each has more memory."


def default_jobs() -> int:
    """Give one job where there is a GPU, else one per core, at most 8."""
    return 1 if torch.accelerator.is_available() else min(os.cpu_count() or 1, 8)


def pending(comparison: Comparison, store: Store) -> list[Run]:
    """Give the runs without a result, with those they start from, in an order that works.

    A run that failed, or whose arguments have changed since, has none.
    """
    compared = [run for run in comparison.runs() if not _done(store, run)]
    needed: dict[str, Run] = {}
    for run in compared:
        needed |= {need.place: need for need in _needs(run) if not _done(store, need)}
    return [*(run for run in comparison.prepared_runs() if run.place in needed), *compared]


def _needs(run: Run) -> Iterator[Run]:
    for need in run.needs:
        yield from _needs(need)
        yield need


def _done(store: Store, run: Run) -> bool:
    result = store.read(run)
    return result is not None and result.status == "done"


def run_all(comparison: Comparison, store: Store, runs: Iterable[Run], jobs: int, console: Console) -> None:
    """Run, and write each result as it comes.

    Args:
        comparison: what the runs are of.
        store: where results go.
        runs: see `pending`.
        jobs: processes, at least 1.
        console: for the progress bar.
    """
    runner = Runner(comparison, store, jobs)
    bar = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console,
    )  # fmt: skip
    waiting = list(runs)
    with store.alone(), bar, runner.processes():
        progress = bar.add_task("runs", total=len(waiting))
        for run, result in runner.results(waiting):
            store.write(run, result)
            if result.error:
                console.print(f"{run.place} failed: {result.error}", markup=False, highlight=False)
            bar.update(progress, advance=1, description=", ".join(run.place for run in runner.running.values()))


class Runner:
    """Runs in a pool of processes, each when what it starts from is there.

    Args:
        comparison: what the runs are of.
        store: where results and the runs' folders are.
        jobs: processes, at least 1.
    """

    def __init__(self, comparison: Comparison, store: Store, jobs: int) -> None:
        self.comparison, self.store, self.jobs = comparison, store, jobs
        self.running: dict[Future[Outcome], Run] = {}
        self._failed: dict[str, str] = {}
        self._pool = self._new_pool()

    def _new_pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self.jobs, multiprocessing.get_context("spawn"), initializer=start)

    @contextmanager
    def processes(self) -> Iterator[None]:
        """End the processes, at once where the runs are interrupted."""
        others = set(multiprocessing.active_children())
        try:
            yield
        except BaseException:
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
            raise
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def results(self, waiting: list[Run]) -> Iterator[tuple[Run, Result]]:
        """Give the results as they come; those of prepared runs before those of runs that start from them."""
        while waiting or self.running:
            for run in [run for run in waiting if self._failed_need(run)]:
                waiting.remove(run)
                yield self._finish(run, failure(run, str(self._failed_need(run))))
            # No more than there are processes: when one dies, these are the ones that it can have had.
            for run in [run for run in waiting if self._is_ready(run)][: self.jobs - len(self.running)]:
                waiting.remove(run)
                self._submit(run)
            if waiting and not self.running:
                run = waiting.pop(0)
                names = ", ".join(need.name for need in run.needs)
                yield self._finish(run, failure(run, f"the checkpoint that it starts from is gone: {names}."))
                continue
            finished, _ = wait(self.running, return_when=FIRST_COMPLETED)
            for future in finished:
                run = self.running.pop(future)
                yield self._finish(run, self._result(run, future))

    def _finish(self, run: Run, result: Result) -> tuple[Run, Result]:
        if result.error and run.task is None:
            self._failed[run.place] = result.error
        return run, result

    def _failed_need(self, run: Run) -> str | None:
        found = [f"{need.name}, which it starts from, failed: {self._failed[need.place]}"
                 for need in run.needs if need.place in self._failed]  # fmt: skip
        return found[0] if found else None

    def _is_ready(self, run: Run) -> bool:
        return all(_done(self.store, need) for need in run.needs)

    def _submit(self, run: Run) -> None:
        found = {need.name: self.store.read(need) for need in run.needs}
        words = run.arguments({name: str(result.checkpoint) for name, result in found.items() if result is not None})
        compared = run.task is not None
        arguments = (words, self.store.work(run), run.fit, compared, self.comparison.keep_checkpoints or not compared)
        try:
            future = self._pool.submit(work, *arguments)
        except BrokenProcessPool:
            self._pool = self._new_pool()
            future = self._pool.submit(work, *arguments)
        self.running[future] = run

    def _result(self, run: Run, future: Future[Outcome]) -> Result:
        try:
            outcome = future.result()
        except BrokenProcessPool:
            return failure(run, DIED)
        if outcome.error:
            return failure(run, outcome.error, outcome.commands, outcome.seconds)
        metric = self.comparison.metric.replace("$task", run.task or "")
        if run.task is not None and metric not in outcome.metrics:
            known = ", ".join(outcome.metrics)
            return failure(
                run, f"there is no test metric {metric!r}; set `metric` to one of {known}.", outcome.commands
            )
        return Result(
            run.method, run.task, run.k, run.seed, "done", run.fingerprint, outcome.commands, None, metric,
            outcome.metrics.get(metric), outcome.metrics, outcome.trained_parameters, outcome.checkpoint_bytes,
            outcome.steps, outcome.seconds_per_step, outcome.peak_memory_bytes, round(outcome.seconds, 2),
            outcome.checkpoint,
        )  # fmt: skip
