"""Loss by position on long windows of the held-out books, within and beyond the trained length, as a table.

`python -m tools.recalibrate.positions smollm2-rope smollm2-drope --corpus DIR`; `nope=MODEL` nulls a model's rotation.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tools.train_pair.corpus import HELD_OUT, books, windows_at
from tools.train_pair.measure import TAU

import phaselens
from phaselens.lens import HookedTransformer
from phaselens.lens.points import in_layer
from phaselens.lens.token_losses import token_losses
from phaselens.uncertainty import mean_interval

_NULLED = "nope="


def load(name: str) -> HookedTransformer:
    """Load a model by name; `nope=MODEL` with its rotation nulled."""
    if name.startswith(_NULLED):
        return phaselens.load(name.removeprefix(_NULLED), positions="nope")
    return phaselens.load(name)


def held_out_windows(folder: Path, lens: HookedTransformer, count: int, length: int) -> torch.Tensor:
    """Return evenly spaced windows of the held-out books, [window, length], BOS first in each."""
    _, held = books(folder, HELD_OUT)
    encoded = [
        lens.text_tokenizer.backend_tokenizer.encode(
            path.read_text(encoding="utf-8"), add_special_tokens=False
        )
        for path in held
    ]
    stream = np.concatenate([np.asarray(encoding.ids, dtype=np.int64) for encoding in encoded])
    starts = np.linspace(0, stream.size - length, count, dtype=np.int64)
    return torch.from_numpy(windows_at(stream, starts, length, int(lens.info.bos_token_id or 0)))


def edges(length: int, first: int = 64) -> list[int]:
    """Return the borders of the bins of positions: 1, `first`, and doubling up to `length`."""
    borders = [1]
    while first < length:
        borders.append(first)
        first *= 2
    return [*borders, length]


def by_position(lens: HookedTransformer, windows: torch.Tensor) -> tuple[npt.NDArray[np.float64], ...]:
    """Return each window's mean loss in nats, and its share of heads that are sinks, by bin: [window, bin] both.

    The bin of a loss is the position of the predicted token; that of a sink, the position of the query.
    """
    borders = edges(windows.shape[1])
    losses, sink_rates = [], []
    for window in windows[:, None]:
        sinks: list[torch.Tensor] = []

        def keep(sink: torch.Tensor, hook: Any, sinks: list[torch.Tensor] = sinks) -> None:
            sinks.append(sink[0].double())

        hooks = [(in_layer(layer, "attn.hook_sink"), keep) for layer in range(lens.info.n_layers)]
        final = lens.stream(window, hooks)
        loss = token_losses(lens, final[0, :-1], window[0, 1:]).loss.double()
        scores = torch.stack(sinks)
        bins = list(itertools.pairwise(borders))
        losses.append([float(loss[low - 1 : high - 1].mean()) for low, high in bins])
        sink_rates.append(
            [float((scores[..., low:high].mean(-1) >= TAU).double().mean()) for low, high in bins]
        )
    return np.asarray(losses), np.asarray(sink_rates)


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m tools.recalibrate.positions", description=__doc__)
    p.add_argument("models", nargs="+")
    p.add_argument("--corpus", type=Path, required=True, help="folder of .txt books")
    p.add_argument("--windows", type=int, default=12)
    p.add_argument("--length", type=int, default=4096)
    args = p.parse_args()
    borders = edges(args.length)
    labels = [f"{low}–{high - 1}" for low, high in itertools.pairwise(borders)]
    print("| model | | " + " | ".join(labels) + " |")
    print("|---|---|" + "---:|" * len(labels))
    for name in args.models:
        lens = load(name)
        windows = held_out_windows(args.corpus, lens, args.windows, args.length)
        for title, values, digits in zip(
            ("loss", "sink rate"), by_position(lens, windows), (3, 2), strict=True
        ):
            mean, low, high = mean_interval(values)
            cells = [
                f"{mean[i]:.{digits}f} ({low[i]:.{digits}f}–{high[i]:.{digits}f})" for i in range(len(labels))
            ]
            print(f"| {name} | {title} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
