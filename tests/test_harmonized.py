"""A head of ours on other models of transformers: harmonize, [model] backbone, what is saved, and what is refused."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import finish, run, start
from remote_code import run_without_hgpt
from small_run import HARMONIC, losses, make_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertModel,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
    RobertaConfig,
)

import hgpt
import train
from hgpt.errors import UserError
from hgpt.plan import Launch, make_plan
from hgpt.run.report import flops_per_token
from hgpt.source import find_source

V, N = 67, 20.0
SHAPE = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"intermediate_size": 48, "max_position_embeddings": 32, "eos_token_id": None, "bos_token_id": None}
GROUPED = SHAPE | {"num_key_value_heads": 2}
CAUSAL = {
    "gpt2": GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=32, eos_token_id=None),
    "llama": LlamaConfig(**GROUPED),
    "qwen2": Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "hgpt": hgpt.HGPTConfig(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=32, head="softmax"),
}
MASKED = {"bert": BertConfig(**SHAPE), "roberta": RobertaConfig(**SHAPE, pad_token_id=1)}
IDS = torch.arange(2, 20).reshape(2, 9)


def plain(name: str) -> PreTrainedModel:
    torch.manual_seed(1)
    kind = AutoModelForMaskedLM if name in MASKED else AutoModelForCausalLM
    model = kind.from_config(copy.deepcopy((CAUSAL | MASKED)[name])).eval()  # harmonize changes it
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def harmonized(name: str, **settings) -> hgpt.HarmonizedForCausalLM:
    model = hgpt.harmonize(plain(name), N, radius="learned", final_norm_gain=0.3, vocab_size=V, **settings)
    torch.nn.init.normal_(model.lm_head.log_weight)
    return model


@pytest.mark.parametrize("name", CAUSAL | MASKED)
def test_the_loss_is_that_of_distances_to_what_the_output_embedding_got(name):
    before, model = plain(name), harmonized(name)
    seen = []
    before.get_output_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    labels = IDS.clone()
    labels[0, 4] = -100
    with torch.no_grad():
        before(IDS)
        output = model(IDS, labels=labels)
    x, w = 0.3 * seen[0].double(), before.get_output_embeddings().weight[:V].double()
    scores = -N * (x[:, :, None] - w).norm(dim=-1).log() + model.lm_head.log_weight[:V].double()
    torch.testing.assert_close(output.logits.log_softmax(-1).double(), scores.log_softmax(-1), atol=2e-4, rtol=0)
    kept, targets = (scores, labels) if name in MASKED else (scores[:, :-1], labels[:, 1:])
    expected = torch.nn.functional.cross_entropy(kept.flatten(0, 1), targets.flatten())
    assert abs(float(output.loss) - float(expected.detach())) < 1e-4
    model.train()(IDS, labels=labels).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", CAUSAL)
def test_generation_with_and_without_a_cache_and_with_padding(name):
    model = harmonized(name)
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = model.generate(IDS, use_cache=True, **greedy)
    assert torch.equal(found, model.generate(IDS, use_cache=False, **greedy))
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), IDS), dim=1)
    mask = (torch.arange(12) >= 3).long().expand(2, -1)
    assert torch.equal(found, model.generate(padded, attention_mask=mask, **greedy)[:, 3:])


def test_the_parts_of_a_backbone_are_found():
    llama, bert = harmonized("llama").transformer, harmonized("bert").transformer
    assert llama.norm is llama.model.model.norm and llama.h is llama.model.model.layers
    assert isinstance(bert.norm, torch.nn.Identity) and bert.h is bert.model.bert.encoder.layer


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """What each harmonized model saved, and beside it what it computes."""
    found = {}
    for name in CAUSAL | MASKED:
        model, folder = harmonized(name), tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        with torch.no_grad():
            torch.save({"ids": IDS, "logits": model(IDS).logits}, folder / "expected.pt")
        found[name] = folder
    return found


@pytest.mark.parametrize("name", CAUSAL | MASKED)
def test_what_is_saved_loads_and_stays_tied(folders, name):
    before, expected = plain(name), torch.load(folders[name] / "expected.pt")
    kind = AutoModelForMaskedLM if name in MASKED else AutoModelForCausalLM
    model, loading = kind.from_pretrained(folders[name], output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected["logits"])
    tied = before.get_input_embeddings().weight is before.get_output_embeddings().weight
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert type(hgpt.load(folders[name])) is type(find_source(str(folders[name])).load_model()) is type(model)
    rows = model.resize_token_embeddings(V + 5).num_embeddings
    assert model(IDS).logits.shape[-1] == V + 5 and model.config.padded_vocab_size == len(model.lm_head.weight) == rows


def test_what_is_saved_loads_without_hgpt(folders, tmp_path):
    script = """
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

for folder in sys.argv[1:]:
    expected = torch.load(f"{folder}/expected.pt", weights_only=True)
    masked = AutoConfig.from_pretrained(folder, trust_remote_code=True).task == "masked_lm"
    kind = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    model = kind.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(model(expected["ids"]).logits, expected["logits"]), folder
    assert masked or model.generate(expected["ids"], max_new_tokens=2).shape[1] > 9
"""
    run_without_hgpt(script, [str(folder) for folder in folders.values()], tmp_path)


def causal(config) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: causal(Gemma2Config(**GROUPED, head_dim=8, final_logit_softcapping=0.5)), "caps or scales .* is lost"),
        (lambda: causal(GraniteConfig(**GROUPED, logits_scaling=8.0)), "caps or scales"),
        (lambda: causal(OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=16)), r"\(2, 2, 32\); it got \(2, 2, 16\)"),
        (lambda: BertModel(BertConfig(**SHAPE)), "no output embedding"),
        (lambda: causal(BertConfig(**SHAPE)), "sees later tokens"),
        (lambda: harmonized("llama"), "already has a head of hgpt"),
    ],
)
def test_models_that_cannot_bear_the_head_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        hgpt.harmonize(make())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"head_version": 2}, "head_version = 2: another version"),
        ({"vocab_size": 1000}, "exceeds the backbone's 67 rows"),
        ({"backbone": {"model_type": "none_such"}}, "no configuration of transformers"),
        ({"backbone": {"model_type": "mamba"}}, "no num_attention_heads"),
        ({"backbone": {"model_type": "t5"}}, "causal or a masked language model"),
    ],
)
def test_configurations_of_another_version_or_kind_are_refused(folders, tmp_path, values, message):
    config = json.loads((folders["llama"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | values))
    with pytest.raises(UserError, match=message):
        find_source(str(tmp_path)).load_config()


# Runs


def backbone_run(data, runs, name="run", values=None, **sections):
    file = runs / f"{name}.json"
    file.write_text(json.dumps(values or {"model_type": "llama", "torch_dtype": "bfloat16", **GROUPED}))
    model = sections.pop("model", {})
    config = make_config(data, runs, name=name, **sections)
    given = {"n_layer": 12, "n_head": 12, "n_embd": 768, "dropout": 0.0, "backbone": str(file)} | model
    return replace(config, model=replace(config.model, **given))


@pytest.mark.parametrize(
    ("engine", "tied"),
    [("ddp", False), *(pytest.param(engine, True, marks=pytest.mark.slow) for engine in ("zero2", "zero3"))],
)
def test_a_backbone_trains_alike_under_every_engine_and_resumes(data, tmp_path, engine, tied):
    head = replace(HARMONIC, radius="learned")
    settings = {"model": {"head": head, "tie_word_embeddings": tied}, "train": {"micro_batch": 4}}
    alone, together = (backbone_run(data, tmp_path, name, **settings) for name in ("alone", "together"))
    train.main(alone)
    run(replace(together, train=replace(together.train, steps=3)), 2, engine)
    train.main(replace(together, resume="auto"))
    assert losses(together.run_folder) == pytest.approx(losses(alone.run_folder), abs=1e-4)
    model = hgpt.load(together.run_folder / "latest" / "model")
    assert model.dtype == torch.float32
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize(
    ("values", "model", "message"),
    [
        ({"model_type": "gemma2", "final_logit_softcapping": 0.5, "head_dim": 8}, {}, "caps or scales"),
        ({"model_type": "bert"}, {}, "sees later tokens"),
        ({"model_type": "llama", "hidden_size": "x"}, {}, "no configuration of transformers: .*hidden_size"),
        ({"model_type": "gpt2", "num_attention_heads": 3}, {}, "makes no causal_lm model of it: .* divisible"),
        ({"model_type": "vit"}, {}, "makes no causal_lm model of it"),
        ({"model_type": "hgpt"}, {}, "is no backbone, unless hgpt.convert made it"),
        ({"hidden_size": 3}, {}, "has no model_type"),
        (None, {"n_layer": 3}, "model.n_layer = 3 has no effect with model.backbone"),
        (None, {"init_from": "gpt2"}, "model.init_from = gpt2: .* no head of hgpt: remove one"),
        (None, {"backbone": "nowhere.json"}, "model.backbone = nowhere.json: there is no such file"),
    ],
)
def test_bad_backbones_of_a_run_are_refused(data, tmp_path, values, model, message):
    with pytest.raises(UserError, match=message):
        train.main(backbone_run(data, tmp_path, values=values and GROUPED | values, model=model))


def test_another_backbone_in_the_file_is_not_resumed(data, tmp_path):
    config = backbone_run(data, tmp_path)
    train.main(config)
    backbone_run(data, tmp_path, values={"model_type": "llama", **GROUPED, "hidden_act": "relu"})
    with pytest.raises(UserError, match=r"backbone\.hidden_act = 'silu', but the run 'relu'"):
        train.main(replace(config, resume="auto"))


@pytest.mark.slow
def test_nodes_with_other_backbones_in_their_files_do_not_start(data, tmp_path, monkeypatch):
    config = backbone_run(data, tmp_path, train={"micro_batch": 4})
    for node, act in enumerate(("silu", "relu")):
        (tmp_path / f"node{node}").mkdir()
        values = {"model_type": "llama", **GROUPED, "hidden_act": act}
        (tmp_path / f"node{node}" / "backbone.json").write_text(json.dumps(values))
    monkeypatch.chdir(tmp_path / "node0")
    config = replace(config, model=replace(config.model, backbone="backbone.json"))
    folders = [tmp_path / f"node{node}" for node in range(2)]
    assert finish(start([config], 2, "ddp", tmp_path / "log", folders=folders)) == [2, 2]
    assert "the content of model.backbone" in (tmp_path / "log.1").read_text()
    assert not config.run_folder.exists()


def test_the_plan_counts_parameters_and_flops_of_a_backbone(data, tmp_path):
    plan = make_plan(backbone_run(data, tmp_path, model={"tie_word_embeddings": False}), Launch())
    # By hand, a block: q and o 32 · 32, k and v 32 · 16, three matrices of the MLP 32 · 48, two norms.
    matrices = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    assert (plan.parameters.blocks, plan.parameters.positions) == (2 * (matrices + 2 * 32), 0)
    assert plan.parameters.total == 2 * 320 * 32 + plan.parameters.blocks + 2 * 32
    with FlopCounterMode(display=False) as counter:  # which does not see attention on a CPU
        hgpt.HarmonizedForCausalLM(plan.config).eval()(IDS[:, :8])
    # Transformers 5.17 multiplies matrices for RoPE.
    counted = 3 * counter.get_total_flops() / 16 + 12 * 2 * 32 * 8
    assert counted == pytest.approx(flops_per_token(plan.config, 8), rel=1e-3)
