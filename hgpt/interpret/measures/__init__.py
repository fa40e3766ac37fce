"""The measures of a report, in the order of its page: a new one is a file here and an entry in `MEASURES`."""

from hgpt.interpret.measure import Measure
from hgpt.interpret.measures import (
    analogies,
    calibration,
    centres,
    differences,
    geometry,
    lens,
    pairs,
    parallelograms,
    planes,
    predictions,
    reading,
    similarity,
    training,
)

MEASURES: tuple[Measure, ...] = (
    predictions.MEASURE,
    calibration.MEASURE,
    parallelograms.MEASURE,
    differences.MEASURE,
    analogies.MEASURE,
    planes.MEASURE,
    pairs.MEASURE,
    geometry.MEASURE,
    similarity.MEASURE,
    lens.MEASURE,
    training.MEASURE,
    reading.MEASURE,
    centres.MEASURE,
)
