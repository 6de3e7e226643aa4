"""`phaselens repl`."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from phaselens.cli import options

if TYPE_CHECKING:
    from phaselens.runs import ModelSpec


@click.command(context_settings={"show_default": True})
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@options.device
@options.bos
@options.dtype
@options.positions
@click.option(
    "--figures",
    metavar="DIR",
    type=click.Path(file_okay=False),
    help="Where sweeps draw their figures; by default a temporary folder.",
)
@click.option("--quiet", is_flag=True, help="No progress bars.")
@options.debug
def repl(models: tuple[str, ...], **given: Any) -> None:
    """Patch activations by hand, in IPython.

    MODEL is [LABEL=]SOURCE[@REVISION]; SOURCE is rope, drope, smollm2, a checkpoint folder, a plugin's
    model or a hub id. None means: rope drope. Inside, guide() lists what there is; everything is also in
    `phaselens.patching`.
    """
    from phaselens.cli.outcome import only_results_on_stdout
    from phaselens.report.progress import ProgressBar
    from phaselens.runs import DEFAULT_MODELS, ModelSpec, Options, load_model
    from phaselens.runs.options import distinct_labels

    specs = [ModelSpec.parse(model) for model in models or DEFAULT_MODELS]
    labels = distinct_labels(specs)
    positions = options.by_label(given["positions"])
    Options(positions=positions).require_labels(labels)
    lenses, loads = {}, {}
    with only_results_on_stdout(debug=given["debug"]), ProgressBar(quiet=given["quiet"]) as bar:
        for spec, label in zip(specs, labels, strict=True):
            bar.loading(label)
            how = {
                "label": label,
                "positions": positions.get(label, "auto"),
                "bos": given["bos"],
                "device": given["device"],
                "dtype": given["dtype"],
            }
            lenses[label] = load_model(spec, **how)
            loads[label] = _load_call(spec, how)
        from phaselens.repl.session import Session
        from phaselens.repl.shell import make_shell

    session = Session(lenses, given["figures"], quiet=given["quiet"])
    banner = "".join(f"{lens!r}\n" for lens in session.models.values())
    shell = make_shell(
        session,
        loads,
        banner=f"{banner}guide() lists what there is; Tab completes.\n",
        tracebacks=given["debug"],
    )
    with _plain_interrupt():
        shell.show_banner()
        shell.mainloop()


def _load_call(spec: ModelSpec, how: dict[str, Any]) -> str:
    """The call that loads the model again, with its label; defaults are left out."""
    from phaselens.plugin import plugins
    from phaselens.runs import ModelSpec

    said = {name: value for name, value in how.items() if value != "auto"}
    if said["label"] == ModelSpec(spec.source).short:
        del said["label"]
    if spec.source not in ("rope", "drope") and plugins().model(spec.source) is not None:
        extra = "".join(f", {name}={value!r}" for name, value in said.items())
        return f"phaselens.runs.load_model(phaselens.runs.ModelSpec({spec.source!r}){extra})"
    if spec.revision is not None:
        said["revision"] = spec.revision
    extra = "".join(f", {name}={value!r}" for name, value in said.items())
    return f"phaselens.load({spec.source!r}{extra})"


@contextmanager
def _plain_interrupt() -> Iterator[None]:
    """Inside, Ctrl-C is Python's own: it ends a line of the session, and not the session."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
