"""The modules that run on every device, by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mpt_lightning import (
    CPT,
    Adapters,
    DePT,
    FineTuning,
    HardPrompt,
    MPTSource,
    MPTTarget,
    PEFTModule,
    PrefixTuning,
    PromptTuning,
)
from mpt_lightning.modules import PromptModule
from tests.gpu.conftest import ContextData, TinyData


@dataclass
class Case:
    """A module to run.

    Attributes:
        module: The class of the module.
        options: Its arguments; "{teachers}", "{source}" and "{folder}" stand for paths.
        full: Models with which it is trained, evaluated, resumed, loaded, used for inference and exported.
        brief: Models with which it is trained, resumed and loaded.
        data: Its DataModule.
        draws: Whether training steps draw random numbers, so that devices and resumed runs differ.
        kept: The number of index tensors that PEFT keeps on the device until they are used on another one.
    """

    module: type[PromptModule]
    options: dict[str, Any]
    full: tuple[str, ...] = ()
    brief: tuple[str, ...] = ()
    data: Callable[[], TinyData] = TinyData
    draws: bool = False
    kept: int = 0

    def make(self, backbone: str, **paths: str) -> PromptModule:
        options = {name: v.format(**paths) if isinstance(v, str) else v for name, v in self.options.items()}
        # The backbone's check runs on the device in the full cases.
        return self.module(backbone, max_new_tokens=2, backbone_check=bool(self.full), **options)


def film() -> TinyData:
    return TinyData(["film"])


def tuner(kind: str, draws: bool = False, kept: int = 0, **options: Any) -> Case:
    """Return the case of a PEFT type on Llama."""
    config = {"peft_type": kind, "target_modules": ["q_proj", "v_proj"], **options}
    return Case(PEFTModule, {"peft_config": config, "lr": 1e-4}, brief=("llama",), draws=draws, kept=kept)


def reparameterized(kind: str) -> Case:
    """Return the case of prompt tuning through a network or vocabulary weights."""
    return Case(PromptTuning, SHORT | {"reparameterization": kind, "lr": 1e-3}, brief=("llama",))


def context(full: tuple[str, ...] = (), brief: tuple[str, ...] = (), **options: Any) -> Case:
    """Return a case of CPT, with balls large enough for visible steps."""
    return Case(CPT, {"epsilon": 2.0, "template_epsilon": 1.0, "lr": 0.01} | options, full, brief, ContextData)


SHORT = {"prompt_length": 3}
LORA = {"peft_config": {"peft_type": "LORA", "r": 2}, "lr": 1e-5}
SOURCE = SHORT | {"teachers": "{teachers}", "hidden_positions": "all"}
CASES = {
    "prompt tuning": Case(PromptTuning, SHORT, ("t5", "llama", "gpt2")),
    "residual": reparameterized("residual"),
    "mlp": reparameterized("mlp"),
    "lstm": reparameterized("lstm"),
    "superposition": reparameterized("superposition"),
    "class words": Case(PromptTuning, SHORT | {"prompt_init": "labels"}, brief=("gpt2",), data=film),
    "source": Case(MPTSource, SOURCE, ("t5",), ("gpt2",)),
    "source, cached teachers": Case(MPTSource, SOURCE | {"teacher_cache": "{folder}"}, ("llama",)),
    "target": Case(MPTTarget, {"source": "{source}"}, ("gpt2",), ("t5",)),
    "cpt": context(("llama",), ("gpt2",)),
    "cpt, leave one out": context(brief=("llama",), leave_one_out=True),
    "cpt, prompt tuning": context(brief=("gpt2",), method="prompt_tuning"),
    "cpt, instruction": context(brief=("llama",), method="instruction"),
    "dept": Case(DePT, SHORT | {"rank": 2, "lr": 1e-3}, ("t5",), ("llama",)),
    "prefix tuning": Case(PrefixTuning, SHORT, ("llama",), ("gpt2",)),
    "prefix tuning, projected": Case(PrefixTuning, SHORT | {"projection": True}, brief=("llama",)),
    "fine-tuning": Case(FineTuning, {}, ("t5",), ("gpt2",)),
    "head": Case(FineTuning, {"train": "head"}, brief=("llama",)),
    "adapters": Case(Adapters, {"size": 2}, ("gpt2",), ("t5", "llama")),
    "lora": Case(PEFTModule, LORA, ("llama",), ("t5", "gpt2")),
    "adalora": tuner("ADALORA", init_r=4, target_r=2, tinit=0, tfinal=0, total_step=3),
    "ia3": Case(PEFTModule, {"peft_config": {"peft_type": "IA3"}, "lr": 1e-4}, brief=("t5",)),
    "pissa": tuner("LORA", r=2, init_lora_weights="pissa_niter_4"),
    "vera": tuner("VERA", r=4),
    "pvera": tuner("PVERA", draws=True, r=4),
    "shira": tuner("SHIRA", kept=2, r=2),
    "fourierft": tuner("FOURIERFT", n_frequency=10),
    "randlora": tuner("RANDLORA", r=4),
    "waveft": tuner("WAVEFT", n_frequency=10),
    "frod": tuner("FROD"),
    "c3a": tuner("C3A", block_size=8),
}
UNTRAINED = {
    "hard prompt": Case(HardPrompt, {}, ("t5",)),
    "in-context learning": context(("gpt2",), method="icl"),
}
FULL = [(name, kind) for name, case in CASES.items() for kind in case.full]
BRIEF = [(name, kind) for name, case in CASES.items() for kind in case.brief]
