"""`Transformer` as a causal language model of transformers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..model.losses import IGNORED
from ..model.transformer import Output, Transformer
from .cache import AbyssalCache
from .config import AbyssalConfig


class AbyssalForCausalLM(PreTrainedModel, GenerationMixin):
    """Our `Transformer` as `model`; what a file has are its names.

    dtype: norms, mHC, sinks and biases are float32 at least, whatever is asked for. Devices: the model is not split
    over several. Training: after each step of the optimizer `model.model.update_router_bias()` balances the experts; a
    trainer of others does not call it. `gradient_checkpointing_enable()` sets `model.recompute`.

    Raises:
        TypeError, ValueError: a configuration that is refused; in `from_pretrained`, tensors that are missing.
    """

    config_class = AbyssalConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _input_embed_layer = "embed"
    _no_split_modules = {Transformer.__name__}  # noqa: RUF012  (as transformers has it)

    def __init__(self, config: AbyssalConfig) -> None:
        super().__init__(config)
        if getattr(config, "prepared", None):
            raise ValueError(f"the model was changed by {config.prepared}: only its run's code builds it")
        self.model = Transformer(config.ours()).to(torch.get_default_dtype())  # as far as casts go: see model/kept.py
        self.model.attention_stage = getattr(config, "attention_stage", "sparse")
        if not self.model.embed.weight.is_meta:
            for module in self.model.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]  # `Transformer` has drawn its weights
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: AbyssalCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        inputs_embeds: None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [b, t, v] in float32, and the loss if labels are given.

        The loss is, while the model trains, the whole objective: cross-entropy plus the weights of the configuration
        times those of MTP, balance and indexer (`from_pretrained(..., mtp_loss_weight=0.0)` turns one off). After
        `eval()` it is the cross-entropy alone.

        Args:
            input_ids: int64 [b, t].
            attention_mask: [b, t], or of all columns that the cache has seen too; 0 = padding, on either side. It is
                left out of everything.
            labels: int64 [b, t] as `input_ids`, shifted inside; -100 = ignored, as is padding.
            past_key_values, use_cache: a pass with a cache, which nothing is differentiated through. Without either
                there is none, and the pass may be learnt from.
            logits_to_keep: how many last positions' logits, 0 = all; or which positions, int64.

        Raises:
            ValueError: labels together with a cache, what the model does not have (`inputs_embeds`, as experts and
                Engram go by token ids; attentions; one hidden state a layer), an adapter on a weight that is read
                without its module, or what `Transformer.forward` raises.
            TypeError: a cache of another class.
        """
        refused = {"inputs_embeds": inputs_embeds is not None, "output_attentions": output_attentions}
        for name, given in {**refused, "output_hidden_states": output_hidden_states}.items():
            if given:
                raise ValueError(f"{name} was given: allowed is none, this model has no such thing")
        self._check_adapters()
        cache = self._cache(past_key_values, use_cache)
        mask = _mask(input_ids, attention_mask)
        if cache is None:
            out = self._whole(input_ids, mask, labels)
        elif labels is None:
            out = cache.read(self.model, input_ids, mask)
        else:
            raise ValueError("labels cannot be given together with a cache: set use_cache=False")
        kept = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        loss = None if labels is None else out.loss if self.training else out.losses["lm"]
        found = CausalLMOutputWithPast(loss, Output(out.hidden[:, kept], out.head).logits, cache)
        return found.to_tuple() if return_dict is False else found

    def _whole(self, ids: Tensor, mask: Tensor | None, labels: Tensor | None) -> Output:
        """The pass without a cache, over all tokens at once."""
        documents = None if mask is None else mask.ne(0).to(torch.int64) - 1
        if labels is not None:
            labels = labels if mask is None else labels.masked_fill(mask == 0, IGNORED)
            labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        return self.model(ids, targets=labels, documents=documents)

    def _cache(self, given: AbyssalCache | None, wanted: bool | None) -> AbyssalCache | None:
        if given is None:
            return AbyssalCache() if wanted else None
        if not isinstance(given, AbyssalCache):
            raise TypeError(f"past_key_values is {type(given).__name__}: allowed is AbyssalCache, or none")
        return given

    def _check_adapters(self) -> None:
        """What is read as a weight, not called, would be used without what an adapter adds."""
        read = {"head": self.model.head}
        read |= {f"layers.{i}.engram.table": b.engram.table for i, b in enumerate(self.model.layers) if b.engram}
        for name, module in read.items():
            if hasattr(module, "base_layer"):
                raise ValueError(
                    f"target_modules has {name!r}: an adapter there would do nothing, as its weight is read without it;"
                    f" train it whole, by modules_to_save"
                )

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any, **others: Any
    ) -> None:
        """`generate` begins with an `AbyssalCache`. Raises ValueError where it is asked for one of another kind."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(f"cache_implementation={kind!r}: allowed is none, this model has a cache of its own")
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = cache = AbyssalCache()
            if generation_config.is_assistant:
                cache.activate_past_recording()

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *_: Any, **__: Any) -> nn.Module:
        """Raises ValueError for another size: experts and Engram have tables of token ids."""
        size = self.config.vocab_size
        if new_num_tokens not in (None, size):
            raise ValueError(f"new_num_tokens={new_num_tokens}: allowed is vocab_size={size}, which tables go by")
        return self.model.embed

    @property
    def gradient_checkpointing(self) -> bool:  # type: ignore[override]
        return self.model.recompute > 0

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, every_n_layers: int = 1
    ) -> None:
        """`recompute`. Raises ValueError for what it does not do."""
        if every_n_layers != 1 or getattr(gradient_checkpointing_func, "func", checkpoint) is not checkpoint:
            raise ValueError(f"every_n_layers={every_n_layers}, or offload: allowed are 1 and False")
        self.model.recompute = int(enable)

    def _init_weights(self, module: nn.Module) -> None:
        """Raises ValueError: transformers asks this of modules whose tensors the folder lacks."""
        raise ValueError(f"the folder lacks tensors of the model: none is allowed to be missing, as of {module}")


def _mask(ids: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask of the call's own columns [b, t]; None where there is no padding among them."""
    if mask is None:
        return None
    if mask.ndim != 2 or len(mask) != len(ids) or mask.shape[1] < ids.shape[1]:
        raise ValueError(f"attention_mask has shape {list(mask.shape)}: allowed is {list(ids.shape)}, or more columns")
    mask = mask[:, -ids.shape[1] :]
    return None if bool(mask.all()) else mask
