"""hgpt/source.py: weights of transformers' GPT-2, of nanoGPT and of the first harmonic paper's code, into a run."""

import math
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from hgpt.errors import UserError
from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.model.modeling_hgpt import HGPTForCausalLM
from hgpt.source import initialize_from

D, V, T = 32, 101, 16
SHAPE = {"vocab_size": V, "n_positions": T, "n_embd": D, "n_layer": 2, "n_head": 4}
GPT2 = {"bias": True, "head": "softmax", "activation_function": "gelu_pytorch_tanh"}
IDS = torch.arange(24).reshape(2, 12) * 37 % V


def model_like(**settings) -> HGPTForCausalLM:
    return HGPTForCausalLM(HGPTConfig(**(SHAPE | settings))).eval()


def refusal(model: HGPTForCausalLM, source: object) -> str:
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(UserError) as error:
        initialize_from(model, str(source))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------
# transformers' GPT-2


def save_gpt2(folder: Path, **settings) -> GPT2LMHeadModel:
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(**(SHAPE | settings))).eval()
    with torch.no_grad():  # its biases start at 0 and its norms at 1
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "gelu_new"])
@pytest.mark.parametrize("inverse_layer", [False, True])
def test_gpt2_gives_the_same_logits(tmp_path, activation, inverse_layer):
    reference = save_gpt2(tmp_path, scale_attn_by_inverse_layer_idx=inverse_layer)
    model = model_like(**(GPT2 | {"activation_function": activation}), scale_attn_by_inverse_layer_idx=inverse_layer)
    assert initialize_from(model, str(tmp_path)) == []
    torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, atol=1e-5, rtol=1e-5)


def test_gpt2_into_an_untied_model(tmp_path):
    reference = save_gpt2(tmp_path)
    model = model_like(**GPT2, tie_word_embeddings=False)
    assert initialize_from(model, str(tmp_path)) == []
    torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, atol=1e-5, rtol=1e-5)
    assert model.lm_head.weight is not model.transformer.wte.weight


def test_untied_gpt2(tmp_path):
    reference = save_gpt2(tmp_path, tie_word_embeddings=False)
    untied = model_like(**GPT2, tie_word_embeddings=False)
    assert initialize_from(untied, str(tmp_path)) == []
    torch.testing.assert_close(untied(IDS).logits, reference(IDS).logits, atol=1e-5, rtol=1e-5)
    assert initialize_from(model_like(**GPT2), str(tmp_path)) == [
        "not used from the checkpoint: lm_head.weight (its embeddings are not tied, the run's are)"
    ]


def test_cropped_context(tmp_path):
    reference = save_gpt2(tmp_path)
    model = model_like(**GPT2 | {"n_positions": 12})
    assert initialize_from(model, str(tmp_path)) == []
    torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, atol=1e-5, rtol=1e-5)


def test_every_difference_is_named(tmp_path):
    save_gpt2(tmp_path, scale_attn_by_inverse_layer_idx=True)
    notes = initialize_from(model_like(bias=False, head="harmonic", activation_function="gelu"), str(tmp_path))
    biases = [
        f"transformer.h.{block}.{name}.bias"
        for block in range(2)
        for name in ("attn.c_attn", "attn.c_proj", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")
    ]
    assert notes == [
        "model.activation_function is 'gelu', the checkpoint was trained with 'gelu_new'",
        "model.scale_attn_by_inverse_layer_idx is False, the checkpoint was trained with True",
        "model.bias is False, the checkpoint was trained with True",
        "model.head is 'harmonic', the checkpoint was trained with 'softmax'",
        "not used from the checkpoint: " + ", ".join([*biases, "transformer.ln_f.bias"]),
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_layer": 3}, "has another shape than the model: set model.n_layer = 2 (it is 3)"),
        ({"n_head": 2}, "has another shape than the model: set model.n_head = 4 (it is 2)"),
        (
            {"n_embd": 64, "n_layer": 1},
            "has another shape than the model: set model.n_layer = 2 (it is 1), model.n_embd = 32 (it is 64)",
        ),
        ({"n_positions": 17}, "transformer.wpe.weight: (16, 32) in the checkpoint, (17, 32) in the model"),
        ({"vocab_size": 102}, "transformer.wte.weight: (101, 32) in the checkpoint, (128, 32) in the model"),
    ],
)
def test_another_shape_is_refused(tmp_path, settings, message):
    save_gpt2(tmp_path)
    assert message in refusal(model_like(**GPT2 | settings), tmp_path)


def test_a_much_larger_vocabulary_is_another_tokenizers(tmp_path):
    save_gpt2(tmp_path, vocab_size=V + 128)
    message = refusal(model_like(**GPT2), tmp_path)
    assert "transformer.wte.weight: (229, 32) in the checkpoint, (128, 32) in the model" in message
    assert "Use data with the checkpoint's tokenizer" in message


def test_another_inner_width_is_refused(tmp_path):
    save_gpt2(tmp_path, n_inner=8 * D)
    message = refusal(model_like(**GPT2), tmp_path)
    for name in ("mlp.c_fc.weight: (256, 32)", "mlp.c_fc.bias: (256,)", "mlp.c_proj.weight: (32, 256)"):
        assert name in message


# ---------------------------------------------------------------------------------------------------------------
# nanoGPT


def nanogpt_weights(rows: int, bias: bool, prefix: str = "") -> dict[str, Tensor]:
    """A state dict in nanoGPT's names and order, masks of its first version included."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return 0.1 * torch.randn(shape, generator=generator)

    def layer(name: str, *shape: int) -> dict[str, Tensor]:
        weights = {f"{name}.weight": draw(*shape)}
        return weights | {f"{name}.bias": draw(shape[0])} if bias else weights

    weights = {"transformer.wte.weight": draw(rows, D), "transformer.wpe.weight": draw(T, D)}
    for i in range(2):
        h = f"transformer.h.{i}"
        weights |= layer(f"{h}.ln_1", D) | layer(f"{h}.attn.c_attn", 3 * D, D)
        weights |= {f"{h}.attn.bias": torch.tril(torch.ones(1, 1, T, T))}
        weights |= layer(f"{h}.attn.c_proj", D, D) | layer(f"{h}.ln_2", D)
        weights |= layer(f"{h}.mlp.c_fc", 4 * D, D) | layer(f"{h}.mlp.c_proj", D, 4 * D)
    weights |= layer("transformer.ln_f", D) | {"lm_head.weight": weights["transformer.wte.weight"]}
    return {prefix + name: value for name, value in weights.items()}


def save_nanogpt(path: Path, weights: dict[str, Tensor], **arguments) -> Path:
    """ckpt.pt as nanoGPT's train.py writes it."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    model_args = {"n_layer": 2, "n_head": 4, "n_embd": D, "block_size": T, "bias": False, "vocab_size": 128}
    torch.save(
        {
            "model": weights,
            "optimizer": optimizer.state_dict(),
            "model_args": model_args | {"dropout": 0.0} | arguments,
            "iter_num": 600_000,
            "best_val_loss": torch.tensor(2.85),
            "config": {"out_dir": "out", "compile": True, "learning_rate": 6e-4},
        },
        path,
    )
    return path


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("bias", [False, True])
def test_nanogpt_checkpoint(tmp_path, prefix, bias):
    # As with GPT-2's 50257 tokens in 50304 rows, there is padding on both sides: 101 tokens in 128 rows.
    weights = nanogpt_weights(128, bias)
    path = save_nanogpt(tmp_path / "ckpt.pt", {prefix + name: value for name, value in weights.items()}, bias=bias)
    model = model_like(head="softmax", bias=bias)
    assert initialize_from(model, str(path)) == []
    found = dict(model.named_parameters())
    masks = {f"transformer.h.{i}.attn.bias" for i in range(2)}
    assert found.keys() == weights.keys() - masks - {"lm_head.weight"}
    for name, parameter in found.items():
        assert torch.equal(parameter, weights[name]), name
    expected = reference_hidden(weights, IDS, F.gelu, inverse_layer=False) @ weights["lm_head.weight"][:V].T
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)


def test_nanogpt_padding_that_the_model_has_not(tmp_path):
    weights = nanogpt_weights(128, bias=False)
    path = save_nanogpt(tmp_path / "ckpt.pt", weights)
    model = model_like(head="softmax", pad_vocab_to_multiple_of=1)
    assert initialize_from(model, str(path)) == []
    assert torch.equal(model.transformer.wte.weight, weights["transformer.wte.weight"][:V])


def reference_hidden(weights: dict[str, Tensor], ids: Tensor, gelu, inverse_layer: bool) -> Tensor:
    """nanoGPT's forward, written out, (B, T) → (B, T, D)."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (D,), weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    T = ids.shape[1]
    x = weights["transformer.wte.weight"][ids] + weights["transformer.wpe.weight"][:T]
    for i in range(2):
        h = f"transformer.h.{i}"
        parts = linear(f"{h}.attn.c_attn", norm(f"{h}.ln_1", x)).split(D, dim=2)
        q, k, v = (part.unflatten(2, (4, D // 4)).transpose(1, 2) for part in parts)
        scores = q @ k.transpose(2, 3) / math.sqrt(D // 4) / (i + 1 if inverse_layer else 1)
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        x = x + linear(f"{h}.attn.c_proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x + linear(f"{h}.mlp.c_proj", gelu(linear(f"{h}.mlp.c_fc", norm(f"{h}.ln_2", x))))
    return norm("transformer.ln_f", x)


def test_released_harmonic_checkpoint(tmp_path):
    """The first paper's code: GPT-2's GELU, attention by inverse layer, and p ∝ (d²)^(−D), so n = 2 D: 1536 at 768."""
    weights = {name: value.double() for name, value in nanogpt_weights(V, bias=False).items()}
    floats = {name: value.float() for name, value in weights.items()}
    path = save_nanogpt(tmp_path / "ckpt.pt", floats, scale_attn_by_inverse_layer_idx=True)
    model = model_like(exponent="2*dim", scale_attn_by_inverse_layer_idx=True, activation_function="gelu_pytorch_tanh")
    assert model.config.exponent == 2 * D
    assert initialize_from(model, str(path)) == []

    x = reference_hidden(weights, IDS, lambda v: F.gelu(v, approximate="tanh"), inverse_layer=True)
    d_sq = torch.cdist(x, weights["lm_head.weight"].expand(2, -1, -1)).square()
    p = (d_sq / d_sq.amin(-1, keepdim=True)) ** -D  # as they write it; in float64 it does not underflow here
    p = p / p.sum(-1, keepdim=True)
    torch.testing.assert_close(model(IDS).logits.softmax(-1).double(), p, atol=1e-5, rtol=1e-4)

    # Its own settings are named where the run has others.
    assert initialize_from(model_like(exponent="2*dim"), str(path)) == [
        "model.activation_function is 'gelu', the checkpoint was trained with 'gelu_pytorch_tanh'",
        "model.scale_attn_by_inverse_layer_idx is False, the checkpoint was trained with True",
    ]


def test_names_that_do_not_fit(tmp_path):
    weights = nanogpt_weights(128, bias=False)
    weights["transformer.h.0.attn.rope"] = torch.ones(3)
    del weights["transformer.h.1.ln_2.weight"]
    path = save_nanogpt(tmp_path / "ckpt.pt", weights)
    model = model_like(head="softmax")
    kept = model.transformer.h[1].ln_2.weight.detach().clone()
    assert initialize_from(model, str(path)) == [
        "not in the checkpoint, kept as initialised: transformer.h.1.ln_2.weight",
        "not used from the checkpoint: transformer.h.0.attn.rope",
    ]
    assert torch.equal(model.transformer.h[1].ln_2.weight, kept)


def test_missing_biases_are_named(tmp_path):
    path = save_nanogpt(tmp_path / "ckpt.pt", nanogpt_weights(128, bias=False))
    difference, missing = initialize_from(model_like(head="softmax", bias=True), str(path))
    assert difference == "model.bias is True, the checkpoint was trained with False"
    assert missing.startswith("not in the checkpoint, kept as initialised: transformer.h.0.attn.c_attn.bias, ")


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path):
    sprung = tmp_path / "sprung"
    content = {"model": {}, "model_args": {}, "config": Trap(sprung)}
    torch.save(content, tmp_path / "ckpt.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(content, protocol=2))
    for name in ("ckpt.pt", "plain.pt"):
        message = refusal(model_like(), tmp_path / name)
        assert (
            "is no checkpoint of tensors and plain values, which is all that is loaded (weights_only=True)" in message
        )
    assert not sprung.exists()
    torch.load(tmp_path / "ckpt.pt", weights_only=False)  # the trap is one
    assert sprung.exists()


def test_files_that_are_no_checkpoint(tmp_path):
    path = tmp_path / "ckpt.pt"
    path.write_text("hello")
    assert "is no checkpoint of tensors" in refusal(model_like(), path)
    path.write_bytes(b"")
    assert "is no checkpoint of tensors" in refusal(model_like(), path)
    torch.save({"state_dict": {}}, path)
    assert refusal(model_like(), path).endswith("holds 'model' and 'model_args'; this holds ['state_dict']")
    torch.save(torch.ones(3), path)
    assert refusal(model_like(), path).endswith("this holds Tensor")
    torch.save({"model": {}, "model_args": {"n_layer": 2}}, path)
    assert refusal(model_like(), path).endswith("its model_args lack n_embd, n_head")


# ---------------------------------------------------------------------------------------------------------------
# Other sources


def test_hgpt_model_into_a_harmonic_run(tmp_path):
    source = model_like(exponent=14.0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest").symlink_to("checkpoints/step_0000001")
    folder = tmp_path / "run" / "checkpoints" / "step_0000001" / "model"
    source.save_pretrained(folder)
    for path in (folder, folder.parent, tmp_path / "run"):
        model = model_like(exponent=14.0)
        assert initialize_from(model, str(path)) == []
        assert torch.equal(model(IDS).logits, source(IDS).logits)
    assert initialize_from(model_like(exponent=28.0), str(folder)) == [
        "model.head.exponent is 28.0, the checkpoint was trained with 14.0"
    ]


def test_other_models_are_refused(tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    assert refusal(model_like(), tmp_path).endswith("is a llama model; it must be a gpt2 or an hgpt")


def test_a_damaged_model_is_a_clear_error(tmp_path):
    save_gpt2(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert f"model.init_from = {tmp_path} cannot be loaded" in refusal(model_like(**GPT2), tmp_path)


@pytest.mark.parametrize("source", ["nobody/such-a-model", "gpt2", "ckpt.pt", "/no/such/folder", "no such folder!"])
def test_a_source_that_cannot_be_reached(source):
    # conftest.py turns the network off.
    message = refusal(model_like(), source)
    start = (
        f"model.init_from = {source} cannot be loaded; it must be a folder that exists, the id of a model on the "
        "Hugging Face hub, or nanoGPT's ckpt.pt: "
    )
    assert message.startswith(start) and len(message) > len(start)
