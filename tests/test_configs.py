"""Every configuration that ships: it parses, its model builds, and it is what its comment says."""

import math
from pathlib import Path

import pytest
import torch

import hgpt
from hgpt.model.harmonized import model_class
from hgpt.run.config import RunConfig
from hgpt.run.settings import load_run_config, settings

CONFIGS = Path(__file__).parent.parent / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.toml"))

# 12 · L · D² + V · D + T · D + (2 · L + 1) · D for models without biases and tied embeddings, V padded to a
# multiple of 64: by hand.
PARAMETERS = {
    "quickstart": 1_066_112,
    "quickstart_softmax": 1_066_112,
    "gpt2_small_harmonic": 124_373_760,
    "gpt2_small_softmax": 124_373_760,
    "gpt2_medium_harmonic": 354_599_936,
    "gpt2_large_harmonic": 773_582_080,
    "gpt2_xl_harmonic": 1_556_840_000,
    "baek2025_harmonic": 124_373_760,
    "baek2025_softmax": 124_373_760,
    # V · D, twice if not tied, the blocks (attention, three matrices of the MLP, biases of q, k and v, two norms), the
    # final norm and the gain.
    "qwen_harmonic": 50_304 * 896
    + 24 * (2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864 + 896 + 2 * 128 + 2 * 896)
    + 2 * 896,
    "llama_small_harmonic": 2 * 50_304 * 768 + 12 * (4 * 768 * 768 + 3 * 768 * 2048 + 2 * 768) + 2 * 768,
}


def load(name: str) -> RunConfig:
    return load_run_config(["--config", str(CONFIGS / f"{name}.toml")])


@pytest.mark.parametrize("name", sorted(PARAMETERS | dict.fromkeys(NAMES)))
def test_config_builds_its_model(name):
    config = load(name)
    vocab_size = 2048 if name.startswith("quickstart") else 50257
    described = config.model.to_hf(vocab_size=vocab_size, seq_len=config.data.seq_len)
    with torch.device("meta"):
        model = model_class(described)(described)
    assert model.num_parameters() == PARAMETERS[name]
    assert config.name == name
    assert model.config.head == config.model.head.type


def differences(one: RunConfig, other: RunConfig) -> set[str]:
    ours, theirs = settings(one), settings(other)
    return {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)} - {"name"}


@pytest.mark.parametrize("pair", ["quickstart quickstart_softmax", "gpt2_small_harmonic gpt2_small_softmax"])
def test_twins_differ_in_the_head_only(pair):
    different = differences(*map(load, pair.split()))
    assert "model.head.type" in different and all(name.startswith("model.head.") for name in different)


@pytest.mark.parametrize("file", sorted((CONFIGS / "distances").glob("*.toml")), ids=lambda path: path.stem)
def test_configs_of_distances_are_the_quickstart_with_another_distance(file):
    config = load_run_config(["--config", str(file)])
    different = differences(config, load("quickstart"))
    assert {name for name in different if ".distance_options." not in name} == {"model.head.distance"}
    assert config.name == f"quickstart_{file.stem}"
    with torch.device("meta"):
        model = hgpt.HGPTForCausalLM(config.model.to_hf(vocab_size=2048, seq_len=config.data.seq_len))
    metric = {"mahalanobis_low_rank": 2 * 128 * 16, "mahalanobis_full": 128 * 128, "minkowski": 0}[file.stem]
    assert model.num_parameters() == PARAMETERS["quickstart"] + metric


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name.endswith("harmonic") and "baek" not in name] + ["quickstart"]
)
def test_harmonic_configs_are_harmonic(name):
    """√D ≤ n ≤ 4√D, and hidden states that start small; n = D is softmax under another name."""
    config = load(name)
    exponent = config.model.to_hf(vocab_size=64, seq_len=8).exponent
    root = math.sqrt(config.model.n_embd)
    assert root <= exponent <= 4 * root * (1 + 1e-9)
    assert config.model.head.final_norm_gain <= 0.2


def test_the_recipe_of_the_first_paper():
    """arXiv:2502.01628 as its code was released: (d²)^(−768) is n = 1536 on d."""
    harmonic, softmax = load("baek2025_harmonic"), load("baek2025_softmax")
    assert harmonic.model.to_hf(vocab_size=50257, seq_len=1024).exponent == 2 * 768
    for config in (harmonic, softmax):
        assert config.train.global_batch * config.data.seq_len == 491_520
        assert config.train.steps == 10_000
        assert config.model.scale_attn_by_inverse_layer_idx and config.model.tie_word_embeddings
        assert not config.model.bias
        assert config.model.activation_function == "gelu_pytorch_tanh"
        assert (config.optim.betas, config.optim.weight_decay, config.optim.grad_clip) == ((0.9, 0.95), 0.0, 1.0)
    assert (harmonic.optim.lr, harmonic.optim.min_lr, harmonic.optim.warmup_steps) == (6e-3, 3e-4, 1000)
    assert (softmax.optim.lr, softmax.optim.min_lr, softmax.optim.warmup_steps) == (6e-4, 3e-5, 2000)
