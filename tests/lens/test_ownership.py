"""Interrupts at any moment, hooks that raise, and threads leave a lens what it was, to the bit."""

from __future__ import annotations

import contextlib
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

import phaselens
from phaselens.errors import InputError
from phaselens.plugin import Edit
from phaselens.runs import applied
from tests.toys import letters, toy_lens

TOKENS = torch.tensor([[0, 5, 7, 9, 11, 3]])
EDITS: list[Any] = [
    ("blocks.0.hook_mlp_out", lambda tensor, hook: tensor * 0),
    ("blocks.1.hook_resid_mid", lambda tensor, hook: tensor + 1),
    ("blocks.0.attn.hook_sink", lambda tensor, hook: None),
]


class Subject:
    """A lens, what it computes unedited, and the calls and contexts that change it for a while."""

    def __init__(self) -> None:
        self.lens: Any = toy_lens()
        self.residual = self.lens.stream(TOKENS, stop_at_layer=1)
        self.expected = self.outputs()
        lens, residual = self.lens, self.residual
        self.jobs: list[Callable[[], object]] = [
            lambda: lens.stream(TOKENS, EDITS),
            lambda: lens.stream(residual=residual, start_at_layer=1, hooks=EDITS),
            lambda: lens.stream(TOKENS, stop_at_layer=1),
            lambda: lens.run_with_hooks(TOKENS, fwd_hooks=EDITS),
            lambda: lens.run_with_cache(TOKENS),
            lambda: self.within(lens.hooks(fwd_hooks=EDITS)),
            lambda: self.within(applied(lens, [Edit("blocks.0.hook_mlp_out", 0.0)])),
            lambda: self.within(lens.nulled_rotation(1)),
            lambda: self.within(lens.segmented(torch.tensor([[0, 1]]))),
            lambda: self.within(lens.streaming(sink_position=2, lengths=torch.tensor([3]))),
            self.replay,
        ]

    def within(self, context: Any) -> None:
        with context:
            self.lens(TOKENS)

    def replay(self) -> None:
        with self.lens.attention_replay(1):
            self.lens.stream(residual=self.residual, start_at_layer=1, hooks=EDITS)

    def outputs(self) -> tuple[Tensor, ...]:
        return (
            self.lens.stream(TOKENS, unembed=True),
            self.lens(TOKENS).detach(),
            self.lens.stream(residual=self.residual, start_at_layer=1),
        )

    def require_unchanged(self) -> None:
        assert torch.is_grad_enabled()
        assert all(map(torch.equal, self.outputs(), self.expected))
        assert set(self.lens.info.positions) == {"rope"}
        assert not any(point.fwd_hooks or point._forward_hooks for point in self.lens.hook_dict.values())


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject()


def interrupt_at_random(subject: Subject, n: int, seed: int) -> int:
    """Interrupt `n` calls by a timer, and return how many ended by it."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    rng, n_interrupted = random.Random(seed), 0
    retained: list[BaseException] = []
    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        for index in range(n):
            job = subject.jobs[index % len(subject.jobs)]
            start = time.perf_counter()
            job()
            seconds = time.perf_counter() - start
            try:
                signal.setitimer(signal.ITIMER_REAL, max(1e-6, rng.random() * seconds))
                job()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt as error:
                n_interrupted += 1
                retained = [error] if index % 2 else []  # as IPython keeps the last traceback
            subject.require_unchanged()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    del retained
    return n_interrupted


# Python swallows what is raised in a callback of the garbage collector or in a finalizer, and reports it as a warning.
swallowing = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@swallowing
def test_interrupts_leave_the_model_what_it_was(subject: Subject) -> None:
    assert interrupt_at_random(subject, 22, seed=1) > 0


@pytest.mark.slow
@swallowing
def test_five_hundred_interrupts_leave_the_model_what_it_was(subject: Subject) -> None:
    print("seed 0")
    assert interrupt_at_random(subject, 500, seed=0) > 200


class InterruptAt:
    """Raises KeyboardInterrupt at a bytecode of the functions that install and remove; counts without a number."""

    FILES = ("ownership.py", "contextlib.py", "replays.py", "condition_editor.py", "bridge_core.py")

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.n_events = 0

    def enter(self, frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.endswith(self.FILES):
            return None
        frame.f_trace_opcodes = True
        return self.step(frame, event, argument)

    def step(self, frame: FrameType, event: str, argument: object) -> Any:
        self.n_events += 1
        if self.n_events == self.number:
            sys.settrace(None)
            raise KeyboardInterrupt
        return self.step

    def run(self, job: Callable[[], object]) -> int:
        previous = sys.gettrace()
        sys.settrace(self.enter)
        try:
            job()
        finally:
            sys.settrace(previous)
        return self.n_events


@pytest.mark.slow
@swallowing
def test_interrupts_at_any_bytecode_of_the_bookkeeping_leave_the_model_what_it_was(subject: Subject) -> None:
    rng = random.Random(0)
    counts = [InterruptAt().run(job) for job in subject.jobs]
    for index in range(200):
        number = index % len(counts)
        tracer = InterruptAt(rng.randrange(1, counts[number]))
        # In a finaliser, Python loses the interrupt. Where the exception is kept, as IPython keeps the last one, the
        # frames that it holds can postpone the removal to the start of the next call.
        with contextlib.suppress(KeyboardInterrupt):
            tracer.run(subject.jobs[number])
        subject.require_unchanged()


def test_a_call_whose_end_was_lost_is_undone_at_the_start_of_the_next(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    lens, generation = subject.lens, subject.lens.ownership.generation
    point = lens.require_hook("blocks.0.hook_mlp_out")

    def lose(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lens.ownership, "undo", lose)
        patch.setattr(lens.ownership, "end", lose)
        with pytest.raises(KeyboardInterrupt):
            lens.stream(TOKENS)
    point.add_hook(lambda tensor, hook: tensor * 0)  # what an interrupted `finally` would have left
    subject.require_unchanged()
    assert lens.ownership.generation == generation + 1


def test_a_call_that_was_lost_inside_a_context_ends_with_it(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    lens = subject.lens

    def lose(*_: object) -> None:
        raise KeyboardInterrupt

    def interrupt_inside() -> None:
        with lens.attention_replay(1), monkeypatch.context() as patch:
            patch.setattr(lens.ownership, "undo", lose)
            hooks = [("blocks.1.hook_mlp_out", lose)]
            lens.stream(residual=2 * subject.residual, start_at_layer=1, hooks=hooks)

    with pytest.raises(KeyboardInterrupt):
        interrupt_inside()
    subject.require_unchanged()


def test_a_hook_that_raises_leaves_nothing_behind(subject: Subject) -> None:
    def fail(tensor: Tensor, hook: object) -> None:
        raise RuntimeError("no")

    for call in (subject.lens.stream, subject.lens.run_with_hooks):
        with pytest.raises(RuntimeError, match="no"):
            call(TOKENS, [*EDITS, ("blocks.1.attn.hook_q", fail)])
        subject.require_unchanged()


def test_what_a_user_installs_stays(subject: Subject) -> None:
    lens = subject.lens
    lens.add_hook("blocks.0.hook_mlp_out", EDITS[0][1])
    edited = lens.stream(TOKENS)
    with pytest.raises(RuntimeError, match="no"), lens.hooks(fwd_hooks=EDITS[1:2]):
        raise RuntimeError("no")
    assert torch.equal(lens.stream(TOKENS), edited)
    lens.reset_hooks()
    context = lens.hooks(fwd_hooks=EDITS[:1])
    context.__enter__()
    assert torch.equal(lens.stream(TOKENS), edited)
    assert torch.equal(lens.stream(TOKENS), edited)
    context.__exit__(None, None, None)
    subject.require_unchanged()


def test_a_lens_serves_one_thread(subject: Subject) -> None:
    started, finish = threading.Event(), threading.Event()

    def wait(tensor: Tensor, hook: object) -> None:
        started.set()
        assert finish.wait(30)

    thread = threading.Thread(target=lambda: subject.lens.stream(TOKENS, [("hook_embed", wait)]))
    thread.start()
    try:
        assert started.wait(30)
        with pytest.raises(
            InputError, match=r"llama is in use in another thread.*load a lens for each thread"
        ):
            subject.lens.stream(TOKENS)
        with pytest.raises(InputError, match="in use in another thread"):
            phaselens.run(subject.lens, metrics="sinks", texts=[letters(5)])
    finally:
        finish.set()
        thread.join()
    subject.require_unchanged()


@pytest.mark.slow
def test_lenses_of_their_own_serve_threads_at_once() -> None:
    texts = [letters(n) for n in range(5, 9)]
    expected = phaselens.run(toy_lens(), metrics="sinks", texts=texts).to_dict()["metrics"]
    results: list[Any] = [None, None]
    lenses = [toy_lens(), toy_lens()]

    def measure(index: int) -> None:
        results[index] = phaselens.run(lenses[index], metrics="sinks", texts=texts).to_dict()["metrics"]

    threads = [threading.Thread(target=measure, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected, expected]


@pytest.mark.slow
def test_the_memory_of_two_hundred_runs_is_that_of_a_few(subject: Subject) -> None:
    process = psutil.Process()
    sizes = []
    for index in range(200):
        phaselens.run(subject.lens, metrics="sinks", texts=[letters(5), letters(9)])
        if index in (20, 199):
            sizes.append(process.memory_info().rss)
    assert sizes[1] - sizes[0] < 8e6
