"""The trial of one model type: load a tiny model of it with the lens, and compare with its own dense attention."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tools.families.absent import absent_points
from tools.families.configs import TEXT_IDS, class_name_of
from tools.families.dense import RecordedAttention, dense_attention
from tools.families.models import tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import phaselens
from phaselens.errors import PhaseLensError
from phaselens.lens import HookedTransformer
from phaselens.lens.points import STATISTICS, in_layer

DTYPES = ("float32", "bfloat16", "float16", "float64")
#: Largest error of a statistic (relative for the log-sum-exp) and of logits (relative to the largest) in float32.
LIMIT, LOGITS_LIMIT = 1e-5, 2e-5
_N_TEXTS, _N_TOKENS = 2, 24


@dataclass(frozen=True)
class Measurement:
    """The largest errors of a served model in one dtype, against its own eager attention in float64.

    ``statistics`` by name, absolute, and relative for the log-sum-exp; ``logits`` relative to the largest logit,
    against the model's own forward in the same dtype.
    """

    statistics: dict[str, float]
    logits: float

    @property
    def worst(self) -> float:
        """The largest error of a statistic."""
        return max(self.statistics.values(), default=0.0)


@dataclass
class Trial:
    """The result for one model type.

    ``measurements`` by dtype in which it is served; ``refusals`` by dtype, with the message; ``problems`` by dtype,
    with what went wrong other than a refusal; ``absent`` by hook point, with the reason. ``unbuildable`` says why
    transformers itself cannot build the model, or run it on text; "" if it can.
    """

    model_type: str
    class_name: str
    measurements: dict[str, Measurement] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    positions: tuple[str, ...] = ()
    unbuildable: str = ""

    @property
    def is_served(self) -> bool:
        """Whether the model is served in float32, within the limits."""
        measurement = self.measurements.get("float32")
        return measurement is not None and measurement.worst <= LIMIT and measurement.logits <= LOGITS_LIMIT


def try_model_type(model_type: str, dtypes: tuple[str, ...] = DTYPES) -> Trial:
    """Try one model type in each dtype."""
    trial = Trial(model_type, class_name_of(model_type))
    with tempfile.TemporaryDirectory() as parent:
        try:
            checkpoint = Checkpoint(model_type, Path(parent) / model_type)
            _logits(checkpoint.load(torch.float32), text())
        except Exception as error:  # noqa: BLE001 - transformers raises whatever a model type causes
            trial.unbuildable = f"{type(error).__name__}: {one_line(error)}"
            return trial
        for dtype in dtypes:
            try:
                _try_dtype(trial, checkpoint, dtype)
            except PhaseLensError as error:
                trial.refusals[dtype] = one_line(error).replace(f"{parent}/", "")
            except Exception as error:  # noqa: BLE001 - the survey reports whatever a model type causes
                trial.problems[dtype] = f"{type(error).__name__}: {one_line(error)}"
    return trial


def _try_dtype(trial: Trial, checkpoint: Checkpoint, dtype_name: str) -> None:
    """Load and measure a model in one dtype, and add the result to `trial`."""
    dtype = getattr(torch, dtype_name)
    lens = phaselens.load(checkpoint.source(dtype), device="cpu", dtype=dtype)
    tokens = text(lens.info.longest)
    own_logits = _logits(checkpoint.load(dtype), tokens)
    _, attentions = dense_attention(checkpoint.load(dtype, attention="eager").double(), tokens)
    trial.measurements[dtype_name] = measure(lens, tokens, own_logits, attentions)
    if not trial.positions:
        trial.positions, trial.absent = lens.info.positions, absent_points(lens)
        if lens.info.longest is not None:
            trial.absent["longer texts"] = (
                "a query then sees chunks of a text, or keys that an indexer selects"
            )


class Checkpoint:
    """A tiny model of a model type, saved in a folder.

    Where transformers cannot load it from there, it is created again with the same weights: a text model whose
    configuration class is not mapped to a causal language model (`emu3_text_model`), or one with a missing library.
    """

    def __init__(self, model_type: str, folder: Path) -> None:
        self._model_type, self._folder = model_type, folder
        model = tiny_model(model_type)
        self._is_loadable = type(model.config) in MODEL_FOR_CAUSAL_LM_MAPPING
        model.save_pretrained(folder)
        if self._is_loadable:
            try:
                self.load(torch.float32)
            except ImportError:
                # A part for images or sound that needs a library; `tiny_model` leaves it out.
                self._is_loadable = False

    def source(self, dtype: torch.dtype) -> Path | PreTrainedModel:
        """Return what a user would load: the folder, or the model in memory."""
        return self._folder if self._is_loadable else tiny_model(self._model_type).to(dtype)

    def load(self, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
        """Load the model by transformers, by default with the attention that transformers chooses."""
        if not self._is_loadable:
            return tiny_model(self._model_type, attention=attention).to(dtype)
        options: dict[str, Any] = {"attn_implementation": attention} if attention else {}
        if attention or dtype == torch.float64:
            # A loop over experts; other implementations of mixtures of experts lack float64.
            options["experts_implementation"] = "eager"
        return AutoModelForCausalLM.from_pretrained(self._folder, dtype=dtype, **options).eval()


def one_line(error: Exception) -> str:
    """Return an error's message on one line."""
    return " ".join(str(error).split())


def text(longest: int | None = None) -> Tensor:
    """Return the texts of every trial, [batch, pos], of at most `longest` tokens."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(TEXT_IDS.start, TEXT_IDS.stop, (_N_TEXTS, _N_TOKENS), generator=generator)
    return tokens[:, :longest]


def measure(
    lens: HookedTransformer, tokens: Tensor, own_logits: Tensor, attentions: list[RecordedAttention]
) -> Measurement:
    """Return the errors of a lens on `tokens`, against the model's own logits and dense attention.

    Raises:
        ValueError: if the lens measured another number of attentions than the model computed.
    """
    fired: dict[str, list[Tensor]] = defaultdict(list)
    hooks = []
    for layer in range(lens.info.n_layers):
        for name in _statistics(attentions[0]) if attentions else STATISTICS:
            point = in_layer(layer, f"attn.{name}")
            if lens.find_hook(point) is not None:
                hooks.append((point, lambda value, hook, name=name: fired[name].append(value.double())))
    logits = lens.stream(tokens, unembed=True)
    lens.stream(tokens, hooks)
    expected = [_statistics(attention) for attention in attentions]
    errors: dict[str, float] = {}
    for name, values in fired.items():
        if len(values) != len(expected):
            raise ValueError(
                f"{name} fired {len(values)} times, but the model computed {len(expected)} attentions"
            )
        if name == "hook_top_key":  # rounding may decide which of several nearly equal weights is the largest
            pairs = zip(values, attentions, strict=True)
            errors[name] = max(_weight_missed(value, attention.pattern) for value, attention in pairs)
            continue
        errors[name] = max(
            _error(value, dense[name], relative=name == "hook_lse")
            for value, dense in zip(values, expected, strict=True)
        )
    if attentions and not fired:
        raise ValueError(f"the model computed {len(attentions)} attentions, but the lens has no statistics")
    scale = own_logits.abs().max()
    return Measurement(errors, _error(logits.double() / scale, own_logits / scale))


def _logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Return the logits [batch, pos, d_vocab] of the model's own forward."""
    with torch.no_grad():
        return model(tokens, use_cache=False).logits.double()


def _statistics(attention: RecordedAttention) -> dict[str, Tensor]:
    """Return the statistics of a dense attention that are compared with the lens'."""
    pattern = attention.pattern
    return {
        "hook_lse": attention.lse,
        "hook_learned_sink": attention.learned_sink,
        "hook_itself": pattern.diagonal(pattern.shape[-1] - pattern.shape[-2], dim1=-2, dim2=-1),
        "hook_sink": pattern[..., 0],
        "hook_entropy": torch.special.entr(pattern).sum(-1),
        "hook_received": pattern.sum(-2),
        "hook_distance": _by_distance(pattern),
        # Without labels, all keys are in one segment.
        "hook_segments": pattern.sum(-1, keepdim=True),
    }


def _weight_missed(top: Tensor, pattern: Tensor) -> float:
    """Return the largest difference between a row's largest weight and that of the key named in `top` [batch, head,
    query, 2]."""
    weight = pattern.gather(-1, top[..., :1].long())[..., 0]
    return float((pattern.amax(-1) - weight).max())


def _by_distance(pattern: Tensor) -> Tensor:
    """Return the sums over the diagonals of a pattern, from a query's own key back, [batch, head, distance]."""
    return torch.stack(
        [pattern.diagonal(-distance, dim1=-2, dim2=-1).sum(-1) for distance in range(pattern.shape[-1])], -1
    )


def _error(measured: Tensor, expected: Tensor, *, relative: bool = False) -> float:
    """Return the largest difference, relative to magnitudes above 1 if asked; columns beyond the text must be 0."""
    width = expected.shape[-1]
    if measured.shape[:-1] != expected.shape[:-1] or bool(measured[..., width:].any()):
        raise ValueError(f"expected shape {list(expected.shape)}, received {list(measured.shape)}")
    difference = (measured[..., :width] - expected).abs()
    if relative:
        difference = difference / expected.abs().clamp(min=1.0)
    return float(difference.max())
