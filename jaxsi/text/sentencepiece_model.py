"""SentencePiece models: read without a protocol-buffer library, run by tensorflow_text.

tensorflow_text tells ids but not which pieces are control symbols, so the few fields needed are read here.
"""

from collections.abc import Iterator
from typing import Any

from jaxsi.text import tensorflow_text


def _wire_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protocol-buffer message; ValueError where it is none."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            if position >= len(data) or shift > 63:
                raise ValueError(f"broken at byte {position} of {len(data)}")
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(data):
        offset, tag = position, varint()
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            yield number, varint()
            continue
        length = {1: 8, 2: -1, 5: 4}.get(kind)
        if number == 0 or length is None:
            raise ValueError(f"broken at byte {offset} of {len(data)}")
        length = varint() if length < 0 else length
        if position + length > len(data):
            raise ValueError(f"cut off: {position + length - len(data)} bytes are missing at the end")
        position += length
        yield number, data[position - length : position]


def _wire_message(number: int, body: bytes) -> bytes:
    length, varint = len(body), b""
    while length > 127:
        varint, length = varint + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 | 2]) + varint + bytes([length]) + body


# sentencepiece_model.proto: ModelProto{pieces=1, trainer_spec=2, normalizer_spec=3}, SentencePiece{piece=1, type=3},
# TrainerSpec{model_type=3, unk_id=40, bos_id=41, eos_id=42, pad_id=43}, NormalizerSpec{add_dummy_prefix=3}.
# Of a field written twice the last counts, so a change is an addition at the end.
MODEL_TYPE, BPE = 3, 2
CONTROL, USER_DEFINED = 3, 4
_NO_DUMMY_PREFIX, _TYPE_UNUSED = b"\x18\x00", b"\x18\x05"
ROLE_FIELDS = {"unk_token": (40, 0), "bos_token": (41, 1), "eos_token": (42, 2), "pad_token": (43, -1)}


class SentencePieceModel:
    """A serialised SentencePiece model: `pieces`, their `types`, the numbers of its `trainer` spec by field.

    Raises ValueError for bytes that are no such model.
    """

    def __init__(self, model: bytes):
        self._model = model
        self._processors: dict[tuple[bool, frozenset[int]], Any] = {}
        self.pieces: list[str] = []
        self.types: list[int] = []
        self.trainer: dict[int, int] = {}
        for number, value in _wire_fields(model):
            if number == 1 and isinstance(value, bytes):
                piece = dict(_wire_fields(value))
                text, kind = piece.get(1, b""), piece.get(3, 1)
                if not isinstance(text, bytes) or not isinstance(kind, int):
                    raise ValueError(f"piece {len(self.pieces)} is broken")
                self.pieces.append(text.decode("utf-8"))
                self.types.append(kind)
            elif number == 2 and isinstance(value, bytes):
                self.trainer = {field: v for field, v in _wire_fields(value) if isinstance(v, int)}
        if not self.pieces:
            raise ValueError("it holds no pieces")

    def processor(self, prefix: bool, unread: frozenset[int]) -> Any:
        """The tensorflow_text.SentencepieceTokenizer; `prefix`: the text may get the space the model puts before one;
        `unread`: pieces that no text is read as."""
        if (prefix, unread) not in self._processors:
            model = self._model if prefix and not unread else self._variant(prefix, unread)
            self._processors[prefix, unread] = tensorflow_text.load()[1].SentencepieceTokenizer(model=model)
        return self._processors[prefix, unread]

    def _variant(self, prefix: bool, unread: frozenset[int]) -> bytes:
        model, piece, normalizer = [], -1, False
        for number, value in _wire_fields(self._model):
            if not isinstance(value, bytes):
                continue
            piece += number == 1
            normalizer |= number == 3
            if number == 1 and piece in unread and self.types[piece] == USER_DEFINED:
                value += _TYPE_UNUSED
            if number == 3 and not prefix:
                value += _NO_DUMMY_PREFIX
            model.append(_wire_message(number, value))
        if not prefix and not normalizer:
            model.append(_wire_message(3, _NO_DUMMY_PREFIX))
        return b"".join(model)
