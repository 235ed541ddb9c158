# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""What a prediction may be conditioned on, apart from the image: columns of a table, texts, a second modality."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
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
        text_encoder: of texts, a name or path that ``transformers`` knows.
        text_width: of its embeddings.
        image_channels: of the second modality.
    """

    columns: tuple[Column, ...]
    text_encoder: str = ""
    text_width: int = 0
    image_channels: int = 1

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
        return cls(columns, content["text_encoder"], content["text_width"], content["image_channels"])
