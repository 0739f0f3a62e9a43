"""The cost of a backbone's check at load time, and of its fingerprint.

    python benchmarks/loading.py [--threads 2] [--repeats 15] [--only check fingerprint]

"check": `load_backbone` alternately with and without the check. Random weights of about 100 million parameters are
read from files in the page cache. "fingerprint": a model of a billion parameters in bfloat16, relative to one forward
pass over 40 tokens.
"""

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from measure import RESULTS, Line, alternate, main
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config
from transformers import T5ForConditionalGeneration as T5

from mpt_lightning import load_backbone
from mpt_lightning.backbones.fingerprint import fingerprint

MODELS = {
    "GPT-2": lambda: GPT2LMHeadModel(GPT2Config()),
    "Llama": lambda: LlamaForCausalLM(
        LlamaConfig(hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12)
    ),
    "T5": lambda: T5(T5Config(d_model=640, d_ff=2560, num_layers=9, num_heads=10, decoder_start_token_id=0)),
}


def check(repeats: int) -> Iterator[Line]:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for name, build in MODELS.items():
        with TemporaryDirectory() as folder:
            path = str(Path(folder) / "model")
            model = build()
            size = model.num_parameters() / 1e6
            model.save_pretrained(path)
            checked, unchecked = partial(load_backbone, path), partial(load_backbone, path, check=False)
            times = alternate(checked, unchecked, repeats, name)
        yield Line(f"load {name}, {size:.0f} M, checked", "unchecked", 1.05, False, *times)


def of_fingerprint(repeats: int) -> Iterator[Line]:
    config = LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=18, num_attention_heads=32)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    ids = torch.arange(40)[None]

    @torch.no_grad()
    def one_pass() -> None:
        model(input_ids=ids, use_cache=False)

    times = alternate(lambda: fingerprint(model), one_pass, repeats, "fingerprint")
    size = model.num_parameters() / 1e9
    yield Line(f"fingerprint of {size:.1f} B parameters", "a pass over 40 tokens", None, False, *times)


if __name__ == "__main__":
    main("Loading", {"check": check, "fingerprint": of_fingerprint}, RESULTS / "loading.json")
