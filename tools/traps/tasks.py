"""Traps in tasks. Every `*_script` function is wrong on purpose."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tools.traps.bench import Bench, Trap, TrapNumbers
from tools.traps.dense import DenseModel
from tools.traps.interventions import greedy

#: Statements, and whether they are true.
STATEMENTS = {
    "Is London in England?": True,
    "Is Paris in England?": False,
    "Is the sun hot?": True,
    "Is ice hot?": False,
    "Is a horse an animal?": True,
    "Is a stone an animal?": False,
    "Is snow white?": True,
    "Is snow black?": False,
    "Is the sea deep?": True,
    "Can a fish walk?": False,
    "Does a bird have wings?": True,
    "Does a house have wings?": False,
}
OPTIONS = ("Yes", "No")
#: The length at which a script cuts its prompts, and that of the prompts.
CUT_LENGTH, PROMPT_LENGTH = 96, 128
N_PROMPTS = 5


def prompts() -> list[str]:
    """Return the statements as prompts."""
    return [f"Question: {statement} Answer with only 'Yes' or 'No'.\nAnswer:" for statement in STATEMENTS]


def parsed_script(answer: str) -> bool | None:
    """Search a decoded answer for the letters of yes and no; None if it has neither."""
    text = answer.lower()
    if "yes" in text:
        return True
    return False if "no" in text else None


def parsed_accuracy_script(answers: Sequence[str]) -> float | None:
    """Return the share of right answers among those that could be parsed."""
    parsed = [
        (parsed_script(answer), truth) for answer, truth in zip(answers, STATEMENTS.values(), strict=True)
    ]
    judged = [answer == truth for answer, truth in parsed if answer is not None]
    return sum(judged) / len(judged) if judged else None


@lru_cache(maxsize=8)
def decoded_answers(bench: Bench) -> list[str]:
    """Return the decoded answer to each question."""
    tokenizer = bench.lens.tokenizer
    return [
        str(tokenizer.decode(greedy(bench.dense, bench.ids(prompt, 512), cached=True)))
        for prompt in prompts()
    ]


def option_log_p(dense: DenseModel, prompt_ids: Sequence[int], ids: Sequence[int]) -> float:
    """Return the log-probability of what follows the prompt in ids, in nats."""
    n_shared = 0
    while n_shared < len(prompt_ids) and prompt_ids[n_shared] == ids[n_shared]:
        n_shared += 1
    return -float(dense.forward(ids).losses[n_shared - 1 :].sum())


def dense_accuracy(bench: Bench) -> float:
    """Return the share of questions whose right option is the more probable one."""
    right = []
    for prompt, truth in zip(prompts(), STATEMENTS.values(), strict=True):
        prompt_ids = bench.ids(prompt, 512)
        yes, no = (
            option_log_p(bench.dense, prompt_ids, bench.ids(f"{prompt} {option}", 512)) for option in OPTIONS
        )
        right.append(float(yes > no) if truth else float(no > yes))
    return sum(right) / len(right)


@lru_cache(maxsize=8)
def our_run(bench: Bench) -> dict[str, Any]:
    """Return the summary of `knowledge` on the same questions."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "questions.jsonl"
        lines = [
            {
                "id": str(number),
                "kind": "parametric",
                "prompt": prompt,
                "options": OPTIONS,
                "answer": int(not truth),
            }
            for number, (prompt, truth) in enumerate(zip(prompts(), STATEMENTS.values(), strict=True))
        ]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        run = bench.measure([("knowledge", {"file": str(file)})])
    return bench.rows("knowledge", "summary", run)[0]


def unparsed(bench: Bench) -> TrapNumbers:
    """Measure the accuracy of yes-or-no answers."""
    return TrapNumbers(
        dense_accuracy(bench), our_run(bench)["accuracy"], parsed_accuracy_script(decoded_answers(bench))
    )


def n_judged(bench: Bench) -> TrapNumbers:
    """Count the questions that the accuracy is a share of."""
    judged = [parsed_script(answer) for answer in decoded_answers(bench)]
    measured, n = our_run(bench), float(len(STATEMENTS))
    return TrapNumbers(n, measured["coverage"] * n, float(sum(answer is not None for answer in judged)))


def cut_prompt_script(ids: Sequence[int]) -> list[int]:
    """Keep the first tokens of a prompt, as `truncation=True` does."""
    return list(ids[:CUT_LENGTH])


def passkey_prompts(bench: Bench) -> list[list[int]]:
    """Return prompts of `passkey`, by the metric itself."""
    from phaselens.plugin import plugins

    metric = plugins().metric("passkey")
    params = metric.Params(lengths=str(PROMPT_LENGTH), depths="0.5", n=N_PROMPTS, null="none")
    passkey = metric(bench.lens.info, params)
    passkey.bos = "always"
    return [list(prompt.ids) for prompt in passkey.prompts(bench.lens.text_tokenizer)]


def n_asked(bench: Bench, ids_of_prompts: Sequence[Sequence[int]]) -> float:
    """Return in how many prompts the question reaches the model."""
    texts = [bench.lens.tokenizer.decode(torch.tensor(ids)) for ids in ids_of_prompts]
    return float(sum("What is the secret number?" in text for text in texts))


def cut_question(bench: Bench) -> TrapNumbers:
    """Count the passkey prompts whose question reaches the model."""
    whole = passkey_prompts(bench)
    cut = [cut_prompt_script(ids) for ids in whole]
    return TrapNumbers(float(N_PROMPTS), n_asked(bench, whole), n_asked(bench, cut))


def normal_interval_script(n_right: int, n: int) -> tuple[float, float]:
    """Return p ± 1.96 √(p (1 − p) / n), which has no width where all are right."""
    share = n_right / n
    half = 1.96 * (share * (1 - share) / n) ** 0.5
    return share - half, share + half


def few_prompts(_bench: Bench) -> TrapNumbers:
    """Measure the lower end of the interval where all of five prompts are right: n / (n + z²)."""
    from phaselens.uncertainty import wilson_interval

    return TrapNumbers(
        N_PROMPTS / (N_PROMPTS + 1.959963984540054**2),
        wilson_interval(N_PROMPTS, N_PROMPTS).ci_low,
        normal_interval_script(N_PROMPTS, N_PROMPTS)[0],
    )


TRAPS = (
    Trap("Answers searched for words", "questions judged, of 12", 0.0, n_judged),
    Trap("Answers searched for words", "accuracy", 0.0, unparsed),
    Trap("The question cut off", "prompts of 5 that ask", 5, cut_question),
    Trap("Five prompts", "lower end of the interval, 5 of 5 right", 0.3, few_prompts),
)
