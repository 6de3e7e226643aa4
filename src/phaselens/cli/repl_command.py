"""The command `phaselens repl`."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from phaselens.cli import shared_options
from phaselens.cli.streams import only_results_on_stdout
from phaselens.errors import InputError

if TYPE_CHECKING:
    from phaselens.runs import ModelSpec


@click.command(context_settings={"show_default": True})
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@shared_options.device
@shared_options.device_map
@shared_options.bos
@shared_options.dtype
@shared_options.positions
@shared_options.adapter_scale
@shared_options.softmax_scale
@shared_options.rope_scaling
@click.option(
    "--figures",
    metavar="DIR",
    type=click.Path(file_okay=False),
    help="Folder for the figures of sweeps; by default a temporary one.",
)
@click.option("--quiet", is_flag=True, help="Show no progress bars.")
@shared_options.debug
def repl(models: tuple[str, ...], **arguments: Any) -> None:
    """Patch activations by hand, in IPython.

    MODEL is [LABEL=]SOURCE[@REVISION]; SOURCE is rope, drope, smollm2, a checkpoint folder, a plugin's
    model or a hub id. The default is rope drope. In the session, guide() lists all commands; everything is
    also in `phaselens.patching`.
    """
    from phaselens.report.progress import ProgressBar
    from phaselens.runs import DEFAULT_MODELS, ModelSpec, RunOptions, load_model
    from phaselens.runs.run_options import distinct_labels

    if sys.stdout is None or sys.stdin is None:
        stream = "stdin" if sys.stdin is None else "stdout"
        raise InputError(
            f"{stream} is closed, and a session needs it; use phaselens.patching in a script instead"
        )
    specs = [ModelSpec.parse(model) for model in models or DEFAULT_MODELS]
    labels = distinct_labels(specs)
    options = RunOptions(
        positions=shared_options.by_label(arguments["positions"]),
        adapter_scale=shared_options.adapter_scale_by_label(arguments["adapter_scales"]),
        softmax_scale=shared_options.softmax_scale_by_label(arguments["softmax_scales"]),
        rope_scaling=shared_options.rope_scaling_by_label(arguments["rope_scalings"]),
    )
    options.require_labels(labels)
    options.require_adapters(specs)
    lenses, loads = {}, {}
    with only_results_on_stdout(debug=arguments["debug"]), ProgressBar(quiet=arguments["quiet"]) as bar:
        for spec, label in zip(specs, labels, strict=True):
            bar.loading(label)
            load_options = {
                "label": label,
                "positions": options.positions.get(label, "auto"),
                "bos": arguments["bos"],
                "device": arguments["device"],
                "dtype": arguments["dtype"],
                "adapter_scale": options.adapter_scale_of(label, spec),
                "softmax_scale": options.softmax_scale.get(label),
                "rope_scaling": options.rope_scaling.get(label),
                "device_map": arguments["device_map"],
            }
            lenses[label] = load_model(spec, **load_options)
            loads[label] = _load_call(spec, load_options)
        from phaselens.repl.session import Session
    # Outside of the context: IPython edits and completes lines only if stdout is a terminal when it is imported.
    from phaselens.repl.shell import make_shell

    session = Session(lenses, arguments["figures"], quiet=arguments["quiet"])
    banner = "".join(f"{lens!r}\n" for lens in session.models.values())
    shell = make_shell(
        session,
        loads,
        banner=f"{banner}guide() lists all commands; Tab completes.\n",
        tracebacks=arguments["debug"],
    )
    with _plain_interrupt():
        shell.show_banner()
        shell.mainloop()


def _load_call(spec: ModelSpec, load_options: dict[str, Any]) -> str:
    """Return the Python call that loads the model again under its label, without default arguments."""
    from phaselens.plugin import plugins
    from phaselens.runs import ModelSpec

    keywords = {name: value for name, value in load_options.items() if value not in ("auto", None)}
    if keywords["label"] == ModelSpec(spec.source).short:
        del keywords["label"]
    if spec.source not in ("rope", "drope") and plugins().model(spec.source) is not None:
        suffix = "".join(f", {name}={value!r}" for name, value in keywords.items())
        return f"phaselens.runs.load_model(phaselens.runs.ModelSpec({spec.source!r}){suffix})"
    if spec.revision is not None:
        keywords["revision"] = spec.revision
    suffix = "".join(f", {name}={value!r}" for name, value in keywords.items())
    return f"phaselens.load({spec.source!r}{suffix})"


@contextmanager
def _plain_interrupt() -> Iterator[None]:
    """Use Python's own Ctrl-C handler, which interrupts the current line instead of ending the session."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous_handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous_handler)
