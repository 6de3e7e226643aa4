"""Conditions give the losses of full forwards with fewer layers; conditions without an effect are refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import phaselens
from phaselens.lens.token_losses import token_losses
from phaselens.plugin import CausalMetric, Condition, Edit, LayerView, Params, TaskPrompt
from phaselens.testing import FAMILIES, check_metric
from tests.runs.conditions import causal, losses, naive_loss, zero
from tests.toys import letters, toy_lens

TEXTS = [letters(length, length) for length in (4, 9, 2, 6)]


@pytest.fixture(scope="module")
def lens() -> Any:
    return toy_lens(num_hidden_layers=4, dtype=torch.float64)


@pytest.fixture
def layers_run(lens: Any) -> Iterator[Counter[int]]:
    """Counts the attention forwards of each layer, after the first loss (which checks the unembedding)."""
    token_losses(lens, lens.stream(torch.tensor([[0, 5]]))[0], torch.tensor([5, 6]))
    count: Counter[int] = Counter()
    handles = [
        block.attn.original_component.register_forward_pre_hook(lambda *_, layer=layer: count.update([layer]))
        for layer, block in enumerate(lens.blocks)
    ]
    yield count
    for handle in handles:
        handle.remove()


def run(lens: Any, *metrics: Any, texts: Any = TEXTS, **options: Any) -> Any:
    result = phaselens.run(lens, metrics=list(metrics), texts=texts, **options)
    for metric_result in result.metrics.values():
        assert not metric_result.failures, metric_result.failures[0].traceback
    return result


def ids(lens: Any, text: str) -> list[int]:
    return list(lens.text_tokenizer(text)["input_ids"])


# Edits as a metric declares them, and equivalent plain hooks.
CASES = {
    "hook_embed": ("hook_embed", lambda x, *_: x * 0.5, None),
    "resid_pre": ("blocks.1.hook_resid_pre", lambda x, *_: x + 0.3, (1,)),
    "attn_out": ("blocks.1.hook_attn_out", lambda x, *_: -x, (0,)),
    "attn_out below": ("blocks.0.hook_attn_out", lambda x, *_: x * 0.0, None),
    "mlp hook_post": ("blocks.0.mlp.hook_post", lambda x, *_: x * 0.5, (1,)),
    "resid_mid": ("blocks.1.hook_resid_mid", lambda x, *_: x + 0.3, (0,)),
    "mlp_out": ("blocks.0.hook_mlp_out", lambda x, *_: x * 0.0, (0,)),
    "resid_post": ("blocks.0.hook_resid_post", lambda x, *_: x.flip(-1), None),
    "last mlp": ("blocks.1.hook_mlp_out", lambda x, *_: x * 0.0, (1, 2)),
    "v": ("blocks.0.attn.hook_v", lambda x, *_: x * 0.0, (0,)),
    "rot_q": ("blocks.1.attn.hook_rot_q", lambda x, *_: x * 0.5, None),
    "rot_k": ("blocks.0.attn.hook_rot_k", lambda x, *_: x * 0.5, (0, 2)),
    "z": ("blocks.1.attn.hook_z", lambda x, *_: x * 0.0, None),
}


def _positioned(change: Any, positions: Any) -> Any:
    """A plain hook for a text without padding and without a cache."""

    def hook(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
        if positions is None:
            return change(tensor)
        edited = tensor.clone()
        edited[:, list(positions)] = change(tensor)[:, list(positions)]
        return edited

    return hook


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES[1:]] + [FAMILIES[0]]
)
def test_losses_equal_those_of_a_full_forward_under_plain_hooks(family: str) -> None:
    model = toy_lens(family, dtype=torch.float64)
    served = {name: case for name, case in CASES.items() if model.find_hook(case[0]) is not None}
    assert len(served) >= 9
    conditions = [
        Condition(name, [Edit(point, to, positions)]) for name, (point, to, positions) in served.items()
    ]
    texts = [letters(5), letters(3, 4)]
    result = losses(run(model, causal(*conditions), texts=texts))
    for text, words in zip(("0", "1"), texts, strict=True):
        tokens = ids(model, words)
        assert result[text, "baseline", None] == pytest.approx(
            float(naive_loss(model, tokens).mean()), abs=1e-9
        )
        for name, (point, to, positions) in served.items():
            expected = float(naive_loss(model, tokens, [(point, _positioned(to, positions))]).mean())
            assert result[text, name, None] == pytest.approx(expected, abs=1e-9), name


def test_losses_in_float32_agree_to_a_millionth() -> None:
    model = toy_lens()
    conditions = [zero(f"blocks.{layer}.hook_mlp_out", 0, layer=layer) for layer in range(2)]
    result = losses(run(model, causal(*conditions), texts=[letters(30)]))
    for layer in range(2):
        hook = (f"blocks.{layer}.hook_mlp_out", _positioned(lambda x: x * 0.0, (0,)))
        expected = float(naive_loss(model, ids(model, letters(30)), [hook]).mean())
        assert result["0", "off", layer] == pytest.approx(expected, abs=1e-6)


def test_a_condition_runs_only_the_layers_from_its_lowest_edit_on(
    lens: Any, layers_run: Counter[int]
) -> None:
    sweep = [zero(f"blocks.{layer}.attn.hook_z", layer=layer) for layer in range(4)]
    run(lens, causal(*sweep), texts=TEXTS[:1])
    # The baseline runs each layer once; the condition of layer l runs layer l and those above it.
    assert [layers_run[layer] for layer in range(4)] == [2, 3, 4, 5]


@pytest.mark.parametrize("point", ["hook_attn_out", "attn.hook_out", "hook_resid_mid", "mlp.hook_post"])
def test_edits_after_attention_reuse_its_output_from_the_baseline(
    lens: Any, layers_run: Counter[int], point: str
) -> None:
    sweep = [zero(f"blocks.{layer}.{point}", layer=layer) for layer in range(4)]
    run(lens, causal(*sweep), texts=TEXTS[:1])
    assert [layers_run[layer] for layer in range(4)] == [1, 2, 3, 4]


def test_edits_of_the_mlp_output_do_not_run_their_layer_again(lens: Any, layers_run: Counter[int]) -> None:
    sweep = [zero(f"blocks.{layer}.hook_mlp_out", 0, layer=layer) for layer in range(4)]
    run(lens, causal(*sweep), texts=TEXTS[:1])
    assert [layers_run[layer] for layer in range(4)] == [1, 2, 3, 4]


def test_metrics_share_the_baseline(lens: Any, layers_run: Counter[int]) -> None:
    first = causal(zero("blocks.3.hook_attn_out"), name="first")
    second = causal(zero("blocks.3.attn.hook_z"), name="second")
    result = run(lens, first, second, texts=TEXTS[:1])
    # In the last layer: of the baseline, and of the second; the first is edited behind it.
    assert [layers_run[layer] for layer in range(4)] == [1, 1, 1, 2]
    assert losses(result, "first")["0", "baseline", None] == losses(result, "second")["0", "baseline", None]


def test_order_of_conditions_batches_and_texts_change_no_number(lens: Any) -> None:
    conditions = [
        zero("blocks.1.hook_mlp_out", 0, name="mlp"),
        zero("blocks.2.attn.hook_v", 0, name="v"),
        Condition("half", [Edit("blocks.{layer}.attn.hook_rot_q", lambda x, site: x / 2)]),
    ]
    usual = run(lens, causal(*conditions))
    for options in ({"batch_tokens": 1}, {"batch_tokens": 20}):
        result = losses(run(lens, causal(*conditions[::-1]), **options))
        assert result == pytest.approx(losses(usual), abs=1e-12)
    turned = run(lens, causal(*conditions), texts=TEXTS[::-1])
    rows = {row[1]: row[2:] for row in turned.rows("causal", "conditions").rows}
    for row in usual.rows("causal", "conditions").rows:
        assert rows[row[1]] == pytest.approx(row[2:], abs=1e-12)


def test_pads_are_never_edited(lens: Any) -> None:
    collected: list[torch.Tensor] = []

    def double_and_spoil_pads(tensor: torch.Tensor, site: Any) -> torch.Tensor:
        collected.append(site.batch.real)
        return torch.where(site.batch.real[..., None], tensor * 2, torch.nan)

    result = run(lens, causal(Condition("double", [Edit("blocks.0.hook_resid_pre", double_and_spoil_pads)])))
    assert not torch.cat([real.flatten() for real in collected]).all()  # there were pads
    assert all(loss is not None for loss in losses(result).values())


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (Edit("blocks.1.hook_mlp_out", lambda x, site: x), "blocks.1.hook_mlp_out changed no value"),
        (
            Edit("blocks.1.hook_mlp_out", lambda x, site: x.clone()),
            "blocks.1.hook_mlp_out changed no value",
        ),
        (
            Edit("blocks.1.hook_mlp_out", 0.0, [99]),
            "blocks.1.hook_mlp_out found no value to edit in any text",
        ),
    ],
)
def test_a_condition_that_changes_nothing_is_refused(lens: Any, edit: Edit, reason: str) -> None:
    idle, real = Condition("idle", [edit]), zero("blocks.2.hook_mlp_out", name="real")
    result = run(lens, causal(idle, real))
    by_condition = {record["condition"]: record for record in result.rows("causal", "conditions").records()}
    assert by_condition["idle"]["ratio"] is by_condition["idle"]["ppl"] is None
    assert by_condition["real"]["ratio"] > 1.0
    assert {loss for (_, name, _), loss in losses(result).items() if name == "idle"} == {None}
    assert any("idle is missing: its edit of" in warning and reason in warning for warning in result.warnings)

    separate = phaselens.run(lens, metrics=[causal(idle)], texts=TEXTS)
    (failure,) = separate.metrics["causal"].failures
    assert "no condition had an effect" in str(failure)
    assert failure.where is None  # a finding, not a mistake in the metric's code


@pytest.mark.parametrize(
    ("to", "message"),
    [
        (lambda x, site: None, "returned NoneType; return the new tensor"),
        (lambda x, site: x[:, :1], "return the new tensor"),
        (lambda x, site: x.mul_(0.0), "changed its tensor in place"),
    ],
)
def test_an_invalid_edit_fails_its_metric(lens: Any, to: Any, message: str) -> None:
    bad_metric = causal(Condition("bad", [Edit("blocks.1.hook_mlp_out", to)]), name="bad")
    sound_metric = causal(zero("blocks.2.hook_mlp_out"), name="good")
    result = phaselens.run(lens, metrics=[bad_metric, sound_metric], texts=TEXTS)
    assert result.failed == ["bad"]
    assert message in str(result.metrics["bad"].failures[0])
    assert result.rows("good", "conditions").rows


def test_zeroing_what_is_zero_gives_a_ratio_of_exactly_one() -> None:
    model = toy_lens(num_hidden_layers=3)
    with torch.no_grad():
        model.original_model.base_model.layers[1].original_component.mlp.down_proj.weight.zero_()
    sweep = [zero(f"blocks.{layer}.hook_mlp_out", 0, layer=layer) for layer in range(3)]
    also = Condition(
        "attn and mlp", [Edit("blocks.1.hook_mlp_out", 0.0), Edit("blocks.1.hook_attn_out", 0.0)]
    )
    result = run(model, causal(*sweep, also))
    ratios = {record["layer"]: record["ratio"] for record in result.rows("causal", "conditions").records()}
    assert ratios[1] == 1.0
    assert 1.0 not in (ratios[0], ratios[2])
    assert any(
        "off (layer 1): every text already had the value that it writes" in warning
        for warning in result.warnings
    )


def test_several_edits_of_one_point_are_applied_in_order(lens: Any) -> None:
    point = "blocks.1.hook_mlp_out"
    twice = Condition("twice", [Edit(point, lambda x, site: x + 1), Edit(point, lambda x, site: 3 * x)])
    once = Condition("once", [Edit(point, lambda x, site: 3 * (x + 1))])
    result = losses(run(lens, causal(twice, once)))
    for text in map(str, range(len(TEXTS))):
        assert result[text, "twice", None] == pytest.approx(result[text, "once", None], abs=1e-12)


def test_repeats_are_averaged_and_controls_contrasted(lens: Any) -> None:
    def noise(seed: int) -> Edit:
        def add(x: torch.Tensor, site: Any) -> torch.Tensor:
            draw = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
            return x + draw

        return Edit("blocks.1.hook_mlp_out", add)

    controls = [Condition("noise", [noise(seed)], layer=1, seed=seed, control_for="off") for seed in range(3)]
    result = run(lens, causal(zero("blocks.1.hook_mlp_out", layer=1), *controls))
    texts = result.rows("causal", "texts").records()
    mean = {
        text: np.mean(
            [record["loss"] for record in texts if record["text"] == text and record["condition"] == "noise"]
        )
        for text in map(str, range(len(TEXTS)))
    }
    weights = {record["text"]: record["n_predicted"] for record in texts}
    treated = {record["text"]: record["loss"] for record in texts if record["condition"] == "off"}
    expected = sum(weights[text] * (treated[text] - mean[text]) for text in mean) / sum(weights.values())
    (contrast,) = result.rows("causal", "contrasts").records()
    assert contrast["delta_nats"] == pytest.approx(expected, abs=1e-12)
    assert (contrast["condition"], contrast["control"], contrast["n_seeds"], contrast["n_texts"]) == (
        "off",
        "noise",
        3,
        4,
    )
    rows = {record["condition"]: record for record in result.rows("causal", "conditions").records()}
    assert (rows["noise"]["n_seeds"], rows["off"]["n_seeds"]) == (3, 1)


def test_d_z_weighs_texts_of_unequal_lengths_by_their_predicted_tokens(lens: Any) -> None:
    """d_z with each text's difference repeated for its predicted tokens; n − 1 counts texts."""

    def weighted(differences: list[float], tokens: list[int]) -> float:
        by_token = np.repeat(differences, tokens)
        return float(by_token.mean() / by_token.std() * np.sqrt((len(tokens) - 1) / len(tokens)))

    control = zero("blocks.2.hook_mlp_out", name="other", layer=1, control_for="off")
    run_of_both = run(lens, causal(zero("blocks.1.hook_mlp_out", layer=1), control))
    texts = run_of_both.rows("causal", "texts").records()
    loss = {
        name: [row["loss"] for row in texts if row["condition"] == name]
        for name in ("baseline", "off", "other")
    }
    tokens = [row["n_predicted"] for row in texts if row["condition"] == "baseline"]
    assert tokens == [4, 9, 2, 6]

    def difference(of: str, to: str) -> list[float]:
        return [a - b for a, b in zip(loss[of], loss[to], strict=True)]

    rows = {row["condition"]: row for row in run_of_both.rows("causal", "conditions").records()}
    (contrast,) = run_of_both.rows("causal", "contrasts").records()
    for value, differences in (
        (rows["off"]["d_z"], difference("off", "baseline")),
        (rows["other"]["d_z"], difference("other", "baseline")),
        (contrast["d_z"], difference("off", "other")),
    ):
        assert value == pytest.approx(weighted(differences, tokens), rel=1e-9)
        assert value != pytest.approx(weighted(differences, [1] * len(tokens)), rel=1e-2)


def test_perplexity_weighs_tokens_and_names_the_other_weighting(lens: Any) -> None:
    result = run(lens, causal(zero("blocks.1.hook_mlp_out")))
    texts = [
        record for record in result.rows("causal", "texts").records() if record["condition"] == "baseline"
    ]
    n, loss = (
        np.array([record["n_predicted"] for record in texts]),
        np.array([record["loss"] for record in texts]),
    )
    baseline = result.rows("causal", "conditions").records()[0]
    assert baseline["condition"] == "baseline"
    assert baseline["ppl"] == pytest.approx(np.exp((n * loss).sum() / n.sum()))
    assert baseline["ppl_length_weighted"] == pytest.approx(np.exp(((n + 1) * loss).sum() / (n + 1).sum()))


def test_one_text_has_no_interval_and_one_token_no_loss(lens: Any) -> None:
    result = run(lens, causal(zero("blocks.1.hook_mlp_out")), texts=["a b c"])
    row = result.rows("causal", "conditions").records()[1]
    assert row["ratio"] is not None
    assert row["ci_low"] is row["ci_high"] is row["p_value"] is None
    assert any(
        "off: " in warning and "ci_low" in warning and "missing" in warning for warning in result.warnings
    )
    short = run(lens, causal(zero("blocks.1.hook_mlp_out")), texts=["a", "a b c d"], bos="never")
    assert losses(short)["0", "off", None] is None
    assert any("one token, so nothing is predicted" in warning for warning in short.warnings)


def test_a_metrics_own_prompts_are_scored_from_their_start(lens: Any) -> None:
    recorded: list[Any] = []
    prompts = [TaskPrompt("long", [0, 5, 6, 7, 8, 9], scored_from=4), TaskPrompt("short", [0, 5, 9])]

    def record(self: Any, condition: Condition, outcome: Any) -> None:
        recorded.append((condition.name, outcome))
        self.losses.add(condition, outcome)

    metric = causal(zero("blocks.1.hook_mlp_out"), prompts=lambda self, tokenizer: prompts, record=record)
    result = run(lens, metric)
    assert {text for text, _, _ in losses(result)} == {"long", "short"}
    by = {(name, outcome.text): outcome for name, outcome in recorded}
    full_loss = naive_loss(lens, prompts[0].ids)
    assert by["baseline", "long"].loss == pytest.approx(full_loss[3:].numpy(), abs=1e-9)
    assert by["baseline", "long"].targets.tolist() == [8, 9]
    with torch.no_grad():
        logits = lens.original_model(torch.tensor([prompts[0].ids])).logits[0]
    assert by["off", "long"].top.shape == (2,)
    assert by["baseline", "long"].top.tolist() == logits[3:5].argmax(-1).tolist()
    assert by["baseline", "short"].loss == pytest.approx(naive_loss(lens, prompts[1].ids).numpy(), abs=1e-9)


def test_a_causal_metric_can_read_the_unedited_model_first(lens: Any) -> None:
    def update(self: Any, layer: Any) -> None:
        self.per_text.add(layer, norm=layer.float64("hook_mlp_out")[:, 0].norm(dim=-1))

    def conditions(self: Any) -> list[Condition]:
        layer = int(self.per_text.stack("norm").mean(0).argmax())
        return [zero(f"blocks.{layer}.hook_mlp_out", 0, layer=layer)]

    metric = causal(hooks=lambda self: ["blocks.{layer}.hook_mlp_out"], update=update, conditions=conditions)
    result = run(lens, metric)
    with torch.no_grad():
        _, cache = lens.run_with_cache(torch.tensor([ids(lens, TEXTS[0])]))
    norms = [float(cache[f"blocks.{layer}.hook_mlp_out"][0, 0].norm()) for layer in range(4)]
    assert result.rows("causal", "conditions").records()[1]["layer"] == int(np.argmax(norms))


class Halved(CausalMetric[Params]):
    """Halves every score and zeros the values at BOS; its second condition depends on the activations that it read."""

    name, version = "halved", "1"

    def hooks(self) -> list[str]:
        return ["blocks.{layer}.hook_mlp_out"]

    def update(self, layer: LayerView) -> None:
        self.per_text.add(layer, norm=layer.float64("hook_mlp_out")[:, 0].norm(dim=-1))

    def conditions(self) -> list[Condition]:
        most = int(self.per_text.stack("norm").mean(0).argmax())
        half = Condition("half", [Edit("blocks.{layer}.attn.hook_rot_q", lambda x, site: x / 2)])
        return [half, zero(f"blocks.{most}.attn.hook_v", 0, layer=most)]


@pytest.mark.slow
def test_a_causal_metric_keeps_the_contract() -> None:
    check_metric(Halved)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (Condition("off", [Edit("blocks.1.hook_mlp_ou", 0.0)]), "no hook point 'blocks.1.hook_mlp_ou'"),
        (Condition("off", [Edit("unembed.hook_out", 0.0)]), "all logits are never computed at once"),
        (Condition("off", [Edit("blocks.1.hook_mlp_out", 0.0, heads=[0])]), "this point has no heads"),
        (Condition("off", [Edit("blocks.1.attn.hook_q", 0.0, heads=[40])]), "head 40 of 4"),
        (
            Condition("baseline", [Edit("blocks.1.hook_mlp_out", 0.0)]),
            "two conditions are ('baseline', None, None, None)",
        ),
        (Condition("off", []), "has no edits"),
    ],
)
def test_invalid_conditions_are_named(lens: Any, condition: Condition, message: str) -> None:
    result = phaselens.run(lens, metrics=[causal(condition)], texts=TEXTS)
    assert message in str(result.metrics["causal"].failures[0])


def test_a_measurement_cannot_be_edited() -> None:
    with pytest.raises(phaselens.plugin.InputError, match="it is a measurement"):
        Edit("blocks.0.attn.hook_sink", 0.0)
    with pytest.raises(phaselens.plugin.InputError, match=r"positions contain -1; give whole numbers from 0"):
        Edit("blocks.0.hook_mlp_out", 0.0, positions=[-1])
