"""Exported models where hgpt is not installed: how a script begins that loads one, and what it has to compute."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

WITHOUT_HGPT = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hgpt":
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocker())
try:
    import hgpt
except ImportError:
    pass
else:
    raise SystemExit("hgpt can be imported: this proves nothing")
"""

COMPARE = """
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline

trusted = {"trust_remote_code": True}
for folder in sys.argv[1:]:
    expected = torch.load(f"{folder}/expected.pt", weights_only=True)
    ids = expected["ids"]
    assert type(AutoConfig.from_pretrained(folder, **trusted)).__module__.startswith("transformers_modules.")
    model = AutoModelForCausalLM.from_pretrained(folder, **trusted).eval()
    assert torch.equal(model(ids).logits, expected["logits"]), folder
    assert torch.equal(model(ids, labels=ids).loss, expected["loss"]), folder
    trunk = AutoModel.from_pretrained(folder, **trusted).eval()
    assert torch.equal(trunk(ids).last_hidden_state, expected["hidden"])
    greedy = {"max_new_tokens": 5, "do_sample": False}
    for use_cache in (True, False):
        assert torch.equal(model.generate(ids, use_cache=use_cache, **greedy), expected["generated"])
    assert torch.equal(model.generate(ids, num_beams=3, **greedy), expected["beams"])
    model.save_pretrained(f"{folder}/again")  # and on from there
    again = AutoModelForCausalLM.from_pretrained(f"{folder}/again", **trusted).eval()
    assert torch.equal(again(ids).logits, expected["logits"])
    AutoModel.from_pretrained(f"{folder}/again", **trusted)
    generator = pipeline("text-generation", model=folder, device="cpu", **trusted)
    assert generator("w1 w2", **greedy)[0]["generated_text"].startswith("w1 w2")
assert not any(name.split(".")[0] == "hgpt" for name in sys.modules)
"""


def write_expected(model: PreTrainedModel, folder: Path, ids: Tensor) -> None:
    """What `model`, exported to `folder`, computes here, for `assert_same_without_hgpt`."""
    greedy = {"max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        expected = {
            "ids": ids,
            "logits": model(ids).logits,
            "loss": model(ids, labels=ids).loss,
            "hidden": model.transformer(ids).last_hidden_state,
            "generated": model.generate(ids, **greedy),
            "beams": model.generate(ids, num_beams=3, **greedy),
        }
    torch.save(expected, folder / "expected.pt")


def run_without_hgpt(script: str, arguments: Sequence[str], working: Path) -> str:
    """What `script` prints with these arguments in a process that cannot import hgpt; it has to succeed."""
    environment = os.environ | {"HF_MODULES_CACHE": str(working / "modules"), "HF_HOME": str(working / "hub")}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", WITHOUT_HGPT + script, *arguments]
    done = subprocess.run(command, cwd=working, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def assert_same_without_hgpt(folders: list[Path], working: Path, then: str = "") -> None:
    """Each exported folder computes what `write_expected` wrote, in a process that cannot import hgpt.

    `then`: code that this process executes at its end.
    """
    printed = run_without_hgpt(COMPARE + then + "\nprint('compared')", [str(folder) for folder in folders], working)
    assert "compared" in printed
