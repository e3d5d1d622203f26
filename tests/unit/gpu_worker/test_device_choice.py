"""What a device must be able to do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gpu_worker.device_choice import require_drafts
from shared.errors import ConfigError
from tests.support.gateway_harness import toy_spec


def test_a_card_refuses_an_instance_that_drafts() -> None:
    plain = toy_spec(Path("/m"))
    drafting = replace(plain, speculative_tokens=1)
    require_drafts(plain, on_card=True)
    require_drafts(drafting, on_card=False)
    with pytest.raises(ConfigError, match=r"--speculative-tokens.*--device cpu"):
        require_drafts(drafting, on_card=True)
