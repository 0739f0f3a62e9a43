"""Run a comparison's runs that have no result yet."""

import os
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool

import torch
from rich.console import Console

from mpt_lightning.compare.plan import Comparison
from mpt_lightning.compare.pool import WorkerPool, progress_bar
from mpt_lightning.compare.results import Outcome, Result, Store
from mpt_lightning.compare.runs import Run
from mpt_lightning.compare.search import best_trial
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
            unfinished = {run.place for run in (*waiting, *running.values())}
            ready = [run for run in waiting if unfinished.isdisjoint(n.place for n in (*run.needs, *run.searches))]
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
                elif not console.is_terminal:  # the bar is drawn in a terminal alone
                    console.print(f"{run.place} done in {result.seconds:.0f} s", markup=False, highlight=False)
                bar.update(progress, advance=1, description=", ".join(run.place for run in running.values()))


def _pending(comparison: Comparison, store: Store) -> list[Run]:
    """Return the runs that have no result, failed or have changed, each after the runs that it needs."""
    pending: dict[str, Run] = {}

    def add(run: Run) -> None:
        if run.place not in pending and store.read(run).status != "done":
            for need in (*run.needs, *run.searches):
                add(need)
            pending[run.place] = run

    for run in comparison.runs():
        add(run)
    # Prepared runs first: others wait for them. Then searches.
    return sorted(pending.values(), key=lambda run: (run.task is not None, run.test))


def _submit(comparison: Comparison, store: Store, run: Run, pool: WorkerPool) -> Future[Outcome]:
    needs = {need.place: store.read(need) for need in (*run.needs, *run.searches)}
    for place, result in needs.items():
        if result.status != "done":
            reason = result.error or "its checkpoint was removed."
            failed = Future[Outcome]()
            failed.set_result(Outcome(error=f"{place}, which it needs, failed: {reason}"))
            return failed
    checkpoints = {need.prepared_name: str(needs[need.place].checkpoint) for need in run.needs}
    trials = list(run.trials)
    if run.searches:
        trials = [trials[best_trial([needs[search.place].trials for search in run.searches])]]
    keep = run.task is None or (run.test and comparison.keep_checkpoints)
    folder = store.output / "runs" / run.place
    words = run.arguments(checkpoints)
    return pool.submit(work, words, folder, trials, fit=run.fit, test=run.test, select=run.select, keep=keep)


def _result(comparison: Comparison, run: Run, future: Future[Outcome]) -> Result:
    try:
        outcome = future.result()
    except BrokenProcessPool:
        outcome = Outcome(error=DIED)
    metric = comparison.metric.replace("$task", run.task or "")
    if run.test and not outcome.error and metric not in outcome.metrics:
        known = ", ".join(outcome.metrics)
        outcome.error = f"there is no test metric {metric!r}; set `metric` to one of {known}."
    return Result.of(run, outcome, metric)
