"""A tiny random sentence encoder on disk, in the format of all-MiniLM-L6-v2."""

import torch
from transformers import BertConfig, BertModel, BertTokenizer

WORDS = ("what", "is", "this", "how", "many", "are", "there", "where", "the", "mark", "?")
WIDTH = 8


def write_encoder(folder, seed=0, width=WIDTH):
    """A BERT with 2 blocks and a tokenizer of a few words in `folder`; returns the folder as text."""
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    config = BertConfig(
        vocab_size=len(vocab), hidden_size=width, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=24, initializer_range=0.5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(vocab)}).save_pretrained(folder)
    return str(folder)
