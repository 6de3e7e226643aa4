"""Passkey retrieval: a key somewhere in a long text, and the question for it at the end.

The task is Mohtashami and Jaggi's (2023, arXiv:2305.16300), with what makes its numbers comparable added: prompts have
an exact number of tokens, the question is never cut, the depth is set and not drawn, and every prompt has a twin in
which the key is not there.

Scoring is by teacher forcing: the right key stands behind the question, and each of its tokens is predicted from all
that is before. Greedy decoding of that many tokens gives the key if and only if each of them is the likeliest one
there: as long as it has said the key's tokens it has seen exactly what teacher forcing shows it, and at the first
token that it would say differently both go wrong. So the accuracy is that of greedy decoding, for one forward a prompt.
A key that is spelled by other tokens than the tokenizer's own counts as wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phaselens.plugin import (
    BASELINE,
    CAUSAL_TABLES,
    Condition,
    Display,
    InputError,
    Metric,
    Outcome,
    Params,
    Prompt,
    Table,
    hookimpl,
    param,
)
from phaselens_plugins import _inner, _passkeys
from phaselens_plugins._encoding import Encoder
from phaselens_plugins._passkey_tables import TABLES
from phaselens_plugins._passkeys import Case, Hidden, Writer, agreement
from phaselens_plugins._tasks import Key, Task, average, centre, change, finite, known, label, mean, share


@dataclass(frozen=True)
class PasskeyParams(Params):
    """What the metric can be asked for."""

    lengths: str = param(
        "n_ctx/4, n_ctx/2, n_ctx, 2*n_ctx",
        help="tokens of a prompt with its key; n_ctx is the length that the model was made for",
        unit="tokens",
    )
    depths: str = param("0, 0.25, 0.5, 0.75, 1", help="shares of the filler that stand before the key")
    n: int = param(4, help="prompts for each length and depth", unit="prompts", minimum=1)
    digits: int = param(5, help="signs of a key", minimum=1, maximum=100)
    symbols: str = param("0123456789", help="the signs that keys are drawn from")
    null: str = param(
        "removed",
        help="what the twin of a prompt has in the key's place: nothing, or another key; or make no twins",
        choices=("removed", "other", "none"),
    )
    longest: int = param(
        16384, help="lengths over this are left out, with a warning", unit="tokens", minimum=1
    )
    conditions: str = param("", help=_inner.HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        _passkeys.lengths(self.lengths, 1 << 20)
        _passkeys.depths(self.depths)
        if len(set(self.symbols)) < max(2, len(self.symbols)) or any(sign.isspace() for sign in self.symbols):
            raise InputError(
                f"symbols is {self.symbols!r}; give two or more different signs, none of them a space"
            )
        _inner.parse(self.conditions)


@dataclass(frozen=True)
class Answer:
    """What one prompt came to under one condition. `log_p` is in nats, of the whole key."""

    exact: float
    digits: float
    log_p: float


class Passkey(Task[PasskeyParams]):
    """Retrieval of a key by length and depth, as the model is and under conditions."""

    name = "passkey"
    version = "1"
    title = "passkey retrieval"
    description = "whether the model repeats a key that stands somewhere in a long text, by length and depth"
    citation = "the task: Mohtashami and Jaggi 2023, arXiv:2305.16300"
    Params = PasskeyParams
    tables = (*CAUSAL_TABLES, *TABLES)
    display = Display(
        table="accuracy",
        rows="condition",
        value="exact",
        title="exact",
        low="ci_low",
        high="ci_high",
        null="chance",
        percent=True,
        also=(("digits", "digits"), ("gain", "gain, nats"), ("n", "n")),
        summary=(("exact_within", "within n_ctx"), ("exact_beyond", "beyond"), ("coverage", "coverage")),
    )

    @classmethod
    def define(cls, params: PasskeyParams) -> str:
        """What is asked, and how it is scored."""
        under = f"; under {params.conditions}" if params.conditions.strip() else ""
        return (
            f"{params.digits} of {params.symbols!r} at depths {params.depths} of prompts of {params.lengths} tokens, "
            f"{params.n} each; exact = greedy decoding gives the key{under}"
        )

    def setup(self) -> None:
        """Prompts that were made, and what they came to."""
        super().setup()
        self.lengths = _passkeys.lengths(self.params.lengths, self.model.n_ctx)
        self.depths = _passkeys.depths(self.params.depths)
        self.hidden: dict[str, Hidden] = {}
        self.answers: dict[Key, dict[str, Answer]] = {}

    def cases(self, length: int | None = None, depth: float | None = None) -> list[Case]:
        """The prompts that are wanted, twins left out, of one length or depth or of all."""
        return [
            Case(one, other, number)
            for one in self.lengths
            for other in self.depths
            for number in range(self.params.n)
            if length in (None, one) and depth in (None, other)
        ]

    def prompts(self, tokenizer: Any) -> Sequence[Prompt]:
        """Every prompt that can be made and run, twins behind theirs."""
        self.encode = Encoder(tokenizer, bos=self.bos, bos_token_id=self.model.bos_token_id)
        writer = Writer(self.encode, digits=self.params.digits, symbols=self.params.symbols, seed=self.seed)
        for length in self.lengths:
            reason = self._too_long(length)
            if reason:
                self.warn(f"prompts of {length} tokens are null: {reason}")
                continue
            for case in self.cases(length):
                for each in (case,) if self.params.null == "none" else (case, case.twin):
                    made = writer.write(each, self.params.null)
                    if made is None or made.scored_from < 1:
                        self.warn(
                            f"prompts of {length} tokens are null: shorter than the question with its key"
                        )
                        break  # a twin without its prompt says nothing
                    self.hidden[each.id] = made
        if not self.hidden:
            raise InputError(
                f"lengths {self.params.lengths!r}: no prompt of these lengths can be made; give others"
            )
        self._check_lengths()
        return [Prompt(name, made.ids, made.scored_from) for name, made in self.hidden.items()]

    def _too_long(self, length: int) -> str:
        n_ctx = self.model.n_ctx
        if "learned" in self.model.positions and n_ctx is not None and length > n_ctx:
            return f"the model has learned positions for {n_ctx} tokens and none for more"
        if length > self.params.longest:
            return f"more than -P passkey.longest={self.params.longest}"
        return ""

    def _check_lengths(self) -> None:
        off = {
            made.case.length: len(made.ids)
            for made in self.hidden.values()
            if len(made.ids) != made.case.length
        }
        for length, found in off.items():
            self.warn(
                f"prompts of {length} tokens: no filler gave that many; some have {found} (see n_tokens)"
            )
        spelled = [made for made in self.hidden.values() if not made.case.null]
        n_off = sum(not made.copied for made in spelled)
        if n_off:
            self.warn(
                f"the key of {n_off} of {len(spelled)} prompts has other tokens in the text than in the answer"
            )
        n_merged = sum(made.merged for made in self.hidden.values())
        if n_merged:
            self.warn(
                f"the answer begins inside of the question's last tokens in {n_merged} of {len(self.hidden)} prompts; "
                "these tokens are scored with it"
            )

    def record(self, condition: Condition, outcome: Outcome) -> None:
        """Keep how a prompt came out. Twins do not go into the tables of losses."""
        made = self.hidden[outcome.text]
        if not made.case.null:
            super().record(condition, outcome)
        if not finite(outcome.loss):
            self.warn(
                f"{label(condition.name, condition.layer)}: logits of some prompts are NaN or infinite; not scored"
            )
            return
        top, targets = outcome.top.tolist(), outcome.targets.tolist()
        right, total = agreement(top, targets, self.params.symbols, self.encode.spell)
        self.answers.setdefault(condition.key, {})[outcome.text] = Answer(
            float(top == targets), right / total, -float(outcome.loss.sum(dtype="float64"))
        )

    def merge(self, other: Metric[PasskeyParams]) -> None:
        """Also the answers."""
        super().merge(other)
        if isinstance(other, Passkey):
            self.hidden.update(other.hidden)
            for key, found in other.answers.items():
                self.answers.setdefault(key, {}).update(found)

    def compute(self) -> Mapping[str, Table]:
        """All tables of this model."""
        return {
            **super().compute(),
            "prompts": self.table("prompts", self._prompts()),
            "cells": self.table("cells", self._cells()),
            "accuracy": self.table("accuracy", self._accuracy()),
            "summary": self.table("summary", [self._summary()]),
        }

    def _values(self, repeats: Sequence[Condition], cases: Iterable[Case], field: str) -> list[float | None]:
        """One value a case, repeats averaged; None where one of them could not be scored."""
        names = [case.id for case in cases]
        return average(
            [
                [getattr(found[name], field) if name in found else None for name in names]
                for found in (self.answers.get(condition.key, {}) for condition in repeats)
            ]
        )

    def _prompts(self) -> Iterator[tuple[Any, ...]]:
        for name, layer, repeats in self.groups():
            for condition in repeats:
                found = self.answers.get(condition.key, {})
                for prompt, made in self.hidden.items():
                    answer = found.get(prompt)
                    scores = (answer.exact, answer.digits, answer.log_p) if answer else (None, None, None)
                    yield (
                        prompt, name, layer, condition.seed, made.case.length, made.case.depth, len(made.ids),
                        len(made.ids) - made.scored_from, made.key_at, *scores,
                    )  # fmt: skip

    def _cells(self) -> Iterator[tuple[Any, ...]]:
        for name, layer, repeats in self.groups():
            for length in self.lengths:
                for depth in self.depths:
                    yield name, layer, length, depth, *self._shares(repeats, self.cases(length, depth))

    def _accuracy(self) -> Iterator[tuple[Any, ...]]:
        for name, layer, repeats in self.groups():
            for length in self.lengths:
                cases = self.cases(length)
                shares = self._shares(repeats, cases)
                yield f"{name}, {length} tokens", name, layer, length, *shares, *self._change(repeats, cases)

    def _shares(self, repeats: Sequence[Condition], cases: Sequence[Case]) -> tuple[Any, ...]:
        """The columns `_SHARES` of these prompts."""
        import numpy as np

        chance = float(len(self.params.symbols)) ** -self.params.digits, 1 / len(self.params.symbols)
        exact = known(self._values(repeats, cases, "exact")) if repeats else []
        if not exact:
            nothing = (None, None, None, chance[0], None, chance[1], *([None] * 6))
            return len(cases), 0.0, *nothing, 0, len(repeats)
        log_p = self._values(repeats, cases, "log_p")
        twins = [case.twin for case in cases]
        exact_null = self._values(repeats, twins, "exact")
        pairs = zip(log_p, self._values(repeats, twins, "log_p"), strict=True)
        gains = [one - other for one, other in pairs if one is not None and other is not None]
        return (
            len(cases), len(exact) / len(cases), *share(exact, len(cases)), chance[0],
            centre(self._values(repeats, cases, "digits")), chance[1], centre(np.exp(known(log_p)).tolist()),
            *mean(gains, self.seed), centre(exact_null), centre(self._values(repeats, twins, "digits")),
            len(known(exact_null)), len(repeats),
        )  # fmt: skip

    def _change(self, repeats: Sequence[Condition], cases: Sequence[Case]) -> tuple[float | None, ...]:
        """Of `exact` against the baseline, with its interval; nothing for the baseline itself."""
        if not repeats or repeats == [BASELINE]:
            return None, None, None
        before, after = self._values([BASELINE], cases, "exact"), self._values(repeats, cases, "exact")
        pairs = zip(before, after, strict=True)
        found = change([new - old for old, new in pairs if old is not None and new is not None], self.seed)
        if found[0] is not None and found[1] is None:
            self.warn(
                "change_low and change_high are null where `exact` changed alike in all prompts, most often not at all"
            )
        return found

    def _summary(self) -> tuple[Any, ...]:
        n_ctx, cases = self.model.n_ctx, self.cases()
        made = [case for case in cases if case.id in self.hidden]
        beyond = [case for case in made if n_ctx is not None and case.length > n_ctx]
        within = [case for case in made if case not in beyond]
        parts = [
            share(known(self._values([BASELINE], part, "exact")), len(part))[0] for part in (within, beyond)
        ]
        spelled = [made.copied for made in self.hidden.values() if not made.case.null]
        scored = known(self._values([BASELINE], cases, "exact"))
        return (
            n_ctx, *parts, float(len(self.params.symbols)) ** -self.params.digits, len(scored) / len(cases),
            len(cases), sum(spelled) / len(spelled) if spelled else None,
        )  # fmt: skip


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """The metrics in this file."""
    return [Passkey]
