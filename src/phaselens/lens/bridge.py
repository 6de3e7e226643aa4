"""`HookedTransformer`: TransformerLens' bridge, mended, with one streaming forward for measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException

from phaselens.errors import (
    InputError,
    RefusedModel,
    close_matches,
    kind_unless_whole,
    require_flag,
    require_whole,
)
from phaselens.lens.components import (
    DELEGATED,
    N_DISTANCES,
    AttentionReplay,
    Request,
    StreamingAttention,
)
from phaselens.lens.frequencies import same_regime
from phaselens.lens.points import ALIASES, HookPointInfo, describe_hooks, hooked_points, position_axis
from phaselens.lens.projection import Projection
from phaselens.lens.rows import Rows
from phaselens.lens.texts import ReadsTexts, options_of, signed_as
from phaselens.lens.weights import projection, weight_of

if TYPE_CHECKING:
    from phaselens.lens.losses import Unembedding

HookFn = Callable[..., Any]

_SEGMENT = ("_start_at_layer_idx", "_start_residual", "_stop_at_layer_idx")


class HookedTransformer(ReadsTexts):
    """A TransformerLens bridge around an unmodified Hugging Face causal language model.

    Everything TransformerLens offers works on it (`to_tokens`, `generate`, `run_with_cache`, `run_with_hooks`,
    `hooks()`, `transformer_lens.patching`). On top of it:

    * ``blocks.{i}.attn.hook_lse``, ``hook_sink``, ``hook_entropy`` [batch, head, query], ``hook_received`` [batch,
      head, key] and ``hook_distance`` [batch, head, distance], float32, computed only where hooked, exactly, in O(L)
      memory;
    * ``start_at_layer`` does not run the layers below; an edit of ``hook_resid_mid`` reaches the skip path;
    * `info` (what is known of the model) and `stream` (one measuring forward);
    * one BOS policy, `bos`, for all that takes a text: the ids are those that a run measures.

    Made by `phaselens.load`; not meant to be constructed directly.
    """

    tokenizer_note: str | None
    reference: Any
    _request: Request
    _points: dict[str, Any]
    position_axes: dict[str, int | None]
    _unembedding: Unembedding | None

    @property
    def device(self) -> torch.device:
        """Where the embedding is, and so where tokens go."""
        weight: Tensor = self.original_model.get_input_embeddings().weight
        return weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype, which is that of all activations but the statistics."""
        dtype: torch.dtype = next(self.original_model.parameters()).dtype
        return dtype

    @contextmanager
    def streaming(
        self,
        *,
        lengths: Tensor | None = None,
        sink_position: int = 0,
        n_distances: int = N_DISTANCES,
        reads_only: bool = False,
    ) -> Iterator[None]:
        """Say, for the forwards inside, how long each text is and what `hook_sink` and `hook_distance` measure.

        Args:
            lengths: [batch], number of real tokens of each right-padded text; None where nothing is padded.
            sink_position: absolute position of the key.
            n_distances: `hook_distance` holds distances 0 … n_distances − 1.
            reads_only: hooks write into no activation in place. A layer whose matrix is hooked, and not edited, then
                computes to the bit what it computes without (but not under `torch.inference_mode`).
        """
        if isinstance(sink_position, int) and sink_position < 0:
            raise InputError(f"sink position {sink_position}: positions are counted from 0")
        require_whole("sink_position", sink_position, 0)
        require_whole("n_distances", n_distances, 1)
        require_flag("reads_only", reads_only)
        if lengths is not None:
            received = kind_unless_whole(lengths) or ("" if lengths.dim() == 1 else str(list(lengths.shape)))
            if received:
                raise InputError(f"lengths: expected a tensor [batch] of whole numbers, got {received}")
        request = self._request
        before = vars(request).copy()
        vars(request).update(sink_position=sink_position, n_distances=n_distances, reads_only=reads_only)
        try:
            with request.rows.reading(lengths):
                yield
        finally:
            vars(request).update(before)

    @property
    def rows(self) -> Rows:
        """Where the rows of the forward that is running stand; for hooks that act at absolute positions."""
        return self._request.rows

    def attention_replay(self, layer: int) -> AttentionReplay:
        """A context in which the attention of `layer` is computed once, and its output handed on again in every other
        pass: for passes that start from one residual and change nothing before that output. It can be entered again.

        Raises:
            InputError: for a layer that is not there, and inside, for a residual of another shape.

        >>> import phaselens
        >>> from phaselens.testing import tiny_model
        >>> lens = phaselens.load(tiny_model("llama"))
        >>> residual = lens.stream(torch.tensor([[0, 5, 7, 9]]), stop_at_layer=1)
        >>> with lens.attention_replay(1):
        ...     first, second = (lens.stream(residual=residual, start_at_layer=1) for _ in range(2))
        >>> bool(torch.equal(first, second))
        True
        """
        require_whole("layer", layer)
        if not 0 <= layer < self.info.n_layers:
            raise InputError(
                f"attention_replay({layer}): {self.info.label} has layers 0 to {self.info.n_layers - 1}"
            )
        attention: StreamingAttention = self.blocks[layer].attn
        return AttentionReplay(attention)

    def stream(
        self,
        tokens: Tensor | None = None,
        hooks: Sequence[tuple[str, HookFn]] = (),
        *,
        residual: Tensor | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        unembed: bool = False,
        lengths: Tensor | None = None,
        sink_position: int = 0,
        n_distances: int = N_DISTANCES,
        reads_only: bool = False,
    ) -> Tensor:
        """One forward without gradient, KV cache or (unless asked for) unembedding.

        Args:
            tokens: [batch, pos] ids, padded on the right: causal attention then needs no mask, and no real token sees
                a pad. Rows of pads are computed and must be dropped by whoever reads them.
            hooks: pairs of a hook name and a function `(tensor, hook)`.
            residual: [batch, pos, d_model], with `start_at_layer`, in place of tokens.
            start_at_layer: the first layer to run, on `residual`; n_layers for the final norm alone.
            stop_at_layer: the layer to stop before; n_layers to stop before the final norm.
            unembed: return logits [batch, pos, d_vocab].
            lengths, sink_position, n_distances, reads_only: as in `streaming`.

        Returns:
            The final norm's output [batch, pos, d_model]; with `stop_at_layer`, the residual entering that layer; with
            `unembed`, logits.

        Raises:
            InputError: for tokens the model does not have, an unknown hook, or layers out of range.

        >>> import phaselens
        >>> from phaselens.testing import tiny_model
        >>> lens = phaselens.load(tiny_model("llama"))
        >>> sinks = []
        >>> hook = lambda sink, hook: sinks.append(sink)
        >>> final = lens.stream(torch.tensor([[0, 5, 7, 9]]), [("blocks.0.attn.hook_sink", hook)])
        >>> tuple(final.shape), tuple(sinks[0].shape)
        ((1, 4, 32), (1, 4, 4))
        """
        require_flag("unembed", unembed)
        for name, layer in (("start_at_layer", start_at_layer), ("stop_at_layer", stop_at_layer)):
            if layer is not None:
                require_whole(name, layer)
        if unembed and stop_at_layer is not None:
            raise InputError("stream: with stop_at_layer there are no logits; leave unembed out")
        inputs = self._inputs(tokens, residual, start_at_layer)
        model = self.original_model
        handles = hooked_points(self, hooks)
        added = []
        try:
            if stop_at_layer == self.info.n_layers:
                last = f"blocks.{self.info.n_layers - 1}.hook_resid_post"
                handles.append((self.require_hook(last), _stop))
            for point, hook in handles:
                added.append((point, point.add_hook(hook)))
            if start_at_layer == self.info.n_layers and not unembed:
                with torch.no_grad():
                    normed: Tensor = self.ln_final(residual)
                    return normed
            asked = self.streaming(
                lengths=lengths, sink_position=sink_position, n_distances=n_distances, reads_only=reads_only
            )
            with torch.no_grad(), asked, self._between(residual, start_at_layer, stop_at_layer):
                if unembed:
                    logits: Tensor = model(**inputs, use_cache=False).logits
                    return logits
                final: Tensor = model.base_model(**inputs, use_cache=False).last_hidden_state
                return final
        except StopAtLayerException as stopped:
            reached: Tensor = stopped.layer_output
            return reached
        finally:
            for point, handle in added:
                handle.hook.remove()
                point.fwd_hooks = [other for other in point.fwd_hooks if other is not handle]

    def _inputs(self, tokens: Tensor | None, residual: Tensor | None, start: int | None) -> dict[str, Tensor]:
        if start is not None:
            if residual is None or tokens is not None:
                raise InputError(
                    "start_at_layer takes `residual`, the activation entering that layer, and no tokens"
                )
            return {"inputs_embeds": residual}
        if tokens is None or residual is not None:
            raise InputError("stream takes `tokens`; `residual` goes with start_at_layer")
        if not isinstance(tokens, Tensor):
            raise InputError(f"tokens: expected a tensor of ids [batch, pos], got a {type(tokens).__name__}")
        if tokens.dim() != 2 or tokens.is_floating_point():
            raise InputError(f"tokens: expected ids [batch, pos], got {tokens.dtype} {list(tokens.shape)}")
        if tokens.numel() == 0:
            raise InputError(f"tokens: expected at least one token, got {list(tokens.shape)}")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.info.d_vocab:
            raise InputError(
                f"tokens: ids from {low} to {high}, but {self.info.label} knows 0 to {self.info.d_vocab - 1}; "
                "was another model's tokenizer used?"
            )
        if "learned" in self.info.positions and self.info.n_ctx and tokens.shape[1] > self.info.n_ctx:
            raise InputError(
                f"{tokens.shape[1]} tokens, but {self.info.label} has learned positions for {self.info.n_ctx}; "
                "shorten the texts (--max-tokens)"
            )
        return {"input_ids": tokens.to(self.device)}

    @contextmanager
    def _between(
        self, residual: Tensor | None = None, start: int | None = None, stop: int | None = None
    ) -> Iterator[None]:
        """Inside, forwards run from layer `start`, on `residual`, until layer `stop`; by default, all layers. Outside,
        they run as before: a hook may run a forward of its own within one of some layers."""
        n_layers = self.info.n_layers
        if stop is not None and not -n_layers <= stop <= n_layers:
            raise InputError(f"stop_at_layer {stop}: {self.info.label} has {n_layers} layers")
        before = self._segment()
        try:
            self._set_segment((None, None, stop if stop is None or stop >= 0 else stop + n_layers))
            if start is not None:
                self._setup_start_at_layer(residual, start)
            yield
        finally:
            self._set_segment(before)

    def _segment(self) -> tuple[Any, ...]:
        """What TransformerLens notes in every block of the layers that a forward runs."""
        return tuple(getattr(self.blocks[0], name, None) for name in _SEGMENT)

    def _set_segment(self, segment: tuple[Any, ...]) -> None:
        if all(new is old for new, old in zip(segment, self._segment(), strict=True)):
            return
        for block in self.blocks:
            for name, value in zip(_SEGMENT, segment, strict=True):
                setattr(block, name, value)

    @property
    def hook_dict(self) -> dict[str, Any]:
        """All hook points by name; without the statistics while an option of TransformerLens is on that replaces the
        model's attention by its own, which has none. A cache of everything then holds everything else."""
        points: dict[str, Any] = super().hook_dict
        if not self._no_statistics_because():
            return points
        return {name: point for name, point in points.items() if not name.endswith(DELEGATED)}

    def _no_statistics_because(self) -> str:
        return str(self.blocks[0].attn.own_computation_reason())

    def _check_hook_fireable(self, *names: str) -> None:
        """Called by TransformerLens for points that are asked for by name.

        Raises:
            RefusedModel: for a statistic that cannot be served under the present options.
        """
        reason = self._no_statistics_because()
        unserved = [name for name in names if name.endswith(DELEGATED)]
        if reason and unserved:
            raise RefusedModel(f"{unserved[0]} cannot be served under {reason}; switch that off")
        super()._check_hook_fireable(*names)

    def _generate_tokens(self, current_tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens' loop over new tokens; without a cache where a rotation would change."""
        padded = kwargs.get("_is_batched_list") or kwargs.get("initial_attention_mask") is not None
        self._cache_one_rotation(kwargs, current_tokens, padded=bool(padded))
        return super()._generate_tokens(current_tokens, *args, **kwargs)

    def _hf_generate(self, input: Any, options: dict[str, Any]) -> Any:
        """Without a cache where `generate` does without, and where `use_past_kv_cache=False` asks for it."""
        tokens = input if isinstance(input, Tensor) else self.to_tokens(input, truncate=False)
        self._cache_one_rotation(options, tokens, padded=len(tokens) > 1)
        if not options["use_past_kv_cache"]:
            options["use_cache"] = False
        with self.rows.reading(self.rows.lengths_of_next):
            return super()._hf_generate(input, options)

    def _cache_one_rotation(self, options: dict[str, Any], tokens: Tensor, *, padded: bool) -> None:
        """Switch off the cache of a generation from `tokens` [batch, pos] in which a text grows so long that its
        rotation changes: cached keys would keep the old one."""
        n_tokens = tokens.shape[1]
        shortest = 1 if padded else n_tokens
        if not same_regime(self.original_model, shortest, n_tokens + int(options["max_new_tokens"])):
            options["use_past_kv_cache"] = False

    @signed_as(TransformerBridge.forward)
    def forward(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens' forward of texts, tokens or embeddings. Of several texts that are padded, no pad counts, and
        each keeps the rotation of its own length."""
        lengths = self.rows.lengths_of_next
        if self._are_texts(input):
            options = options_of(TransformerBridge.forward, self, input, *args, **kwargs)
            if options["attention_mask"] is None:
                input, lengths = self._read_padded(input, options)
                args, kwargs = (), options
        asked = {name: value for name, value in vars(self._request).items() if name != "rows"}
        with self._between(), self.streaming(lengths=lengths, **asked):
            return super().forward(input, *args, **kwargs)

    def describe_hooks(self, *, every: bool = False) -> list[HookPointInfo]:
        """Every hook point with shape, dtype and meaning; see `phaselens.lens.points.describe_hooks`."""
        return describe_hooks(self, every=every)

    def position_axis(self, name: str) -> int | None:
        """Which dimension of the tensor at a hook point runs over positions; None if none does."""
        return position_axis(self, name)

    def weight_of(self, layer: int | None, name: str) -> Tensor:
        """The weight that TransformerLens calls `blocks.{layer}.{name}`; see `phaselens.lens.weights.weight_of`."""
        return weight_of(self, layer, name)

    def projection_of(self, layer: int | None, name: str) -> Projection:
        """The projection of that name, `attn.W_O`; see `phaselens.lens.weights.projection`."""
        return projection(self, layer, name)

    def find_hook(self, name: str) -> Any:
        """The hook point of that name, or None."""
        if name not in self._points:
            self._points[name] = self.hook_dict.get(name) or self._point_by_path(name)
        return self._points[name]

    def require_hook(self, name: str) -> Any:
        """The hook point of that name.

        Raises:
            InputError: with close matches, where there is none.
        """
        point = self.find_hook(name)
        if point is None:
            known = [
                *self.hook_dict,
                *(f"blocks.{i}.{alias}" for i in range(self.info.n_layers) for alias in ALIASES),
            ]
            hint = close_matches(name, known, otherwise="describe_hooks() of the model lists all of them")
            raise InputError(f"{self.info.label} has no hook point {name!r}; {hint}")
        return point

    def _point_by_path(self, name: str) -> Any:
        """Resolve an alias such as `blocks.0.hook_resid_pre`, which is an attribute and not a module of its own."""
        from transformer_lens.hook_points import HookPoint

        target: Any = self
        for part in name.split("."):
            if part.isdigit() and hasattr(target, "__getitem__"):
                if int(part) >= len(target):
                    return None
                target = target[int(part)]
            else:
                target = getattr(target, part, None)
            if target is None:
                return None
        return target if isinstance(target, HookPoint) else None


def _stop(residual: Tensor, hook: Any) -> None:
    """A hook after which nothing is computed."""
    raise StopAtLayerException(residual)
