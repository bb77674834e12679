"""Text <-> token ids: a Hugging Face tokenizer from a local folder, or one token a byte.

Owns chat templates and which tokens end an answer. Libraries are imported by ``load_tokenizer``: transformers
takes seconds, and the server answers /health meanwhile. Read next: ``generate.py``.
"""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from toolkit.config.model import ModelConfig
from toolkit.engine.frontend.detokenize import TextStream

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

# Ends of a chat turn. Some checkpoints name only the end of a document as eos, and would talk on.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>", "<|return|>")

# A character is at most four tokens of one byte: more held tokens than this are not a character in the making.
_MAX_HELD = 16


_BYTE_FALLBACK = re.compile("<0x[0-9A-F]{2}>")  # SentencePiece's tokens for bytes outside its vocabulary


class Tokenizer(Protocol):
    """Thread-safe: long prompts are encoded beside the event loop. Attributes: ``stop_token_ids`` end an answer."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]: ...

    def encode(self, text: str) -> list[int]:
        """A plain prompt, with what the model wants in front of it (beginning-of-text)."""

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """A conversation, up to where the assistant speaks. ``ValueError`` when the template refuses it."""

    def stream(self) -> TextStream: ...

    def token_bytes(self, token: int) -> bytes:
        """One token by itself, special ones included; may be part of a character."""


def load_tokenizer(model: ModelConfig) -> Tokenizer:
    """The tokenizer that ``model.tokenizer`` names. Seconds, for a folder."""
    name = model.tokenizer or model.path or "bytes"
    return ByteTokenizer() if name == "bytes" else HfTokenizer(name, model.path or name)


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, for models without a tokenizer. No token ends an answer."""

    stop_token_ids: tuple[int, ...] = ()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        lines = [f"{message['role']}: {message['content']}\n" for message in messages]
        return self.encode("".join(lines) + "assistant:")

    def stream(self) -> TextStream:
        return ByteStream()

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""


class ByteStream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(bytes([min(token, 255)]))  # ids beyond 255 have no text: 255 gives U+FFFD

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class HfTokenizer:
    """``AutoTokenizer`` of a folder; never the network.

    Args:
        folder: tokenizer.json or what transformers converts to it, tokenizer_config.json, chat template.
        model_folder: its generation_config.json and config.json name further end tokens.

    Raises:
        ValueError: the folder has no tokenizer that the ``tokenizers`` library can run.
    """

    def __init__(self, folder: str, model_folder: str) -> None:
        if not Path(folder).is_dir():  # a name of a hub would be looked up in caches
            raise ValueError(f"model.tokenizer={folder} is not a folder: give a local tokenizer folder, or `bytes`")
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers raises OSError, ValueError, KeyError and others here
            raise ValueError(f"model.tokenizer={folder} cannot be loaded: {error}") from error
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"model.tokenizer={folder} has no fast tokenizer: add tokenizer.json, or use `bytes`")
        self._backend: Backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self.stop_token_ids = self._find_stop_tokens(Path(model_folder))
        self._added = frozenset(self._backend.get_added_tokens_decoder())
        self._bytes = _byte_level_alphabet() if "ByteLevel" in repr(self._backend.decoder) else {}

    def encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text).ids)

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        from jinja2 import TemplateError

        if not self._tokenizer.chat_template:
            raise ValueError("the model's tokenizer has no chat template: use /v1/completions")
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ValueError(f"the model's chat template refuses these messages: {error}") from None
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def stream(self) -> TextStream:
        return HfStream(self._backend)

    def token_bytes(self, token: int) -> bytes:
        piece = self._backend.id_to_token(token) or ""  # a padded vocabulary has ids without a token
        if token in self._added:
            return piece.encode()
        if self._bytes:
            return bytes(self._bytes[char] for char in piece)
        if _BYTE_FALLBACK.fullmatch(piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()  # SentencePiece's mark of a space

    def _find_stop_tokens(self, model_folder: Path) -> tuple[int, ...]:
        found: set[int] = set()
        if self._tokenizer.eos_token_id is not None:
            found.add(int(self._tokenizer.eos_token_id))
        for name in ("generation_config.json", "config.json"):
            if (model_folder / name).is_file():
                ids = json.loads((model_folder / name).read_text()).get("eos_token_id")
                found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
        template = str(self._tokenizer.chat_template or "")
        for end in _TURN_ENDS:
            token = self._backend.token_to_id(end)
            if token is not None and end in template:
                found.add(token)
        return tuple(sorted(found))


class HfStream:
    """``tokenizers``' DecodeStream, which has no end: what it still withholds is decoded here."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._start([])

    def _start(self, before: list[int]) -> None:
        from tokenizers.decoders import DecodeStream

        self._stream = DecodeStream(skip_special_tokens=True)
        self._before = before  # the tokens of the last piece: a token's leading space depends on what it follows
        self._held: list[int] = []

    def push(self, token: int) -> str:
        self._held.append(token)
        try:
            text = self._stream.step(self._backend, token)
        except Exception:  # "Invalid prefix": the bytes so far are not the beginning of any text
            return self._release()
        if text is None:
            return self._release() if len(self._held) >= _MAX_HELD else ""
        self._before, self._held = self._held, []
        return text

    def flush(self) -> str:
        return self._release()

    def _release(self) -> str:
        """All withheld text, invalid bytes as U+FFFD; decoding starts afresh after it."""
        if not self._held:
            return ""
        known = self._backend.decode(self._before, skip_special_tokens=True)
        text = self._backend.decode(self._before + self._held, skip_special_tokens=True)[len(known) :]
        self._start([])
        return text


def _byte_level_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (Radford et al. 2019, GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
