"""Tiny random models of every family that the lens supports, built in code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from phaselens.errors import (
    InputError,
    close_matches,
    require_flag,
    require_number,
    require_text,
    require_whole,
    short_form,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from phaselens.lens import HookedTransformer

    TinyModel: TypeAlias = PreTrainedModel

_COMMON: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "attention_dropout": 0.0,
}

# Family: (configuration class, fields that differ from the common ones). Windows are shorter than the tests' texts.
_RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama-gqa": ("LlamaConfig", {}),
    "llama-mqa": ("LlamaConfig", {"num_key_value_heads": 1}),
    "llama-d-head": ("LlamaConfig", {"head_dim": 16}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "mistral": ("MistralConfig", {"sliding_window": 7}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 7, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 7, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3Config", {}),
    "granite": (
        "GraniteConfig",
        {
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.5,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
        },
    ),
    "gpt-neox": ("GPTNeoXConfig", {"rotary_pct": 0.5}),
    "gpt2": ("GPT2Config", {}),
    "olmo2": ("Olmo2Config", {}),
    "bitnet": ("BitNetConfig", {}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "cohere2": ("Cohere2Config", {"sliding_window": 7}),
    "gpt-oss": (
        "GptOssConfig",
        {"head_dim": 8, "sliding_window": 7, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    **{
        f"{base}-drope-{attention_type}".replace("_", "-"): (config, {"attention_type": attention_type})
        for base, config in (("llama", "DroPELlamaConfig"), ("qwen2", "DroPEQwen2Config"))
        for attention_type in ("nope", "qk_norm_nope", "q_norm_nope", "k_norm_nope")
    },
}

#: Families of which `tiny_lens` and `tiny_model` can make a model.
FAMILIES: tuple[str, ...] = tuple(_RECIPES)

# Configuration fields that a family names differently, or does not have (None).
_FIELD_NAMES: dict[str, dict[str, str | None]] = {
    "GPT2Config": {
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": None,
        "max_position_embeddings": "n_positions",
        "attention_dropout": "attn_pdrop",
    },
    "GPTNeoXConfig": {"num_key_value_heads": None},
}
_WITH_LAYER_TYPES = {"Gemma2Config", "Gemma3TextConfig", "Cohere2Config", "GptOssConfig"}


def tiny_model(
    family: str, *, seed: int = 0, dtype: torch.dtype | None = None, gain: float = 3.0, **overrides: Any
) -> TinyModel:
    """Create a random Hugging Face model of a family, small enough for a forward in milliseconds.

    Args:
        family: one of `FAMILIES`.
        seed: seed of the weights.
        dtype: a torch dtype; float32 by default.
        gain: factor of the query and key projections; the default makes attention far from uniform.
        overrides: fields of the configuration, by their names in transformers' Llama.

    Returns:
        A model in eval mode, without a tokenizer: 2 layers, d_model 32, 67 token ids.

    Raises:
        InputError: for an unknown family, a dtype that is none, and a field that the family's configuration lacks.

    >>> tiny_model("gpt2").config.n_layer
    2
    """
    require_text("family", family)
    require_whole("seed", seed, 0)
    require_number("gain", gain)
    if family not in _RECIPES:
        raise InputError(f"no tiny model {family!r}; {close_matches(family, FAMILIES)}")
    import torch
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    from phaselens.lens import drope

    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise InputError(f"expected dtype as a torch dtype, received {short_form(dtype)}")
    class_name, family_fields = _RECIPES[family]
    config_class = getattr(drope, class_name, None) or getattr(transformers, class_name)
    field_names = _FIELD_NAMES.get(class_name, {})
    for field in overrides:
        target = field_names.get(field, field)
        if target is None or not hasattr(config_class(), target):
            names = [name for name in vars(config_class()) if not name.startswith("_")]
            raise InputError(
                f"tiny_model({family!r}): {class_name} has no field {field!r}; {close_matches(field, names)}"
            )
    fields: dict[str, Any] = {}
    for field, value in {**_COMMON, **family_fields, **overrides}.items():
        target = field_names.get(field, field)
        if target is not None:
            fields[target] = value
    if class_name in _WITH_LAYER_TYPES and "layer_types" not in fields:
        n_layers = fields["num_hidden_layers"]
        fields["layer_types"] = [
            ("sliding_attention", "full_attention")[layer % 2] for layer in range(n_layers)
        ]
    try:
        config = config_class(**fields)
    except StrictDataclassError as error:
        raise InputError(f"tiny_model({family!r}): {class_name}: {' '.join(str(error).split())}") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # A loop over experts also runs in float64; other implementations of mixtures of experts do not.
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, experts_implementation="eager"
        )
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                elif any(
                    part in parameter_name for part in ("q_proj", "k_proj", "qkv", "query_key", "c_attn")
                ):
                    parameter.mul_(gain)
                if not any(part in parameter_name for part in ("norm", "ln_")):
                    parameter.mul_(4.0)
    return model.to(dtype or torch.float32).eval()


def tiny_lens(
    family: str = "llama", *, label: str | None = None, positions: str = "auto", **options: Any
) -> HookedTransformer:
    """Create a lens around `tiny_model(family, **options)`, with the tiny tokenizer.

    >>> tiny_lens("llama", positions="nope").info.positions
    ('nope', 'nope')
    """
    from phaselens.lens import load

    model = tiny_model(family, **options)
    return load(
        model,
        label=label or family,
        tokenizer=tiny_tokenizer(),
        positions=positions,
        device="cpu",
        check=False,
    )


def tiny_tokenizer(
    *, adds_bos: bool = True, has_bos: bool = True, adds_eos: bool = False
) -> PreTrainedTokenizerFast:
    """Create a tokenizer of single characters for the tiny models' 67 ids: `<s>` 0, `</s>` 1, unknown 2, characters.

    Like those of real models, it may put `<s>` before a text and `</s>` after it, or have no `<s>` at all.

    >>> tiny_tokenizer()("to be")["input_ids"]
    [0, 31, 26, 3, 13, 16]
    """
    for name, flag in (("adds_bos", adds_bos), ("has_bos", has_bos), ("adds_eos", adds_eos)):
        require_flag(name, flag)
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    characters = " \n.,;:!?'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    special_tokens = ["<s>", "</s>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*special_tokens, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    if adds_bos or adds_eos:
        template = ["<s>"] * adds_bos + ["$A"] + ["</s>"] * adds_eos
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(template), special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    bos_token = {"bos_token": "<s>"} if has_bos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        **bos_token,
    )
