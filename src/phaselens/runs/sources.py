"""Models and texts by name: what comes with PhaseLens, what lies on the disk, what a plugin offers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from phaselens.data import Text
from phaselens.errors import InputError, ModelError, require_kind
from phaselens.plugin import NamedModel, plugins
from phaselens.plugin.loading import FAULTS, told
from phaselens.runs.options import DEFAULT_MODELS, ModelSpec

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
    check: bool | Literal["report"] = True,
) -> HookedTransformer:
    """The lens of a model named by text; ModelError names the plugin where its own loading fails."""
    from phaselens.lens import load

    require_kind("spec", spec, ModelSpec, "such as ModelSpec.parse('rope')")
    options: dict[str, Any] = {
        "positions": positions,
        "bos": bos,
        "device": device,
        "dtype": dtype,
        "check": check,
    }
    named = _of_plugin(spec.source)
    if named is None:
        return load(spec.source, label=label, revision=spec.revision, **options)
    if spec.revision is not None:
        raise InputError(
            f"model {spec.source!r} is a plugin's and has no revisions; leave @{spec.revision} out"
        )
    from phaselens.lens.registration import register_adapter

    for architecture, adapter in named.adapters.items():
        register_adapter(architecture, adapter)
    made = _made(named)
    model, tokenizer = made if isinstance(made, tuple) else (made, None)
    return load(model, label=label or spec.short, tokenizer=tokenizer, **options)


def require_device_and_dtype(device: str, dtype: str) -> None:
    """InputError for a device that is not there, or a dtype that is not served, before any model is loaded."""
    from phaselens.lens.sources import resolve_device, resolve_dtype

    resolve_dtype(dtype, resolve_device(device), None)


def require_model(spec: ModelSpec) -> str | None:
    """Check that a model can be loaded, by headers alone.

    Returns:
        The checkpoint folder or hub id that the name stands for; None for a plugin's model.

    Raises:
        ModelError: where nothing of this name can be loaded, or what can is damaged.
    """
    from phaselens.lens.sources import require_readable, resolve

    if _of_plugin(spec.source) is not None:
        return None
    folder = resolve(spec.source)
    require_readable(folder, spec.source, spec.revision)
    return folder


def named_texts(source: str) -> str | Iterable[str | Text]:
    """The texts that a plugin offers under this name, or `source` itself, which then names a file."""
    named = None if Path(source).exists() else plugins().texts(source)
    if named is None:
        return source
    try:
        return list(named.read())
    except FAULTS as error:
        raise InputError(
            f"texts {source!r}: plugin {plugins().origin(source)} failed: {told(error)}"
        ) from error


def used_plugins(models: Iterable[str], texts: object) -> list[str]:
    """Names of the plugins whose models or texts a run uses."""
    names = [ModelSpec.parse(model).source for model in models]
    used = [name for name in names if _of_plugin(name) is not None]
    if isinstance(texts, str) and not Path(texts).exists() and plugins().texts(texts) is not None:
        used.append(texts)
    return used


def _of_plugin(source: str) -> NamedModel | None:
    """Names that PhaseLens itself resolves, and paths, go before a plugin's."""
    from phaselens.lens.packaged import MODELS as PACKAGED_MODELS

    if source in DEFAULT_MODELS or source in PACKAGED_MODELS or Path(source).exists():
        return None
    return plugins().model(source)


def _made(named: NamedModel) -> Any:
    try:
        return named.load()
    except FAULTS as error:
        origin = plugins().origin(named.name)
        raise ModelError(f"model {named.name!r}: plugin {origin} failed to load it: {told(error)}") from error
