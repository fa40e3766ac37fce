"""Calibration and bands of frequency: against scikit-learn and values worked out by hand."""

import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from hgpt.interpret.measures.calibration import (
    calibration_error_interval,
    confidence_bins,
    expected_calibration_error,
    reliability_curve,
)
from hgpt.interpret.measures.predictions import BANDS, band_name, bits_per_byte, frequency_bands, frequency_ranks
from hgpt.interpret.statistics import bootstrap_counts


def test_reliability_curve_is_scikit_learns():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(size=4000)
    correct = rng.uniform(size=4000) < confidence**2
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
    # An edge belongs to the bin below it.
    assert confidence_bins(np.array([0.0, 0.25, 0.2500001, 0.5, 1.0]), 4).tolist() == [0, 0, 1, 1, 3]


def windows_of_predictions(shift, seed, windows=40, size=50, bins=15):
    """Per window: Σ correct − confidence in each bin, and positions, when p(correct) = confidence − `shift` of its bin.

    The confidences are uniform over the bins, so the ECE of infinitely many positions is the mean of |shift|.
    """
    rng = np.random.default_rng(seed)
    low, high = np.abs(shift).max(), 1 - np.abs(shift).max()
    bin_of = rng.integers(0, bins, (windows, size))
    confidence = np.clip((bin_of + rng.uniform(size=(windows, size))) / bins, low, high)
    correct = rng.uniform(size=(windows, size)) < confidence - shift[bin_of]
    index = np.arange(windows)[:, None] * bins + bin_of
    gaps = np.bincount(index.ravel(), weights=(correct - confidence).ravel(), minlength=windows * bins)
    return gaps.reshape(windows, bins), np.full(windows, float(size))


@pytest.mark.parametrize(
    "shift",
    [np.zeros(15), np.full(15, 0.03), 0.1 * np.sign(np.arange(15) - 7.0), np.where(np.arange(15) < 3, 0.15, 0.0),
     np.full(15, 0.2)],
    ids=["calibrated", "a little", "much", "in three bins", "very much"],
)  # fmt: skip
def test_the_interval_of_the_calibration_error_covers_it(shift):
    """The known ECE lies in 95 % of the intervals, or more, and the sample's own in all of them."""
    covered, samples, widths = 0, [], []
    for seed in range(150):
        gaps, sizes = windows_of_predictions(shift, seed)
        low, high = calibration_error_interval(gaps, sizes, bootstrap_counts(len(sizes), 200, seed))
        samples.append(np.abs(gaps.sum(axis=0)).sum() / sizes.sum())
        assert 0 <= low <= samples[-1] <= high <= 1
        widths.append(high - low)
        covered += low <= np.abs(shift).mean() <= high
    assert covered / 150 > 0.92
    if shift.min() == 0.2:  # an interval no wider than the normal one
        assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std(samples), rel=0.25)


def test_bits_per_byte_and_frequency_bands_by_hand():
    # Two tokens of 1 and 3 bytes, ln 2 and 3 ln 2 nats: four bits in four bytes.
    assert bits_per_byte(np.log(2) * np.array([1.0, 3.0]), np.array([1, 3])) == pytest.approx(1)
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
