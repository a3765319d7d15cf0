"""The tokenizer of the house models: CLIP's own kind, trained on the emoji world's captions."""

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(captions: list[str], merges: int = 1500) -> CLIPTokenizer:
    """A byte-level BPE `CLIPTokenizer` whose every byte has a token, so that no text is unknown.

    transformers' own `train_new_from_iterator` leaves out the word-final forms of bytes it didn't
    meet; those would become the end token and cut the prompt short.
    """
    draft = CLIPTokenizer(vocab={START: 0, END: 1}, merges=[]).backend_tokenizer
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = draft.normalizer, draft.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + merges,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    learned = _merges(bpe)
    tokens = [START, END, *alphabet, *(a + "</w>" for a in alphabet)]
    tokens += [a + b for a, b in learned]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=learned, model_max_length=77)


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    import json

    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
