"""What the tables of passkey retrieval hold."""

from __future__ import annotations

from phaselens.plugin import Column, TableSpec, interval_help

SHARE = "share of prompts"
DIGITS = "share of signs"
_CHANGE = f"{interval_help('prompts', paired=True)}; null where all changed alike"
_SHARES = (
    Column("n", int, "prompts", "asked; one that could not be scored counts as not right"),
    Column("coverage", float, SHARE, "that could be scored"),
    Column("exact", float, SHARE, "greedy decoding gives the whole key"),
    Column("ci_low", float, SHARE, "95 % interval, Wilson"),
    Column("ci_high", float, SHARE, "95 % interval, Wilson"),
    Column("chance", float, SHARE, "of guessing the whole key"),
    Column(
        "digits",
        float,
        DIGITS,
        "signs of the key that are right, each predicted after the right ones before it",
    ),
    Column("digits_chance", float, DIGITS, "of guessing one"),
    Column("probability", float, "probability", "of the whole key, mean over prompts"),
    Column(
        "gain", float, "nats", "log-probability of the key beyond that in the prompt's twin without it, mean"
    ),
    Column("gain_low", float, "nats", interval_help("prompts")),
    Column("gain_high", float, "nats", interval_help("prompts")),
    Column("exact_null", float, SHARE, "as `exact`, in the twins: the key was not in the text"),
    Column("digits_null", float, DIGITS, "as `digits`, in the twins"),
    Column("n_null", int, "prompts", "twins that could be scored"),
    Column("n_seeds", int, "seeds", "repeats of a control, averaged prompt by prompt first"),
)
_LAYER = Column("layer", int, "index", "the layer that the condition concerns, 0-based")
_LENGTH = Column("length", int, "tokens", "of a prompt with its key, first token included")
_DEPTH = Column("depth", float, "share of filler", "that stands before the key")

TABLES = (
    TableSpec(
        "prompts",
        (
            Column("prompt", str, None, "its id: length/depth/number, and /null for a twin without the key"),
            Column("condition", str, None, "the condition's name; `baseline` is the model as it is"),
            _LAYER,
            Column("seed", int, None, "which repeat of a control"),
            _LENGTH,
            _DEPTH,
            Column("n_tokens", int, "tokens", "ids that the model was given, the key's included"),
            Column("n_key", int, "tokens", "of them the key's, which are scored"),
            Column("key_at", int, "position", "of the key in the text, 0-based; null in a twin"),
            Column("exact", int, None, "1 if greedy decoding gives the key, else 0"),
            Column("digits", float, DIGITS, "signs of the key that are right"),
            Column("log_p", float, "nats", "log-probability of the whole key"),
        ),
        "a row per prompt and condition",
    ),
    TableSpec(
        "cells",
        (
            Column("condition", str, None, "the condition's name; `baseline` is the model as it is"),
            _LAYER,
            _LENGTH,
            _DEPTH,
            *_SHARES,
        ),
        "a row per condition, length and depth",
    ),
    TableSpec(
        "accuracy",
        (
            Column("condition", str, None, "the condition's name and the length"),
            Column("of", str, None, "the condition's name alone"),
            _LAYER,
            _LENGTH,
            *_SHARES,
            Column("change", float, SHARE, "of `exact` against the baseline"),
            Column(
                "change_low",
                float,
                SHARE,
                _CHANGE,
            ),
            Column(
                "change_high",
                float,
                SHARE,
                _CHANGE,
            ),
        ),
        "a row per condition and length, all depths together",
    ),
    TableSpec(
        "summary",
        (
            Column("n_ctx", int, "tokens", "the length that the model was made for"),
            Column("exact_within", float, SHARE, "`exact` at baseline, lengths up to n_ctx"),
            Column("exact_beyond", float, SHARE, "the same, longer ones"),
            Column("chance", float, SHARE, "of guessing the whole key"),
            Column("coverage", float, SHARE, "that could be scored at baseline"),
            Column("n", int, "prompts", "asked under each condition, twins left out"),
            Column("copied", float, SHARE, "whose key has the same tokens in the text and in the answer"),
        ),
        "a row per model",
    ),
)
