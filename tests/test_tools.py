"""Tools that train models of others, where they are installed: PEFT, TRL."""

import json
from pathlib import Path

import pytest
import torch
from test_modeling import tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import Trainer


def trained(model: torch.nn.Module, steps: int = 20) -> tuple[float, float]:
    """The loss before and after a few steps on one batch."""
    ids = torch.randint(61, (4, 16), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        losses.append(model(input_ids=ids, labels=ids).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return float(losses[0]), float(losses[-1])


@pytest.mark.parametrize("targets", [["c_attn", "c_proj"], "all-linear"])
def test_lora(targets: list[str] | str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    assert not any("lm_head" in name for name, p in model.named_parameters() if p.requires_grad)
    first, last = trained(model)
    assert last < first
    model.eval().save_pretrained(tmp_path)
    ids = torch.arange(8)[None]
    again = peft.PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, again(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_new_tokens_and_their_centres_alone_are_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the lines of docs/tools.md; without them PEFT computes heads as linear layers, and refuses other kinds."""
    peft = pytest.importorskip("peft")
    from peft.utils.other import TrainableTokensWrapper

    page = (Path(__file__).parent.parent / "docs" / "tools.md").read_text(encoding="utf-8")
    default, lines = (
        block.split("```")[0] for block in page.split("```python\n")[1:] if "peft" in block.split("```")[0]
    )
    monkeypatch.setattr(TrainableTokensWrapper, "_forward_wrapped", TrainableTokensWrapper._forward_wrapped)
    monkeypatch.setitem(peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, "hgpt", [])

    def tune(model: torch.nn.Module, indices: object) -> torch.nn.Module:
        return peft.get_peft_model(model, peft.LoraConfig(r=2, trainable_token_indices=indices))

    exec(default, {})
    with pytest.raises(ValueError, match="unknown layer type"):
        trained(tune(tiny_model(), [3, 5]))
    exec(lines, {})
    both = {"wte": [3, 5], "lm_head": [3, 5]}
    for tied, indices, centres in ((True, [3, 5], [3, 5]), (False, both, [3, 5]), (False, {"wte": [3, 5]}, [])):
        model = tiny_model(tie_word_embeddings=tied)
        weights = (model.transformer.wte.weight, model.lm_head.weight)
        before = [weight.detach().clone() for weight in weights]
        tuned = tune(model, indices)
        first, last = trained(tuned)
        assert last < first
        ids = torch.arange(8)[None]
        expected = tuned.eval()(input_ids=ids).logits
        tuned.save_pretrained(tmp_path)
        fresh = tiny_model(tie_word_embeddings=tied)
        torch.testing.assert_close(
            peft.PeftModel.from_pretrained(fresh, tmp_path).eval()(input_ids=ids).logits, expected
        )
        merged = tuned.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
        for weight, old, rows in zip(weights, before, ([3, 5], centres), strict=True):
            assert (weight != old).any(-1).nonzero().flatten().tolist() == rows


def test_trl_fine_tunes_through_our_loss(tmp_path: Path) -> None:
    """The subclass of docs/tools.md; TRL's own loss would take the centres for a linear layer, and is refused."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")

    class HarmonicSFTTrainer(trl.SFTTrainer):
        compute_loss = Trainer.compute_loss

    def trainer(kind: type) -> Trainer:
        rows = [{"input_ids": [(i + j) % 50 for j in range(12)]} for i in range(16)]
        settings = trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=4, learning_rate=1e-2, report_to=[], use_cpu=True, logging_steps=1
        )
        return kind(
            model=tiny_model(),
            args=settings,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tiny_tokenizer(),
        )

    with pytest.raises(AttributeError, match="no bias"):
        trainer(trl.SFTTrainer).train()
    ours = trainer(HarmonicSFTTrainer)
    batch = next(iter(ours.get_train_dataloader()))
    ours.model.eval()
    logits: Tensor = ours.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(ours.compute_loss(ours.model, dict(batch)).double(), expected, rtol=1e-5, atol=1e-5)
    ours.train()
    ours.save_state()
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    losses = [row["loss"] for row in log if "loss" in row]
    assert len(losses) == 4 and losses[-1] < losses[0]
