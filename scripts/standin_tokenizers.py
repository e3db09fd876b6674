"""Tokenizers of stand-in checkpoints, in the original files' formats, made from the built-in prompts."""

import io
import json
from pathlib import Path

from calib.dataset.prompts import builtin
from calib.models.tokens import BYTE_LETTERS

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CLIP_MERGES = 49152 - 256 - 2  # lines of CLIP's merges.txt that are read
T5_PIECES = 600
QWENS_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWENS_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_clip(folder: Path, count: int = CLIP_MERGES) -> None:
    """CLIP's two files, of ``count`` merges, and so of 514 tokens more; the last is the end's."""
    merges = clip_merges(count)
    letters = [*(chr(b) for b in range(256) if chr(b) in BYTE_LETTERS), *(c for c in BYTE_LETTERS if ord(c) > 255)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    _write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def clip_merges(count: int) -> list[tuple[str, str]]:
    """Pairs, triples and some quadruples of letters, within words and at their ends."""
    alphabet = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    merges: list[tuple[str, str]] = []
    stems = alphabet
    while len(merges) < count:
        longer = [(stem, letter) for stem in stems for letter in alphabet]
        merges += [(stem, f"{letter}{end}") for end in ("", "</w>") for stem, letter in longer]
        stems = ["".join(pair) for pair in longer]
    return merges[:count]


def write_t5(folder: Path) -> None:
    """T5's pieces and settings, of :data:`T5_PIECES` and 100 further tokens."""
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(folder / "tokenizer_config.json", {**special, "extra_ids": 100, "tokenizer_class": "T5Tokenizer"})
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(builtin()),
        model_writer=model,
        vocab_size=T5_PIECES,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())


def write_qwen(folder: Path, size: int = 600) -> None:
    """A byte-level tokenizer of ``size`` pieces, with Qwen's special tokens and a chat template as its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(QWENS_SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(builtin(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=QWENS_SPECIAL[0], eos_token=QWENS_SPECIAL[2], padding_side="right"
    )
    fast.chat_template = QWENS_CHAT
    fast.save_pretrained(folder)


def _write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
