"""Facts that families name differently, and that one file reads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import phaselens
from phaselens.lens import families
from phaselens.testing import tiny_model


def attention_of(family: str, **options):
    model = tiny_model(family, **options)
    names = (
        name for name, _ in model.named_modules() if name.endswith((".attn", ".attention", ".self_attn"))
    )
    return model.get_submodule(next(names))


@pytest.mark.parametrize(
    ("family", "n_heads", "n_kv_heads", "d_head"),
    [
        ("llama", 4, 4, 8),
        ("llama-gqa", 4, 2, 8),
        ("llama-d-head", 4, 2, 16),
        ("gpt2", 4, 4, 8),
        ("gpt-neox", 4, 4, 8),
    ],
)
def test_heads_are_those_the_module_computes_with(family, n_heads, n_kv_heads, d_head):
    attention = attention_of(family)
    shape = (families.n_heads_of(attention), families.n_kv_heads_of(attention), families.d_head_of(attention))
    assert shape == (n_heads, n_kv_heads, d_head)


def test_scores_have_the_scale_the_softcap_and_the_sink_logits_of_the_family():
    assert families.scale_of(attention_of("llama")) == 8**-0.5
    assert families.scale_of(attention_of("granite")) == 0.3
    assert families.softcap_of(attention_of("gemma2")) == 50.0
    assert families.softcap_of(attention_of("gemma3")) is None
    assert families.sink_logits_of(attention_of("gpt-oss")).shape == (4,)
    assert families.sink_logits_of(attention_of("llama")) is None
    assert [families.needs_eager(tiny_model(family)) for family in ("gemma2", "gpt-oss", "llama")] == [
        True,
        True,
        False,
    ]


def test_logits_have_the_factor_and_the_softcap_of_the_family():
    assert families.logit_factor_of(tiny_model("granite")) == 0.5
    assert families.logit_factor_of(tiny_model("cohere2", logit_scale=0.25)) == 0.25
    assert families.logit_softcap_of(tiny_model("gemma2")) == 30.0
    neox = tiny_model("gpt-neox")
    assert families.unembedding_of(neox) is neox.lm_head
    assert families.logit_factor_of(neox) == 1.0
    assert families.logit_softcap_of(neox) is None


@pytest.mark.parametrize(
    ("stated", "expected"), [(3, 3), (0, 0), (-1, None), (48, None), (10**12, None), (None, None)]
)
def test_a_bos_token_that_the_model_does_not_have_is_none(stated, expected):
    model = tiny_model("llama", vocab_size=48)
    model.config.bos_token_id = stated
    assert families.bos_token_id_of(model) == expected


def test_an_unknown_fused_projection_is_refused_with_those_known():
    with pytest.raises(phaselens.RefusedModel, match=r"Linear computes q, k and v .* known: GPT2Attention"):
        families.fused_layout(torch.nn.Linear(2, 2))


# Names that tokenizers, arguments of attention, dimensions and other attributes have too.
SHARED = {"sinks", "attention_type", "bos_token_id", "d_model", "scaling"}


def test_no_other_file_reads_the_names_of_a_family():
    tables = vars(families).values()
    names = {name for table in tables if type(table) is tuple for name in table if isinstance(name, str)}
    assert {"sinks", "head_dim", "lm_head", "scaling"} < names
    quoted = re.compile("|".join(f"[\"']{name}[\"']" for name in sorted(names - SHARED)))
    reads_sinks = re.compile(r'getattr\(.*"sinks"|original_component\.sinks')
    lens = Path(families.__file__).parent
    # DroPE's classes are a family themselves, which sets what families.py reads. The values of a config's file are
    # checked under the names that the file has.
    allowed = ("families.py", "drope.py", "declared_values.py")
    other_files = [path for path in lens.glob("*.py") if path.name not in allowed]
    offending = {
        path.name
        for path in other_files
        if quoted.search(path.read_text()) or reads_sinks.search(path.read_text())
    }
    assert not offending
