"""Measures as sums over rows."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from serve.scores.measured import Measured, divided, means, signature

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def test_means_have_names_values_and_nested_json() -> None:
    names = ("rouge-1", "rouge-1.p", "rouge-1.r", "bleu-4")
    found = means("seed", "s", names, [[0.5, 1, 0.25, 0.1], [0, 0, 0, 0.3]])
    np.testing.assert_allclose(found.values_M, [0.25, 0.5, 0.125, 0.2])
    np.testing.assert_array_equal(found.row_values_NM, [[0.5, 1, 0.25, 0.1], [0, 0, 0, 0.3]])
    assert found.full_names == ("seed.rouge-1", "seed.rouge-1.p", "seed.rouge-1.r", "seed.bleu-4")
    assert found.as_dict() == {"rouge-1": {"f": 0.25, "p": 0.5, "r": 0.125}, "bleu-4": 0.2}
    assert found.higher_is_better == (True,) * 4


def test_a_measure_that_is_not_defined_is_null_in_json() -> None:
    empty = Measured("", "s", ("stop_rate",), np.zeros((2, 2)), divided, (True,))
    assert math.isnan(empty.values_M[0])
    assert json.dumps(empty.as_dict(), allow_nan=False) == '{"stop_rate": null}'
    assert empty.full_names == ("stop_rate",)


def test_a_signature_is_written_as_sacrebleu_s() -> None:
    assert signature(tok="jieba", scale=1) == "tok:jieba|scale:1"
