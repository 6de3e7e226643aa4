"""Checkpoints on disk: those that load, and every reason why one does not, each in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import phaselens
from phaselens.lens import checkpoints
from phaselens.testing import tiny_model, tiny_tokenizer
from tests.lens.conftest import text
from tests.marks import mark_later_slow
from tests.toys import save_in_hub_cache


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "llama"
    tiny_model("llama-gqa").save_pretrained(path)
    return path


def copy_of(folder, tmp_path):
    path = tmp_path / "copy"
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def test_a_folder_loads_as_it_is(folder, tokens):
    lens = phaselens.load(str(folder))
    with torch.no_grad():
        assert torch.equal(lens(tokens), tiny_model("llama-gqa")(tokens).logits)
    info = lens.info
    assert (info.label, info.family, info.n_layers, info.n_heads, info.n_kv_heads, info.d_head) == (
        "llama", "llama", 2, 4, 2, 8,
    )  # fmt: skip
    assert info.dtype == "float32"
    assert info.device == "cpu"
    assert set(info.files) >= {"config.json", "model.safetensors"}
    assert lens.tokenizer is None
    assert "no tokenizer" in lens.tokenizer_note
    json.dumps(info.as_dict(), allow_nan=False)


def test_a_path_object_loads_under_the_given_label(folder):
    assert phaselens.load(folder, label="mine").info.label == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16", "float16", torch.float64])
def test_the_dtype_is_that_of_the_option(folder, name):
    lens = phaselens.load(folder, dtype=name)
    assert str(lens.dtype).removeprefix("torch.") == lens.info.dtype
    dtypes = []
    lens.stream(text(1), [("blocks.0.attn.hook_sink", lambda v, hook: dtypes.append(v.dtype))])
    assert dtypes == [torch.float64 if name is torch.float64 else torch.float32]


@pytest.mark.slow
@pytest.mark.parametrize("base", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "attention_type", mark_later_slow(["nope", "qk_norm_nope", "q_norm_nope", "k_norm_nope"])
)
def test_drope_checkpoints_load_natively(base, attention_type, tmp_path, tokens):
    from transformers import AutoModelForCausalLM

    model = tiny_model(
        f"{base}-drope-{attention_type}".replace("_", "-"),
        softmax_scale=0.5 if attention_type == "nope" else None,
    )
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == f"{base}_drope"
    assert saved["attention_type"] == attention_type
    assert saved.get("softmax_scale", "absent") == (0.5 if attention_type == "nope" else "absent")
    lens = phaselens.load(tmp_path)
    assert lens.info.positions == ("nope", "nope")
    assert lens.info.attention_type == attention_type
    assert lens.info.scales == ((0.5, 0.5) if attention_type == "nope" else (8**-0.5, 8**-0.5))
    with torch.no_grad():
        expected = model(tokens).logits
        assert torch.equal(lens(tokens), expected)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, expected)


@pytest.mark.parametrize("attention_type", ["nope", "qk_norm_nope", "q_norm_nope", "k_norm_nope"])
def test_cached_decoding_of_drope_models_equals_uncached(attention_type, tokens):
    """The reference classes' norm variants ignore the cache under transformers 5."""
    model = tiny_model(f"llama-drope-{attention_type}".replace("_", "-"))
    with torch.no_grad():
        expected = model(tokens).logits
        output = model(tokens[:, :20], use_cache=True)
        steps = [output.logits]
        for i in range(20, 24):
            output = model(tokens[:, i : i + 1], past_key_values=output.past_key_values, use_cache=True)
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=2e-5, rtol=1e-5)


def test_drope_nope_is_the_base_model_with_cos_1_and_sin_0(tokens):
    base = tiny_model("llama-gqa")
    drope = tiny_model("llama-drope-nope")
    assert drope.load_state_dict(base.state_dict(), strict=True)
    base.model.rotary_emb.register_forward_hook(
        lambda _m, _a, o: (torch.ones_like(o[0]), torch.zeros_like(o[1]))
    )
    with torch.no_grad():
        assert torch.equal(drope(tokens).logits, base(tokens).logits)


def test_an_unknown_attention_type_is_named():
    with pytest.raises(ValueError, match=r"attention_type is 'alibi'; DroPE knows nope"):
        tiny_model("llama-drope-nope", attention_type="alibi")


_PLAIN = """
import sys
order, folder = sys.argv[1:]
if order == "before":
    import phaselens
from transformers import LlamaConfig, AutoConfig, AutoModelForCausalLM
if order == "after":
    import phaselens
import torch
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=order == "before")
assert type(model).__module__ == "phaselens.lens.drope", type(model)
assert AutoConfig.from_pretrained(folder).attention_type == "qk_norm_nope"
from transformer_lens.model_bridge import TransformerBridge
tokens = torch.arange(9)[None]
with torch.no_grad():
    expected = model(tokens).logits
    bridge = TransformerBridge.boot_transformers(folder)
    assert torch.equal(bridge(tokens), expected)
    seen = []
    bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.0.attn.hook_sink", lambda v, hook: seen.append(v))])
assert seen[0].shape == (1, 4, 9)
print("same")
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", ["before", "after"])
def test_plain_transformers_and_transformer_lens_load_drope_once_phaselens_is_imported(order, tmp_path):
    """A fresh process imports them in either order; a checkpoint's own code (auto_map) never runs."""
    tiny_model("llama-drope-qk-norm-nope").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.EvilConfig"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('remote code ran')")
    process = subprocess.run(
        [sys.executable, "-c", _PLAIN, order, str(tmp_path)], capture_output=True, text=True
    )
    assert process.stdout.strip().endswith("same"), process.stderr[-2000:]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("dropee", "did you mean drope"),
        ("./not/here", "no such folder"),
        (__file__, "is a file"),
    ],
)
def test_a_missing_source_is_refused(source, message):
    with pytest.raises(phaselens.ModelError, match=message) as caught:
        phaselens.load(source)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def refused(path, message, **options):
    with pytest.raises(phaselens.ModelError, match=message) as caught:
        phaselens.load(path, **options)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def test_a_folder_without_config_is_refused(tmp_path):
    refused(tmp_path, "no config.json")


def test_a_config_without_weights_is_refused(folder, tmp_path):
    path = copy_of(folder, tmp_path)
    (path / "model.safetensors").unlink()
    refused(path, r"no \*.safetensors")


def test_truncated_weights_are_refused(folder, tmp_path):
    path = copy_of(folder, tmp_path)
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[: len(content) // 2])
    refused(path, "truncated or damaged")
    (path / "model.safetensors").write_bytes(b"")
    refused(path, "truncated or damaged")


def test_missing_tensors_are_never_filled_at_random(folder, tmp_path):
    path = copy_of(folder, tmp_path)
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    refused(path, r"lacks 1 of the model's tensors \(first: model.layers.1.mlp.up_proj.weight\)")


def test_a_broken_or_unknown_config_is_refused(folder, tmp_path):
    path = copy_of(folder, tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text("{")
    refused(path, "could not be loaded")
    (path / "config.json").write_text(json.dumps({**config, "model_type": "no_such_type"}))
    refused(
        path, 'config.json has model_type "no_such_type", which this version of transformers does not know'
    )
    (path / "config.json").write_text(json.dumps({**config, "hidden_size": 31}))
    refused(path, "fields that contradict each other: The hidden size .31. is not a multiple")


def test_pickled_weights_are_read_only_on_request(folder, tmp_path):
    path = copy_of(folder, tmp_path)
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    refused(path, "pickle, which can run code")
    assert phaselens.load(path, allow_pickle=True).info.n_layers == 2


def test_a_model_too_large_for_memory_is_refused(folder, monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"available": 1000})())
    refused(folder, r"needs 0\.0 GB as float32, and 0\.0 GB are free on cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "did you mean"),
        ({"dtype": torch.int32}, "dtype torch.int32"),
        ({"device": "gpu"}, "torch has no device 'gpu'"),
        ({"device": "meta"}, "cpu and cuda only"),
        ({"positions": "rope"}, "use auto"),
    ],
)
def test_unknown_options_are_refused(folder, options, message):
    with pytest.raises(phaselens.InputError, match=message) as caught:
        phaselens.load(folder, **options)
    assert caught.value.exit_code == 2


def test_a_missing_cuda_device_is_refused(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(phaselens.InputError, match="no CUDA device"):
        phaselens.load(folder, device="cuda")
    assert checkpoints.resolve_device("auto") == torch.device("cpu")


@pytest.mark.slow
def test_a_model_that_differs_is_refused_and_the_layer_is_named(folder, monkeypatch):
    """A lens that computes layer 1's attention wrongly is refused, with the layer in the message."""
    from phaselens import attention

    true = attention.attend

    def wrong(q, k, v, **options):
        output, lse = true(q, k, v, **options)
        return 1.01 * output, lse

    monkeypatch.setattr(attention, "attend", wrong)
    refused(folder, r"failed its check 'logits, all statistics hooked'.*first seen entering layer 1, by 0\.")


@pytest.mark.slow
def test_wrong_statistics_are_refused(folder, monkeypatch):
    from phaselens import attention

    true = attention.summarise

    def wrong(*inputs, **options):
        summary = true(*inputs, **options)
        return summary if summary.entropy is None else replace(summary, entropy=summary.entropy + 1e-3)

    monkeypatch.setattr(attention, "summarise", wrong)
    refused(
        folder,
        "failed its check 'streamed statistics equal those of the scores in float64': difference 0.001.*worst in layer",
    )


def test_nan_weights_load_without_the_check_and_measure_as_nan(folder, tmp_path):
    """NaN is the model's own value: an unchecked lens shows it, and a metric reports it as missing."""
    path = copy_of(folder, tmp_path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    refused(path, r"weights hold NaN \(first: model.layers.1.self_attn.q_proj.weight, 1 of 1,024")
    lens = phaselens.load(path, check=False)
    sinks = []
    lens.stream(text(1), [("blocks.1.attn.hook_sink", lambda v, hook: sinks.append(v))])
    assert sinks[0][0, 0].isnan().any()


def test_other_objects_and_loaded_lenses_are_refused(tokens):
    with pytest.raises(phaselens.InputError, match=r"expected source as a name.*, received 3"):
        phaselens.load(3)
    lens = phaselens.load(tiny_model("llama"))
    with pytest.raises(phaselens.InputError, match="loaded already"):
        phaselens.load(lens)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "ignored", "expected"),
    [
        ("gpt2", {"num_key_value_heads": 2}, {"n_kv_heads": 4}),
        ("gpt-neox", {"num_key_value_heads": 2}, {"n_kv_heads": 4}),
        ("llama", {"attn_logit_softcapping": 2.0}, {"softcap": None}),
    ],
)
def test_configuration_fields_that_the_model_ignores_are_ignored(family, ignored, expected, tokens):
    model = tiny_model(family)
    for field, value in ignored.items():
        setattr(model.config, field, value)
    lens = phaselens.load(model)
    assert {name: getattr(lens.info, name) for name in expected} == expected
    assert lens.weight_of(0, "attn.W_K").shape == (lens.info.n_kv_heads, lens.info.d_model, lens.info.d_head)
    _, cache = lens.run_with_cache(tokens, names_filter="blocks.0.attn.hook_k")
    assert cache["blocks.0.attn.hook_k"].shape[2:] == (lens.info.n_kv_heads, lens.info.d_head)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"adds_bos": False}, {"adds_bos": False, "has_bos": False}])
def test_a_tokenizer_made_in_memory_is_used(options):
    lens = phaselens.load(tiny_model("llama"), tokenizer=tiny_tokenizer(**options))
    assert lens.text_tokenizer("to be")["input_ids"][-5:] == [31, 26, 3, 13, 16]
    assert lens.to_tokens("to be", prepend_bos=False).tolist() == [[31, 26, 3, 13, 16]]
    policies = {
        (): "tokenizer adds BOS",
        (False,): "tokenizer adds no BOS",
        (False, False): "tokenizer has no BOS",
    }
    assert lens.info.bos_policy == policies[tuple(options.values())]
    assert (lens.text_tokenizer.bos_token_id is None) == ("has_bos" in options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("family", ["llama-gqa", "llama-drope-nope", "gemma2", "gpt-neox"])
def test_the_check_passes_in_half_precision(family, dtype):
    from phaselens.lens import run_checks

    lens = phaselens.load(tiny_model(family), dtype=dtype)
    assert all(result.ok for result in run_checks(lens))


def test_a_hub_id_that_cannot_be_fetched_fails_at_once(monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants, errors

    refused("nobody/nothing", "not in the local cache, and HF_HUB_OFFLINE is set")
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)

    def unreachable(url, timeout):
        assert timeout == 5
        raise errors.HTTPError("no route")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    refused("nobody/nothing", "the hub at .* cannot be reached")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "label"), [("gpt2", "gpt2"), ("gpt2-medium", "gpt2-medium"), ("owner/gpt2", "gpt2")]
)
def test_a_hub_id_loads_from_the_local_cache_with_and_without_an_owner(name, label, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    files = save_in_hub_cache(tmp_path, name, "gpt2")
    by_name, by_folder = phaselens.load(name), phaselens.load(files)
    assert (by_name.info.source, by_name.info.label, by_name.info.family) == (name, label, "gpt2")
    assert torch.equal(by_name.stream(text(9), unembed=True), by_folder.stream(text(9), unembed=True))
    assert by_name.to_tokens("a b").tolist() == [[0, 3, 4]]


def test_an_uncached_hub_id_without_an_owner_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refused(
        "gpt2",
        "model 'gpt2': .* nor a hub id in the local cache, and HF_HUB_OFFLINE is set; unset it to fetch",
    )


# Weights in several files, tied and not


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [False, True])
def test_shards_and_a_single_file_load_tied_and_untied(tmp_path, tokens, shards, tied):
    model = tiny_model("llama-gqa", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="20KB" if shards else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == shards
    lens = phaselens.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(lens(tokens), model(tokens).logits)
    wrapped = lens.original_model
    shares = wrapped.lm_head.weight.data_ptr() == wrapped.model.embed_tokens.weight.data_ptr()
    assert shares == tied


def sharded(path):
    tiny_model("llama-gqa").save_pretrained(path, max_shard_size="20KB")
    index = path / "model.safetensors.index.json"
    return index, json.loads(index.read_text())


def test_an_untied_model_without_an_unembedding_is_refused(tmp_path):
    index, content = sharded(tmp_path)
    shard = content["weight_map"].pop("lm_head.weight")
    tensors = load_file(tmp_path / shard)
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / shard, metadata={"format": "pt"})
    index.write_text(json.dumps(content))
    refused(tmp_path, r"lacks 1 of the model's tensors \(first: lm_head.weight\)")


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/outside.safetensors",
        "a/../../outside.safetensors",
        "C:\\w.safetensors",
    ],
)
def test_shards_outside_of_the_folder_are_not_read(tmp_path, name):
    folder = tmp_path / "model"
    index, content = sharded(folder)
    shard = content["weight_map"]["lm_head.weight"]
    (tmp_path / "outside.safetensors").write_bytes((folder / shard).read_bytes())
    content["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(content))
    refused(folder, "names weights outside of the checkpoint's folder")


class _Evil:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was read",))


def test_a_pickle_among_the_shards_is_not_read(tmp_path):
    index, content = sharded(tmp_path)
    torch.save({"lm_head.weight": _Evil()}, tmp_path / "model-00001.bin")
    content["weight_map"]["lm_head.weight"] = "model-00001.bin"
    index.write_text(json.dumps(content))
    refused(tmp_path, r"names weights that are not safetensors \('model-00001.bin'\); pickle can run code")


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("../outside.safetensors", "transformers_weights in config.json names weights outside"),
        ("adapter_model.bin", "names weights that are not safetensors"),
        ("other.safetensors", None),
    ],
)
def test_the_file_that_a_config_names_is_checked(folder, tmp_path, tokens, chosen, message):
    path = copy_of(folder, tmp_path)
    another_model = tiny_model("llama-gqa", seed=1)
    save_file(another_model.state_dict(), path / "other.safetensors", metadata={"format": "pt"})
    torch.save(_Evil(), path / "adapter_model.bin")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "transformers_weights": chosen}))
    if message is not None:
        refused(path, message)
        return
    with torch.no_grad():
        assert torch.equal(phaselens.load(path)(tokens), another_model(tokens).logits)


@pytest.mark.parametrize("name", ["model-00001.bin", "../outside.safetensors"])
def test_the_index_of_a_hub_model_is_checked_before_its_shards_are_read(tmp_path, monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    files = save_in_hub_cache(tmp_path, "org/model", "llama-gqa")
    weights = load_file(files / "model.safetensors")
    (files / "model.safetensors").unlink()
    torch.save({"lm_head.weight": _Evil()}, files / "model-00001.bin")
    save_file(weights, files / "model-00002.safetensors", metadata={"format": "pt"})
    index = {
        "metadata": {},
        "weight_map": {**dict.fromkeys(weights, "model-00002.safetensors"), "lm_head.weight": name},
    }
    (files / "model.safetensors.index.json").write_text(json.dumps(index))
    monkeypatch.setattr(checkpoints.headers, "require_intact", lambda *_, **__: None)
    refused("org/model", "model.safetensors.index.json names weights")


@pytest.mark.slow
def test_implementations_that_a_config_names_are_left_out(folder, tmp_path, tokens):
    """A config can name kernels on the hub, which transformers would fetch and run."""
    path = copy_of(folder, tmp_path)
    config = json.loads((path / "config.json").read_text())
    evil = {"attn_implementation": "evil/attention", "experts_implementation": "evil/experts"}
    (path / "config.json").write_text(json.dumps({**config, **evil}))
    with torch.no_grad():
        assert torch.equal(phaselens.load(path)(tokens), phaselens.load(folder)(tokens))


def test_an_error_of_the_models_own_forward_is_one_line():
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(7, 32)
    with pytest.raises(phaselens.ModelError, match="own forward on text fails in float32"):
        phaselens.load(model)
