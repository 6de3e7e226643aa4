"""Where a model's modules are: on one device, or spread by accelerate over several, the CPU and the disk."""

from __future__ import annotations

import json
import os
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from phaselens.errors import InputError, short_form

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AUTO = "auto"
DISK = "disk"


@dataclass(frozen=True)
class DeviceMap:
    """The device of each module, by its name; without any, accelerate fills the GPUs, then the CPU, then the disk."""

    devices: Mapping[str, str | int] | None
    source: str

    @classmethod
    def parse(cls, value: object) -> DeviceMap:
        """Return the map that `value` is or names: `auto`, a mapping, or a JSON file with one.

        Raises:
            InputError: for a file that cannot be read, and for a map or a device of another form.
        """
        if isinstance(value, str) and value == AUTO:
            return cls(None, AUTO)
        if isinstance(value, Mapping):
            return cls(_checked_devices(value, "device_map"), "a mapping")
        if isinstance(value, str | os.PathLike):
            path = os.fspath(value)
            return cls(_checked_devices(_read(path), f"device map {path!r}"), path)
        raise InputError(
            f"device_map is {short_form(value)}; give auto, a JSON file, or a dict from modules to devices"
        )

    @property
    def device(self) -> torch.device:
        """The kind of device that computes: a GPU if the map names or may use one."""
        if self.devices is None:
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        uses_gpu = any(device not in ("cpu", DISK) for device in self.devices.values())
        return torch.device("cuda" if uses_gpu else "cpu")

    def place(self, load: Callable[[dict[str, Any]], PreTrainedModel], name: str) -> PreTrainedModel:
        """Load a model by a function that takes arguments of `from_pretrained`; what it offloads lives as long as it.

        Raises:
            InputError: if the map leaves out a module or offloads the token embedding.
        """
        folder = tempfile.TemporaryDirectory(prefix="phaselens-offload-")
        devices = AUTO if self.devices is None else dict(self.devices)
        try:
            model = load({"device_map": devices, "offload_folder": folder.name})
            self._require_complete(model, name)
            if model.get_input_embeddings().weight.is_meta:
                raise InputError(
                    f"model {name!r}: the device map offloads the token embedding, which tells where the tokens go; "
                    "put it on the first device"
                )
        except BaseException:
            folder.cleanup()
            raise
        weakref.finalize(model, folder.cleanup)
        return model

    def _require_complete(self, model: PreTrainedModel, name: str) -> None:
        """Raise InputError if a parameter is in none of the map's modules."""
        modules = {"": 0} if self.devices is None else self.devices
        for parameter, _ in model.named_parameters():
            if not any(module == "" or f"{parameter}.".startswith(f"{module}.") for module in modules):
                raise InputError(
                    f"model {name!r}: {self.source} names no device for {parameter}; name one for each module, or "
                    'for the rest: {"": "cpu"}'
                )


def description_of(model: PreTrainedModel) -> str | None:
    """Return how many modules are on each device, such as `cuda:0 12, disk 4`; None without a device map."""
    devices = getattr(model, "hf_device_map", None)
    if not devices or len(set(devices.values())) < 2:
        return None
    names = (f"cuda:{device}" if isinstance(device, int) else str(device) for device in devices.values())
    return ", ".join(f"{name} {count}" for name, count in Counter(names).items())


def is_offloaded(module: nn.Module) -> bool:
    """Return whether accelerate keeps the module's own weights elsewhere between its forwards."""
    hook = vars(module).get("_hf_hook")
    if hook is None:
        return False
    from accelerate.utils import has_offloaded_params

    return bool(has_offloaded_params(module))


@contextmanager
def loaded_weights(*roots: nn.Module | None) -> Iterator[bool]:
    """Load what is offloaded of these modules and those inside them; yield whether any of them was offloaded."""
    modules = [
        module for root in roots if root is not None for module in root.modules() if is_offloaded(module)
    ]
    with ExitStack() as stack:
        if modules:
            from accelerate.utils import align_module_device

            for module in dict.fromkeys(modules):
                stack.enter_context(align_module_device(module))
        yield bool(modules)


def parameter_of(module: nn.Module | None, name: str) -> Tensor | None:
    """Return a parameter of the module, or None; a copy of one that is offloaded."""
    with loaded_weights(module) as was_offloaded:
        parameter = getattr(module, name, None)
        if was_offloaded and isinstance(parameter, Tensor):
            return parameter.detach().clone()
        return parameter


def _read(path: str) -> object:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(
            f"device map {path!r}: {reason.lower()}; give auto, or a JSON file from modules to devices"
        ) from error
    except ValueError as error:
        raise InputError(f'device map {path!r} is not JSON ({error}); write {{"": "cpu"}}') from error


def _checked_devices(value: object, name: str) -> dict[str, str | int]:
    if not isinstance(value, Mapping) or not value:
        raise InputError(
            f"{name} is {short_form(value)}; give an object from modules to devices, such as "
            '{"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "disk"}'
        )
    devices: dict[str, str | int] = {}
    for module, device in value.items():
        if not isinstance(module, str):
            raise InputError(f"{name}: {short_form(module)} is not the name of a module")
        devices[module] = _checked_device(device, f"{name}: the device of {module!r}")
    return devices


def _checked_device(device: object, name: str) -> str | int:
    forms = "a GPU's number, cuda:N, cpu or disk"
    if isinstance(device, bool) or not isinstance(device, str | int):
        raise InputError(f"{name} is {short_form(device)}; give {forms}")
    if device in ("cpu", DISK):
        return device
    number = device if isinstance(device, int) else device.removeprefix("cuda").removeprefix(":") or "0"
    is_named = isinstance(device, int) or device.startswith("cuda")
    if not is_named or not str(number).isdecimal():
        raise InputError(f"{name} is {short_form(device)}; give {forms}")
    n_gpus = torch.cuda.device_count()
    if int(number) >= n_gpus:
        raise InputError(
            f"{name} is {short_form(device)}, but torch sees {n_gpus} CUDA devices; give {forms}"
        )
    return int(number)
