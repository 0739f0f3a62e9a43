"""Results as files in the format of PEFT's method comparison, whose dashboard then shows them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mpt_lightning.compare.plan import k_name
from mpt_lightning.compare.results import Result
from mpt_lightning.errors import MPTError
from mpt_lightning.io import write_file


def write_peft_results(results: Iterable[Result], folder: Path) -> list[Path]:
    """Write a file for each run that is done, and return their paths.

    The dashboard of PEFT 0.21 reads them from `method_comparison/MetaMathQA/results`: each run is an experiment, its
    score the test accuracy, and its file that of the trained tensors.
    """
    files = []
    for result in results:
        if result.status == "done":
            content = peft_result(result)
            name = content["run_info"]["experiment_name"].replace("/", "--")
            files.append(folder / f"{name}.json")
            write_file(files[-1], json.dumps(content, indent=2) + "\n")
    return files


def peft_result(result: Result) -> dict[str, Any]:
    """Return a run as PEFT's comparison describes its runs.

    The mean and the 99th percentile of the memory are not measured: the peak stands for them.
    """
    name = f"{result.method}/{str(result.task).replace('/', '-')}-k{k_name(result.k)}-seed{result.seed}"
    environment = result.environment
    if not environment:
        raise MPTError(f"The result of {name} has no record of its model; delete it, and run the comparison again.")
    versions, kind = environment["versions"], environment["peft_type"]
    memory = result.peak_memory_bytes or 0
    package_info = {f"{package.replace('_', '-')}-version": number for package, number in versions.items()}
    arguments = {"commands": result.commands, "chosen": result.chosen}
    return {
        "run_info": {
            "created_at": environment["created"],
            "total_time": result.seconds,
            "experiment_name": name,
            "peft_branch": f"mpt_lightning {versions['mpt_lightning']}",
            "train_config": {
                "model_id": environment["backbone"], "max_steps": result.steps, "seed": result.seed,
                "task": result.task, "k": result.k, "metric": result.metric, **arguments,
            },
            "peft_config": kind and {"peft_type": kind, "base_model_name_or_path": environment["backbone"]},
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": memory,
            "accelerator_memory_max": memory,
            "accelerator_memory_reserved_99th": memory,
            "train_time": result.train_seconds,
            "file_size": result.checkpoint_bytes,
            "num_trainable_params": result.trained_parameters,
            "num_total_params": environment["parameters"],
            "status": "success",
            "metrics": [
                {
                    "step": result.steps, "test accuracy": result.value, "train loss": result.train_loss,
                    "train samples": result.train_rows, "train total tokens": result.train_tokens, "forgetting": None,
                }
            ],
        },
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": {},
            "package_info": {"bitsandbytes-version": "not used", **package_info},
            "system_info": environment["system"],
            "pytorch_info": f"PyTorch {versions['torch']}",
        },
    }  # fmt: skip
