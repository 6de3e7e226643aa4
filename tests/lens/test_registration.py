"""What `import phaselens` prepares for later imports."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
import phaselens
import transformers.cache_utils as caches
assert "hqq.core.quantize" not in sys.modules
packed, facts = caches.HQQQuantizer.quantize(torch.ones(64, 64), nbits=4, device="cpu", axis=1)
assert "hqq.core.quantize" in sys.modules
import hqq.core
assert hqq.core.quantize is sys.modules["hqq.core.quantize"]
"""


@pytest.mark.slow
def test_a_package_for_quantised_caches_is_imported_when_it_is_used():
    pytest.importorskip("hqq")
    program = PROGRAM.replace("\nimport sys", "\nimport sys, torch", 1)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_torchao_logs_nothing_when_transformers_imports_it():
    pytest.importorskip("torchao")
    program = "import phaselens, transformers.quantizers, torchao, logging; logging.warning('heard')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "WARNING:root:heard\n")
