"""The measures of a report, in the order of its page. A new measure is a file here and its name in `GROUPS`."""

from importlib import import_module

from hgpt.interpret.measure import Measure

# Heading in the summary → modules
GROUPS = {
    "To explore": ("explorer", "reading"),
    "On {part}": ("predictions", "calibration"),
    "Relations between words": ("parallelograms", "differences", "analogies", "planes"),
    "Vectors": ("geometry", "similarity", "lens"),
    "Training": ("training",),
    "To read": ("centres",),
}
MEASURES = tuple(Measure.of(import_module(f"{__name__}.{name}"), group) for group in GROUPS for name in GROUPS[group])
