"""Models and texts by name: bundled with PhaseLens, on the disk, or offered by a plugin."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from phaselens.data import Text
from phaselens.data.reading import BUNDLED
from phaselens.data.text_files import STDIN
from phaselens.errors import InputError, ModelError, require_kind
from phaselens.plugin import NamedModel, NamedTexts, plugins
from phaselens.plugin.author_errors import describe_error, is_of_plugin
from phaselens.runs.run_options import ModelSpec

if TYPE_CHECKING:
    from phaselens.lens import HookedTransformer


def load_model(
    spec: ModelSpec,
    *,
    label: str | None = None,
    positions: str = "auto",
    bos: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    adapter_scale: float | None = None,
    softmax_scale: float | None = None,
    rope_scaling: str | None = None,
    device_map: str | None = None,
    check: bool | Literal["report"] = True,
) -> HookedTransformer:
    """Load the model that `spec` names; ModelError names the plugin if the plugin's loading fails.

    Raises:
        InputError: for a revision or an adapter of a plugin's model.
        ModelError: if the model cannot be loaded.
    """
    from phaselens.lens import load

    require_kind("spec", spec, ModelSpec, "such as ModelSpec.parse('rope')")
    options: dict[str, Any] = {
        "positions": positions,
        "bos": bos,
        "device": device,
        "dtype": dtype,
        "softmax_scale": softmax_scale,
        "rope_scaling": rope_scaling,
        "device_map": device_map,
        "check": check,
    }
    plugin_model = _plugin_model(spec)
    if plugin_model is None:
        return load(spec.identified, label=label, adapter_scale=adapter_scale, **options)
    if adapter_scale is not None or spec.identified.base is not spec.identified:
        raise InputError(
            f"model {spec.source!r}: {plugin_model.name!r} is offered by a plugin, which has to apply the adapter "
            "itself; leave the adapter out"
        )
    if spec.revision is not None:
        raise InputError(
            f"model {spec.source!r} is offered by a plugin and has no revisions; leave @{spec.revision} out"
        )
    from phaselens.lens.registration import register_adapter

    for architecture, adapter in plugin_model.adapters.items():
        register_adapter(architecture, adapter)
    loaded = _loaded(plugin_model)
    model, tokenizer = loaded if isinstance(loaded, tuple) else (loaded, None)
    return load(model, label=label or spec.short, tokenizer=tokenizer, **options)


def require_device_and_dtype(device: str, dtype: str) -> None:
    """Raise InputError for a missing device or an unsupported dtype, before any model is loaded."""
    from phaselens.lens.checkpoints import resolve_device, resolve_dtype

    resolve_dtype(dtype, resolve_device(device), None)


def require_models(specs: Sequence[ModelSpec]) -> None:
    """Check that models can be loaded and tokenize texts, without loading them; models of plugins are not checked.

    Raises:
        ModelError: for a model that is missing, damaged or incomplete.
    """
    from phaselens.lens.checkpoints import require_complete, require_readable

    sources = [spec.identified for spec in specs if _plugin_model(spec) is None]
    # All headers first, because `require_complete` imports modules that take seconds.
    for source in sources:
        require_readable(source)
    for source in sources:
        require_complete(source)


def find_texts(source: object) -> NamedTexts | None:
    """Return the texts that a plugin offers under this name, if any. The bundled texts, stdin and files go before."""
    if not isinstance(source, str) or source in (BUNDLED, STDIN, "") or _exists(source):
        return None
    return plugins().texts(source)


def _exists(path: str) -> bool:
    """Return whether a file or folder has this name; no file can have one with a NUL or a lone surrogate."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def read_texts_of_plugin(plugin_texts: NamedTexts) -> list[str | Text]:
    """Read the texts; InputError names the plugin if it fails."""
    name = plugin_texts.name
    try:
        return list(plugin_texts.read())
    except BaseException as error:
        if not is_of_plugin(error):
            raise
        raise InputError(
            f"texts {name!r}: plugin {plugins().origin(name)} failed: {describe_error(error)}"
        ) from error


def plugins_of_models(specs: Iterable[ModelSpec]) -> list[str]:
    """Return the names of the plugins that offer models among `specs`."""
    return [spec.source for spec in specs if _plugin_model(spec) is not None]


def _plugin_model(spec: ModelSpec) -> NamedModel | None:
    """Return the plugin's model of that name, if any. Built-in names and paths take precedence."""
    base = spec.identified.base
    return plugins().model(base.name) if base.kind == "other" else None


def _loaded(plugin_model: NamedModel) -> Any:
    try:
        return plugin_model.load()
    except BaseException as error:
        if not is_of_plugin(error):
            raise
        origin = plugins().origin(plugin_model.name)
        raise ModelError(
            f"model {plugin_model.name!r}: plugin {origin} failed to load it: {describe_error(error)}"
        ) from error
