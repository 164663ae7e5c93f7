"""Tokenizers of every kind behind one small interface.

>>> from jaxdistill.data import tokenizers
>>> tokenizer = tokenizers.scored_bpe(
...     ["<unk>", "<s>", "</s>", "a", "b", "ab"], scores=[0, 0, 0, -9, -9, -1],
...     control=("<unk>", "<s>", "</s>"), bos_id=1, eos_id=2, space_prefix=False)
>>> tokenizer.encode("abba", add_bos=True)
[1, 5, 4, 3]
>>> tokenizer.decode([5, 4, 3])
'abba'
"""

from jaxdistill.data.tokenizers.build import byte_level_bpe, scored_bpe
from jaxdistill.data.tokenizers.fast import FastTokenizer
from jaxdistill.data.tokenizers.interface import Tokenizer, check_vocabulary
from jaxdistill.data.tokenizers.load import load
from jaxdistill.data.tokenizers.sentencepiece import SentencePieceTokenizer

__all__ = [
    "FastTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "byte_level_bpe",
    "check_vocabulary",
    "load",
    "scored_bpe",
]
