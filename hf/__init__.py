"""Our models as models of transformers; whoever imports this tells its Auto classes of them. No remote code.

    import abyssal.hf                                                       # transformers >= 5
    from transformers import AutoModelForCausalLM, pipeline

    model = AutoModelForCausalLM.from_pretrained("runs/toy/checkpoints/step-000200", dtype="bfloat16")
    model.generate(ids, attention_mask=mask, max_new_tokens=20)             # beams, assistants; padding on any side
    model(ids, labels=ids).loss.backward()                                  # labels are shifted inside
    pipeline("text-generation", model=model, tokenizer=tokenizer)
    peft.get_peft_model(model, LoraConfig(target_modules="all-linear"))     # any linear layer but the head
    model.save_pretrained("mine")                                           # `load_pretrained("mine")` reads it

A folder is in the layout "abyssal": a checkpoint of a run, or what `save_pretrained(model, folder, layout="abyssal")`
writes; `abyssal convert` makes one of any other, also of a run of several processes, whose weights lie in parts. The
layout "huggingface" of a model without Engram needs nothing of ours.

config   AbyssalConfig, the keys of `ModelConfig`
cache    AbyssalCache, what a model has seen, as transformers asks for it
model    AbyssalForCausalLM
"""

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import WeightRenaming, register_checkpoint_conversion_mapping

from .cache import AbyssalCache
from .config import AbyssalConfig
from .model import AbyssalForCausalLM

__all__ = ["AbyssalCache", "AbyssalConfig", "AbyssalForCausalLM"]

AutoConfig.register(AbyssalConfig.model_type, AbyssalConfig, exist_ok=True)
AutoModelForCausalLM.register(AbyssalConfig, AbyssalForCausalLM, exist_ok=True)
# Files hold the names of `Transformer`, which is the attribute `model` here. Under the class's name, not the model
# type's: peft would rewrite its adapters by that.
register_checkpoint_conversion_mapping(
    AbyssalForCausalLM.__name__, [WeightRenaming(r"^(?!model\.)(.+)", r"model\.\1")], overwrite=True
)
