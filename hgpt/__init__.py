"""GPT-2 language models with a harmonic distance layer as unembedding.

Importing this package registers the model with transformers, so that `AutoConfig`, `AutoModel` and
`AutoModelForCausalLM` load every checkpoint that it writes.
"""

from . import cli  # noqa: F401  # isort: skip  (first: Ctrl-C then ends the imports without a traceback)
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from .model.configuration_hgpt import HGPTConfig
from .model.distances import Distance, register_distance
from .model.harmax import harmax, harmonic_loss, log_harmax, relative_distances, squared_distances
from .model.harmonized import HarmonizedConfig, HarmonizedForCausalLM, HarmonizedForMaskedLM, harmonize, load
from .model.heads import HarmonicHead, HarmonicLoss, SoftmaxHead
from .model.modeling_hgpt import HGPTForCausalLM, HGPTModel

AutoConfig.register(HGPTConfig.model_type, HGPTConfig, exist_ok=True)
AutoModel.register(HGPTConfig, HGPTModel, exist_ok=True)
AutoModelForCausalLM.register(HGPTConfig, HGPTForCausalLM, exist_ok=True)
AutoConfig.register(HarmonizedConfig.model_type, HarmonizedConfig, exist_ok=True)
AutoModelForCausalLM.register(HarmonizedConfig, HarmonizedForCausalLM, exist_ok=True)
AutoModelForMaskedLM.register(HarmonizedConfig, HarmonizedForMaskedLM, exist_ok=True)
# save_pretrained also saves the code, for processes without hgpt (trust_remote_code=True).
HGPTConfig.register_for_auto_class()
HGPTModel.register_for_auto_class("AutoModel")
HGPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
HarmonizedConfig.register_for_auto_class()
HarmonizedForCausalLM.register_for_auto_class("AutoModelForCausalLM")
HarmonizedForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")

__all__ = [
    "Distance",
    "HGPTConfig",
    "HGPTForCausalLM",
    "HGPTModel",
    "HarmonicHead",
    "HarmonicLoss",
    "HarmonizedConfig",
    "HarmonizedForCausalLM",
    "HarmonizedForMaskedLM",
    "SoftmaxHead",
    "harmax",
    "harmonic_loss",
    "harmonize",
    "load",
    "log_harmax",
    "register_distance",
    "relative_distances",
    "squared_distances",
]
