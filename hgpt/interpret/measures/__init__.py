"""The measures of a report, in the order of its page: a new one is a file here and an entry in `MEASURES`."""

from hgpt.interpret.measure import Measure
from hgpt.interpret.measures.analogies import MEASURE as analogies
from hgpt.interpret.measures.calibration import MEASURE as calibration
from hgpt.interpret.measures.centres import MEASURE as centres
from hgpt.interpret.measures.differences import MEASURE as differences
from hgpt.interpret.measures.geometry import MEASURE as geometry
from hgpt.interpret.measures.lens import MEASURE as lens
from hgpt.interpret.measures.parallelograms import MEASURE as parallelograms
from hgpt.interpret.measures.planes import MEASURE as planes
from hgpt.interpret.measures.predictions import MEASURE as predictions
from hgpt.interpret.measures.reading import MEASURE as reading
from hgpt.interpret.measures.similarity import MEASURE as similarity
from hgpt.interpret.measures.training import MEASURE as training

MEASURES: tuple[Measure, ...] = (
    predictions,
    calibration,
    differences,
    parallelograms,
    analogies,
    planes,
    geometry,
    similarity,
    lens,
    training,
    reading,
    centres,
)
