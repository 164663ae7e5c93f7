"""Build a tokenizer from a bare vocabulary, as GGUF and llama2.c files hold it."""

from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from jaxdistill.data.tokenizers.fast import FastTokenizer

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen2 differs from Llama 3 in one place: every digit is a word of its own.
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")


def _byte_level(words: str | None = None) -> pre_tokenizers.PreTokenizer:
    """Cut into words (GPT-2's rule where none is given), then write bytes as letters."""
    if words is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _smollm() -> pre_tokenizers.PreTokenizer:
    """Each digit alone first, then GPT-2's words: ' 12' is ' ', '1', '2'."""
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


# The names are those of `tokenizer.ggml.pre`.
PRE_TOKENIZERS = {
    "default": _byte_level,
    "gpt-2": _byte_level,
    "smollm": _smollm,
    "llama-bpe": lambda: _byte_level(_LLAMA3_WORDS),
    "qwen2": lambda: _byte_level(_QWEN2_WORDS),
}


def byte_level_bpe(
    tokens: Sequence[str],
    merges: Sequence[str],
    *,
    pre_tokenizer: str,
    control: Sequence[str] = (),
    user_defined: Sequence[str] = (),
    bos_id: int | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
    add_bos: bool = False,
    chat_template: str | None = None,
) -> FastTokenizer:
    """A GPT-2 style byte-level BPE.

    Args:
      tokens: the vocabulary in the order of ids, bytes written as GPT-2's letters.
      merges: "left right", best first.
      pre_tokenizer: how text is cut into words, a key of `PRE_TOKENIZERS`.
      control: tokens that are special; user_defined: tokens that are taken whole but are text.
      bos_id, eos_id, pad_id, chat_template: as for `FastTokenizer`.
      add_bos: whether other programs should put bos before a text (`encode` never does by itself).

    Raises:
      ValueError: an unknown pre-tokenizer, a repeated token, a merge of unknown tokens.
    """
    if pre_tokenizer not in PRE_TOKENIZERS:
        raise ValueError(
            f"the pre-tokenizer {pre_tokenizer!r} is not known here "
            f"(known: {', '.join(PRE_TOKENIZERS)}); use the model's tokenizer.json"
        )
    if wrong := [merge for merge in merges if merge.count(" ") != 1]:
        raise ValueError(f"a BPE merge is two tokens with a space between, not {wrong[0]!r}")
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    # Llama 3's vocabulary has words that its merges cannot reach.
    model = _bpe(tokens, pairs, ignore_merges=pre_tokenizer == "llama-bpe")
    backend = tokenizers.Tokenizer(model)
    if pre_tokenizer == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = PRE_TOKENIZERS[pre_tokenizer]()
    backend.decoder = decoders.ByteLevel()
    _add_tokens(backend, control, user_defined)
    _start_with(backend, tokens, bos_id if add_bos else None)
    return FastTokenizer(
        backend, bos_id=bos_id, eos_id=eos_id, pad_id=pad_id, chat_template=chat_template
    )


def scored_bpe(
    tokens: Sequence[str],
    scores: Sequence[float],
    *,
    control: Sequence[str],
    user_defined: Sequence[str] = (),
    space: str = "▁",
    space_prefix: bool = True,
    bos_id: int | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
    unknown: str = "<unk>",
    add_bos: bool = False,
    chat_template: str | None = None,
) -> FastTokenizer:
    """A SentencePiece-style BPE: of all neighbours that join to a token, the best score joins.

    Characters outside the vocabulary become byte tokens "<0xE2>" where the vocabulary has them.

    Args:
      tokens, scores: the vocabulary in the order of ids.
      space: how the vocabulary writes a space.
      space_prefix: whether a space is put before the text, and dropped again by `decode`.
      unknown: the token for what cannot be encoded.
      control, user_defined, bos_id, eos_id, pad_id, add_bos, chat_template: as `byte_level_bpe`.

    Raises:
      ValueError: a repeated token, or not one score a token.
    """
    if len(tokens) != len(scores):
        raise ValueError(f"there are {len(tokens)} tokens but {len(scores)} scores")
    atoms = {*control, *user_defined}
    merges = _merges_from_scores(tokens, scores, atoms)
    model = _bpe(tokens, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    prefix = [normalizers.Prepend(space)] if space_prefix else []
    strip = [decoders.Strip(" ", 1, 0)] if space_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", space)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    _add_tokens(backend, control, user_defined)
    _start_with(backend, tokens, bos_id if add_bos else None)
    return FastTokenizer(
        backend, bos_id=bos_id, eos_id=eos_id, pad_id=pad_id, chat_template=chat_template
    )


def _merges_from_scores(
    tokens: Sequence[str], scores: Sequence[float], atoms: set[str]
) -> list[tuple[str, str]]:
    """Every way to cut a token into two others, the cuts of the best-scored token first."""
    known = set(tokens) - atoms
    order = sorted(range(len(tokens)), key=lambda token_id: -scores[token_id])
    merges = []
    for token_id in order:
        token = tokens[token_id]
        if token in atoms:
            continue
        cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        merges += [(left, right) for left, right in cuts if left in known and right in known]
    return merges


def _bpe(tokens: Sequence[str], merges: Sequence[tuple[str, str]], **options: Any) -> models.BPE:
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        repeated = next(token for i, token in enumerate(tokens) if vocabulary[token] != i)
        raise ValueError(f"the vocabulary has the token {repeated!r} twice")
    known = vocabulary.keys()
    for left, right in merges:
        if left not in known or right not in known or left + right not in known:
            raise ValueError(f"the merge {left!r} + {right!r} names a token not in the vocabulary")
    return models.BPE(vocab=vocabulary, merges=list(merges), **options)


def _add_tokens(
    backend: tokenizers.Tokenizer, control: Sequence[str], user_defined: Sequence[str]
) -> None:
    backend.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in control]
    )
    backend.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in user_defined])


def _start_with(backend: tokenizers.Tokenizer, tokens: Sequence[str], bos_id: int | None) -> None:
    if bos_id is None:
        return
    bos = tokens[bos_id]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
    )
