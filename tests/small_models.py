"""Small exported models, tokenizers that are not over bytes, and data folders, for tests of hgpt.interpret."""

import base64
import json
import pydoc_data.topics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
import torch
from small_run import write_data
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import hgpt
from hgpt.data.tokenizer import END_OF_TEXT, load_tokenizer
from hgpt.run.checkpoint import LATEST, MODEL

TEXT = pydoc_data.topics.topics["with"] + pydoc_data.topics.topics["while"]
UNKNOWN = "[UNK]"


def byte_pairs(size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE of `size` tokens, as GPT-2's is one."""
    return load_tokenizer(f"bpe:{size}", lambda: [TEXT])._backend


def trained(backend: tokenizers.Tokenizer, kind: type, size: int, **options: str) -> tokenizers.Tokenizer:
    special = [UNKNOWN, END_OF_TEXT]
    backend.train_from_iterator([TEXT], kind(vocab_size=size, special_tokens=special, show_progress=False, **options))
    return backend


def word_pieces(size: int) -> tokenizers.Tokenizer:
    """WordPiece of lower-case words: "##ing" goes on with a word, and spaces are no tokens."""
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return trained(backend, trainers.WordPieceTrainer, size)


def unigrams(size: int) -> tokenizers.Tokenizer:
    """A unigram model as SentencePiece has it, a space being the "▁" of the word behind it."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return trained(backend, trainers.UnigramTrainer, size, unk_token=UNKNOWN)


def export(
    folder: Path,
    backend: tokenizers.Tokenizer,
    head: str = "softmax",
    *,
    context: int = 24,
    seed: int = 1,
    rows: int = 0,
    **settings: str,
) -> Path:
    """A model of 2 blocks and 32 dimensions with random weights: `head` of hgpt, tied for softmax only, or "gpt2".

    `rows`: of the embedding, by default one for each token. `settings`: of HGPTConfig.
    """
    torch.manual_seed(seed)
    shape = {"n_positions": context, "n_embd": 32, "n_layer": 2, "n_head": 2}
    shape["vocab_size"] = rows or backend.get_vocab_size()
    if head == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(**shape))
    else:
        tied = head == "softmax"
        model = hgpt.HGPTForCausalLM(hgpt.HGPTConfig(**shape, head=head, tie_word_embeddings=tied, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_((2 if name.endswith("log_weight") else 0.05) * torch.randn_like(parameter))
    model.save_pretrained(folder)
    special = {"eos_token": END_OF_TEXT} | ({"unk_token": UNKNOWN} if UNKNOWN in backend.get_vocab() else {})
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return folder


def unpack(packed: dict) -> np.ndarray:
    """An array of hgpt.interpret.packing: its steps, or floats."""
    steps = np.frombuffer(base64.b64decode(packed["data"]), dtype=f"<u{packed['bits'] // 8}")
    if "low" not in packed:
        return steps
    return np.where(steps == 65535, np.nan, packed["low"] + steps / 65534 * (packed["high"] - packed["low"]))


def encode(backend: tokenizers.Tokenizer, text: str) -> np.ndarray:
    return np.array(backend.encode(text, add_special_tokens=False).ids)


def prepare(folder: Path, backend: tokenizers.Tokenizer, text: str = TEXT) -> Path:
    """A data folder as data_prep writes it, `text` being both of its splits."""
    tokens = encode(backend, text)
    return write_data(folder, tokens, tokens, backend, len(text.encode()))


def bare(folder: Path, tokens: np.ndarray) -> Path:
    """A folder as nanoGPT writes it: tokens and nothing else."""
    folder.mkdir(parents=True)
    for split in ("train", "val"):
        tokens.astype("<u2").tofile(folder / f"{split}.bin")
    return folder


def relation_set(folder: Path, pairs: Sequence[tuple[str, str]], name: str = "planted") -> str:
    """Write one relation into a folder of them; returns the folder."""
    folder.mkdir(exist_ok=True)
    content = [{"input": first, "output": second} for first, second in pairs]
    (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return str(folder)


def run_of(
    folder: Path, data: str, backend: tokenizers.Tokenizer, contexts: dict[int, int], head: str = "softmax"
) -> Path:
    """A run folder with a checkpoint for each step of step → context, whose config.toml holds `data` as [data]."""
    for step, context in contexts.items():
        checkpoint = folder / "checkpoints" / f"step_{step:07d}"
        export(checkpoint / MODEL, backend, head, context=context, seed=step)
        (checkpoint / "state.json").write_text(json.dumps({"step": step, "tokens": 1000 * step}))
    (folder / LATEST).symlink_to(checkpoint.relative_to(folder))
    (folder / "config.toml").write_text(f"[data]\n{data}\n")
    return folder


def relation_score(score: float, *, shuffled: float = 2.0, spread: float = 0.2):
    """A RelationScore by hand, of 30 pairs; its replicates are spread evenly over score ± spread."""
    from hgpt.interpret.measures.parallelograms import RelationScore  # here: few tests need matplotlib
    from hgpt.interpret.statistics import Estimate

    interval = Estimate(value=score, low=score - spread, high=score + spread)
    return RelationScore(pairs=30, dropped=2, score=interval, shuffled=shuffled, p_shuffled=0.5, plane_variance=0.1,
                         plane_variance_of_words=0.3, replicates=score + spread * np.linspace(-1, 1, 401),
                         disjoint=score + np.linspace(-1, 1, 15), sampled=np.linspace(0, 9, 400))  # fmt: skip
