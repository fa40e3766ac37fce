"""hgpt/interpret/calibration.py: against scikit-learn and values worked out by hand."""

import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from hgpt.interpret.calibration import (
    BANDS,
    band_name,
    bits_per_byte,
    confidence_bins,
    expected_calibration_error,
    frequency_bands,
    frequency_ranks,
    reliability_curve,
)


def predictions(n=4000, seed=0):
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(size=n)
    return confidence, rng.uniform(size=n) < confidence**2


def test_reliability_curve_is_scikit_learns():
    confidence, correct = predictions()
    accuracy, mean = calibration_curve(correct, confidence, n_bins=15, strategy="uniform")
    found = reliability_curve(confidence, correct)
    assert found.accuracy == pytest.approx(accuracy)
    assert found.confidence == pytest.approx(mean)
    assert found.count.sum() == len(confidence)


def test_calibration_error_by_hand():
    # Two bins of (0, 0.5] and (0.5, 1]: |1/2 − 0.3| · 2/4 + |1/2 − 0.9| · 2/4 = 0.3.
    confidence, correct = np.array([0.2, 0.4, 0.9, 0.9]), np.array([False, True, True, False])
    assert expected_calibration_error(confidence, correct, bins=2) == pytest.approx(0.3)
    assert reliability_curve(confidence, correct, bins=10).count.tolist() == [1, 1, 2]  # empty bins are left out


def test_edges_belong_to_the_bin_below():
    assert confidence_bins(np.array([0.0, 0.25, 0.2500001, 0.5, 1.0]), 4).tolist() == [0, 0, 1, 1, 3]


def test_calibrated_predictions_have_no_error_to_speak_of():
    rng = np.random.default_rng(1)
    confidence = rng.uniform(size=200_000)
    assert expected_calibration_error(confidence, rng.uniform(size=200_000) < confidence) < 0.01
    assert expected_calibration_error(confidence, np.ones(200_000, bool)) == pytest.approx(0.5, abs=0.01)


def test_bits_per_byte_by_hand():
    # Two tokens of 1 and 3 bytes, ln 2 and 3 ln 2 nats: four bits in four bytes.
    assert bits_per_byte(np.log(2) * np.array([1.0, 3.0]), np.array([1, 3])) == pytest.approx(1)


def test_frequency_bands():
    counts = np.zeros(12_000, dtype=np.int64)
    counts[[5, 7, 9]] = [100, 300, 200]
    ranks = frequency_ranks(counts)
    assert ranks[[7, 9, 5]].tolist() == [1, 2, 3]
    assert sorted(ranks) == list(range(1, 12_001))
    bands = frequency_bands(counts)
    for band, (first, last) in enumerate(BANDS):
        assert sorted(ranks[bands == band])[0] == first
        assert sorted(ranks[bands == band])[-1] == (last or 12_000)
    assert [band_name(0), band_name(4)] == ["rank 1–10", "rank above 10,000"]
