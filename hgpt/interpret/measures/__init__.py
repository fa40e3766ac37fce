"""The measures of a report, in the order of its page. A new measure is a file here and an entry in `MEASURES`."""

from hgpt.interpret.measure import Measure
from hgpt.interpret.measures import (
    analogies,
    calibration,
    centres,
    differences,
    explorer,
    geometry,
    lens,
    parallelograms,
    planes,
    predictions,
    reading,
    similarity,
    training,
)

ON_TEXT = (predictions, calibration)
RELATIONS = (parallelograms, differences, analogies, planes)
VECTORS = (geometry, similarity, lens)
TO_EXPLORE = (explorer, reading)
TO_READ = (training, centres)
MEASURES = tuple(Measure.of(module) for module in (*TO_EXPLORE, *ON_TEXT, *RELATIONS, *VECTORS, *TO_READ))
