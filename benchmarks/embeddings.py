"""Times embeddings against sentence-transformers, on the same random checkpoint and in turns.

    python benchmarks/embeddings.py [--shape minilm] [--texts 64] [--rounds 9] [--threads 2]

Needs transformers and sentence-transformers. A checkpoint of the shape is made in a temporary folder, float32, with a
tokenizer of one token per word. The texts of a round have lengths drawn evenly from `--min-tokens` to `--max-tokens`;
both sides get the same ones as text, in one call (`encode(texts, batch_size=64)`, which sorts them by length and pads
each batch, and `LLM.embed(texts)`), and whoever goes first changes from round to round. Printed are the medians, the
ratio within a round with its extremes, and the largest difference between the vectors.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omni_engine import LLM

# architecture, its config; of the published models that people serve, with random weights
BERT = {"max_position_embeddings": 512, "vocab_size": 30_522}
QWEN3 = {"max_position_embeddings": 2048, "vocab_size": 30_522, "head_dim": 64, "tie_word_embeddings": True}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "minilm": ("BertModel", {**BERT, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
                             "intermediate_size": 1536}),
    "bert-base": ("BertModel", {**BERT, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
                                "intermediate_size": 3072}),
    "qwen3-small": ("Qwen3Model", {**QWEN3, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8,
                                   "num_key_value_heads": 4, "intermediate_size": 1536}),
}  # fmt: skip
NUM_WORDS = 5000
BATCH_SIZE = 64


def make_checkpoint(folder: Path, architecture: str, config: dict[str, Any]) -> None:
    """A model and its tokenizer, as sentence-transformers saves them."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    model_class = getattr(transformers, architecture)
    model_class(model_class.config_class(**config)).save_pretrained(folder)
    vocabulary = {name: place for place, name in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]"])}
    vocabulary |= {f"w{word}": word + 4 for word in range(NUM_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    encodes = architecture == "BertModel"
    length = min(config["max_position_embeddings"], 512)
    files: dict[str, Any] = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]",
            "model_max_length": length, "padding_side": "right" if encodes else "left",
        },
        "modules.json": [
            {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for place, (path, kind) in enumerate(
                [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
            )
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": config["hidden_size"],
            "pooling_mode_mean_tokens": encodes,
            "pooling_mode_lasttoken": not encodes,
        },
        "2_Normalize/config.json": {},
        "sentence_bert_config.json": {"max_seq_length": length, "do_lower_case": False},
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))


def draw_texts(generator: random.Random, count: int, least: int, most: int) -> list[str]:
    """Texts that come to between `least` and `most` tokens each, two of them special ones."""
    return [
        " ".join(f"w{generator.randrange(NUM_WORDS)}" for _ in range(generator.randint(least, most) - 2))
        for _ in range(count)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="minilm")
    parser.add_argument("--texts", type=int, default=64, help="per call (64)")
    parser.add_argument("--min-tokens", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9, help="that are counted (9)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--max-num-batched-tokens", type=int, help="of the engine, if not its default")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time of all threads "
                        "divided by their number, for machines that others use too")  # fmt: skip
    arguments = parser.parse_args()
    clock = time.perf_counter if arguments.clock == "wall" else lambda: time.process_time() / arguments.threads
    from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    generator = random.Random(0)
    seconds: dict[str, list[float]] = {"sentence-transformers": [], "omni-engine": []}
    num_tokens: list[int] = []
    difference = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint(folder, *SHAPES[arguments.shape])
        reference = SentenceTransformer(name, device="cpu")
        llm = LLM(name, max_num_batched_tokens=arguments.max_num_batched_tokens)
        for turn in range(arguments.rounds + 1):
            texts = draw_texts(generator, arguments.texts, arguments.min_tokens, arguments.max_tokens)
            found: dict[str, np.ndarray] = {}
            taken: dict[str, float] = {}
            for side in sorted(seconds, reverse=bool(turn % 2)):
                start = clock()
                if side == "omni-engine":
                    outputs = llm.embed(texts, use_tqdm=False)
                    found[side] = np.array([output.outputs.embedding for output in outputs])
                else:
                    found[side] = np.asarray(reference.encode(texts, batch_size=BATCH_SIZE, show_progress_bar=False))
                taken[side] = clock() - start
            difference = max(difference, float(np.abs(found["omni-engine"] - found["sentence-transformers"]).max()))
            if turn < 1:
                continue  # warm-up
            for side, value in taken.items():
                seconds[side].append(value)
            num_tokens.append(sum(len(text.split()) + 2 for text in texts))
    lengths = f"{arguments.min_tokens} to {arguments.max_tokens} tokens"
    print(f"{arguments.shape}, float32, {arguments.texts} texts of {lengths}", end=", ")
    print(f"{arguments.threads} threads, {arguments.clock} clock")
    for side, times in seconds.items():
        rate = statistics.median(tokens / value for tokens, value in zip(num_tokens, times, strict=True))
        print(f"{side:22} {statistics.median(times):8.3f} s  {rate:9.0f} tokens/s")
    pairs = zip(seconds["sentence-transformers"], seconds["omni-engine"], strict=True)
    ratios = [theirs / ours for theirs, ours in pairs]
    print(f"ratio                  {statistics.median(ratios):8.2f}    ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"largest difference     {difference:.1e}")


if __name__ == "__main__":
    main()
