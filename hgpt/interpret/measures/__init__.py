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

GROUPS = {
    "To explore": (explorer, reading),
    "On {part}": (predictions, calibration),
    "Relations between words": (parallelograms, differences, analogies, planes),
    "Vectors": (geometry, similarity, lens),
    "Training": (training,),
    "To read": (centres,),
}
MEASURES = tuple(Measure.of(module, group) for group, modules in GROUPS.items() for module in modules)
