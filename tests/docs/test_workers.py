"""The page on workers shows commands that exist, manifests that are YAML, and the simulation's columns."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tools.simulate_workers import COUNTS, Times, table

from phaselens.cli.merge_command import merge
from phaselens.cli.run_command import run

PAGE = (Path(__file__).parents[2] / "docs" / "workers.md").read_text(encoding="utf-8")


def options_of(command: object) -> set[str]:
    return {option for parameter in vars(command)["params"] for option in parameter.opts}


def test_every_option_on_the_page_exists() -> None:
    known = options_of(run) | options_of(merge) | {"--repeat"}
    of_slurm = {"--array", "--cpus-per-task", "--gres", "--parsable", "--dependency", "--wrap"}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", PAGE)) - of_slurm <= known


def test_the_manifests_run_a_part_and_a_cluster() -> None:
    yaml = pytest.importorskip("yaml")
    job, ray_job = (yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["args"][0].endswith("--shards $((JOB_COMPLETION_INDEX + 1))/8 --quiet")
    assert job["spec"]["completions"] == 8
    assert ray_job["kind"] == "RayJob"
    assert "--engine ray --address auto" in ray_job["spec"]["entrypoint"]


def test_the_table_is_one_of_the_simulation() -> None:
    header = table(Times([[1.0]], 0.0, 0.0, 0.0), [1]).splitlines()[0]
    assert header in PAGE
    counts = re.findall(r"^\| ([\d,]+) \| [\d,.]+ \|", PAGE, re.MULTILINE)
    assert [int(count.replace(",", "")) for count in counts] == list(COUNTS)
