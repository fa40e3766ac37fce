"""hgpt/run/model_card.py: what the card says, and that the code in it runs."""

import contextlib
import io
import re

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import BertConfig, PreTrainedTokenizerFast

from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.model.harmonized import HarmonizedConfig, HarmonizedForMaskedLM
from hgpt.model.modeling_hgpt import HGPTForCausalLM
from hgpt.run.model_card import model_card


def card(config: HGPTConfig, weights: dict[str, torch.Tensor]) -> str:
    facts = {"data": "Python's documentation {3.11}", "training tokens": "819,200 in 400 steps"}
    return model_card(config, weights, name="quickstart", facts=facts)


WARNING = "Do not serve this model with an engine that puts its own linear head on the trunk"
MINKOWSKI = {"distance": "minkowski", "distance_options": {"p": 3}}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"exponent": "2*sqrt_dim", "n_embd": 768}, ["n = 55.4256", "d_i = ||w_i − x||, and", WARNING,
            "d_i / d_min = (p_max / p_i)^(1/n)", "dot products where"]),
        (MINKOWSKI | {"exponent": 14, "learn_exponent": True}, ["n = 7.38906 (learned, from 14)",
            "the distance `minkowski` (p = 3) of hgpt: (Σ |x_k − w_k|^p)^(1/p)"]),
        ({"exponent": 14, "radius": "learned"}, ["p_i = (d_i / ρ_i)^(−n) / Σ_j (d_j / ρ_j)^(−n),    n = 14", WARNING,
            "model.lm_head.relative_distances(logits)", "dot products where"]),
        ({"head": "softmax", "radius": "learned"}, ["w_i · x + a_i", WARNING, "logits without the bias"]),
        ({"head": "softmax"}, ["logits w_i · x:"]),
    ],
    ids=["harmonic", "another distance, learnt n", "radii", "bias", "softmax"],
)  # fmt: skip
def test_the_card_describes_the_head(settings, words):
    learned = {"lm_head.log_exponent": torch.tensor(2.0)} if "learn_exponent" in settings else {}
    weights = {"lm_head.weight": torch.empty(2000, 1000), "transformer.ln_f.weight": torch.empty(992)} | learned
    text = card(HGPTConfig(**settings), weights=weights)
    assert text.startswith("---\nlibrary_name: transformers\n")
    common = ["| data | Python's documentation {3.11} |", "| training tokens | 819,200 in 400 steps |"]
    for word in [*words, *common, f"{2_000_993 if learned else 2_000_992:,} parameters"]:
        assert word in text
    if settings == {"head": "softmax"}:
        for word in ("n = ", "Do not serve", "d_i^(−n)"):
            assert word not in text


@pytest.mark.parametrize("head", ["harmonic", "softmax", "masked"])
def test_the_code_in_it_runs(tmp_path, head):
    if head == "masked":
        shape = {"vocab_size": 3, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        backbone = BertConfig(**shape, intermediate_size=8)
        config = HarmonizedConfig(backbone=backbone, vocab_size=3, task="masked_lm", pad_vocab_to_multiple_of=1)
        HarmonizedForMaskedLM(config).save_pretrained(tmp_path)
    else:
        config = HGPTConfig(vocab_size=3, n_positions=64, n_embd=8, n_layer=1, n_head=1, head=head, pad_token_id=0)
        HGPTForCausalLM(config).save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({"The": 0, "a": 1, "b": 2}, unk_token="b"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="The").save_pretrained(tmp_path)
    code = re.search(r"```python\n(.*?)```", card(config, {}), re.DOTALL)[1].replace("this folder", str(tmp_path))
    assert code.count(str(tmp_path)) == code.count("trust_remote_code=True)") == 2
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {})
    assert printed.getvalue().startswith("The") or head == "masked"
    assert printed.getvalue().strip()
