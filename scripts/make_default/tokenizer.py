"""CLIP's own byte-pair vocabulary cut to its first merges: 8,192 tokens, 24 to a prompt.

`python scripts/make_default/tokenizer.py` writes the tokenizer folder into the work folder.
"""

from __future__ import annotations

import gzip
import json
from importlib.util import find_spec
from pathlib import Path

from new_base import WORK
from transformers import CLIPTokenizer

TOKENS, LENGTH = 8192, 24
START, END = "<|startoftext|>", "<|endoftext|>"
FOLDER = WORK / "tokenizer"


def byte_letters() -> list[str]:
    """The 256 printable letters that stand for bytes, in CLIP's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(len(others))]


def write(folder: Path) -> None:
    """Write vocab.json, merges.txt and tokenizer_config.json."""
    spec = find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise SystemExit("open_clip_torch is needed for CLIP's vocabulary: pip install it")
    with gzip.open(Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz", "rt") as file:
        merges = file.read().split("\n")[1 : TOKENS - 512 - 2 + 1]
    letters = byte_letters()
    tokens = letters + [letter + "</w>" for letter in letters]
    tokens += ["".join(pair.split()) for pair in merges] + [START, END]
    assert len(tokens) == len(set(tokens)) == TOKENS
    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "bos_token": START}
    config |= {"eos_token": END, "unk_token": END, "pad_token": END, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load(folder: Path = FOLDER) -> CLIPTokenizer:
    if not (folder / "vocab.json").exists():
        write(folder)
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


if __name__ == "__main__":
    tokenizer = load()
    for text in ("a red fox on a light blue background", "Two Penguins, 3d style", ""):
        print(tokenizer.tokenize(text), tokenizer(text).input_ids)
