"""The benchmark of the whole step runs."""

import pytest
import torch

from benchmarks import train_step
from hgpt.errors import UserError
from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.model.modeling_hgpt import HGPTForCausalLM


def test_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--layers 1 --heads 2 --dim 16 --seq-len 8 --micro-batch 2 --vocab 50 --threads 1"
    train_step.main([*sizes.split(), "--rounds", "2"])
    out = capsys.readouterr().out
    assert "16 tokens per step" in out
    assert "harmonic / softmax, tokens/s:" in out and "harmonic / plain, tokens/s:" in out
    with pytest.raises(UserError, match="--rounds: must be at least 2, for quartiles; got 1"):
        train_step.main(["--rounds", "1"])


def test_the_plain_model_is_the_softmax_twin() -> None:
    """It computes what it is compared with: the same loss from the same weights."""
    config = HGPTConfig(
        vocab_size=50, n_positions=8, n_layer=2, n_head=2, n_embd=16, head="softmax", pad_vocab_to_multiple_of=1
    )
    ours, plain = HGPTForCausalLM(config).train(), train_step.PlainGPT(config)
    names = {"tokens": "wte", "positions": "wpe", "norm": "ln_f"}
    inner = {"norms.0": "ln_1", "norms.1": "ln_2", "qkv": "attn.c_attn", "out": "attn.c_proj"}
    inner |= {"wide": "mlp.c_fc", "narrow": "mlp.c_proj"}
    for block in range(2):
        names |= {f"blocks.{block}.{name}": f"h.{block}.{theirs}" for name, theirs in inner.items()}
    weights = ours.state_dict()
    plain.load_state_dict({f"{name}.weight": weights[f"transformer.{theirs}.weight"] for name, theirs in names.items()})
    tokens = torch.randint(50, (3, 9))
    expected = ours(tokens[:, :-1], shift_labels=tokens[:, 1:]).loss
    torch.testing.assert_close(plain(tokens[:, :-1], tokens[:, 1:]), expected, rtol=1e-5, atol=1e-6)
