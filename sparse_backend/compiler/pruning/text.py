"""Calibration text: what the user gives, checked and cut into sequences of tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError, OptionError

SEQUENCE = 256
DEFAULT_TOKENS = 128 * SEQUENCE
MIN_TOKENS = 2048
TRANSFORMERS = (
    "calibrating on text needs transformers, which this environment lacks; compile in an engine's environment, or "
    "install the extra 'prune'"
)
# Characters read per token asked for: more than any tokenizer's average on any text.
_CHARACTERS_PER_TOKEN = 16


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Text to calibrate on.

    Attributes:
        path: a plain text file, UTF-8, of the kind the model will be used for.
        tokens: how many to use at most, in sequences of 256; the default is 128 sequences.
    """

    path: Path
    tokens: int = DEFAULT_TOKENS

    def __post_init__(self) -> None:
        if self.tokens < MIN_TOKENS:
            raise OptionError(
                f"calibration on {self.tokens} tokens is too little to say what a layer's inputs look like; "
                f"allowed: {MIN_TOKENS} and more"
            )

    def read(self) -> str:
        """The beginning of the text, at least as many tokens as asked for if it has them.

        Raises:
            OptionError: there is no such file, or it is not text.
        """
        try:
            with self.path.open(encoding="utf-8") as f:
                text = f.read(self.tokens * _CHARACTERS_PER_TOKEN)
        except OSError as error:
            raise OptionError(f"calibration text {self.path} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise self._not_text() from None
        if "\0" in text:
            raise self._not_text()
        return text

    def _not_text(self) -> OptionError:
        return OptionError(f"calibration text {self.path} is not text in UTF-8; pass a plain text file")

    def sequences(self, model: Path, length: int = SEQUENCE) -> torch.Tensor:
        """Token ids of the text, int64 [count, length], spread evenly over it; what is left over is dropped.

        Args:
            model: checkpoint folder with the tokenizer's files.
            length: tokens per sequence.

        Raises:
            OptionError: the text has fewer than 2048 tokens, or transformers is missing.
            CheckpointError: the checkpoint has no tokenizer that transformers can load.
        """
        text = self.read()
        ids = torch.tensor(_tokenizer(model)(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
        if ids.numel() < MIN_TOKENS:
            raise OptionError(
                f"calibration text {self.path} has {ids.numel()} tokens; at least {MIN_TOKENS} are needed, "
                f"{DEFAULT_TOKENS} are good"
            )
        there = ids[: ids.numel() // length * length].view(-1, length)
        count = min(len(there), self.tokens // length)
        return there[torch.linspace(0, len(there) - 1, count).long()]


def _tokenizer(model: Path) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise OptionError(TRANSFORMERS) from None
    try:
        return AutoTokenizer.from_pretrained(str(model))
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{model}: calibrating needs its tokenizer, which transformers cannot load ({first}); put the "
            "tokenizer's files beside the weights"
        ) from None
