"""Knowledge tasks: yes/no questions and choices, from a file of yours, scored by how probable each option is.

No answer is generated and searched for words, so none can be misread ("incorrect" contains "correct"), and none is
missing. Every option is put behind the question, and its tokens are predicted:

* log P(option) is the sum over the option's tokens, so options that begin alike are told apart by what follows;
* the model's answer is the option with the largest sum; two that are exactly alike are no answer, and count as wrong;
* p = exp log P(answer) over the sum of all options: a softmax over the options alone;
* the same from the mean over an option's tokens stands beside it under its own name (`…_per_token`), as long options
  have small sums.

An option follows its prompt after the white space that the prompt ends with, or else after one space; this white
space belongs to the option's tokens, in whatever way the tokenizer cuts them. What was lost under a condition is a
difference item by item; contextual questions are answered by what stands in the prompt, parametric ones by what the
model has learned (Jin et al. 2025, arXiv:2502.01563, section 4).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

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
from phaselens_plugins import _inner
from phaselens_plugins._encoding import Encoder, common
from phaselens_plugins._knowledge_tables import TABLES
from phaselens_plugins._questions import CONTEXTUAL, KINDS, PARAMETRIC, Question, Questions, read_questions
from phaselens_plugins._scores import Item, chance, difference, judge, same_answer
from phaselens_plugins._tasks import Key, Task, average, change, finite, known, label, mean, share

ALL = "all"


@dataclass(frozen=True)
class KnowledgeParams(Params):
    """What the metric can be asked for."""

    file: str | None = param(None, help="a JSONL file of questions; docs/tasks.md has the format")
    conditions: str = param("", help=_inner.HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        _inner.parse(self.conditions)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Also reads the file once, so that a bad one stops the run before a model is loaded."""
        params = super().parse(values)
        params.questions()
        return params

    def questions(self) -> Questions:
        """The file's items; InputError where there is no file, or a line cannot be used."""
        if self.file is None:
            raise InputError(
                "it has no questions of its own; name a JSONL file of yours by -P knowledge.file=FILE "
                "(docs/tasks.md has the format)"
            )
        return read_questions(self.file)


class Knowledge(Task[KnowledgeParams]):
    """Accuracy and log-odds of questions with options, and what conditions take from them."""

    name = "knowledge"
    version = "1"
    title = "knowledge tasks"
    description = "questions with options from your JSONL file, scored by the probability of the options"
    citation = "contextual against parametric knowledge: Jin et al. 2025, arXiv:2502.01563"
    Params = KnowledgeParams
    tables = (*CAUSAL_TABLES, *TABLES)
    display = Display(
        table="accuracy",
        rows="condition",
        value="accuracy",
        title="accuracy",
        low="ci_low",
        high="ci_high",
        null="chance",
        percent=True,
        also=(("log_odds", "log odds"), ("coverage", "coverage"), ("n", "n")),
        summary=(("contextual", "contextual"), ("parametric", "parametric"), ("chance", "chance")),
    )

    @classmethod
    def define(cls, params: KnowledgeParams) -> str:
        """How an answer is found."""
        under = f"; under {params.conditions}" if params.conditions.strip() else ""
        file = params.file or "no file"
        return f"the answer is the option with the largest log-probability, summed over its tokens; {file}{under}"

    def setup(self) -> None:
        """The questions, and the log-probability of each option, by condition and prompt."""
        super().setup()
        self.questions: dict[str, Question] = {}
        self.sha256 = ""
        if self.params.file is not None:
            read = self.params.questions()
            self.questions, self.sha256 = {item.id: item for item in read.items}, read.sha256
        self.places: dict[str, tuple[str, int]] = {}
        self.n_tokens: dict[str, list[int]] = {}
        self.longest: dict[str, int] = {}
        self.sums: dict[Key, dict[tuple[str, int], float]] = {}

    def prompts(self, tokenizer: Any) -> Sequence[Prompt]:
        """A prompt for each option of each question that can be scored."""
        if not self.questions:
            self.params.questions()
        encode = Encoder(tokenizer, bos=self.bos, bos_token_id=self.model.bos_token_id)
        made: list[Prompt] = []
        with_bos = [name for name, item in self.questions.items() if encode.n_written_bos(item.asked)]
        for note in encode.notes_on_written_bos(with_bos):
            self.warn(note)
        for item in self.questions.values():
            asked = encode(item.asked)
            wholes = [encode(item.asked + item.continuation(place)) for place in range(len(item.options))]
            start = min(common(asked, whole) for whole in wholes)
            reason = self._unusable(wholes, start)
            if reason:
                self.warn(f"item {item.id!r} cannot be scored and counts as not right: {reason}")
                continue
            self._note(item, wholes, start, len(asked))
            self.n_tokens[item.id] = [len(whole) - start for whole in wholes]
            self.longest[item.id] = max(map(len, wholes))
            for place, whole in enumerate(wholes):
                prompt = f"{len(self.places)}"
                self.places[prompt] = item.id, place
                made.append(Prompt(prompt, whole, start))
        if not made:
            raise InputError(
                f"file {self.params.file!r}: not one of its questions can be scored; see the warnings"
            )
        return made

    def _unusable(self, wholes: Sequence[Sequence[int]], start: int) -> str:
        n_ctx, longest = self.model.n_ctx, max(map(len, wholes))
        if "learned" in self.model.positions and n_ctx is not None and longest > n_ctx:
            return f"{longest} tokens, but the model has learned positions for {n_ctx}"
        if start < 1:
            return "no token stands before its options"
        if any(len(whole) <= start for whole in wholes) or len({tuple(whole) for whole in wholes}) < len(
            wholes
        ):
            return "the tokenizer gives two of its options the same tokens"
        return ""

    def _note(self, item: Question, wholes: Sequence[Sequence[int]], start: int, n_asked: int) -> None:
        """Say what is unusual about an item that can be scored."""
        if start < n_asked:
            self.warn(
                f"item {item.id!r}: options change the tokens at the end of the question; its last {n_asked - start} "
                "are scored with each option"
            )
        for one in wholes:
            if any(one is not other and common(one, other) == len(one) for other in wholes):
                self.warn(
                    f"item {item.id!r}: one option begins with the whole of another, which is then never less probable"
                )
        longest = max(map(len, wholes))
        if self.model.n_ctx is not None and longest > self.model.n_ctx:
            self.warn(f"item {item.id!r} has {longest} tokens, but the model was made for {self.model.n_ctx}")

    def record(self, condition: Condition, outcome: Outcome) -> None:
        """Keep the option's log-probability; the right option's loss goes into the tables of losses."""
        name, place = self.places[outcome.text]
        if place == self.questions[name].answer:
            super().record(condition, replace(outcome, text=name))
        if finite(outcome.loss):
            total = -float(outcome.loss.sum(dtype="float64"))
            self.sums.setdefault(condition.key, {})[name, place] = total
        else:
            self.warn(
                f"{label(condition.name, condition.layer)}: logits are NaN or infinite for item {name!r}; not scored"
            )

    def merge(self, other: Metric[KnowledgeParams]) -> None:
        """Also the log-probabilities."""
        super().merge(other)
        if isinstance(other, Knowledge):
            self.places.update(other.places)
            self.n_tokens.update(other.n_tokens)
            self.longest.update(other.longest)
            for key, found in other.sums.items():
                self.sums.setdefault(key, {}).update(found)

    def compute(self) -> Mapping[str, Table]:
        """All tables of this model."""
        self.judged = {key: self._judged(key) for key in self.sums}
        self._warn_of_ties()
        return {
            **super().compute(),
            "items": self.table("items", self._items()),
            "accuracy": self.table("accuracy", self._accuracy()),
            "degradation": self.table("degradation", self._degradation()),
            "summary": self.table("summary", [self._summary()]),
        }

    def _judged(self, key: Key) -> dict[str, Item]:
        """Scores of the questions all of whose options have a value."""
        kept = self.sums[key]
        found = {}
        for name, lengths in self.n_tokens.items():
            sums = [kept.get((name, place)) for place in range(len(lengths))]
            values = known(sums)
            if len(values) == len(sums):
                found[name] = judge(values, lengths, self.questions[name].answer)
        return found

    def _warn_of_ties(self) -> None:
        for (condition, layer, _), found in self.judged.items():
            tied = sum(item.chosen is None for item in found.values())
            if tied:
                self.warn(
                    f"{label(condition, layer)}: two options are equally probable in {tied} items, which count as wrong"
                )

    def _of_kind(self, kind: str) -> list[Question]:
        return [item for item in self.questions.values() if kind in (ALL, item.kind)]

    def _kinds(self) -> list[str]:
        """The kinds that are there, and all together."""
        return [*(kind for kind in KINDS if self._of_kind(kind)), ALL]

    def _values(
        self, repeats: Sequence[Condition], items: Sequence[Question], field: str
    ) -> list[float | None]:
        """One value an item, repeats averaged; None where one of them could not be scored."""
        return average(
            [
                [getattr(found[item.id], field) if item.id in found else None for item in items]
                for found in (self.judged.get(condition.key, {}) for condition in repeats)
            ]
        )

    def _items(self) -> Iterator[tuple[Any, ...]]:
        for name, layer, repeats in self.groups():
            for condition in repeats:
                found = self.judged.get(condition.key, {})
                for item in self.questions.values():
                    one = found.get(item.id)
                    chosen = None if one is None or one.chosen is None else item.options[one.chosen]
                    scores: tuple[Any, ...] = (None,) * 6 if one is None else (
                        one.correct, one.correct_per_token, one.p, one.p_per_token, one.log_odds, one.log_odds_per_token
                    )  # fmt: skip
                    yield (
                        item.id, name, layer, condition.seed, item.kind, item.options[item.answer], chosen, *scores,
                        1 / len(item.options), self.longest.get(item.id),
                    )  # fmt: skip

    def _accuracy(self) -> Iterator[tuple[Any, ...]]:
        for name, layer, repeats in self.groups():
            for kind in self._kinds():
                items = self._of_kind(kind)
                right = known(self._values(repeats, items, "correct"))
                others = known(self._values(repeats, items, "correct_per_token"))
                means = [
                    mean(known(self._values(repeats, items, field)), self.seed)[0]
                    for field in ("p", "log_odds")
                ]
                yield (
                    f"{name}, {kind}", name, layer, kind, len(items), len(right) / len(items),
                    *share(right, len(items)), chance(items), same_answer(items), share(others, len(items))[0],
                    *means, len(repeats),
                )  # fmt: skip

    def _degradation(self) -> Iterator[tuple[Any, ...]]:
        for name, layer, repeats in self.groups():
            if repeats == [BASELINE]:
                continue
            lost = {kind: self._lost(repeats, kind) for kind in self._kinds()}
            for kind, (accuracy, log_odds) in lost.items():
                yield (
                    name, layer, kind, len(accuracy), *self._change(accuracy), *mean(log_odds, self.seed),
                    *self._of_all(repeats, kind),
                )  # fmt: skip
            if CONTEXTUAL in lost and PARAMETRIC in lost:
                both = list(zip(lost[CONTEXTUAL], lost[PARAMETRIC], strict=True))
                n = min(len(one) for one in both[0])
                yield (
                    name, layer, f"{CONTEXTUAL} − {PARAMETRIC}", n,
                    *(number for pair in both for number in difference(*pair, seed=self.seed)), None, None,
                )  # fmt: skip

    def _change(self, lost: Sequence[float]) -> tuple[float | None, float | None, float | None]:
        found = change(lost, self.seed)
        if found[0] is not None and found[1] is None:
            self.warn(
                "accuracy_low and accuracy_high are null where accuracy changed alike in all items, or not at all"
            )
        return found

    def _lost(self, repeats: Sequence[Condition], kind: str) -> tuple[list[float], list[float]]:
        """Baseline − condition, item by item, of what was scored both ways: accuracy and log-odds."""
        items = sorted(self._of_kind(kind), key=lambda item: item.id)
        lost = []
        for field in ("correct", "log_odds"):
            before, after = self._values([BASELINE], items, field), self._values(repeats, items, field)
            pairs = zip(before, after, strict=True)
            lost.append([old - new for old, new in pairs if old is not None and new is not None])
        return lost[0], lost[1]

    def _of_all(self, repeats: Sequence[Condition], kind: str) -> tuple[float | None, str | None]:
        """What share of the accuracy above chance was lost, and whether that can be said."""
        items = self._of_kind(kind)
        before, low, _ = share(known(self._values([BASELINE], items, "correct")), len(items))
        after, _, _ = share(known(self._values(repeats, items, "correct")), len(items))
        floor = chance(items)
        if before is None or after is None:
            return None, None
        if low is None or low <= floor:
            self.warn(
                f"{kind}: accuracy at baseline is not above chance, so no share of it can be lost: lost_of_all is null"
            )
            return None, "baseline at chance"
        if after < floor:
            self.warn(f"{kind}: accuracy below chance says no more than chance does: lost_of_all is null")
            return None, "below chance"
        return (before - after) / (before - floor), "ok"

    def _summary(self) -> tuple[Any, ...]:
        def of(kind: str) -> float | None:
            items = self._of_kind(kind)
            return share(known(self._values([BASELINE], items, "correct")), len(items))[0]

        items = self._of_kind(ALL)
        n_scored = len(known(self._values([BASELINE], items, "correct")))
        return (
            of(ALL),
            chance(items),
            n_scored / len(items),
            of(CONTEXTUAL),
            of(PARAMETRIC),
            len(items),
            self.sha256,
        )


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """The metrics in this file."""
    return [Knowledge]
