"""Facts that differ between model families, read from a Hugging Face model or its attention modules.

Only this file knows the names that families give them: one function per fact, with the names in the tables at the top.
To support another name, add it to its table. The exception is the state that rotary modules keep between forwards
(`inv_freq`, `original_inv_freq`, …), which `frequencies` reads and resets. Facts that no attribute states reliably are
measured on the model instead: `rotation` (how a layer encodes positions), `rotation_pairs`, `visibility` (windows).

Functions take the model's own attention modules, whose configuration is `config`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from phaselens.errors import RefusedModel
from phaselens.lens.fused_layout import FusedLayout

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Attention modules with one projection for q, k and v, and whether it is laid out head by head.
_FUSED_BY_HEAD = {"GPT2Attention": False, "Phi3Attention": False, "GPTNeoXAttention": True}
# Attributes of attention modules.
_D_HEAD = ("head_dim", "head_size")
_QUERIES_PER_KEY = ("num_key_value_groups",)
_SCALE = ("scaling",)
_SOFTCAP = ("attn_logit_softcapping",)
_SINK_LOGITS = ("sinks",)
# A buffer of attention modules with the sines and cosines of each position (GPT-J, CodeGen).
_ROTATION_TABLE = "embed_positions"
# Attributes of the model: its unembedding, and a factor of the logits.
_UNEMBEDDING = ("lm_head", "embed_out")
_LOGIT_FACTOR = ("logit_scale",)
# Fields of the configuration.
_LOGIT_DIVISOR = ("logits_scaling",)
_LOGIT_SOFTCAP = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_D_MODEL = ("hidden_size",)
#: Fields that declare the width of the residual stream, and those that count rows of that width.
WIDTH_FIELDS = ("hidden_size", "n_embd", "d_model")
ROW_FIELDS = ("vocab_size", "intermediate_size")
_BOS = ("bos_token_id",)
_D_MLP = ("intermediate_size",)
_N_CTX = ("max_position_embeddings",)
_N_SELECTED_KEYS = ("index_topk", "indexer_budget", "keep_window_size")
_CHUNK = ("attention_chunk_size",)
# The number of tokens from which on a model runs all of its layers on one piece of a text after the other (xLSTM).
_PIECE = ("max_inference_chunksize",)
_N_CTX_TRAINED = "original_max_position_embeddings"
_ROPE_PARAMETERS = ("rope_parameters",)
# A field of the configuration, and its value for attention on random blocks of keys.
_SPARSE_BLOCKS = ("attention_type", "block_sparse")
# The method of a module that has such attention, beside full attention.
_SPARSE_SWITCH = "set_attention_type"
_QUANTISATION = "quantization_config"
# How the name of a rotary module ends, or of a buffer in it, and a word in the class name of every norm.
_ROTARY_MODULE = "rotary_emb"
_ROTARY_BUFFER = "inv_freq"
_NORM_CLASS = "norm"
# transformers' rope types whose frequencies depend on a text's length: part of a name, and a name.
_STRETCHED_ROPE, _TWO_SET_ROPE = "dynamic", "longrope"
# A norm inside a linear module, before its product (BitNet).
_INNER_NORM = ("rms_norm",)
# The input width of a linear module (torch's Linear, transformers' Conv1D).
_LINEAR_WIDTH = ("in_features", "nx")


def _attribute(owner: object, names: tuple[str, ...]) -> Any:
    """Return the first of these attributes that `owner` has and that is not None; None without any."""
    values = (getattr(owner, name, None) for name in names)
    return next((value for value in values if value is not None), None)


# Facts of one attention module


def n_heads_of(attention: nn.Module) -> int:
    """Return the number of heads of queries."""
    config: PreTrainedConfig = attention.config
    return int(config.num_attention_heads)


def n_kv_heads_of(attention: nn.Module) -> int:
    """Return the number of heads of keys and values.

    They are read from the module: a configuration may have a `num_key_value_heads` that nothing reads (GPT-2,
    GPT-NeoX).
    """
    return n_heads_of(attention) // int(_attribute(attention, _QUERIES_PER_KEY) or 1)


def d_head_of(attention: nn.Module) -> int:
    """Return the size of one head's query."""
    config: PreTrainedConfig = attention.config
    return int(_attribute(attention, _D_HEAD) or config.hidden_size // config.num_attention_heads)


def scale_of(attention: nn.Module) -> float:
    """Return the factor of q·k before the softmax."""
    scale = _attribute(attention, _SCALE)
    return float(scale) if scale is not None else d_head_of(attention) ** -0.5


def set_scales(model: PreTrainedModel, scale: float) -> bool:
    """Set the factor of q·k in every module of the model that states one; return whether any does."""
    is_set = False
    for module in model.modules():
        for name in _SCALE:
            if isinstance(vars(module).get(name), int | float):
                setattr(module, name, float(scale))
                is_set = True
    return is_set


def softcap_of(attention: nn.Module) -> float | None:
    """Return the bound c of scores c·tanh(score / c), whatever the configuration says; None without one."""
    softcap = _attribute(attention, _SOFTCAP)
    return None if softcap is None else float(softcap)


def sink_logits_of(attention: nn.Module) -> Tensor | None:
    """Return the learned sink logits [head], each one more term of the softmax's sum; None without any."""
    logits: Tensor | None = _attribute(attention, _SINK_LOGITS)
    return logits


def norms_in(attention: nn.Module) -> list[nn.Module]:
    """Return the norms inside attention, which act on queries and keys before the rotation."""
    return [
        module
        for name, module in attention.named_modules()
        # The parametrizations of a weight (weight_norm) act neither on queries nor on keys.
        if name
        and _NORM_CLASS in type(module).__name__.lower()
        and "parametrizations" not in name.split(".")
        and not any(module.children())
    ]


def norm_inside(linear: nn.Module) -> nn.Module | None:
    """Return the norm inside a linear module, which acts on its input before the product; None without one."""
    norm: nn.Module | None = _attribute(linear, _INNER_NORM)
    return norm


def has_fused_layout(model: PreTrainedModel) -> bool:
    """Return whether the layout of the fused projections in a model's attention is known."""
    return any(type(module).__name__ in _FUSED_BY_HEAD for module in model.modules())


def fused_layout(attention: nn.Module) -> FusedLayout:
    """Return the layout of a module's fused projection of queries, keys and values.

    Raises:
        RefusedModel: for a family whose layout is not known.
    """
    by_head = _FUSED_BY_HEAD.get(type(attention).__name__)
    if by_head is None:
        supported = ", ".join(_FUSED_BY_HEAD)
        raise RefusedModel(
            f"{type(attention).__name__} computes q, k and v in one projection of unknown layout, so hook_q, hook_k "
            f"and hook_v cannot be served; known: {supported}. hook_rot_q and hook_rot_k can be hooked instead"
        )
    return FusedLayout(n_heads_of(attention), n_kv_heads_of(attention), d_head_of(attention), by_head)


def has_position_table(model: PreTrainedModel, attentions: Iterable[nn.Module]) -> bool:
    """Return whether attention modules, or an embedding other than that of tokens, hold a table with a row for each
    position that the model was made for."""
    n_ctx = n_ctx_of(model)
    embeddings = (module for module in model.modules() if isinstance(module, nn.Embedding))
    tables = [table.weight for table in embeddings if table.weight is not embedding_of(model)]
    tables += [buffer for module in attentions for buffer in module.buffers() if buffer.dim() >= 2]
    tables += [getattr(module, name) for module, name in rotation_tables(model)]
    return any(table.shape[-2] == n_ctx for table in tables)


def rotation_tables(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Return the modules that rotate by a table of sines and cosines [pos, d_rotary], and the table's name."""
    return (
        (module, _ROTATION_TABLE)
        for module in model.modules()
        if isinstance(module._buffers.get(_ROTATION_TABLE), Tensor)
    )


# Facts of one rotary module


def rope_types_of(rotary: nn.Module) -> dict[str | None, str]:
    """Return the rope type by layer type, under None if all layers share one; empty if the module states none."""
    # Only the module's own attribute: a bridge also has those of the module that it wraps.
    rope_type = vars(rotary).get("rope_type")
    if isinstance(rope_type, dict):
        return dict(rope_type)
    return {None: rope_type} if isinstance(rope_type, str) else {}


def is_stretched_rope(rope_type: str) -> bool:
    """Return whether this rope type stretches the frequencies once a text exceeds the trained length."""
    return _STRETCHED_ROPE in rope_type


def is_two_set_rope(rope_type: str) -> bool:
    """Return whether this rope type has one set of frequencies for short texts and one for long ones."""
    return rope_type == _TWO_SET_ROPE


def n_ctx_before_rope(rotary: nn.Module, layer_type: str | None) -> int:
    """Return the configured length of the texts that the model was made for before its rope type extended it."""
    config: PreTrainedConfig = rotary.config
    parameters = config.rope_parameters
    layer_parameters = parameters if layer_type is None else parameters[layer_type]
    return int(layer_parameters["original_max_position_embeddings"])


# Facts of the model


def has_sparse_blocks(model: PreTrainedModel) -> bool:
    """Return whether attention is on random blocks of keys in texts longer than a few blocks (BigBird)."""
    has_both_kinds = any(hasattr(module, _SPARSE_SWITCH) for module in model.modules())
    return has_both_kinds and getattr(text_config_of(model), _SPARSE_BLOCKS[0], None) == _SPARSE_BLOCKS[1]


def text_config_of(model: PreTrainedModel) -> PreTrainedConfig:
    """Return the configuration of the text decoder; of a model of several modalities, a part of its configuration."""
    return model.config.get_text_config(decoder=True)


def rope_parameters_of(model: PreTrainedModel) -> dict[str, Any] | None:
    """Return the rope parameters of the configuration; None without any."""
    parameters = _attribute(text_config_of(model), _ROPE_PARAMETERS)
    return None if parameters is None else dict(parameters)


def set_rope_parameters(model: PreTrainedModel, parameters: dict[str, Any]) -> None:
    """Set the rope parameters of the configuration, which its rotary modules read when they are made."""
    setattr(text_config_of(model), _ROPE_PARAMETERS[0], parameters)


def needs_eager(model: PreTrainedModel) -> bool:
    """Return whether SDPA cannot compute the model's attention: it has neither a softcap nor learned sink logits."""
    return any(
        softcap_of(module) is not None or sink_logits_of(module) is not None for module in model.modules()
    )


def supports_sdpa(model: PreTrainedModel) -> bool:
    """Return whether transformers computes this model's attention by scaled-dot-product attention on request."""
    return bool(getattr(model, "_supports_sdpa", True))


def n_ctx_of(model: PreTrainedModel) -> int | None:
    """Return the number of positions that the model was made for; None if it does not state one (XLNet: −1)."""
    n_ctx = _attribute(text_config_of(model), _N_CTX)
    return None if n_ctx is None or int(n_ctx) < 1 else int(n_ctx)


def n_selected_keys_of(model: PreTrainedModel) -> int | None:
    """Return the number of keys that attention selects for each query; None where each sees all."""
    n_keys = _attribute(text_config_of(model), _N_SELECTED_KEYS)
    return n_keys if isinstance(n_keys, int) else None


def piece_length_of(model: PreTrainedModel) -> int | None:
    """Return the length of the pieces on which a model's layers run one after the other; None where they see texts."""
    n_tokens = _attribute(text_config_of(model), _PIECE)
    return n_tokens if isinstance(n_tokens, int) else None


def probe_length(model: PreTrainedModel, n_tokens: int) -> int:
    """Return a number of tokens, at most `n_tokens`, in which the model's attention is causal or windowed."""
    limits = [
        _attribute(text_config_of(model), names) for names in (_N_CTX, _N_SELECTED_KEYS, _CHUNK, _PIECE)
    ]
    return min([n_tokens, *(limit for limit in limits if isinstance(limit, int) and limit > 1)])


def n_ctx_trained_of(model: PreTrainedModel) -> int | None:
    """Return the number of positions before a rope type extended it, as the configuration states; else `n_ctx_of`.

    Where layer types have their own rope parameters, it is the smallest number that any of them states.
    """
    config = model.config.get_text_config()
    parameters = _attribute(config, _ROPE_PARAMETERS) or {}
    by_layer_type = [entry for entry in parameters.values() if isinstance(entry, dict)]
    stated = [
        source[_N_CTX_TRAINED]
        for source in (parameters, *by_layer_type, vars(config))
        if source.get(_N_CTX_TRAINED) is not None
    ]
    return min(map(int, stated)) if stated else n_ctx_of(model)


def d_model_of(model: PreTrainedModel) -> int:
    """Return the width of the residual stream."""
    width = _attribute(text_config_of(model), _D_MODEL)
    return int(embedding_of(model).shape[1] if width is None else width)


def bos_token_id_of(model: PreTrainedModel) -> int | None:
    """Return the id of the BOS token that the configuration states; None without one that the model has."""
    token_id = _attribute(text_config_of(model), _BOS)
    return token_id if isinstance(token_id, int) and 0 <= token_id < d_vocab_of(model) else None


def d_vocab_of(model: PreTrainedModel) -> int:
    """Return the number of tokens in the embedding."""
    return len(embedding_of(model))


def embedding_of(model: PreTrainedModel) -> Tensor:
    """Return the embedding [d_vocab, d_model]."""
    weight: Tensor = model.get_input_embeddings().weight
    return weight


def d_mlp_of(model: PreTrainedModel, output: nn.Module) -> int:
    """Return the width of an MLP's hidden activations, read from its output projection if that states it."""
    width = linear_width_of(output)
    if width is not None:
        return width
    return int(_attribute(text_config_of(model), _D_MLP) or 4 * embedding_of(model).shape[1])


def linear_width_of(module: nn.Module) -> int | None:
    """Return the width of a linear module's input; None for a module that states none."""
    width = _attribute(module, _LINEAR_WIDTH)
    return width if isinstance(width, int) else None


def body_of(model: PreTrainedModel) -> nn.Module:
    """Return the part of a model that computes the final norm's output from tokens."""
    embedding, children = model.get_input_embeddings(), list(model.children())
    body: nn.Module = model.base_model
    if body is not model:
        return body
    # The class names as its base a module that it does not have (Llama 4).
    holders = [child for child in children if any(module is embedding for module in child.modules())]
    return holders[0] if holders else body


def rotary_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Return the rotary modules in a model or a part of it, which compute cos and sin."""
    return (
        module
        for name, module in model.named_modules()
        if name.endswith(_ROTARY_MODULE)
        or any(buffer.endswith(_ROTARY_BUFFER) for buffer, _ in module.named_buffers(recurse=False))
    )


def unembedding_of(model: PreTrainedModel) -> nn.Module | None:
    """Return the module with `weight` [d_vocab, d_model] that computes logits from the final norm's output, or None."""
    unembedding: nn.Module | None = _attribute(model, _UNEMBEDDING)
    return unembedding


def logit_factor_of(model: PreTrainedModel) -> float:
    """Return the factor of the unembedding's output."""
    factor = float(_attribute(model, _LOGIT_FACTOR) or 1.0)
    return factor / float(_attribute(text_config_of(model), _LOGIT_DIVISOR) or 1.0)


def logit_softcap_of(model: PreTrainedModel) -> float | None:
    """Return the bound c of logits c·tanh(logit / c); None without one."""
    softcap: float | None = _attribute(text_config_of(model), _LOGIT_SOFTCAP)
    return softcap


def drop_quantisation(model: PreTrainedModel) -> None:
    """Remove the quantisation from the configuration of a model whose weights are dequantised."""
    if hasattr(model.config, _QUANTISATION):
        delattr(model.config, _QUANTISATION)
