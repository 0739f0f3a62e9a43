"""PEFT's configs as plain values, and back."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from enum import Enum
from importlib import import_module
from typing import Any

import peft
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig, PeftType, PromptLearningConfig

from mpt_lightning.errors import MPTError

# The class of this package that does what a PEFT type does with prompts.
OURS = {
    "PROMPT_TUNING": "use mpt_lightning.PromptTuning",
    "P_TUNING": "use mpt_lightning.PromptTuning with reparameterization mlp or lstm",
    "PREFIX_TUNING": "use mpt_lightning.PrefixTuning",
    "MULTITASK_PROMPT_TUNING": "use mpt_lightning.MPTSource and MPTTarget",
    "CPT": "use mpt_lightning.CPT",
    "CARTRIDGE": "use mpt_lightning.PrefixTuning or CPT",
}
# Types that only work through PEFT's own forward pass, which takes neither our rows nor our prompts.
OWN_FORWARD = ("ADAPTION_PROMPT", "XLORA", "POLY", "SHADOW")
_BOOKKEEPING = ("peft_type", "peft_version", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode")

Config = dict[str, Any]


def plain_config(given: PeftConfig | Callable[[], PeftConfig] | Mapping[str, Any]) -> Config:
    """Return a config as plain values: `{"class_path": "peft.LoraConfig", "init_args": {"r": 4}}` without defaults.

    It is given as a config, a function that returns one, a mapping with `class_path` and `init_args`, or PEFT's own
    with `peft_type`, as in an adapter_config.json. Anything else is an MPTError, and so is an unknown argument, or a
    type that has a separate class in this package.
    """
    if callable(given):
        given = given()
    if isinstance(given, PeftConfig):
        # Not to_dict(), which for some types leaves fields out.
        kind, values = type(given), {item.name: getattr(given, item.name) for item in fields(given)}
    elif isinstance(given, Mapping) and "class_path" in given:
        kind, values = _find(str(given["class_path"])), dict(given.get("init_args") or {})
    elif isinstance(given, Mapping) and given.get("peft_type") in set(PeftType):
        kind, values = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(given["peft_type"])], dict(given)
    else:
        raise MPTError(
            f"peft_config must be a config of PEFT such as peft.LoraConfig(r=8), or a mapping with its `peft_type`; "
            f"got {given!r}."
        )
    _check_type(kind)
    known = {item.name: item for item in fields(kind)}
    if unknown := sorted(values.keys() - known.keys()):
        raise MPTError(f"peft_config: {kind.__name__} has no {', '.join(unknown)}. It has: {', '.join(sorted(known))}.")
    defaults = {name: _plain(_default(item), name) for name, item in known.items()}
    plain = {name: _plain(value, name) for name, value in values.items() if name not in _BOOKKEEPING}
    if plain.get("init_lora_weights", True) != "loftq":
        plain.pop("loftq_config", None)  # jsonargparse fills it in, and PEFT warns of it
    path = f"peft.{kind.__name__}" if hasattr(peft, kind.__name__) else f"{kind.__module__}.{kind.__qualname__}"
    config = {"class_path": path, "init_args": {n: v for n, v in sorted(plain.items()) if v != defaults[n]}}
    build_config(config)
    return config


def build_config(plain: Config) -> PeftConfig:
    """Build the config from what `plain_config` returned."""
    kind = _find(plain["class_path"])
    arguments = dict(plain["init_args"])
    if needs_total_step(plain) and "total_step" not in arguments:
        # AdaLoRA needs the run's steps, which are not known yet: the least that it accepts.
        arguments["total_step"] = arguments.get("tinit", 0) + arguments.get("tfinal", 0) + 1
    try:
        return kind(**arguments)
    except (ValueError, TypeError, AssertionError, ImportError) as error:
        raise MPTError(f"peft_config: {kind.__name__} rejects its arguments: {error}") from error


def needs_total_step(plain: Config) -> bool:
    """Return whether this is AdaLoRA without the run's number of steps."""
    return plain["class_path"] == "peft.AdaLoraConfig" and plain["init_args"].get("total_step") is None


def draws_what_is_frozen(plain: Config) -> bool:
    """Return whether PEFT may draw something at random that is not trained, and so not in a checkpoint."""
    usual = plain["class_path"] in ("peft.LoraConfig", "peft.AdaLoraConfig", "peft.IA3Config")
    return not usual or plain["init_args"].get("init_lora_weights", True) not in (True, False, "gaussian")


def build_tuner(config: PeftConfig, model: Any) -> Any:
    """Put PEFT's layers into a model, and return the object that manages them."""
    with warnings.catch_warnings():
        # GPT-2 keeps its weights transposed; PEFT detects that itself, and warns.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
        try:
            return PEFT_TYPE_TO_TUNER_MAPPING[PeftType(config.peft_type)](model, config, "default")
        except (ValueError, TypeError, NotImplementedError) as error:
            raise MPTError(
                f"peft_config: {type(config).__name__} does not fit {type(model).__name__}. Change its arguments "
                f"(target_modules names the layers), or the type. The cause: {error}"
            ) from error


def _check_type(config: type[PeftConfig]) -> None:
    types = [item for item, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items() if cls is config]
    if not types:
        raise MPTError(f"peft_config: got {config.__name__}, expected the config of a method, such as peft.LoraConfig.")
    kind = types[0].value
    if kind in OURS or issubclass(config, PromptLearningConfig):
        instead = OURS.get(kind, "use one of mpt_lightning's classes")
        raise MPTError(
            f"peft_config is of the type {kind}, which trains prompts. PEFTModule is for the types that change "
            f"weights, such as LORA; {instead} instead."
        )
    if kind in OWN_FORWARD or types[0] not in PEFT_TYPE_TO_TUNER_MAPPING:
        raise MPTError(
            f"peft_config is of the type {kind}, which needs PEFT's own forward pass and cannot be put into a "
            "backbone. Use another type, such as LORA, ADALORA or IA3."
        )


def _find(path: str) -> type[PeftConfig]:
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(import_module(module or "peft"), name)
    except (ImportError, AttributeError) as error:
        raise MPTError(
            f"peft_config: got {path!r}, which cannot be imported; expected a class such as peft.LoraConfig."
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, PeftConfig)):
        raise MPTError(f"peft_config: got {path!r}, expected a config of PEFT, such as peft.LoraConfig.")
    return kind


def _default(item: Any) -> Any:
    return item.default_factory() if item.default_factory is not MISSING else item.default


def _plain(value: Any, name: str) -> Any:
    """Return a value as what a checkpoint and a YAML file can hold."""
    if isinstance(value, Enum):
        return value.value
    if value is MISSING or value is None or isinstance(value, bool | int | float | str):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value), name)
    if isinstance(value, set | frozenset):
        return sorted(_plain(item, name) for item in value)
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item, name) for key, item in value.items()}
    raise MPTError(f"peft_config: got {name}={value!r}, expected a plain value, which a checkpoint can hold.")
