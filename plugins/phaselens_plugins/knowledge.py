"""Knowledge tasks: questions with options from the user's file, scored by the probability of each option.

No answer is generated and parsed, so none is misread ("incorrect" contains "correct") or missing. Every option is
appended to the question, and its tokens are predicted:

* log P(option) is the sum over the option's tokens, so options with the same first token differ by the later ones;
* the model's answer is the option with the largest sum; two equal largest sums are not an answer, and count as wrong;
* p = P(answer) over the sum of P(option) for all options: a softmax over the options alone;
* the columns `…_per_token` use the mean over an option's tokens, as long options have small sums.

An option follows its prompt after the white space that ends the prompt, or else after one space; this white space
belongs to the option's tokens, however the tokenizer splits them. The loss under a condition is a difference item by
item; contextual questions are answered by the prompt, parametric ones by what the model has learned (Jin et al. 2025,
arXiv:2502.01563, section 4).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from phaselens.plugin import (
    BASELINE,
    CAUSAL_TABLES,
    Condition,
    ConditionKey,
    InputError,
    Metric,
    Table,
    TaskPrompt,
    TextOutcome,
    hookimpl,
    param,
)
from phaselens_plugins._causal import merge_nested
from phaselens_plugins._common import TableRow
from phaselens_plugins._encoding import shared_prefix_length
from phaselens_plugins._inner import CONDITIONS_HELP
from phaselens_plugins._questions import (
    CONTEXTUAL,
    KINDS,
    PARAMETRIC,
    Question,
    QuestionFile,
    read_questions,
)
from phaselens_plugins._scores import (
    QuestionScore,
    chance_accuracy,
    difference_of_means,
    same_answer_accuracy,
    score_options,
)
from phaselens_plugins._task_tables import KNOWLEDGE_TABLES
from phaselens_plugins._tasks import (
    Task,
    TaskParams,
    all_finite,
    complete_pairs,
    mean_with_interval,
    task_display,
    without_none,
)

ALL = "all"


@dataclass(frozen=True)
class KnowledgeParams(TaskParams):
    """Parameters of the metric."""

    file: str | None = param(None, help="a JSONL file of questions; docs/tasks.md has the format")
    conditions: str = param("", help=CONDITIONS_HELP)

    @classmethod
    def parse(cls, values: Mapping[str, object]) -> Self:
        """Parse `values`, and read the file once, so that a bad file stops the run before a model is loaded."""
        params = super().parse(values)
        params.read_file()
        return params

    def read_file(self) -> QuestionFile:
        """Read the file's questions; InputError without a file, or for a line that cannot be used."""
        if self.file is None:
            raise InputError(
                "no questions are included; name your JSONL file with -P knowledge.file=FILE "
                "(docs/tasks.md has the format)"
            )
        return read_questions(self.file)


class Knowledge(Task[KnowledgeParams, QuestionScore]):
    """Metric of accuracy and log-odds of questions with options, and of their loss under conditions."""

    name = "knowledge"
    version = "1"
    title = "knowledge tasks"
    description = "questions with options from your JSONL file, scored by the probability of the options"
    citation = "contextual against parametric knowledge: Jin et al. 2025, arXiv:2502.01563"
    Params = KnowledgeParams
    tables = (*CAUSAL_TABLES, *KNOWLEDGE_TABLES)
    display = task_display(
        "accuracy",
        columns=(("log_odds", "log odds"), ("coverage", "coverage"), ("n", "n")),
        summary=(("contextual", "contextual"), ("parametric", "parametric"), ("chance", "chance")),
    )

    @classmethod
    def define(cls, params: KnowledgeParams) -> str:
        """State how the model's answer is determined."""
        return (
            "the answer is the option with the largest log-probability, summed over its tokens; "
            f"{params.file or 'no file'}{params.conditions_note}"
        )

    def setup(self) -> None:
        """Read the questions; start with no prompts or log-probabilities."""
        super().setup()
        self.questions: dict[str, Question] = {}
        self.sha256 = ""
        if self.params.file is not None:
            file = self.params.read_file()
            self.questions = {question.id: question for question in file.questions}
            self.sha256 = file.sha256
        #: Question id and option index by prompt id.
        self.options: dict[str, tuple[str, int]] = {}
        #: Tokens of each option, and tokens of the longest prompt, by question id.
        self.n_tokens: dict[str, list[int]] = {}
        self.longest: dict[str, int] = {}
        #: Log-probability in nats by condition, then by question id and option index.
        self.log_p: dict[ConditionKey, dict[tuple[str, int], float]] = {}

    def prompts(self, tokenizer: object) -> Sequence[TaskPrompt]:
        """Return one prompt for each option of each question that can be scored."""
        if not self.questions:
            self.params.read_file()
        encode = self.encoder(tokenizer)
        prompts: list[TaskPrompt] = []
        questions = self.questions.values()
        with_bos = [question.id for question in questions if encode.n_written_bos(question.stem)]
        for note in encode.notes_on_written_bos(with_bos):
            self.warn(note)
        for question in questions:
            stem_ids = encode(question.stem)
            option_ids = [
                encode(question.stem + question.continuation(option))
                for option in range(len(question.options))
            ]
            scored_from = min(shared_prefix_length(stem_ids, ids) for ids in option_ids)
            reason = self._reason_to_skip(option_ids, scored_from)
            if reason:
                self.warn(f"item {question.id!r} cannot be scored and counts as wrong: {reason}")
                continue
            self._warn_about_question(question, option_ids, scored_from, len(stem_ids))
            self.n_tokens[question.id] = [len(ids) - scored_from for ids in option_ids]
            self.longest[question.id] = max(map(len, option_ids))
            for option, ids in enumerate(option_ids):
                prompt_id = f"{len(self.options)}"
                self.options[prompt_id] = question.id, option
                prompts.append(TaskPrompt(prompt_id, ids, scored_from))
        if not prompts:
            raise InputError(
                f"file {self.params.file!r}: none of its questions can be scored; see the warnings"
            )
        return prompts

    def _reason_to_skip(self, option_ids: Sequence[Sequence[int]], scored_from: int) -> str:
        longest = max(map(len, option_ids))
        if reason := self.model.reason_against(longest):
            return f"{longest} tokens, but {reason}"
        if scored_from < 1:
            return "no token precedes its options"
        has_empty = any(len(ids) <= scored_from for ids in option_ids)
        if has_empty or len({tuple(ids) for ids in option_ids}) < len(option_ids):
            return "the tokenizer gives two of its options the same tokens"
        return ""

    def _warn_about_question(
        self, question: Question, option_ids: Sequence[Sequence[int]], scored_from: int, n_stem: int
    ) -> None:
        """Warn of unusual properties of a question that can be scored."""
        if scored_from < n_stem:
            self.warn(
                f"item {question.id!r}: options change the tokens at the end of the question; its last "
                f"{n_stem - scored_from} are scored with each option"
            )
        for ids in option_ids:
            if any(ids is not other and shared_prefix_length(ids, other) == len(ids) for other in option_ids):
                self.warn(
                    f"item {question.id!r}: one option is a prefix of another, so it is never less probable"
                )
        longest = max(map(len, option_ids))
        if self.model.n_ctx is not None and longest > self.model.n_ctx:
            self.warn(
                f"item {question.id!r} has {longest} tokens, but the model's context length is {self.model.n_ctx}"
            )

    def record(self, condition: Condition, outcome: TextOutcome) -> None:
        """Record the option's log-probability; the right option's loss enters the tables of losses."""
        question_id, option = self.options[outcome.text]
        if option == self.questions[question_id].answer:
            super().record(condition, replace(outcome, text=question_id))
        if all_finite(outcome.loss):
            total = -float(outcome.loss.sum(dtype="float64"))
            self.log_p.setdefault(condition.key, {})[question_id, option] = total
        else:
            self.warn(f"{condition.label}: logits are NaN or infinite for item {question_id!r}; not scored")

    def merge(self, other: Metric[KnowledgeParams]) -> None:
        """Merge another instance, with its log-probabilities."""
        super().merge(other)
        if isinstance(other, Knowledge):
            self.options.update(other.options)
            self.n_tokens.update(other.n_tokens)
            self.longest.update(other.longest)
            merge_nested(self.log_p, other.log_p)

    def compute(self) -> Mapping[str, Table]:
        """Return all tables of this model."""
        self.scores = {key: self._scores_of(key) for key in self.log_p}
        self._warn_of_ties()
        return {
            **super().compute(),
            "items": self.table("items", self._item_rows()),
            "accuracy": self.table("accuracy", self._accuracy_rows()),
            "degradation": self.table("degradation", self._degradation_rows()),
            "summary": self.table("summary", [self._summary_row()]),
        }

    def _scores_of(self, key: ConditionKey) -> dict[str, QuestionScore]:
        """Return the scores of the questions all of whose options have a log-probability."""
        log_p = self.log_p[key]
        scores = {}
        for question_id, lengths in self.n_tokens.items():
            sums = without_none(log_p.get((question_id, option)) for option in range(len(lengths)))
            if len(sums) == len(lengths):
                scores[question_id] = score_options(sums, lengths, self.questions[question_id].answer)
        return scores

    def _warn_of_ties(self) -> None:
        conditions = {BASELINE.key: BASELINE, **self.losses.conditions}
        for key, scores in self.scores.items():
            n_tied = sum(score.chosen is None for score in scores.values())
            if n_tied:
                self.warn(
                    f"{conditions[key].label}: two options are equally probable in {n_tied} items, which count as wrong"
                )

    def _of_kind(self, kind: str) -> list[Question]:
        return [question for question in self.questions.values() if kind in (ALL, question.kind)]

    def _ids(self, kind: str) -> list[str]:
        return [question.id for question in self._of_kind(kind)]

    def _kinds(self) -> list[str]:
        """Return the kinds of question in the file, and all together."""
        return [*(kind for kind in KINDS if self._of_kind(kind)), ALL]

    def _item_rows(self) -> Iterator[TableRow]:
        for name, layer, repeats in self.groups():
            for condition in repeats:
                scores = self.scores.get(condition.key, {})
                for question in self.questions.values():
                    score = scores.get(question.id)
                    chosen = None if score is None or score.chosen is None else question.options[score.chosen]
                    cells: TableRow = (None,) * 6 if score is None else (
                        score.correct, score.correct_per_token, score.p, score.p_per_token, score.log_odds,
                        score.log_odds_per_token,
                    )  # fmt: skip
                    yield (
                        question.id, name, layer, condition.seed, question.kind, question.options[question.answer],
                        chosen, *cells, 1 / len(question.options), self.longest.get(question.id),
                    )  # fmt: skip

    def _accuracy_rows(self) -> Iterator[TableRow]:
        for name, layer, repeats in self.groups():
            for kind in self._kinds():
                questions, ids = self._of_kind(kind), self._ids(kind)
                n_scored = len(without_none(self.values(repeats, ids, "correct")))
                means = [
                    # One resample: the table has no interval of these means.
                    mean_with_interval(
                        without_none(self.values(repeats, ids, field)), self.seed, n_resamples=1
                    )[0]
                    for field in ("p", "log_odds")
                ]
                yield (
                    f"{name}, {kind}", name, layer, kind, len(ids), n_scored / len(ids),
                    *self.share(repeats, ids, "correct"), chance_accuracy(questions), same_answer_accuracy(questions),
                    self.share(repeats, ids, "correct_per_token")[0], *means, len(repeats),
                )  # fmt: skip

    def _degradation_rows(self) -> Iterator[TableRow]:
        for name, layer, repeats in self.groups():
            if repeats == [BASELINE]:
                continue
            lost_by_kind = {kind: self._lost_accuracy(repeats, kind) for kind in self._kinds()}
            for kind, (accuracy, log_odds) in lost_by_kind.items():
                lost_accuracy = self.mean_change(
                    accuracy,
                    "accuracy_low and accuracy_high are missing where accuracy changed by the same amount in "
                    "all items, or not at all",
                )
                yield (
                    name, layer, kind, len(accuracy), *lost_accuracy, *mean_with_interval(log_odds, self.seed),
                    *self._lost_share(repeats, kind),
                )  # fmt: skip
            if CONTEXTUAL in lost_by_kind and PARAMETRIC in lost_by_kind:
                field_pairs = list(zip(lost_by_kind[CONTEXTUAL], lost_by_kind[PARAMETRIC], strict=True))
                n = min(map(len, field_pairs[0]))
                differences = (
                    difference_of_means(contextual, parametric, seed=self.seed)
                    for contextual, parametric in field_pairs
                )
                yield (
                    name, layer, f"{CONTEXTUAL} − {PARAMETRIC}", n,
                    *(number for difference in differences for number in difference), None, None,
                )  # fmt: skip

    def _lost_accuracy(self, repeats: Sequence[Condition], kind: str) -> tuple[list[float], list[float]]:
        """Return baseline − condition of the items scored under both: accuracy and log-odds."""
        ids = sorted(self._ids(kind))
        accuracy, log_odds = (
            [
                unedited - edited
                for unedited, edited in complete_pairs(
                    self.values([BASELINE], ids, field), self.values(repeats, ids, field)
                )
            ]
            for field in ("correct", "log_odds")
        )
        return accuracy, log_odds

    def _lost_share(self, repeats: Sequence[Condition], kind: str) -> tuple[float | None, str | None]:
        """Return the lost share of the accuracy above chance, and the status: why that share is undefined, or ok."""
        ids, chance = self._ids(kind), chance_accuracy(self._of_kind(kind))
        unedited, low, _ = self.share([BASELINE], ids, "correct")
        edited, _, _ = self.share(repeats, ids, "correct")
        if unedited is None or edited is None:
            return None, None
        if low is None or low <= chance:
            self.warn(
                f"{kind}: accuracy at baseline is not above chance, so no share of it can be lost: "
                "lost_of_all is missing"
            )
            return None, "baseline at chance"
        if edited < chance:
            self.warn(
                f"{kind}: accuracy under a condition is below chance, which is no worse than a total loss: lost_of_all "
                "is missing"
            )
            return None, "below chance"
        return (unedited - edited) / (unedited - chance), "ok"

    def _summary_row(self) -> TableRow:
        accuracies = {
            kind: self.share([BASELINE], self._ids(kind), "correct")[0]
            for kind in (ALL, CONTEXTUAL, PARAMETRIC)
        }
        ids = self._ids(ALL)
        n_scored = len(without_none(self.values([BASELINE], ids, "correct")))
        return (
            accuracies[ALL],
            chance_accuracy(self._of_kind(ALL)),
            n_scored / len(ids),
            accuracies[CONTEXTUAL],
            accuracies[PARAMETRIC],
            len(ids),
            self.sha256,
        )


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """Return the metrics in this file."""
    return [Knowledge]
