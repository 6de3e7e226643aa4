"""A model spread over devices computes what it computes on one, to the bit."""

import gc
import json
import re
import tempfile
from pathlib import Path

import pytest
import torch

import phaselens
from phaselens.errors import InputError
from phaselens.lens.placement import DeviceMap
from phaselens.testing import tiny_model, tiny_tokenizer
from tests.marks import mark_later_slow

TEXTS = ["to be or not to be", "to do it or not", "be it"]
METRICS = ["sinks", "massive-values", "qk-geometry", "bos-write", "bos-mlp", "layer-ablation"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("spread") / "tiny"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def two_parts(second: str) -> dict[str, str]:
    """Return a map with everything above the first layer on the second device."""
    lower = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0"), "cpu")
    return lower | dict.fromkeys(("model.layers.1", "model.norm", "lm_head"), second)


def map_file(tmp_path: Path, devices: object) -> str:
    path = tmp_path / "map.json"
    path.write_text(json.dumps(devices))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("second", mark_later_slow(["disk", "cpu"]))
def test_a_run_on_two_parts_equals_a_run_on_one_device_to_the_bit(folder, tmp_path, second):
    options = {"metrics": METRICS, "texts": TEXTS, "max_tokens": 12}
    whole = phaselens.run(str(folder), **options)
    parts = phaselens.run(str(folder), device_map=map_file(tmp_path, two_parts(second)), **options)
    for run in (whole, parts):
        assert [str(failure) for result in run.metrics.values() for failure in result.failures] == []
    for name, result in whole.metrics.items():
        for table in result.tables:
            assert parts.table(name, table) == whole.table(name, table), (name, table)


@pytest.mark.slow
def test_offloaded_weights_can_be_read(folder):
    whole, parts = (phaselens.load(folder, device_map=devices) for devices in (None, two_parts("disk")))
    assert parts.info.device_map == "cpu 3, disk 3"
    assert whole.info.device_map is None
    for layer, name in ((1, "attn.W_O"), (1, "mlp.W_in"), (None, "W_U"), (None, "W_E")):
        assert torch.equal(parts.weight_of(layer, name), whole.weight_of(layer, name)), name
    with pytest.raises(InputError, match=r"'ln1\.w' in layer 1 is offloaded by the device map"):
        parts.weight_of(1, "ln1.w")


@pytest.mark.slow
def test_the_folder_of_offloaded_weights_goes_with_the_model(folder):
    folders = Path(tempfile.gettempdir())
    before = set(folders.glob("phaselens-offload-*"))
    lens = phaselens.load(folder, device_map=two_parts("disk"))
    assert set(folders.glob("phaselens-offload-*")) - before
    del lens
    gc.collect()
    assert set(folders.glob("phaselens-offload-*")) <= before


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ([], "is an empty list; give an object from modules to devices|is \\[\\]; give an object"),
        ({"": "gpu"}, "the device of '' is 'gpu'; give a GPU's number, cuda:N, cpu or disk"),
        ({"": True}, "the device of '' is True"),
        ({"": "cuda:7"}, "torch sees 0 CUDA devices"),
        ({"": 7}, "torch sees 0 CUDA devices"),
    ],
)
def test_maps_of_another_form_are_refused(tmp_path, monkeypatch, devices, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match=message):
        DeviceMap.parse(map_file(tmp_path, devices))


def test_a_map_that_is_missing_or_is_not_json_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file or directory; give auto, or a JSON file"):
        DeviceMap.parse(str(tmp_path / "none.json"))
    (tmp_path / "text").write_text("cuda:0")
    with pytest.raises(InputError, match="is not JSON"):
        DeviceMap.parse(str(tmp_path / "text"))


def test_a_map_that_cannot_be_served_is_refused_with_the_reason(folder):
    with pytest.raises(InputError, match=re.escape("the device map offloads the token embedding")):
        phaselens.load(folder, device_map={**two_parts("disk"), "model.embed_tokens": "disk"})
    with pytest.raises(InputError, match=r"names no device for model\.norm\.weight"):
        phaselens.load(folder, device_map={"model.embed_tokens": "cpu", "model.layers": "cpu"})
    with pytest.raises(InputError, match="give one of them"):
        phaselens.load(folder, device_map="auto", device="cpu")
    with pytest.raises(InputError, match="has no effect on a model object"):
        phaselens.load(tiny_model("llama"), device_map="auto")
