# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""LoRA (Hu et al., ICLR 2022; arXiv 2106.09685) in the adapter slot of an expert, through the peft library."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from medmoe.errors import ConfigError


class LoRA:
    """Injects trainable low-rank updates into linear layers of a frozen expert.

    Args:
        rank: r of the update B A; 0 leaves the expert as it is.
        alpha: the update is scaled by alpha / r. Defaults to 2 r.
        targets: names of the linear layers; by default the expert's own choice, the attention's "qkv".

    Raises:
        ConfigError: for a negative rank or when no layer bears a target's name.
    """

    def __init__(self, rank: int = 8, alpha: int | None = None, targets: Sequence[str] | None = None) -> None:
        if rank < 0:
            raise ConfigError(f"lora_rank={rank}: the rank is a positive number, or 0 for no LoRA")
        self.rank, self.alpha, self.targets = rank, alpha, targets

    def attach(self, expert: nn.Module) -> bool:
        """Injects the updates into ``expert``; says whether anything now trains."""
        if self.rank == 0:
            return False
        from peft import LoraConfig, inject_adapter_in_model

        own: Sequence[str] = getattr(expert, "adapter_targets", ("qkv",))
        targets = list(self.targets or own)
        linear = {name.rpartition(".")[2] for name, part in expert.named_modules() if isinstance(part, nn.Linear)}
        missing = [target for target in targets if target.rpartition(".")[2] not in linear]
        if missing:
            raise ConfigError(f"LoRA targets {missing} are not in the expert: it has {sorted(linear)}")
        alpha = 2 * self.rank if self.alpha is None else self.alpha
        config = LoraConfig(r=self.rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, bias="none")
        inject_adapter_in_model(config, expert)
        return True
