"""Tables of the tasks `knowledge` and `passkey`, and the columns that both have."""

from __future__ import annotations

from phaselens.plugin import Column, TableSpec, interval_help

CONDITION = Column("condition", str, None, "the condition's name; `baseline` is the unedited model")
NAME_ALONE = Column("of", str, None, "the condition's name alone")
LAYER = Column("layer", int, "index", "the condition's layer, 0-based")
SEED = Column("seed", int, None, "the number of the control's repeat")

OF_ITEMS, OF_PROMPTS, OF_SYMBOLS = "share of items", "share of prompts", "share of signs"


def _n_asked(unit: str) -> Column:
    return Column("n", int, unit, f"number of {unit}; one that cannot be scored counts as wrong")


def _share_columns(share: Column, chance: str) -> tuple[Column, ...]:
    """Return the column `share` with its coverage, Wilson's interval and the level of chance."""
    return (
        Column("coverage", float, share.unit, "share of items that could be scored"),
        share,
        Column("ci_low", float, share.unit, "95 % interval, Wilson"),
        Column("ci_high", float, share.unit, "95 % interval, Wilson"),
        Column("chance", float, share.unit, chance),
    )


def _coverage_at_baseline(unit: str) -> Column:
    return Column("coverage", float, unit, "share that could be scored at baseline")


def _n_seeds(unit: str) -> Column:
    return Column("n_seeds", int, "seeds", f"repeats of a control, averaged {unit} by {unit} first")


# --- knowledge -------------------------------------------------------------------------------------------------------

_MEAN_CHANCE = "mean over items of 1 / number of options"
_ITEM_INTERVAL = interval_help("items", paired=True)
_ITEM_CHANGE = f"{_ITEM_INTERVAL}; missing where all items changed by the same amount"

KNOWLEDGE_TABLES = (
    TableSpec(
        "items",
        (
            Column("item", str, None, "the question's id"),
            CONDITION,
            LAYER,
            SEED,
            Column("kind", str, None, "contextual or parametric"),
            Column("answer", str, None, "the right option"),
            Column("chosen", str, None, "the most probable option; missing where two are equally probable"),
            Column("correct", int, None, "1 if `chosen` is the right option, else 0"),
            Column("correct_per_token", int, None, "`correct` from the mean over each option's tokens"),
            Column("p", float, "probability", "probability of the right option among the options"),
            Column("p_per_token", float, "probability", "`p` from the mean over each option's tokens"),
            Column("log_odds", float, "nats", "ln P(right) − ln P(any other option)"),
            Column("log_odds_per_token", float, "nats", "`log_odds` from the mean over each option's tokens"),
            Column("chance", float, "probability", "1 / number of options"),
            Column("n_tokens", int, "tokens", "tokens of the question with its longest option"),
        ),
        "one row per question and condition",
    ),
    TableSpec(
        "accuracy",
        (
            Column("condition", str, None, "the condition's name and the kind"),
            NAME_ALONE,
            LAYER,
            Column("kind", str, None, "contextual, parametric, or all"),
            _n_asked("items"),
            *_share_columns(
                Column("accuracy", float, OF_ITEMS, "share whose most probable option is the right one"),
                _MEAN_CHANCE,
            ),
            Column(
                "same_answer",
                float,
                OF_ITEMS,
                "accuracy of giving the most frequent right answer to every question",
            ),
            Column(
                "accuracy_per_token", float, OF_ITEMS, "`accuracy` from the mean over each option's tokens"
            ),
            Column(
                "p",
                float,
                "probability",
                "probability of the right option among the options, mean over items",
            ),
            Column("log_odds", float, "nats", "ln P(right) − ln P(any other option), mean over items"),
            _n_seeds("item"),
        ),
        "one row per condition and kind",
    ),
    TableSpec(
        "degradation",
        (
            CONDITION,
            LAYER,
            Column("kind", str, None, "contextual, parametric, all, or `contextual − parametric`"),
            Column(
                "n",
                int,
                "items",
                "items scored both at baseline and under the condition; of a difference of kinds, the smaller number",
            ),
            Column("lost_accuracy", float, OF_ITEMS, "baseline − condition"),
            Column("accuracy_low", float, OF_ITEMS, _ITEM_CHANGE),
            Column("accuracy_high", float, OF_ITEMS, _ITEM_CHANGE),
            Column("lost_log_odds", float, "nats", "baseline − condition"),
            Column("log_odds_low", float, "nats", _ITEM_INTERVAL),
            Column("log_odds_high", float, "nats", _ITEM_INTERVAL),
            Column("lost_of_all", float, "share", "lost_accuracy / (baseline accuracy − chance)"),
            Column(
                "status",
                str,
                None,
                "ok; baseline at chance: nothing to lose; below chance: the condition is",
            ),
        ),
        "accuracy and log-odds that a condition takes away, item by item; one row per condition and kind",
    ),
    TableSpec(
        "summary",
        (
            Column("accuracy", float, OF_ITEMS, "accuracy at baseline"),
            Column("chance", float, OF_ITEMS, _MEAN_CHANCE),
            _coverage_at_baseline(OF_ITEMS),
            Column("contextual", float, OF_ITEMS, "accuracy of contextual items at baseline"),
            Column("parametric", float, OF_ITEMS, "accuracy of parametric items at baseline"),
            Column("n", int, "items", "items asked"),
            Column("sha256", str, None, "sha256 of the file"),
        ),
        "one row per model",
    ),
)

# --- passkey ---------------------------------------------------------------------------------------------------------

_KEY_CHANCE = "probability of guessing the whole key"
_PROMPT_INTERVAL = interval_help("prompts")
_PROMPT_CHANGE = (
    f"{interval_help('prompts', paired=True)}; missing where all prompts changed by the same amount"
)
_LENGTH = Column("length", int, "tokens", "prompt length with the key and the first token")
_DEPTH = Column("depth", float, "share of filler", "share of the filler that precedes the key")
_RETRIEVAL = (
    _n_asked("prompts"),
    *_share_columns(
        Column("exact", float, OF_PROMPTS, "share in which greedy decoding gives the whole key"), _KEY_CHANCE
    ),
    Column(
        "digits",
        float,
        OF_SYMBOLS,
        "share of the key's symbols predicted right, each after the right preceding ones",
    ),
    Column("digits_chance", float, OF_SYMBOLS, "probability of guessing one symbol"),
    Column("probability", float, "probability", "probability of the whole key, mean over prompts"),
    Column(
        "gain", float, "nats", "log-probability of the key minus that in the prompt's twin without it, mean"
    ),
    Column("gain_low", float, "nats", _PROMPT_INTERVAL),
    Column("gain_high", float, "nats", _PROMPT_INTERVAL),
    Column("exact_null", float, OF_PROMPTS, "`exact` in the twins, whose text does not contain the key"),
    Column("digits_null", float, OF_SYMBOLS, "`digits` in the twins"),
    Column("n_null", int, "prompts", "twins that could be scored"),
    _n_seeds("prompt"),
)

PASSKEY_TABLES = (
    TableSpec(
        "prompts",
        (
            Column(
                "prompt",
                str,
                None,
                "the prompt's id: length/depth/number, with /null for a twin without the key",
            ),
            CONDITION,
            LAYER,
            SEED,
            _LENGTH,
            _DEPTH,
            Column("n_tokens", int, "tokens", "tokens run, the key's included"),
            Column("n_key", int, "tokens", "tokens of the key, which are scored"),
            Column("key_at", int, "position", "position of the key in the text, 0-based; missing in a twin"),
            Column("exact", int, None, "1 if greedy decoding gives the key, else 0"),
            Column("digits", float, OF_SYMBOLS, "share of the key's symbols that are right"),
            Column("log_p", float, "nats", "log-probability of the whole key"),
        ),
        "one row per prompt and condition",
    ),
    TableSpec(
        "cells",
        (CONDITION, LAYER, _LENGTH, _DEPTH, *_RETRIEVAL),
        "one row per condition, length and depth",
    ),
    TableSpec(
        "accuracy",
        (
            Column("condition", str, None, "the condition's name and the length"),
            NAME_ALONE,
            LAYER,
            _LENGTH,
            *_RETRIEVAL,
            Column("change", float, OF_PROMPTS, "`exact` minus that of the baseline"),
            Column("change_low", float, OF_PROMPTS, _PROMPT_CHANGE),
            Column("change_high", float, OF_PROMPTS, _PROMPT_CHANGE),
        ),
        "one row per condition and length, over all depths",
    ),
    TableSpec(
        "summary",
        (
            Column("n_ctx", int, "tokens", "the model's context length"),
            Column("exact_within", float, OF_PROMPTS, "`exact` at baseline for lengths up to n_ctx"),
            Column("exact_beyond", float, OF_PROMPTS, "`exact` at baseline for greater lengths"),
            Column("chance", float, OF_PROMPTS, _KEY_CHANCE),
            _coverage_at_baseline(OF_PROMPTS),
            Column("n", int, "prompts", "prompts asked under each condition, without twins"),
            Column(
                "copied",
                float,
                OF_PROMPTS,
                "share whose key has the same tokens in the text and in the answer",
            ),
        ),
        "one row per model",
    ),
)
