"""PEFT's layers in this package's backbones: results equal PEFT's, and checkpoints contain the trained tensors."""

import warnings
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as L
import peft
import pytest
import torch

from mpt_lightning import PEFTModule, load_backbone
from mpt_lightning.backbones import CausalBackbone, Seq2SeqBackbone
from mpt_lightning.checkpoint import read_checkpoint
from mpt_lightning.modules.peft_config import build_config, build_tuner, plain_config
from mpt_lightning.objectives import token_cross_entropy
from tests.conftest import KINDS, build_model
from tests.modules.checks import assert_loads_equal, assert_resumes_exactly, weights
from tests.modules.conftest import TASKS, AnyData

Folder = Callable[[str], str]
MakeTrainer = Callable[..., L.Trainer]
LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 16}
IA3 = {"peft_type": "IA3"}
ADALORA = {"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "deltaT": 1}
METHODS = {"lora": LORA, "ia3": IA3, "adalora": ADALORA}


def run(backbone, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = (batch["task_ids"], batch["input_ids"], batch["attention_mask"], batch["labels"])
    return backbone(torch.zeros(3, 0, 32), *inputs).logits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_equal_pefts(kind: str, method: str, batch: dict[str, torch.Tensor]) -> None:
    cls = Seq2SeqBackbone if kind == "t5" else CausalBackbone
    ours, model = cls(build_model(kind), kind), build_model(kind)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")
        config = plain_config(METHODS[method])
        theirs = peft.get_peft_model(model, build_config(config))
        build_tuner(build_config(config), ours.model)
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(p.shape, generator=generator) for name, p in ours.model.named_parameters()}
    for name, parameter in ours.model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(drawn[name])
    named = {name.removeprefix("base_model.model."): p for name, p in theirs.named_parameters()}
    trained = [name for name, parameter in named.items() if parameter.requires_grad]
    assert trained
    for name in trained:
        named[name].data.copy_(drawn[name])

    logits = run(ours, batch)
    if kind == "t5":
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        expected = theirs(**inputs, labels=batch["labels"]).logits
    else:
        rows = []
        for row in range(len(logits)):  # one by one, so that nothing is padded
            tokens = int(batch["attention_mask"][row].sum())
            given = batch["labels"][row, :-1].clamp(min=0)
            ids = torch.cat([batch["input_ids"][row, :tokens], given])[None]
            rows.append(theirs(input_ids=ids).logits[0, tokens - 1 :])
        expected = torch.stack(rows)
    counted = batch["labels"] != -100
    torch.testing.assert_close(logits[counted], expected[counted], rtol=1e-4, atol=1e-4)
    token_cross_entropy(logits, batch["labels"]).backward()
    token_cross_entropy(expected, batch["labels"]).backward()
    gradients = dict(ours.model.named_parameters())
    for name in trained:
        torch.testing.assert_close(gradients[name].grad, named[name].grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_resuming_is_exact(method: str, model_folder: Folder, trainer: MakeTrainer, tmp_path: Path) -> None:
    folder = model_folder("t5")  # built before a seed is set
    module = assert_resumes_exactly(lambda: PEFTModule(folder, METHODS[method], lr=0.05), trainer, tmp_path)
    if method == "adalora":
        assert module.adalora.peft_config["default"].total_step == 6


def test_dropout_of_the_layers_is_on_in_training(model_folder: Folder, trainer: MakeTrainer, data: AnyData) -> None:
    module = PEFTModule(model_folder("gpt2"), LORA | {"lora_dropout": 0.5}, lr=0.05)
    trainer(max_epochs=1).fit(module, datamodule=data)
    module.train()
    assert not module.backbone.model.training
    modes = {name: m.training for name, m in module.backbone.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert {on for name, on in modes.items() if "lora_dropout" in name} == {True}
    assert {on for name, on in modes.items() if "lora_dropout" not in name} == {False}
    batch = next(iter(data.train_dataloader()))
    assert not torch.equal(module(batch), module(batch))
    module.eval()
    assert torch.equal(module(batch), module(batch))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_contains_the_trained_tensors(
    kind: str, method: str, model_folder: Folder, data: AnyData, trainer: MakeTrainer, tmp_path: Path
) -> None:
    module = PEFTModule(model_folder(kind), METHODS[method], lr=0.05)
    fitted = trainer(max_epochs=2)
    fitted.fit(module, datamodule=data)
    loaded = assert_loads_equal(module, fitted, tmp_path / "last.ckpt")
    assert loaded.tasks == TASKS
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    trained = {f"backbone.model.{n}" for n, p in module.backbone.model.named_parameters() if p.requires_grad}
    assert content["state_dict"].keys() == trained
    parts = {"lora": {"lora_A", "lora_B"}, "ia3": {"ia3_l"}, "adalora": {"lora_A", "lora_B", "lora_E"}}[method]
    assert {part for name in trained for part in name.split(".") if part.startswith(("lora_", "ia3_"))} == parts
    assert content["hyper_parameters"]["peft_config"] == plain_config(METHODS[method])
    plain = load_backbone(model_folder(kind)).model.state_dict()
    ours = module.backbone.model.state_dict()
    for name, value in plain.items():
        if name in ours:
            assert torch.equal(value, ours[name]), name


def test_adalora_lowers_its_ranks_as_pefts_loop_does(model_folder: Folder, data: AnyData, trainer: MakeTrainer) -> None:
    L.seed_everything(0)
    module = PEFTModule(model_folder("t5"), ADALORA, lr=0.02, schedule="constant")
    trainer(max_epochs=3).fit(module, datamodule=data)

    model = build_model("t5")
    # Without a task type PEFT's forward pass omits the regulariser.
    plain = plain_config(ADALORA)
    plain["init_args"] |= {"total_step": 9, "task_type": "SEQ_2_SEQ_LM"}
    config = build_config(plain)
    L.seed_everything(0)
    theirs = peft.get_peft_model(model, config)
    start = PEFTModule(model_folder("t5"), ADALORA)
    start._seed = module._seed
    start.configure_model()
    named = {name.removeprefix("base_model.model."): p for name, p in theirs.named_parameters() if p.requires_grad}
    for name, parameter in start.backbone.model.named_parameters():
        if parameter.requires_grad:
            named[name].data.copy_(parameter)
    optimizer = torch.optim.AdamW(named.values(), lr=0.02, weight_decay=0.0)
    step = 0
    for _ in range(3):
        for batch in data.train_dataloader():
            optimizer.zero_grad()
            output = theirs(**{n: batch[n] for n in ("input_ids", "attention_mask", "labels")})
            output.loss.backward()
            optimizer.step()
            theirs.base_model.update_and_allocate(step)
            step += 1
    trained = weights(module)
    zeros = 0
    for name, parameter in named.items():
        torch.testing.assert_close(trained[f"backbone.model.{name}"], parameter.detach(), rtol=1e-3, atol=1e-4)
        zeros += int((parameter == 0).sum()) if "lora_E" in name else 0
    ranks = sum(len(p) for n, p in named.items() if "lora_E" in n)
    assert zeros == ranks // 2


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=4, target_modules=["q", "v"], bias="all"),
        lambda: peft.LoraConfig(r=2, init_lora_weights="pissa_niter_2", target_modules=["q"]),
        {"peft_type": "VERA", "r": 4, "target_modules": ["q"]},
        {"peft_type": "SHIRA", "r": 2, "target_modules": ["q"]},
        {"class_path": "peft.LoHaConfig", "init_args": {"r": 2, "target_modules": ["q"], "rank_dropout": 0.2}},
        {"peft_type": "LORA", "r": 2, "modules_to_save": ["lm_head"]},
    ],
    ids=["bias", "pissa", "vera", "shira", "loha", "modules_to_save"],
)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks", "ignore:Model has `tie_word_embeddings")
def test_untrained_random_tensors_are_the_same_after_loading(
    config: object, model_folder: Folder, data: AnyData, trainer: MakeTrainer, tmp_path: Path
) -> None:
    L.seed_everything(0)
    module = PEFTModule(model_folder("t5"), config, lr=0.05)
    fitted = trainer(max_epochs=1)
    fitted.fit(module, datamodule=data)
    L.seed_everything(77)
    assert_loads_equal(module, fitted, tmp_path / "last.ckpt")
    again = PEFTModule(model_folder("t5"), config, lr=0.05)
    trainer(max_epochs=1).fit(again, datamodule=data, ckpt_path=str(tmp_path / "last.ckpt"))
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(module.eval()(batch), again.eval()(batch))


def test_layers_of_a_bf16_backbone_train_in_fp32(model_folder: Folder, data: AnyData, trainer: MakeTrainer) -> None:
    for config in METHODS.values():
        module = PEFTModule(model_folder("llama"), config, backbone_dtype="bfloat16")
        trainer(max_epochs=1).fit(module, datamodule=data)
        assert {value.dtype for value in module.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}, "trains prompts.*use mpt_lightning.PromptTuning"),
        ({"peft_type": "MULTITASK_PROMPT_TUNING"}, "use mpt_lightning.MPTSource and MPTTarget"),
        ({"peft_type": "P_TUNING"}, "use mpt_lightning.PromptTuning with reparameterization"),
        ({"peft_type": "PREFIX_TUNING"}, "use mpt_lightning.PrefixTuning"),
        ({"class_path": "peft.CPTConfig"}, "use mpt_lightning.CPT"),
        ({"peft_type": "ADAPTION_PROMPT"}, "needs PEFT's own forward pass"),
        ({"peft_type": "XLORA"}, "needs PEFT's own forward pass"),
        ({"peft_type": "LORA", "rank": 4}, "LoraConfig has no rank. It has: .*r,"),
        ({"peft_type": "LARA"}, "must be a config of PEFT such as peft.LoraConfig"),
        ({"class_path": "peft.LaraConfig"}, "got 'peft.LaraConfig', which cannot be imported"),
        ({"class_path": "peft.LoraModel"}, "got 'peft.LoraModel', expected a config of PEFT"),
        ({"peft_type": "LORA", "layers_pattern": "x"}, "LoraConfig rejects its arguments"),
        (peft.LoraConfig(r=4, target_modules=[object()]), "expected a plain value"),
    ],
)
def test_a_wrong_config_raises(config: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PEFTModule("anything", config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LORA | {"target_modules": ["nothing"]}, "LoraConfig does not fit T5ForConditionalGeneration"),
        (ADALORA | {"tinit": 5}, r"between step tinit=5 and tfinal=1 steps before the end, and the run has 3"),
        (ADALORA | {"init_r": 2}, "from init_r=2 to target_r=2, which must be less"),
    ],
)
def test_an_unsuitable_config_raises_before_training(
    config: dict, message: str, model_folder: Folder, data: AnyData, trainer: MakeTrainer
) -> None:
    fitted = trainer()
    with pytest.raises(ValueError, match=message):
        fitted.fit(PEFTModule(model_folder("t5"), config), datamodule=data)
    assert fitted.global_step == 0


def test_another_config_or_backbone_or_class_is_refused(
    model_folder: Folder, data: AnyData, trainer: MakeTrainer, tmp_path: Path
) -> None:
    path = str(tmp_path / "lora.ckpt")
    fitted = trainer()
    fitted.fit(PEFTModule(model_folder("t5"), LORA), datamodule=data)
    fitted.save_checkpoint(path)
    with pytest.raises(ValueError, match=r"The checkpoint was trained with .*'lora_alpha': 16.* this run has"):
        PEFTModule.load_from_checkpoint(path, peft_config=LORA | {"lora_alpha": 9})
    with pytest.raises(ValueError, match="was trained on the backbone"):
        PEFTModule.load_from_checkpoint(path, backbone=model_folder("gpt2"))
    with pytest.raises(ValueError, match="was saved by PEFTModule, which trains weights of the backbone and no prompt"):
        read_checkpoint(path).prompt()
    content = torch.load(path, weights_only=True)
    content["state_dict"].popitem()
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"missing: backbone\.model"):
        PEFTModule.load_from_checkpoint(path)


def test_quantization_without_its_library_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpt_lightning.backbones.quantization.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"needs bitsandbytes and accelerate.*pip install mpt_lightning\[quantization\]"
    ):
        PEFTModule("anything", LORA, backbone_quantization="4bit")
    with pytest.raises(ValueError, match="backbone_quantization: got '3bit', expected one of 4bit, 8bit or null"):
        PEFTModule("anything", LORA, backbone_quantization="3bit")


@pytest.mark.parametrize(("kind", "names"), [("4bit", "load_in_4bit"), ("8bit", "load_in_8bit")])
def test_a_quantized_backbone_is_loaded_with_transformers_config(
    kind: str, names: str, model_folder: Folder, data: AnyData, trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    seen: dict = {}

    def load(path: str, **options: object):
        seen.update(options)
        return build_model("llama").to(options["dtype"]), {"missing_keys": set()}

    monkeypatch.setattr("mpt_lightning.backbones.quantization.find_spec", lambda name: object())
    monkeypatch.setattr(
        "transformers.integrations.bitsandbytes.validate_bnb_backend_availability", lambda raise_exception: True
    )
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    module = PEFTModule(model_folder("llama"), LORA, backbone_quantization=kind, backbone_dtype="bfloat16")
    trainer(max_steps=1).fit(module, datamodule=data)
    config = seen["quantization_config"]
    assert getattr(config, names)
    assert seen["device_map"] == {"": torch.device("cpu")}
    if kind == "4bit":
        assert (config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
        assert config.bnb_4bit_use_double_quant


def test_a_machine_that_cannot_quantize_raises(model_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(raise_exception: bool) -> bool:
        raise RuntimeError("None of the available devices\nare supported")

    monkeypatch.setattr("mpt_lightning.backbones.quantization.find_spec", lambda name: object())
    monkeypatch.setattr("transformers.integrations.bitsandbytes.validate_bnb_backend_availability", refuse)
    with pytest.raises(ValueError, match=r"cannot run on this machine.*None of the available devices are supported"):
        load_backbone(model_folder("t5"), quantization="8bit")
