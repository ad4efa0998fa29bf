"""SentencePiece models: read through the protocol buffer that `transformers` uses, run by tensorflow_text.

tensorflow_text encodes and decodes, but does not tell which pieces are control symbols. Those are read here.
"""

from typing import Any

from jaxsi.text import tensorflow_text


def _parsed(model: bytes) -> Any:
    """The ModelProto of a serialised model. Raises: ValueError if it cannot be parsed."""
    from google.protobuf.message import DecodeError

    # transformers chooses between its own copy of the protocol and that of sentencepiece, if installed: a process that
    # loads both fails. Imported here because it takes a second.
    from transformers.convert_slow_tokenizer import import_protobuf

    protocol: Any = import_protobuf()
    try:
        return protocol.ModelProto.FromString(model)
    except DecodeError as error:
        raise ValueError("broken, or cut off at the end") from error


class SentencePieceModel:
    """A serialised SentencePiece model.

    Attributes:
      pieces: all pieces, by id; `control` and `user_defined` are those of these kinds.
      names: the pieces of "unk_token", "bos_token", "eos_token" and "pad_token", as far as the model has them.
      is_bpe: whether the model is a byte-pair encoding.

    Raises:
      ValueError: if the bytes are not such a model.
    """

    def __init__(self, model: bytes):
        self._model = model
        self._processors: dict[tuple[bool, frozenset[int]], Any] = {}
        parsed = _parsed(model)
        if not parsed.pieces:
            raise ValueError("it holds no pieces")
        kinds, trainer = type(parsed).SentencePiece, parsed.trainer_spec
        self.pieces: list[str] = [piece.piece for piece in parsed.pieces]
        self.control: list[str] = [piece.piece for piece in parsed.pieces if piece.type == kinds.CONTROL]
        self.user_defined: list[str] = [piece.piece for piece in parsed.pieces if piece.type == kinds.USER_DEFINED]
        ids = {name: getattr(trainer, f"{name}_id") for name in ("unk", "bos", "eos", "pad")}  # -1: not in the model
        self.names = {f"{name}_token": self.pieces[n] for name, n in ids.items() if 0 <= n < len(self.pieces)}
        self.is_bpe: bool = trainer.model_type == type(trainer).BPE

    def processor(self, prefix: bool, unread: frozenset[int]) -> Any:
        """The tensorflow_text.SentencepieceTokenizer.

        Args:
          prefix: whether the text gets the space that the model puts before a text.
          unread: ids of pieces that no text is read as.
        """
        if (prefix, unread) not in self._processors:
            model = self._model if prefix and not unread else self._variant(prefix, unread)
            self._processors[prefix, unread] = tensorflow_text.load()[1].SentencepieceTokenizer(model=model)
        return self._processors[prefix, unread]

    def _variant(self, prefix: bool, unread: frozenset[int]) -> bytes:
        variant = _parsed(self._model)
        kinds = type(variant).SentencePiece
        for number in unread:
            if variant.pieces[number].type == kinds.USER_DEFINED:
                variant.pieces[number].type = kinds.UNUSED
        if not prefix:
            variant.normalizer_spec.add_dummy_prefix = False
        return variant.SerializeToString()
