"""What a GGUF file says of a tokenizer: BPE of Llama 2's kind (spaces as ▁, bytes as <0x..>) and byte-level BPE."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gguf import TokenType
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llmalign.errors import UserError
from llmalign.scores.sampling import end_token_ids

logger = logging.getLogger(__name__)

SPACE = "▁"
NEVER_JOINED = -1e6  # the score of a piece that no merge makes
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# A tag of transformers' own that marks what an assistant says; a comment trims the same white space.
_GENERATION = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
)
# How text is split before merging, by llama.cpp's names.
PATTERNS = {
    _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _WORDS + r"\p{N}" + _REST: "qwen2",
    _CASED + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as GGUF has it; `tokens` and `kinds` have an entry for every row of the embeddings."""

    model: str  # llama.cpp's name of the algorithm: llama (SentencePiece's BPE) or gpt2 (byte-level)
    tokens: list[str]
    kinds: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    splits: str = "default"
    space_prefix: bool = False
    starts: bool = False  # texts are given a BOS token
    ends: bool = False  # and an EOS token
    special: dict[str, int] = field(default_factory=dict)  # bos, eos, unk, pad, and further ends: eot, eom
    chat_template: str | list[dict[str, str]] | None = None


def read_vocabulary(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, chat_template: str | None = None
) -> Vocabulary:
    """What GGUF is told of a tokenizer and of the tokens that end a text of `model`.

    `chat_template` replaces the tokenizer's own. Rows of the embeddings without a token get an unused name. Raises
    UserError for an algorithm or a way to split text that llama.cpp does not know, and for a vocabulary larger than the
    embeddings. What llama.cpp does otherwise (normal forms, prefixes after special tokens) is logged.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"the tokenizer {type(tokenizer).__name__} has no tokenizer.json, which GGUF is made from")
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    bpe = described["model"]
    if bpe["type"] != "BPE":
        raise UserError(f"a tokenizer of kind {bpe['type']} cannot be written to GGUF here: only BPE can")
    tokens, kinds = _tokens(tokenizer, described, rows=model.get_input_embeddings().weight.shape[0])
    starts, ends = _added(tokenizer)
    shared: dict[str, Any] = {
        "tokens": tokens, "kinds": kinds, "starts": starts, "ends": ends, "special": _special(tokenizer, model),
        "chat_template": _template(chat_template or tokenizer.chat_template),
    }  # fmt: skip
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in bpe["merges"]]
    if bpe["byte_fallback"]:
        prefix = _space_prefix(described)
        return Vocabulary("llama", scores=_scores(bpe["vocab"], merges), space_prefix=prefix, **shared)
    splits = _splits(described)
    return Vocabulary("gpt2", merges=[" ".join(pair) for pair in merges], splits=splits, **shared)


def write_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Add the tokenizer's keys to a GGUFWriter."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.splits)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    writer.add_add_space_prefix(vocabulary.space_prefix)
    writer.add_add_bos_token(vocabulary.starts)
    writer.add_add_eos_token(vocabulary.ends)
    add = {
        "bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id, "eot": writer.add_eot_token_id, "eom": writer.add_eom_token_id,
    }  # fmt: skip
    for name, number in vocabulary.special.items():
        add[name](number)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _tokens(tokenizer: PreTrainedTokenizerFast, described: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(by_id) >= rows:
        raise UserError(
            f"the tokenizer has a token of id {max(by_id)}, but the model has embeddings for {rows} alone; resize them"
        )
    added = {token["id"]: token for token in described["added_tokens"]}
    unknown = tokenizer.unk_token_id if described["model"]["byte_fallback"] else None
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(rows)]
    kinds = []
    for number, token in enumerate(tokens):
        if number not in by_id:
            kind = TokenType.UNUSED
        elif number == unknown:
            kind = TokenType.UNKNOWN
        elif number in added:
            kind = TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
        elif described["model"]["byte_fallback"] and _BYTE.fullmatch(token):
            kind = TokenType.BYTE
        else:
            kind = TokenType.NORMAL
        kinds.append(int(kind))
    stripping = [token["content"] for token in added.values() if token["lstrip"] or token["rstrip"]]
    if stripping:
        logger.warning("llama.cpp keeps the white space beside %s, which this tokenizer drops.", ", ".join(stripping))
    return tokens, kinds


def _scores(vocabulary: Mapping[str, int], merges: Sequence[Sequence[str]]) -> list[float]:
    """Of every piece, by id: SentencePiece joins by score, the best first, so the earliest merge has the best."""
    rank: dict[str, int] = {}
    for number, pair in enumerate(merges):
        rank.setdefault("".join(pair), number)
    size = max(vocabulary.values()) + 1
    found = [NEVER_JOINED] * size
    for token, number in vocabulary.items():
        found[number] = -float(rank[token]) if token in rank else NEVER_JOINED
    known = {tuple(pair) for pair in merges}
    others = sum(
        (piece[:cut], piece[cut:]) not in known
        for piece in rank
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    )
    if others:
        logger.warning(
            "llama.cpp joins any two pieces that make a third; this tokenizer leaves out %d such pairs, so that a few "
            "texts may be split otherwise.", others,
        )  # fmt: skip
    return found


def _space_prefix(described: dict[str, Any]) -> bool:
    """Whether a text is given a space in front. Raises UserError for another preparation than Llama 2's."""
    normalizer, splitter = described["normalizer"], described["pre_tokenizer"]
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepended = {"type": "Prepend", "prepend": SPACE}
    if all(step in (replaced, prepended) for step in steps) and splitter is None and replaced in steps:
        return prepended in steps
    metaspace = splitter is not None and splitter["type"] == "Metaspace" and splitter["replacement"] == SPACE
    if not steps and metaspace and not splitter.get("split", True):
        scheme = splitter["prepend_scheme"]
        if scheme != "never":
            after = ", and to those after a special token" if scheme == "first" else ""
            logger.warning("llama.cpp also adds a space to texts that start with one%s.", after)
        return scheme != "never"
    kinds = ", ".join(step["type"] for step in [*steps, splitter] if step is not None) or "nothing"
    raise UserError(f"the tokenizer prepares text by {kinds}, which is not what llama.cpp does for this kind of BPE")


def _splits(described: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text. Raises UserError where it has none."""
    normalizer, splitter = described["normalizer"], described["pre_tokenizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        raise UserError(f"the tokenizer normalises text by {normalizer['type']}, which llama.cpp does not do")
    if normalizer is not None:
        logger.info("llama.cpp does not bring text to the normal form NFC first, as this tokenizer does.")
    steps = [] if splitter is None else splitter.get("pretokenizers", [splitter])
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        raise UserError("the tokenizer is neither of Llama 2's kind nor a byte-level BPE without a space in front")
    first = steps[0]
    if len(steps) == 1 and first["use_regex"]:
        return "gpt-2"
    if len(steps) == 2 and first["type"] == "Digits" and first["individual_digits"] and steps[1]["use_regex"]:
        return "smollm"
    if len(steps) == 2 and first["type"] == "Split" and not first["invert"] and first["behavior"] == "Isolated":
        pattern = first["pattern"].get("Regex", "")
        if pattern in PATTERNS and not steps[1]["use_regex"]:
            if PATTERNS[pattern] == "tekken":
                logger.warning("llama.cpp knows no combining marks where it splits text for this tokenizer.")
            return PATTERNS[pattern]
    shown = first["pattern"] if first["type"] == "Split" else [step["type"] for step in steps]
    raise UserError(
        f"the tokenizer splits text by {shown}, which has no known name in llama.cpp; known are gpt-2, smollm, "
        f"{', '.join(PATTERNS.values())}"
    )


def _added(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the tokenizer puts BOS before and EOS after a text. Raises UserError for any other token."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for starts in (False, True):
        for ends in (False, True):
            before = [tokenizer.bos_token_id] if starts else []
            after = [tokenizer.eos_token_id] if ends else []
            if whole == [*before, *bare, *after]:
                return starts, ends
    raise UserError("the tokenizer adds other tokens to a text than one BOS and one EOS, which GGUF cannot say")


def _special(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> dict[str, int]:
    """Ids by GGUF's names; ends beyond the tokenizer's EOS go to the two further names that it has."""
    named = {
        "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }  # fmt: skip
    found = {name: number for name, number in named.items() if number is not None}
    further = [number for number in end_token_ids(model, tokenizer) if number != tokenizer.eos_token_id]
    found.update(zip(("eot", "eom"), further, strict=False))
    if further[2:]:
        left = ", ".join(tokenizer.convert_ids_to_tokens(further[2:]))
        logger.warning("GGUF names three tokens that end a text; %s will not end one in llama.cpp.", left)
    return found


def _template(template: Any) -> str | list[dict[str, str]] | None:
    if isinstance(template, dict):
        return [{"name": name, "template": _plain(text)} for name, text in template.items()]
    return None if template is None else _plain(template)


def _plain(template: str) -> str:
    return _GENERATION.sub(r"{#\1 \2#}", template)
