"""Blocks of a page run in order, and their output is compared word by word."""

from __future__ import annotations

from pathlib import Path

import pytest
from tools.page_blocks import Printed, blocks, run_page, same_output, with_output

PAGE = """\
# A page

```text title=words.txt
one two
```

```python
import pathlib

words = pathlib.Path("words.txt").read_text().split()
print(len(words), "words")
```

<!-- output -->

```text
```

<!-- not run: installs -->

```sh
pip install something
```

<!-- needs: a_package_that_nobody_has -->

```python
raise RuntimeError
```

```python
print(words[-1])
```

<!-- output -->
```text
one
```
"""


def test_titles_are_files_names_are_shared_and_marked_blocks_do_not_run(tmp_path: Path) -> None:
    outputs = list(run_page(PAGE, tmp_path))
    assert [output.text for output in outputs] == ["2 words\n", "two\n"]
    assert [output.shown.code for output in outputs] == ["", "one\n"]
    page = with_output(PAGE, outputs)
    assert "```text\n2 words\n```" in page
    assert page.endswith("```text\ntwo\n```\n")
    assert with_output(page, list(run_page(page, tmp_path))) == page


def test_commands_run_as_the_command_line_does(tmp_path: Path) -> None:
    commands = "phaselens --version  # a comment\nphaselens \\\n  --version > version.txt"
    page = f"```sh\n{commands}\n```\n\n<!-- output -->\n```text\n```\n"
    (output,) = run_page(page, tmp_path)
    assert output.text == (tmp_path / "version.txt").read_text()
    assert output.text.startswith("phaselens")


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("```sh\nls\n```\n", "mark the block that calls 'ls'"),
        ("```sh\nphaselens nothing\n```\n", "phaselens nothing ended with code 2: .*nothing"),
        ("```yaml\na: 1\n```\n", "a block 'yaml' is neither"),
    ],
)
def test_what_cannot_run_is_reported(page: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        list(run_page(page, tmp_path))


def test_outputs_agree_up_to_the_last_digit_and_the_width_of_rules() -> None:
    assert same_output("loss 1.25 ───\n", "loss  1.26 ─────")
    assert not same_output("loss 1.25", "loss 1.27")
    assert not same_output("loss 0.1", "loss -0.1")
    assert not same_output("layer 5", "layer 6")
    assert same_output("ppl 2,300", "ppl 2,301")
    assert not same_output("rope 1.0", "drope 1.0")
    assert same_output("0.7–0.8", "0.7–0.9")


def test_every_mark_is_read() -> None:
    assert [(block.mark, block.detail) for block in blocks(PAGE)] == [
        (None, None),
        (None, None),
        ("output", None),
        ("not run", "installs"),
        ("needs", "a_package_that_nobody_has"),
        (None, None),
        ("output", None),
    ]
    assert Printed(blocks(PAGE)[0], "text").shown.title == "words.txt"
