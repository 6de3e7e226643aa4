"""Tools for tests of metrics and plugins: tiny random models, planted truths, and the contract of all metrics.

    from phaselens.testing import check_metric
    def test_my_metric(): check_metric(MyMetric)

Nothing is downloaded, and importing this package imports neither torch nor pytest. Where PhaseLens is installed, pytest
has the fixtures `phaselens_lens`, `phaselens_planted` and `phaselens_check`.
"""

from phaselens.testing.contract import check_metric, examine
from phaselens.testing.facts import model_info
from phaselens.testing.findings import Finding
from phaselens.testing.models import FAMILIES, tiny_lens, tiny_model, tiny_tokenizer
from phaselens.testing.planted import PLANTED, Planted, plant

__all__ = [
    "FAMILIES",
    "PLANTED",
    "Finding",
    "Planted",
    "check_metric",
    "examine",
    "model_info",
    "plant",
    "tiny_lens",
    "tiny_model",
    "tiny_tokenizer",
]
