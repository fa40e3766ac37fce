"""GPT-2 language models with a harmonic distance layer as unembedding.

Importing this package registers the model with transformers, so that `AutoConfig`, `AutoModel` and
`AutoModelForCausalLM` load every checkpoint that it writes.
"""

from . import cli  # noqa: F401  # isort: skip  (first: Ctrl-C then ends the imports without a traceback)
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .model.configuration_hgpt import HGPTConfig
from .model.distances import Distance, register_distance
from .model.harmax import harmax, harmonic_loss, log_harmax, relative_distances, squared_distances
from .model.heads import HarmonicHead, HarmonicLoss, SoftmaxHead
from .model.modeling_hgpt import HGPTForCausalLM, HGPTModel

AutoConfig.register(HGPTConfig.model_type, HGPTConfig, exist_ok=True)
AutoModel.register(HGPTConfig, HGPTModel, exist_ok=True)
AutoModelForCausalLM.register(HGPTConfig, HGPTForCausalLM, exist_ok=True)
# save_pretrained also saves the code, for processes without hgpt (trust_remote_code=True).
HGPTConfig.register_for_auto_class()
HGPTModel.register_for_auto_class("AutoModel")
HGPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "Distance",
    "HGPTConfig",
    "HGPTForCausalLM",
    "HGPTModel",
    "HarmonicHead",
    "HarmonicLoss",
    "SoftmaxHead",
    "harmax",
    "harmonic_loss",
    "log_harmax",
    "register_distance",
    "relative_distances",
    "squared_distances",
]
