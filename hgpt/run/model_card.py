"""The README.md of an exported model."""

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor

from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.model.distances import make_distance

_HARMONIC = """\
The unembedding is a harmonic distance layer (Baek et al., arXiv:2502.01628): with the hidden state x and a centre
w_i for each token, d_i = {distance}, and the probability of token i is

    p_i = d_i^(−n) / Σ_j d_j^(−n),    n = {exponent:g}{learned}

`logits` are −n log d_i, so softmax, temperature (T gives the exponent n/T), top-k, top-p, beam search and cross-entropy
work on them unchanged. Probabilities give back relative distances: d_i / d_min = (p_max / p_i)^(1/n).
"""

_RADII = """\
The unembedding is a harmonic distance layer (Baek et al., arXiv:2502.01628) with learned radii: with the hidden state
x, a centre w_i and a radius ρ_i for each token, d_i = {distance}, and the probability of token i is

    p_i = (d_i / ρ_i)^(−n) / Σ_j (d_j / ρ_j)^(−n),    n = {exponent:g}{learned}

`logits` are −n log d_i + a_i with a_i = n log ρ_i, the parameter `lm_head.log_weight`, so softmax, temperature,
top-k, top-p, beam search and cross-entropy work on them unchanged. `model.lm_head.relative_distances(logits)` gives
d_i / d_min, and `model.lm_head.radii` ρ_i.
"""

_LIFT = """
x = L h + b has one coordinate more than h, the hidden state of the trunk (`hgpt.convert`).
"""

_DISTANCE = "d(x, w_i) by the distance `{name}`{options} of hgpt: {formula}"

_SOFTMAX = """\
The unembedding is the ordinary softmax layer, logits w_i · x: the twin of a harmonic model of the same training code.
"""

_BIAS = """\
The unembedding is a softmax layer with a learned bias (`lm_head.log_weight`), logits w_i · x + a_i: the twin of a
harmonic model with radii of the same training code.
"""

_WARNING = """\
**Do not serve this model with an engine that puts its own linear head on the trunk** (vLLM's transformers backend
does): it would silently compute {wrong}.
"""

_TEMPLATE = """\
---
library_name: transformers
pipeline_tag: {task}
tags:
- hgpt
- {config.head}
---

# {name}

A {config.trunk_in_words} with a {config.head} head, {made}: {parameters:,} parameters,
{config.n_layer} blocks, width {config.trunk_width}, {config.n_head} attention heads, context {config.n_positions},
vocabulary {config.vocab_size:,}.

{description}
| | |
| --- | --- |
{rows}

```python
from transformers import {auto}, AutoTokenizer

# trust_remote_code=True runs the model's code in the folder. With hgpt installed, `import hgpt` does instead.
model = {auto}.from_pretrained("this folder", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("this folder", trust_remote_code=True)
inputs = tokenizer("The", return_tensors="pt")
print(tokenizer.decode({output}))
```
{warning}"""


def model_card(
    config: HGPTConfig,
    weights: Mapping[str, Tensor],
    *,
    name: str,
    facts: Mapping[str, str],
    made: str = "trained with hgpt",
) -> str:
    """Markdown: what the model is, where it comes from, how to load it, and how not to serve it.

    Args:
        weights: the model's parameters by name, for their number and a learned exponent.
        facts: a table of two columns: data, validation loss, …
    """
    masked = getattr(config, "task", None) == "masked_lm"
    harmonic, learned = config.head == "harmonic", config.radius == "learned"
    wrong = "dot products where this model needs distances" if harmonic else "logits without the bias"
    return _TEMPLATE.format(
        config=config,
        name=name,
        parameters=sum(weight.numel() for weight in weights.values()),
        description=_harmonic(config, weights) if harmonic else _BIAS if learned else _SOFTMAX,
        made=made,
        rows="\n".join(f"| {fact} | {value} |" for fact, value in facts.items()),
        task="fill-mask" if masked else "text-generation",
        auto="AutoModelForMaskedLM" if masked else "AutoModelForCausalLM",
        output="model(**inputs).logits[0].argmax(-1)"
        if masked
        else "model.generate(**inputs, max_new_tokens=50, do_sample=True)[0]",
        warning=f"\n{_WARNING.format(wrong=wrong)}" if harmonic or learned else "",
    )


def _harmonic(config: HGPTConfig, weights: Mapping[str, Tensor]) -> str:
    distance = "||w_i − x||"
    if config.distance != "euclidean":
        with torch.device("meta"):  # without drawing initial values from the training's generator
            metric = make_distance(config.distance, config.n_embd, **config.distance_options)
        options = ", ".join(f"{name} = {value}" for name, value in config.distance_options.items())
        formula = (inspect.getdoc(metric) or "").partition("\n")[0]  # the docstring's first line is its formula
        distance = _DISTANCE.format(name=config.distance, options=options and f" ({options})", formula=formula)
    learned = weights.get("lm_head.log_exponent")
    text = (_RADII if config.radius == "learned" else _HARMONIC) + (_LIFT if getattr(config, "lift", False) else "")
    return text.format(
        distance=distance,
        exponent=config.exponent if learned is None else float(learned.exp()),
        learned="" if learned is None else f" (learned, from {config.exponent:g})",
    )
