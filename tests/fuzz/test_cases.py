"""A thousand hostile checkpoints, texts, command lines and plugins end as they should. Slow tier only.

The seed is printed; PHASELENS_FUZZ_SEED repeats it, and PHASELENS_FUZZ_CASES sets the number of cases.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.cases import CaseFolders, CaseRunner
from tests.fuzz.mutations import mutate_bytes, mutate_checkpoint
from tests.fuzz.plugin_sources import WORKING, misbehaving
from tests.toys import save_checkpoint

pytestmark = pytest.mark.slow
SEED = int(os.environ.get("PHASELENS_FUZZ_SEED") or secrets.randbelow(2**32))
N_CASES = int(os.environ.get("PHASELENS_FUZZ_CASES") or 1000)
FAMILIES = ("llama", "gemma2", "gpt2", "gpt-oss")
RUN = ("run", "m", "-p", "sinks", "--texts", "t.txt", "--quiet", "--format", "json")


def fuzzed(share: float) -> Callable[[Any], Any]:
    """Decorate a test that is run with a share of all cases."""
    options = settings(
        max_examples=max(1, round(N_CASES * share)),
        deadline=None,
        database=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    return lambda test: seed(SEED)(options(test))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny checkpoint of each family."""
    folder = tmp_path_factory.mktemp("sources")
    for family in FAMILIES:
        save_checkpoint(folder / family, family)
    return folder


@pytest.fixture(scope="session")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CaseRunner]:
    """The warm process."""
    print(f"\nPHASELENS_FUZZ_SEED={SEED}")
    folders = CaseFolders(tmp_path_factory.mktemp("fuzz") / "case")
    folders.clear()
    runner = CaseRunner(folders)
    yield runner
    runner.close()


def prepare(runner: CaseRunner, checkpoints: Path, family: str = "llama") -> Path:
    """Make the folders anew, with a checkpoint and a file of texts; return the folder of the inputs."""
    runner.folders.clear()
    inputs = runner.folders.inputs
    shutil.copytree(checkpoints / family, inputs / "m")
    (inputs / "t.txt").write_text("a b c d\nb c a\n")
    return inputs


def require_sound(runner: CaseRunner, description: object, *arguments: str) -> None:
    """Run a case, and fail with everything that is known of it."""
    outcome = runner.run(*arguments)
    problems = outcome.problems(runner.folders)
    assert not problems, f"{problems}\n{description}\n{outcome}\nPHASELENS_FUZZ_SEED={SEED}"


@fuzzed(0.4)
@given(rng=st.randoms(use_true_random=False), family=st.sampled_from(FAMILIES), n=st.integers(1, 2))
def test_checkpoints(runner: CaseRunner, checkpoints: Path, rng: Random, family: str, n: int) -> None:
    inputs = prepare(runner, checkpoints, family)
    changes = [mutate_checkpoint(rng, inputs / "m") for _ in range(n)]
    require_sound(runner, changes, *(RUN if rng.random() < 0.8 else ("check", "m")))


SUFFIXES = (".txt", ".jsonl", ".csv", ".tsv", ".parquet", ".txt.gz", ".jsonl.zst", ".ndjson", ".bin")
RECORDS = (
    '{"text": "a b", "id": "x"}', '{"text": "a b", "id": 3}', '{"text": 3}', '{"text": null}', '{"txt": "a"}', "{}",
    "[]",
    '{"text": "a", "id": "\\u001b[31m"}', '{"text": "a", "id": "=1+1"}', '{"text": "\\ud800"}', '{"text": "a b"',
    '{"id": ' + "9" * 5000 + ', "text": "a"}', "[" * 20_000, '{"text": "' + "a " * 20_000 + '"}', "text,id\na b,x",
    '"a', "\t",
)  # fmt: skip


@fuzzed(0.2)
@given(
    rng=st.randoms(use_true_random=False),
    suffix=st.sampled_from(SUFFIXES),
    content=st.one_of(
        st.binary(max_size=200),
        st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.lists(st.sampled_from(RECORDS), max_size=5).map(lambda lines: "\n".join(lines).encode()),
    ),
    options=st.lists(
        st.sampled_from(["--paragraphs", "--window=3", "--max-tokens=1", "--text-field=id"]), max_size=2
    ),
)
def test_texts(
    runner: CaseRunner, checkpoints: Path, rng: Random, suffix: str, content: bytes, options: list[str]
) -> None:
    inputs = prepare(runner, checkpoints)
    name = f"texts{suffix}"
    (inputs / name).write_bytes(mutate_bytes(rng, content) if rng.random() < 0.3 else content)
    arguments = [*RUN, *options]
    arguments[arguments.index("t.txt")] = name
    require_sound(runner, (name, content), *arguments)


ARGUMENT_VALUES = st.one_of(
    st.sampled_from(["", "0", "-1", "1", "3", "1e999", "nan", "9" * 30, "9" * 5000, "x", "m", "m=", "=", "@", "m@main",
                     "\x1b[31m",
                     "../../secret.safetensors", "/dev/zero", "t.txt", "m", "a" * 5000, "sinks.threshold=x", "m=nope",
                     "m=yarn:2", "sinks", "heads", "json", "csv", "out/x", "auto", "cpu", "cuda:9", "float16", "nope"]),
    st.text(st.characters(exclude_characters="\0"), max_size=20),
)  # fmt: skip
OPTIONS = (
    "--texts", "--text", "--text-field", "--id-field", "--label-field", "--max-tokens", "--window", "--stride",
    "--n-texts", "--batch-tokens", "--shard-tokens", "--bos", "--device", "--dtype", "--positions", "--adapter-scale",
    "--softmax-scale", "--rope-scaling", "--seed", "--table", "--by", "--figure-format", "--figure-width", "-P", "-p",
    "--heatmap", "--token-texts", "--threads", "--plugin-file", "--shards", "--phase",
)  # fmt: skip


@fuzzed(0.25)
@given(
    pairs=st.lists(st.tuples(st.sampled_from(OPTIONS), ARGUMENT_VALUES), min_size=1, max_size=3),
    model=ARGUMENT_VALUES,
    keeps_model=st.booleans(),
)
def test_arguments(
    runner: CaseRunner, checkpoints: Path, pairs: list[tuple[str, str]], model: str, keeps_model: bool
) -> None:
    prepare(runner, checkpoints)
    arguments = [word for pair in pairs for word in pair]
    models = ["m"] if keeps_model else ["--", model]
    require_sound(
        runner,
        "",
        "run",
        "-p",
        "sinks",
        "--texts",
        "t.txt",
        "--quiet",
        "--format",
        "json",
        *arguments,
        *models,
    )


@fuzzed(0.15)
@given(rng=st.randoms(use_true_random=False))
def test_plugins(runner: CaseRunner, checkpoints: Path, rng: Random) -> None:
    inputs = prepare(runner, checkpoints)
    source = misbehaving(rng)
    (inputs / "fuzzed.py").write_text(source)
    outputs = [[], ["--figures", "out/f", "--figure-format", "svg"], ["--out", "out/run"]]
    require_sound(
        runner,
        source[len(WORKING) :],
        *RUN,
        "-p",
        "fuzzed",
        "--plugin-file",
        "fuzzed.py",
        *rng.choice(outputs),
    )


def test_what_must_not_be_is_seen(runner: CaseRunner, checkpoints: Path) -> None:
    """A plugin may do all this, so it shows that the process and its checks see it."""
    inputs = prepare(runner, checkpoints)
    deeds = {
        "open('../secret.safetensors', 'rb')": "read of ../secret.safetensors",
        "open('elsewhere', 'w')": "write of elsewhere",
        "os.mkdir('elsewhere', dir_fd=os.open('..', os.O_RDONLY))": "write of ",
        "subprocess.run(['true'])": "process: ",
        "__import__('socket').socket().connect_ex(('127.0.0.1', 9))": "socket: ",
        "os._exit(9)": "exit code 9",
        "sys.stderr.write('Traceback')": "'Traceback' on stderr",
        "sys.stderr.write('line\\n' * 9)": "9 lines on stderr",
    }
    for deed, problem in deeds.items():
        (inputs / "fuzzed.py").write_text(f"{WORKING}\n{deed}\n")
        outcome = runner.run(*RUN, "-p", "fuzzed", "--plugin-file", "fuzzed.py")
        assert any(problem in seen for seen in outcome.problems(runner.folders)), (deed, outcome)


def test_an_interrupt_while_figures_are_drawn_removes_the_unfinished_ones(
    runner: CaseRunner, checkpoints: Path
) -> None:
    """Python removes a folder by descriptors, with names that are relative to it."""
    inputs = prepare(runner, checkpoints)
    plot = "    @classmethod\n    def plot(cls, tables, figure):\n        raise KeyboardInterrupt()\n"
    (inputs / "fuzzed.py").write_text(f"{WORKING}{plot}")
    arguments = ("-p", "fuzzed", "--plugin-file", "fuzzed.py", "--out", "out/run")
    require_sound(runner, plot, *RUN, *arguments)
