# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""What a prediction may be conditioned on, apart from the image: columns of a table, texts, a second modality."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

KINDS = ("number", "category", "text", "image")


@dataclass(frozen=True)
class Column:
    """One condition.

    Attributes:
        name: the table's column; for an image, the folder beside ``images``.
        kind: "number", "category", "text" or "image".
        mean: of a number in the training cases.
        std: of a number in the training cases, above 0.
        values: of a category in the training cases, sorted. Index 0 is kept for missing and never seen; the first
            value has index 1.
    """

    name: str
    kind: str
    mean: float = 0.0
    std: float = 1.0
    values: tuple[str, ...] = ()


@dataclass(frozen=True)
class Schema:
    """All conditions of a network, with what was learned of the training cases.

    Attributes:
        columns: at least one; at most one of them is an image.
        text_encoder: of texts, a name or path that ``transformers`` knows. It is not compared: it says where the
            encoder is, and another machine may have it elsewhere.
        text_width: of its embeddings.
        image_channels: of the second modality, 1 to 3.
        text_sha256: over the encoder's weights, see :func:`medmoe.experts.weights.checksum`; empty without texts.
    """

    columns: tuple[Column, ...]
    text_encoder: str = field(default="", compare=False)
    text_width: int = 0
    image_channels: int = 1
    text_sha256: str = ""

    def of_kind(self, kind: str) -> tuple[Column, ...]:
        """The columns of one kind, in order."""
        return tuple(column for column in self.columns if column.kind == kind)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a file or a checkpoint's metadata."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Schema:
        """The inverse of :meth:`to_json`."""
        columns = tuple(Column(**{**column, "values": tuple(column["values"])}) for column in content["columns"])
        return cls(**{**content, "columns": columns})
