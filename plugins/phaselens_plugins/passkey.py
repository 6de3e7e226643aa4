"""Passkey retrieval: a key somewhere in a long text, and a question for it at the end.

The task is that of Mohtashami and Jaggi (2023, arXiv:2305.16300), made comparable between models: prompts have an exact
number of tokens, the question is never cut, the depth is set rather than drawn, and every prompt has a twin without
the key.

Scoring is by teacher forcing: the right key follows the question, and each of its tokens is predicted from all tokens
before it. Greedy decoding of that many tokens gives the key if and only if each of them is the most likely one: until
the first wrong token, both have the same input, and at that token both are wrong. So `exact` is the accuracy of greedy
decoding, at the cost of one forward per prompt. A key spelled with other tokens than the tokenizer's own counts as
wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phaselens.plugin import (
    BASELINE,
    CAUSAL_TABLES,
    Condition,
    InputError,
    Metric,
    Table,
    TaskPrompt,
    TextOutcome,
    hookimpl,
    param,
)
from phaselens_plugins._common import TableRow
from phaselens_plugins._inner import CONDITIONS_HELP
from phaselens_plugins._passkeys import (
    PasskeyCase,
    PasskeyPrompt,
    PromptWriter,
    count_matching_symbols,
    parse_depths,
    parse_lengths,
)
from phaselens_plugins._task_tables import PASSKEY_TABLES
from phaselens_plugins._tasks import (
    Estimate,
    Task,
    TaskParams,
    all_finite,
    complete_pairs,
    mean_of_present,
    mean_with_interval,
    task_display,
    without_none,
)


@dataclass(frozen=True)
class PasskeyParams(TaskParams):
    """Parameters of the metric."""

    lengths: str = param(
        "n_ctx/4, n_ctx/2, n_ctx, 2*n_ctx",
        help="tokens of a prompt with its key; n_ctx is the model's context length",
        unit="tokens",
    )
    depths: str = param("0, 0.25, 0.5, 0.75, 1", help="shares of the filler that precede the key")
    n: int = param(4, help="prompts for each length and depth", unit="prompts", minimum=1)
    digits: int = param(5, help="number of symbols of a key", minimum=1, maximum=100)
    symbols: str = param("0123456789", help="the symbols that keys are drawn from")
    null: str = param(
        "removed",
        help="what a prompt's twin has in place of the key: nothing (removed) or another key (other); none: no twins",
        choices=("removed", "other", "none"),
    )
    longest: int = param(16384, help="greater lengths are left out, with a warning", unit="tokens", minimum=1)
    conditions: str = param("", help=CONDITIONS_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_lengths(self.lengths, 1 << 20)
        parse_depths(self.depths)
        if len(set(self.symbols)) < max(2, len(self.symbols)) or any(map(str.isspace, self.symbols)):
            raise InputError(
                f"symbols is {self.symbols!r}; give two or more different characters, no white space"
            )


@dataclass(frozen=True)
class PasskeyScore:
    """Score of one prompt under one condition. `log_p` is the log-probability of the whole key, in nats."""

    exact: float
    digits: float
    log_p: float


class Passkey(Task[PasskeyParams, PasskeyScore]):
    """Metric of the retrieval of a key by length and depth, for the unedited model and under conditions."""

    name = "passkey"
    version = "1"
    title = "passkey retrieval"
    description = "whether the model repeats a key that occurs somewhere in a long text, by length and depth"
    citation = "the task: Mohtashami and Jaggi 2023, arXiv:2305.16300"
    Params = PasskeyParams
    tables = (*CAUSAL_TABLES, *PASSKEY_TABLES)
    display = task_display(
        "exact",
        columns=(("digits", "digits"), ("gain", "gain, nats"), ("n", "n")),
        summary=(("exact_within", "within n_ctx"), ("exact_beyond", "beyond"), ("coverage", "coverage")),
    )

    @classmethod
    def define(cls, params: PasskeyParams) -> str:
        """State the prompts and how they are scored."""
        return (
            f"{params.digits} of {params.symbols!r} at depths {params.depths} of prompts of {params.lengths} tokens, "
            f"{params.n} each; exact = greedy decoding gives the key{params.conditions_note}"
        )

    def setup(self) -> None:
        """Parse the lengths and depths for this model; start without prompts."""
        super().setup()
        self.lengths = parse_lengths(self.params.lengths, self.model.n_ctx)
        self.depths = parse_depths(self.params.depths)
        self.made_prompts: dict[str, PasskeyPrompt] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the encoder, which holds the tokenizer; `prompts` makes it."""
        return {name: value for name, value in vars(self).items() if name != "encode"}

    def cases(self, length: int | None = None, depth: float | None = None) -> list[PasskeyCase]:
        """Return the requested prompts, without twins: all, or those of one length or depth."""
        return [
            PasskeyCase(case_length, case_depth, number)
            for case_length in self.lengths
            for case_depth in self.depths
            for number in range(self.params.n)
            if length in (None, case_length) and depth in (None, case_depth)
        ]

    def prompts(self, tokenizer: object) -> Sequence[TaskPrompt]:
        """Return all prompts that can be made and run, each followed by its twin."""
        self.encode = self.encoder(tokenizer)
        writer = PromptWriter(
            self.encode, digits=self.params.digits, symbols=self.params.symbols, seed=self.seed
        )
        for length in self.lengths:
            reason = self._reason_to_skip(length)
            if reason:
                self.warn(f"prompts of {length} tokens are missing: {reason}")
                continue
            for case in self.cases(length):
                for variant in (case,) if self.params.null == "none" else (case, case.twin):
                    prompt = writer.write(variant, self.params.null)
                    if prompt is None or prompt.scored_from < 1:
                        self.warn(
                            f"prompts of {length} tokens are missing: shorter than the question with its key"
                        )
                        break  # a twin has no meaning without its prompt
                    self.made_prompts[variant.id] = prompt
        if not self.made_prompts:
            raise InputError(
                f"lengths {self.params.lengths!r}: no prompt of these lengths can be made; give other lengths"
            )
        self._warn_about_prompts()
        return [
            TaskPrompt(prompt_id, prompt.ids, prompt.scored_from)
            for prompt_id, prompt in self.made_prompts.items()
        ]

    def _reason_to_skip(self, length: int) -> str:
        if reason := self.model.reason_against(length):
            return reason
        if length > self.params.longest:
            return f"more than -P passkey.longest={self.params.longest}"
        return ""

    def _warn_about_prompts(self) -> None:
        prompts = self.made_prompts.values()
        actual_lengths = {
            prompt.case.length: len(prompt.ids) for prompt in prompts if len(prompt.ids) != prompt.case.length
        }
        for length, actual_length in actual_lengths.items():
            self.warn(
                f"prompts of {length} tokens: no filler has that length; some have {actual_length} (see n_tokens)"
            )
        with_key = [prompt for prompt in prompts if not prompt.case.null]
        n_differing = sum(not prompt.is_copied for prompt in with_key)
        if n_differing:
            self.warn(
                f"in {n_differing} of {len(with_key)} prompts the key is tokenized differently in text and answer"
            )
        n_merged = sum(prompt.is_merged for prompt in prompts)
        if n_merged:
            self.warn(
                f"the tokenizer joins the answer with the question's last tokens in {n_merged} of {len(prompts)} "
                "prompts; these tokens are scored with it"
            )

    def record(self, condition: Condition, outcome: TextOutcome) -> None:
        """Record a prompt's score. Twins are left out of the tables of losses."""
        if not self.made_prompts[outcome.text].case.null:
            super().record(condition, outcome)
        if not all_finite(outcome.loss):
            self.warn(f"{condition.label}: logits of some prompts are NaN or infinite; not scored")
            return
        top, targets = outcome.top.tolist(), outcome.targets.tolist()
        n_right, n_symbols = count_matching_symbols(top, targets, self.params.symbols, self.encode.token_text)
        self.scores.setdefault(condition.key, {})[outcome.text] = PasskeyScore(
            float(top == targets), n_right / n_symbols, -float(outcome.loss.sum(dtype="float64"))
        )

    def merge(self, other: Metric[PasskeyParams]) -> None:
        """Merge another instance, with its prompts."""
        super().merge(other)
        if isinstance(other, Passkey):
            self.made_prompts.update(other.made_prompts)

    def compute(self) -> Mapping[str, Table]:
        """Return all tables of this model."""
        return {
            **super().compute(),
            "prompts": self.table("prompts", self._prompt_rows()),
            "cells": self.table("cells", self._cell_rows()),
            "accuracy": self.table("accuracy", self._accuracy_rows()),
            "summary": self.table("summary", [self._summary_row()]),
        }

    def _prompt_rows(self) -> Iterator[TableRow]:
        for name, layer, repeats in self.groups():
            for condition in repeats:
                scores = self.scores.get(condition.key, {})
                for prompt_id, prompt in self.made_prompts.items():
                    score = scores.get(prompt_id)
                    cells = (score.exact, score.digits, score.log_p) if score else (None, None, None)
                    yield (
                        prompt_id, name, layer, condition.seed, prompt.case.length, prompt.case.depth,
                        len(prompt.ids), len(prompt.ids) - prompt.scored_from, prompt.key_at, *cells,
                    )  # fmt: skip

    def _cell_rows(self) -> Iterator[TableRow]:
        for name, layer, repeats in self.groups():
            for length in self.lengths:
                for depth in self.depths:
                    yield name, layer, length, depth, *self._retrieval(repeats, self.cases(length, depth))

    def _accuracy_rows(self) -> Iterator[TableRow]:
        for name, layer, repeats in self.groups():
            for length in self.lengths:
                cases = self.cases(length)
                retrieval, change = self._retrieval(repeats, cases), self._change(repeats, cases)
                yield f"{name}, {length} tokens", name, layer, length, *retrieval, *change

    @property
    def key_chance(self) -> float:
        """Probability of guessing the whole key."""
        return float(len(self.params.symbols)) ** -self.params.digits

    def _retrieval(self, repeats: Sequence[Condition], cases: Sequence[PasskeyCase]) -> TableRow:
        """Return the columns from `n` to `n_seeds` for these prompts."""
        import numpy as np

        key_chance, symbol_chance = self.key_chance, 1 / len(self.params.symbols)
        ids, twin_ids = [case.id for case in cases], [case.twin.id for case in cases]
        n_scored = len(without_none(self.values(repeats, ids, "exact")))
        if not n_scored:
            nulls = (None, None, None, key_chance, None, symbol_chance, *([None] * 6))
            return len(cases), 0.0, *nulls, 0, len(repeats)
        log_p, twin_log_p = self.values(repeats, ids, "log_p"), self.values(repeats, twin_ids, "log_p")
        gains = [with_key - without_key for with_key, without_key in complete_pairs(log_p, twin_log_p)]
        twin_exact = self.values(repeats, twin_ids, "exact")
        return (
            len(cases), n_scored / len(cases), *self.share(repeats, ids, "exact"), key_chance,
            mean_of_present(self.values(repeats, ids, "digits")), symbol_chance,
            mean_of_present(np.exp(without_none(log_p)).tolist()), *mean_with_interval(gains, self.seed),
            mean_of_present(twin_exact), mean_of_present(self.values(repeats, twin_ids, "digits")),
            len(without_none(twin_exact)), len(repeats),
        )  # fmt: skip

    def _change(self, repeats: Sequence[Condition], cases: Sequence[PasskeyCase]) -> Estimate:
        """Return the change of `exact` against the baseline, with its interval; None for the baseline itself."""
        if not repeats or repeats == [BASELINE]:
            return None, None, None
        ids = [case.id for case in cases]
        exact_pairs = complete_pairs(
            self.values([BASELINE], ids, "exact"), self.values(repeats, ids, "exact")
        )
        return self.mean_change(
            [edited - unedited for unedited, edited in exact_pairs],
            "change_low and change_high are missing where `exact` changed by the same amount in all prompts, most "
            "often not at all",
        )

    def _summary_row(self) -> TableRow:
        n_ctx, ids = self.model.n_ctx, [case.id for case in self.cases()]
        made_cases = [case for case in self.cases() if case.id in self.made_prompts]
        beyond_context = [case.id for case in made_cases if n_ctx is not None and case.length > n_ctx]
        within_context = [case.id for case in made_cases if case.id not in beyond_context]
        copied = [prompt.is_copied for prompt in self.made_prompts.values() if not prompt.case.null]
        n_scored = len(without_none(self.values([BASELINE], ids, "exact")))
        return (
            n_ctx,
            self.share([BASELINE], within_context, "exact")[0], self.share([BASELINE], beyond_context, "exact")[0],
            self.key_chance, n_scored / len(ids), len(ids), sum(copied) / len(copied) if copied else None,
        )  # fmt: skip


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """Return the metrics in this file."""
    return [Passkey]
