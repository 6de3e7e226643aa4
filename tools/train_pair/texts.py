"""Cut held-out passages of varied length that start a paragraph and end a sentence; by default, the bundled texts.

`python -m tools.train_pair.texts --corpus DIR --tokenizer DIR --out FILE.jsonl`
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from tools.train_pair.corpus import SPECIAL
from transformers import AutoTokenizer, PreTrainedTokenizerFast

SOURCES = {
    "dracula": "Bram Stoker, Dracula (1897); public domain",
    "the-adventures-of-sherlock-holmes": (
        "Arthur Conan Doyle, The Adventures of Sherlock Holmes (1892); public domain"
    ),
}
NAMES = {"dracula": "dracula", "the-adventures-of-sherlock-holmes": "sherlock"}
# Fewest and most tokens of a length class, BOS included, and passages of it in each book.
CLASSES = ((16, 20), (26, 32), (54, 64), (108, 128), (220, 256), (460, 512))
PER_CLASS = 5
_SENTENCE_END = re.compile(r"""(?<=[a-z][.!?])["']?(?=\s+["'A-Z])""")
_TITLE = re.compile(r"\b(?:Mr|Mrs|Dr|St|Prof|Esq|Messrs)\.$")


def sentences(paragraph: str) -> list[str]:
    """Split after sentence ends, keeping the text: the joined pieces are `paragraph`."""
    fragments, start = [], 0
    for match in _SENTENCE_END.finditer(paragraph):
        if not _TITLE.search(paragraph[: match.start()]):
            fragments.append(paragraph[start : match.end()])
            start = match.end()
    return [*fragments, paragraph[start:]]


def passages(paragraphs: list[str], start: int) -> Iterator[str]:
    """Yield passages that start at paragraph `start`, each one sentence longer than the previous."""
    text = ""
    for number, paragraph in enumerate(paragraphs[start:]):
        text += "\n" if number else ""
        for sentence in sentences(paragraph):
            text += sentence
            yield text


def count_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    """Return the number of tokens of `text`, and one for BOS, whether or not the tokenizer adds it."""
    return len(tokenizer(text, add_special_tokens=False).input_ids) + 1


def longest_passage(
    tokenizer: PreTrainedTokenizerFast, paragraphs: list[str], start: int, low: int, high: int
) -> str | None:
    """Return the longest passage from `start` with low..high tokens, BOS included, or None."""
    longest = None
    for text in passages(paragraphs, start):
        size = count_tokens(tokenizer, text)
        if size > high:
            break
        if size >= low and text.rstrip("\"'")[-1:] in (".", "!", "?"):
            longest = text
    return longest


def _is_prose(paragraph: str) -> bool:
    return len(paragraph) > 40 and paragraph[0].isalpha() and paragraph.rstrip("\"'")[-1:] in (".", "!", "?")


def select_texts(
    corpus: Path,
    tokenizer: PreTrainedTokenizerFast,
    classes: Sequence[tuple[int, int]] = CLASSES,
    per_class: int = PER_CLASS,
) -> list[dict[str, str]]:
    """Return passages of the two held-out books, short ones first within a book: `id`, `text` and `source` each.

    Args:
        classes: the fewest and most tokens of each length class, BOS included.
        per_class: passages of each class in each book. No two passages overlap.
    """
    rows: list[dict[str, str]] = []
    for book, source in SOURCES.items():
        lines = (corpus / f"{book}.txt").read_text(encoding="utf-8").splitlines()
        # Front matter, advertisements and the printer's errata are not prose.
        paragraphs = [line for line in lines[len(lines) // 20 : -len(lines) // 12] if "* * *" not in line]
        class_limits = [limits for limits in classes for _ in range(per_class)]
        used = 0
        texts: list[tuple[int, str]] = []
        # Alternate long and short from the start of the book to its end, so that each class spans the book.
        order = [class_limits[c * per_class + i] for i in range(per_class) for c in range(len(classes))]
        for number_in_book, (low, high) in enumerate(order):
            earliest = max(used, number_in_book * len(paragraphs) // len(order))
            for start in range(earliest, len(paragraphs)):
                text = None
                if _is_prose(paragraphs[start]):
                    text = longest_passage(tokenizer, paragraphs, start, low, high)
                if text is not None:
                    texts.append((count_tokens(tokenizer, text), text))
                    used = start + text.count("\n") + 1
                    break
            else:
                raise ValueError(f"{book}: no passage of {low} to {high} tokens after paragraph {earliest}")
        for number, (_, text) in enumerate(sorted(texts)):
            if any(mark in text for mark in (*SPECIAL, *tokenizer.all_special_tokens)):
                raise ValueError(f"{book}: a passage spells out a special token: {text[:60]!r}")
            rows.append({"id": f"{NAMES[book]}-{number:02d}", "text": text, "source": source})
    return rows


def _limits(written: str) -> tuple[int, int]:
    low, _, high = written.partition("-")
    return int(low), int(high)


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m tools.train_pair.texts", description=__doc__)
    p.add_argument("--corpus", type=Path, required=True)
    p.add_argument("--tokenizer", type=Path, required=True, help="folder with the tokenizer that counts")
    p.add_argument(
        "--classes", type=_limits, nargs="+", default=CLASSES, metavar="LOW-HIGH", help="lengths in tokens"
    )
    p.add_argument("--per-class", type=int, default=PER_CLASS, help="passages of each class in each book")
    p.add_argument("--out", type=Path, required=True, help="the .jsonl to write")
    args = p.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    rows = select_texts(args.corpus, tokenizer, args.classes, args.per_class)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
