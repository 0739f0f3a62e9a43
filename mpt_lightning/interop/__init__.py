"""Exchange with other libraries: PEFT folders, prompt embeddings for vLLM and transformers, and the Hub."""

from mpt_lightning.checkpoint import import_peft
from mpt_lightning.interop.card import model_card
from mpt_lightning.interop.hub import push
from mpt_lightning.interop.peft import export_peft
from mpt_lightning.interop.prompt_embeds import export_prompt_embeds

__all__ = ["export_peft", "export_prompt_embeds", "import_peft", "model_card", "push"]
