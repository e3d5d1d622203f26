"""What a rank needs of its card's memory, by the form of the model's weights, and the refusal of
what does not fit. Pure; knows no device."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from gpu_worker.checkpoint.checkpoint import Checkpoint
from gpu_worker.cuda.experts.expert_form import ExpertForm
from shared.errors import ConfigError

_GB = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class CardMemory:
    """The large parts; buffers of steps and graphs come on top of them. A slot has a place in each
    of `num_layers` MoE layers. `shared_bytes` are those of all other weights."""

    form: ExpertForm
    num_layers: int
    num_experts: int
    slots_per_rank: int
    shared_bytes: int
    kv_bytes_per_token: int
    kv_tokens: int

    @property
    def slot_bytes(self) -> int:
        """Of one slot in every layer."""
        return self.num_layers * self.form.num_bytes

    @property
    def kv_bytes(self) -> int:
        return self.kv_tokens * self.kv_bytes_per_token

    @property
    def total_bytes(self) -> int:
        return self.slots_per_rank * self.slot_bytes + self.shared_bytes + self.kv_bytes

    def log_fields(self) -> dict[str, float | str]:
        return {
            "experts": self.form.name,
            "expert_mb": round(self.form.num_bytes / 1e6, 3),
            "experts_gb": round(self.slots_per_rank * self.slot_bytes / _GB, 2),
            "shared_gb": round(self.shared_bytes / _GB, 2),
            "kv_gb": round(self.kv_bytes / _GB, 2),
        }

    def check(self, free_bytes: int) -> None:
        """Raises ConfigError if it does not fit, and says what would."""
        if self.total_bytes <= free_bytes:
            return
        raise ConfigError(
            f"this card has {free_bytes / _GB:.1f} GB free, and the rank needs "
            f"{self.total_bytes / _GB:.1f} GB and more: {self.slots_per_rank} slots of experts in "
            f"{self.form.name} {self.slots_per_rank * self.slot_bytes / _GB:.1f} GB, other weights "
            f"{self.shared_bytes / _GB:.1f} GB, KV cache of {self.kv_tokens} tokens "
            f"{self.kv_bytes / _GB:.1f} GB; {self._what_fits(free_bytes)}"
        )

    def _what_fits(self, free_bytes: int) -> str:
        left_bytes = free_bytes - self.shared_bytes
        for_slots = left_bytes - self.kv_bytes
        slots = for_slots // self.slot_bytes if self.slot_bytes else 0
        tokens = (left_bytes - self.slots_per_rank * self.slot_bytes) // self.kv_bytes_per_token
        ways = []
        if slots > 0:
            ranks = -(-self.num_experts // slots)
            ways.append(
                f"{slots} slots fit (--slots-per-rank {slots}; {self.num_experts} experts then "
                f"need {ranks} rank{'s' if ranks > 1 else ''} or more)"
            )
        if tokens > 0:
            ways.append(f"{tokens} tokens of KV cache fit (--kv-tokens {tokens})")
        return ", or ".join(ways) or "use a larger card, or more of them with fewer slots each"


def shared_weight_bytes(
    checkpoint: Checkpoint, names: list[str], expert_prefixes: Set[str], value_bytes: int
) -> int:
    """What the tensors `names` take on a card at least, without those of experts: a byte a value if
    they are FP8 in the checkpoint, and else `value_bytes`."""
    total = 0
    for name in names:
        if not expert_prefixes.isdisjoint((name.rsplit(".", 1)[0], name.rsplit(".", 2)[0])):
            continue
        values = 1
        for size in checkpoint.shape(name):
            values *= size
        total += values * (1 if checkpoint.stored_dtype(name) == "F8_E4M3" else value_bytes)
    return total
