"""Which ranks an instance can have beside those that it has."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpu_worker.config import KvCacheDtype
from gpu_worker.identity import require_kv_cache_dtype
from shared.errors import ConfigError
from tests.support.control_port import PEER, record_of

AUTO, FP8 = KvCacheDtype.AUTO, KvCacheDtype.FP8


def test_all_ranks_keep_their_kv_caches_alike() -> None:
    auto = record_of(PEER, 1)
    fp8 = replace(auto, kv_cache_dtype="fp8")
    require_kv_cache_dtype([], FP8, on_card=True)
    require_kv_cache_dtype([fp8, fp8], FP8, on_card=True)
    require_kv_cache_dtype([auto], AUTO, on_card=False)
    with pytest.raises(ConfigError, match=r"--kv-cache-dtype auto.*would with fp8"):
        require_kv_cache_dtype([fp8, auto], FP8, on_card=True)
    with pytest.raises(ConfigError, match=r"--kv-cache-dtype fp8.*would with auto"):
        require_kv_cache_dtype([auto, fp8], AUTO, on_card=True)


def test_ranks_on_cpus_have_no_narrow_cache() -> None:
    with pytest.raises(ConfigError, match="for cards"):
        require_kv_cache_dtype([], FP8, on_card=False)
