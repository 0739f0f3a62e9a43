"""Run a comparison's runs that have no result yet."""

import os
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool

import torch
from rich.console import Console

from mpt_lightning.compare.plan import Comparison, Run
from mpt_lightning.compare.pool import WorkerPool, progress_bar
from mpt_lightning.compare.results import Outcome, Result, Store
from mpt_lightning.compare.worker import work

DIED = "the process of this run died: out of memory, or killed. With fewer --jobs, each has more memory."


def run_all(comparison: Comparison, store: Store, console: Console, jobs: int | None = None) -> None:
    """Run what has no result in `jobs` processes, and write each result as soon as it is known."""
    waiting, running = _pending(comparison, store), dict[Future[Outcome], Run]()
    if not waiting:
        return
    jobs = jobs or (1 if torch.accelerator.is_available() else min(os.cpu_count() or 1, 8))
    with store.locked(), progress_bar(console) as bar, WorkerPool(jobs) as pool:
        progress = bar.add_task("runs", total=len(waiting))
        while waiting or running:
            unfinished = [*waiting, *running.values()]
            ready = [run for run in waiting if not any(need in unfinished for need in run.needs)]
            # No more than there are processes: if one dies, all these runs fail.
            for run in ready[: jobs - len(running)]:
                waiting.remove(run)
                running[_submit(comparison, store, run, pool)] = run
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                result = _result(comparison, run, future)
                store.write(run, result)
                if result.error:
                    console.print(f"{run.place} failed: {result.error}", markup=False, highlight=False)
                bar.update(progress, advance=1, description=", ".join(run.place for run in running.values()))


def _pending(comparison: Comparison, store: Store) -> list[Run]:
    """Return the runs that have no result, failed or have changed, after the prepared runs that they need."""
    runs = [run for run in comparison.runs() if store.read(run).status != "done"]
    for prepared in reversed(comparison.prepared_runs()):
        if store.read(prepared).status != "done" and any(prepared in run.needs for run in runs):
            runs.insert(0, prepared)
    return runs


def _submit(comparison: Comparison, store: Store, run: Run, pool: WorkerPool) -> Future[Outcome]:
    checkpoints: dict[str, str] = {}
    for need in run.needs:
        result = store.read(need)
        if result.status != "done":
            reason = result.error or "its checkpoint was removed."
            failed = Future[Outcome]()
            failed.set_result(Outcome(error=f"{need.name}, which it starts from, failed: {reason}"))
            return failed
        checkpoints[need.name] = str(result.checkpoint)
    compared = run.task is not None
    keep = comparison.keep_checkpoints or not compared
    folder = store.output / "runs" / run.place
    test = compared and comparison.tests
    return pool.submit(work, run.arguments(checkpoints), folder, fit=run.fit, test=test, keep=keep)


def _result(comparison: Comparison, run: Run, future: Future[Outcome]) -> Result:
    try:
        outcome = future.result()
    except BrokenProcessPool:
        outcome = Outcome(error=DIED)
    metric = comparison.metric.replace("$task", run.task or "")
    if run.task is not None and not outcome.error and metric not in outcome.metrics:
        known = ", ".join(outcome.metrics)
        outcome.error = f"there is no metric {metric!r}; set `metric` to one of {known}."
    return Result.of(run, outcome, metric)
