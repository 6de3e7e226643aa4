"""`HookedTransformer`: TransformerLens' bridge, corrected, with one streaming forward for measurements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException

from phaselens.errors import (
    InputError,
    RefusedModel,
    close_matches,
    require_flag,
    require_text,
    require_whole,
    type_unless_whole,
)
from phaselens.lens import families
from phaselens.lens.attention_owner import StreamingOptions
from phaselens.lens.blocks import layer_range, set_layer_range
from phaselens.lens.components import attention_layers
from phaselens.lens.frequencies import same_regime
from phaselens.lens.hooks import HookPointInfo, describe_hooks, position_axis, resolve_hooks
from phaselens.lens.memory import is_out_of_memory
from phaselens.lens.ownership import OwnedContext, Ownership, owned_call, owned_context
from phaselens.lens.points import N_DISTANCES, OWN_ATTENTION_POINTS, Hook, declaration, in_layer
from phaselens.lens.pretrained import one_line
from phaselens.lens.projection import Projection
from phaselens.lens.quantised import Arithmetic
from phaselens.lens.replays import ReplaysAttention
from phaselens.lens.rotation import SwitchesRotation
from phaselens.lens.rows import Rows
from phaselens.lens.segment_labels import LabelsSegments
from phaselens.lens.stream_inputs import LARGEST_SIZE, model_inputs, require_lengths, require_range
from phaselens.lens.texts import ReadsTexts, options_of, signed_as
from phaselens.lens.weights import projection, weight_of

if TYPE_CHECKING:
    from phaselens.lens.reference import Reference
    from phaselens.lens.token_losses import ModuleHead, Unembedding


class HookedTransformer(SwitchesRotation, LabelsSegments, ReplaysAttention, ReadsTexts):
    """A TransformerLens bridge around an unmodified Hugging Face causal language model.

    Everything TransformerLens offers works on it (`to_tokens`, `generate`, `run_with_cache`, `run_with_hooks`,
    `hooks()`, `transformer_lens.patching`). On top of it:

    * the statistics of attention (`phaselens.lens.points.STATISTICS`, such as ``blocks.{i}.attn.hook_sink`` [batch,
      head, query]): float32 or wider, exact, in O(L) memory, computed only where hooked;
    * ``start_at_layer`` does not run the layers below; an edit of ``hook_resid_mid`` reaches the skip path;
    * ``hook_loss`` [batch, pos], the loss of each token, in pieces of the vocabulary;
    * `info` (facts about the model) and `stream` (one measuring forward);
    * `set_rotation` nulls the rotation of layers and restores it, `segmented` divides the keys into segments;
    * one BOS policy, `bos`, for every method that takes a text: the ids are those that a run measures.

    `phaselens.load` returns one; it is not meant to be constructed directly.
    """

    #: The loss of each token; see `phaselens.lens.loss_point`.
    hook_loss: HookPoint
    tokenizer_note: str | None
    resume_problem: str | None  # see `resuming.find_problem`
    head_paths: tuple[str, ...]  # see `layer_stack.LayerStack`
    reference: Reference | None
    ownership: Ownership
    _streaming_options: StreamingOptions
    _points: dict[str, HookPoint | None]
    position_axes: dict[str, int | None]
    _unembedding: Unembedding | ModuleHead | None
    _arithmetic: Arithmetic | None

    @property
    def device(self) -> torch.device:
        """The device of the embedding, where tokens must be."""
        return families.embedding_of(self.original_model).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights and of all activations except statistics and matrices."""
        return families.embedding_of(self.original_model).dtype

    @property
    def arithmetic(self) -> Arithmetic:
        """How its modules compute, which decides what rounding alone can change."""
        return self._arithmetic or Arithmetic(self.dtype)

    run_with_hooks = owned_call(TransformerBridge.run_with_hooks)
    run_with_cache = owned_call(TransformerBridge.run_with_cache)
    hooks = owned_context(TransformerBridge.hooks)

    def reserved(self) -> OwnedContext:
        """Return a context inside which no other thread can use the lens."""
        return OwnedContext(self, nullcontext)

    @owned_context
    @contextmanager
    def streaming(
        self,
        *,
        lengths: Tensor | None = None,
        sink_position: int = 0,
        n_distances: int = N_DISTANCES,
        reads_only: bool = False,
    ) -> Iterator[None]:
        """Set the texts' lengths, and what `hook_sink` and `hook_distance` measure, for forwards inside the context.

        Args:
            lengths: [batch], the number of real tokens of each right-padded text; None where nothing is padded.
            sink_position: absolute position of the key.
            n_distances: `hook_distance` has the distances 0 … n_distances − 1.
            reads_only: hooks write into no activation in place. A layer whose matrix is hooked, and not edited, then
                computes bit for bit what it computes without the hook (except under `torch.inference_mode`).
        """
        if isinstance(sink_position, int) and sink_position < 0:
            raise InputError(f"sink position {sink_position}: positions are counted from 0")
        require_whole("sink_position", sink_position, 0)
        require_whole("n_distances", n_distances, 1)
        if n_distances > LARGEST_SIZE:
            raise InputError(f"n_distances {n_distances}: give at most {LARGEST_SIZE}")
        require_flag("reads_only", reads_only)
        if lengths is not None:
            received = type_unless_whole(lengths) or ("" if lengths.dim() == 1 else str(list(lengths.shape)))
            if received:
                raise InputError(
                    f"expected lengths as a tensor [batch] of whole numbers, received {received}"
                )
        options = self._streaming_options
        outer = vars(options).copy()
        vars(options).update(sink_position=sink_position, n_distances=n_distances, reads_only=reads_only)
        try:
            with options.rows.with_lengths(lengths):
                yield
        finally:
            vars(options).update(outer)

    @property
    def rows(self) -> Rows:
        """The absolute positions of the running forward's rows."""
        return self._streaming_options.rows

    @owned_call
    def stream(
        self,
        tokens: Tensor | None = None,
        hooks: Sequence[Hook] = (),
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
        """Run one forward without gradient and KV cache, and without unembedding unless `unembed` is set.

        Args:
            tokens: [batch, pos] ids, padded on the right: causal attention then needs no mask, and no real token sees
                a pad. Rows of pads are computed; the caller must drop them.
            hooks: pairs of a hook name and a function `(tensor, hook)`.
            residual: [batch, pos, d_model], with `start_at_layer`, instead of tokens.
            start_at_layer: the first layer to run, on `residual`; n_layers for the final norm alone.
            stop_at_layer: the layer to stop before; n_layers to stop before the final norm.
            unembed: return logits [batch, pos, d_vocab].
            lengths: as in `streaming`.
            sink_position: as in `streaming`.
            n_distances: as in `streaming`.
            reads_only: as in `streaming`.

        Returns:
            The final norm's output [batch, pos, d_model]; with `stop_at_layer`, the residual entering that layer; with
            `unembed`, logits.

        Raises:
            InputError: for tokens that the model does not have, an unknown hook point, or layers out of range.

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
        if unembed and stop_at_layer is not None:
            raise InputError("stream: with stop_at_layer there are no logits; omit unembed")
        inputs = model_inputs(self, tokens, residual, start_at_layer)
        require_range(self, start_at_layer, stop_at_layer)
        require_lengths(lengths, next(iter(inputs.values())))
        model = self.original_model
        pairs = resolve_hooks(self, hooks)
        added = []
        try:
            if stop_at_layer == self.info.n_layers:
                last_residual = in_layer(self.info.n_layers - 1, "hook_out")
                pairs.append((self.require_hook(last_residual), _stop))
            for point, function in pairs:
                added.append((point, point.add_hook(function)))
            if start_at_layer == stop_at_layer == self.info.n_layers and residual is not None:
                return residual
            if start_at_layer == self.info.n_layers and not unembed and "ln_final" in self._modules:
                with torch.no_grad():
                    normed: Tensor = self.ln_final(residual)
                    return normed
            streaming = self.streaming(
                lengths=lengths, sink_position=sink_position, n_distances=n_distances, reads_only=reads_only
            )
            with torch.no_grad(), streaming, self._between(residual, start_at_layer, stop_at_layer):
                if unembed:
                    logits: Tensor = model(**inputs, use_cache=False).logits
                    return logits
                final: Tensor = families.body_of(model)(**inputs, use_cache=False).last_hidden_state
                return final
        except StopAtLayerException as stopped:
            reached: Tensor = stopped.layer_output
            return reached
        except (IndexError, RuntimeError) as error:
            n_ctx = self.info.n_ctx
            if is_out_of_memory(error) or tokens is None or n_ctx is None or tokens.shape[1] <= n_ctx:
                raise
            raise InputError(
                f"{tokens.shape[1]} tokens, but {self.info.label} was made for {n_ctx}, and its forward fails on more "
                f"({one_line(error)}); shorten the texts (--max-tokens)"
            ) from error
        finally:
            for point, handle in added:
                handle.hook.remove()
                point.fwd_hooks = [hook for hook in point.fwd_hooks if hook is not handle]

    @contextmanager
    def _between(
        self, residual: Tensor | None = None, start: int | None = None, stop: int | None = None
    ) -> Iterator[None]:
        """Run forwards inside the context from layer `start`, on `residual`, to layer `stop`; by default, all layers.

        The outer range is restored on exit, since a hook can run a forward inside one that runs some layers only.
        """
        n_layers = self.info.n_layers
        outer = layer_range(self.blocks)
        try:
            set_layer_range(self.blocks, (None, None, stop if stop is None or stop >= 0 else stop + n_layers))
            if start == n_layers:  # TransformerLens refuses it: no layer is left to take the residual
                set_layer_range(self.blocks, (start, residual, None))
            elif start is not None:
                self._setup_start_at_layer(residual, start)
            yield
        finally:
            set_layer_range(self.blocks, outer)

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """All hook points by name. The statistics are left out if an option of TransformerLens replaces the
        model's attention by its own, which has none. A cache of everything then holds everything else."""
        points: dict[str, HookPoint] = super().hook_dict
        if not self._eager_reason():
            return points
        return {name: point for name, point in points.items() if not name.endswith(OWN_ATTENTION_POINTS)}

    def _eager_reason(self) -> str:
        return next((attention.eager_reason() for attention in attention_layers(self).values()), "")

    def _check_hook_fireable(self, *names: str) -> None:
        """Check points that are requested by name; TransformerLens calls this.

        Raises:
            RefusedModel: for a statistic that cannot be served under the current options.
        """
        reason = self._eager_reason()
        unserved = [name for name in names if name.endswith(OWN_ATTENTION_POINTS)]
        if reason and unserved:
            raise RefusedModel(f"{unserved[0]} cannot be served under {reason}; switch that off")
        super()._check_hook_fireable(*names)

    def _generate_tokens(self, current_tokens: Tensor, *args: object, **kwargs: object) -> Any:
        """Run TransformerLens' loop, without a cache if the rotation would change during it."""
        padded = kwargs.get("_is_batched_list") or kwargs.get("initial_attention_mask") is not None
        self._switch_off_stale_cache(kwargs, current_tokens, padded=bool(padded))
        return super()._generate_tokens(current_tokens, *args, **kwargs)

    def _hf_generate(self, input: str | list[str] | Tensor, options: dict[str, Any]) -> Any:
        """Run Hugging Face's generation, without a cache if `generate` uses none or `use_past_kv_cache` is False."""
        tokens = input if isinstance(input, Tensor) else self.to_tokens(input, truncate=False)
        self._switch_off_stale_cache(options, tokens, padded=len(tokens) > 1)
        if not options["use_past_kv_cache"]:
            options["use_cache"] = False
        with self.rows.with_lengths(self.rows.lengths_of_next):
            return super()._hf_generate(input, options)

    def _switch_off_stale_cache(self, options: dict[str, Any], tokens: Tensor, *, padded: bool) -> None:
        """Switch off the cache of a generation from `tokens` [batch, pos] if a text may grow so long that its rotation
        changes: cached keys would keep the old one."""
        n_tokens = tokens.shape[1]
        shortest = 1 if padded else n_tokens
        if not same_regime(self.original_model, shortest, n_tokens + int(options["max_new_tokens"])):
            options["use_past_kv_cache"] = False

    @owned_call
    @signed_as(TransformerBridge.forward)
    def forward(self, input: str | list[str] | Tensor, *args: object, **kwargs: object) -> Any:
        """Run TransformerLens' forward; pads do not count, and each text keeps the rotation of its own length."""
        lengths = self.rows.lengths_of_next
        if self._are_texts(input):
            options = options_of(TransformerBridge.forward, self, input, *args, **kwargs)
            if options["attention_mask"] is None:
                input, lengths = self._padded_inputs(input, options)
                args, kwargs = (), options
        outer = {name: value for name, value in vars(self._streaming_options).items() if name != "rows"}
        with self._between(), self.streaming(lengths=lengths, **outer):
            return super().forward(input, *args, **kwargs)

    def describe_hooks(self, *, every: bool = False) -> list[HookPointInfo]:
        """Return every hook point with shape, dtype and meaning; see `phaselens.lens.hooks.describe_hooks`."""
        return describe_hooks(self, every=every)

    def position_axis(self, name: str) -> int | None:
        """Return the dimension of the tensor at a hook point that runs over positions; None if none does."""
        return position_axis(self, name)

    def weight_of(self, layer: int | None, name: str) -> Tensor:
        """Return the weight `name`, such as `mlp.W_in`; see `phaselens.lens.weights.weight_of`."""
        return weight_of(self, layer, name)

    def projection_of(self, layer: int | None, name: str) -> Projection:
        """Return the projection `name`, such as `attn.W_O`; see `phaselens.lens.weights.projection`."""
        return projection(self, layer, name)

    def find_hook(self, name: str) -> HookPoint | None:
        """Return the hook point with this name, or None."""
        require_text("the name of a hook point", name)
        if name not in self._points:
            points = super().hook_dict
            self._points = {**points, **self._points, name: points.get(name)}
        return self._points[name]

    def require_hook(self, name: str) -> HookPoint:
        """Return the hook point with this name.

        Raises:
            InputError: with close matches, if the model has none.
        """
        point = self.find_hook(name)
        if point is None:
            hint = close_matches(
                name, self.hook_dict, otherwise="describe_hooks() of the model lists all of them"
            )
            declared, absence = declaration(name), self.info.absence(name)
            if absence is not None:
                hint = f"{absence}; {hint}"
            elif declared is not None and declared.exists_in:
                hint = f"only {declared.exists_in} have it; {hint}"
            raise InputError(f"{self.info.label} has no hook point {name!r}; {hint}")
        return point


def _stop(residual: Tensor, hook: object) -> None:
    """Stop the forward at the hook point."""
    raise StopAtLayerException(residual)
