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


def test_new_tokens_alone_are_trained() -> None:
    """Where the head is not tied; PEFT computes tied heads as linear layers, and refuses those of other kinds."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], trainable_token_indices={"wte": [3, 5]})
    model = tiny_model(tie_word_embeddings=False)
    before = model.transformer.wte.weight.detach().clone()
    tuned = peft.get_peft_model(model, config)
    trained(tuned)
    after = tuned.merge_and_unload().transformer.wte.weight.detach()
    assert (after != before).any(-1).nonzero().flatten().tolist() == [3, 5]
    with pytest.raises(ValueError, match="unknown layer type"):
        trained(peft.get_peft_model(tiny_model(), config))


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
