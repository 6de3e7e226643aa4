"""Values that the fields of a checkpoint's config must have, checked by name before transformers reads them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from phaselens.errors import ModelError

_TAKE_AGAIN = "fix it, or fetch the config again"
#: Sections of a config that describe the text model.
_TEXT_SECTIONS = ("text_config", "llm_config", "language_config")
_DTYPE = re.compile(r"(torch\.)?(auto|half|double|b?float\d*(_\w+)?|u?int\d+|bool)")
#: Fields that count the experts of a layer.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_MOST_LABELS = 1_000_000


@dataclass(frozen=True)
class FieldRule:
    """What the value of a field must be, in words and as a test; null is left to transformers if `or_null`."""

    expected: str
    accepts: Callable[[Any], bool]
    or_null: bool = True

    def allows(self, value: object) -> bool:
        """Return whether the field may have this value."""
        return (value is None and self.or_null) or (value is not None and self.accepts(value))


def _is_count(value: Any) -> bool:
    if isinstance(value, list) and value:  # one number per layer; a layer may lack what is counted
        return all(type(number) is int and number >= 0 for number in value)
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_COUNT = FieldRule("a whole number of at least 1", _is_count)
_NUMBER = FieldRule("a number", _is_number)
_POSITIVE = FieldRule("a number above 0", lambda value: _is_number(value) and value > 0)
_NOT_NEGATIVE = FieldRule("a number of at least 0", lambda value: _is_number(value) and value >= 0)
_FRACTION = FieldRule("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
_FLAG = FieldRule("true or false", lambda value: isinstance(value, bool))
_TEXT = FieldRule("text", lambda value: isinstance(value, str) and value != "", or_null=False)
_TEXTS = FieldRule(
    "a list of texts",
    lambda value: isinstance(value, list) and all(isinstance(entry, str) for entry in value),
)
_OBJECT = FieldRule("an object", lambda value: isinstance(value, dict))

_RULES: dict[str, FieldRule] = {
    **dict.fromkeys(
        ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_attention_heads", "num_heads", "n_head",
         "n_heads", "num_key_value_heads", "num_kv_heads", "n_head_kv", "hidden_size", "n_embd", "d_model", "head_dim",
         "vocab_size", "intermediate_size", "n_inner", "ffn_dim", "max_position_embeddings", "n_positions", "n_ctx",
         "max_seq_len", "sliding_window"),
        _COUNT,
    ),
    **dict.fromkeys(
        ("attn_logit_softcapping", "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "rope_theta",
         "rotary_emb_base", "query_pre_attn_scalar"),
        _POSITIVE,
    ),
    **dict.fromkeys(
        ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", "initializer_range"),
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys(
        ("attention_multiplier", "residual_multiplier", "embedding_multiplier", "logits_scaling", "logit_scale"),
        _NUMBER,
    ),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), _FRACTION),
    **dict.fromkeys(
        ("output_hidden_states", "output_attentions", "use_cache", "is_decoder", "is_encoder_decoder",
         "add_cross_attention", "tie_word_embeddings", "use_sliding_window"),
        _FLAG,
    ),
    **dict.fromkeys(("architectures", "layer_types"), _TEXTS),
    **dict.fromkeys(
        ("rope_parameters", "rope_scaling", "quantization_config", "auto_map", "id2label", "label2id", *_TEXT_SECTIONS),
        _OBJECT,
    ),
    "return_dict": FieldRule("true", lambda value: value is True, or_null=False),
    "dtype": (_DTYPE_RULE := FieldRule(
        "the name of a dtype of torch",
        lambda value: isinstance(value, dict) or (isinstance(value, str) and _DTYPE.fullmatch(value) is not None),
    )),
    "torch_dtype": _DTYPE_RULE,
    "num_labels": FieldRule(
        f"a whole number from 0 to {_MOST_LABELS:,}",
        lambda value: type(value) is int and 0 <= value <= _MOST_LABELS,
        or_null=False,
    ),
}  # fmt: skip
#: Fields of the sections that describe a rotation.
_ROTATION_RULES = {
    "rope_theta": _POSITIVE,
    "factor": _POSITIVE,
    "partial_rotary_factor": _FRACTION,
    "rope_type": _TEXT,
}


def require_values(config: Mapping[str, Any], model_name: str) -> None:
    """Check the fields of a config that every family shares, in the words of its JSON.

    Raises:
        ModelError: naming the field, its value, and what it should be.
    """
    if "model_type" in config and not _TEXT.allows(config["model_type"]):
        raise _error("model_type", config["model_type"], _TEXT, model_name)
    for section in (config, *(config[name] for name in _TEXT_SECTIONS if isinstance(config.get(name), dict))):
        for name, value in section.items():
            rule = _RULES.get(name)
            is_unused = name == "sliding_window" and section.get("use_sliding_window") is False
            if rule is not None and not is_unused and not rule.allows(value):
                raise _error(name, value, rule, model_name)
        for name, value in _rotation_fields(section):
            if name in _ROTATION_RULES and not _ROTATION_RULES[name].allows(value):
                raise _error(name, value, _ROTATION_RULES[name], model_name)
        _require_within(section, model_name)


def _rotation_fields(section: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a rotation, and of those of each type of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        rotation = section.get(name)
        for key, value in rotation.items() if isinstance(rotation, dict) else ():
            if isinstance(value, dict):
                yield from value.items()
            else:
                yield key, value


def _require_within(section: Mapping[str, Any], model_name: str) -> None:
    """Raise ModelError for a pad without a row of the embedding, and for more chosen experts than there are."""
    size, pad = section.get("vocab_size"), section.get("pad_token_id")
    if type(size) is int and type(pad) is int and pad >= size:
        rule = FieldRule(f"an id below the vocab_size of {size:,}, or null", lambda value: False)
        raise _error("pad_token_id", pad, rule, model_name)
    chosen = section.get("num_experts_per_tok")
    for name in _EXPERTS:
        n_experts = section.get(name)
        if type(chosen) is int and type(n_experts) is int and n_experts > 0 and not 1 <= chosen <= n_experts:
            rule = FieldRule(f"a whole number from 1 to the {name} of {n_experts:,}", lambda value: False)
            raise _error("num_experts_per_tok", chosen, rule, model_name)


def _error(name: str, value: object, rule: FieldRule, model_name: str) -> ModelError:
    return ModelError(
        f"model {model_name!r}: config.json has {name} {as_json(value)}; it should be {rule.expected}; {_TAKE_AGAIN}"
    )


def as_json(value: object) -> str:
    """Return a value as JSON, without its end if it is long.

    >>> as_json(None), as_json({"a": [1]})
    ('null', '{"a": [1]}')
    """
    if type(value) is int and abs(value) >= 10**18:
        return "of more than 18 digits"
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):  # not from a file, or with a number of 5,000 digits
        return f"of type {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:59]}…"
