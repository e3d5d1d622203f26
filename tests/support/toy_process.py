"""Stands in for a rank's process: registers with the lease that it was given, then waits. `--toy`
says whether it obeys its agent's signal to end, ignores it, exits at once with a code or with a
complaint, or has a child of its own."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

from shared.etcd_options import EtcdOptions
from shared.etcd_store import EtcdStore
from shared.exit_codes import END_AT_ONCE
from shared.keys import Keys
from shared.records import RankRecord, pack_record
from shared.types import Incarnation, NodeId, RankId, RankState


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("rank", "incarnation", "lease-id", "lifeline-fd"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("etcd-ca", "etcd-cert", "etcd-key"):
        parser.add_argument(f"--{name}", type=Path)
    for name in ("node", "etcd", "instance", "toy"):
        parser.add_argument(f"--{name}")
    flags, _ = parser.parse_known_args()
    if flags.toy == "ignore-the-end":
        signal.signal(END_AT_ONCE, signal.SIG_IGN)
    if flags.toy.startswith("exit-"):
        sys.exit(int(flags.toy.removeprefix("exit-")))
    if flags.toy == "complain":
        sys.exit("starfish rank: model.safetensors is truncated")
    if flags.toy == "parent":
        subprocess.Popen(["sleep", "0.5"])
    asyncio.run(register(flags))
    while True:
        signal.pause()


async def register(flags: argparse.Namespace) -> None:
    record = RankRecord(
        rank=RankId(flags.rank),
        incarnation=Incarnation(flags.incarnation),
        node=NodeId(flags.node),
        pid=os.getpid(),
        lease_id=flags.lease_id,
        state=RankState.READY,
        control_host="127.0.0.1",
        control_port=1,
        transfer_name="",
        slots=1,
        kv_blocks=1,
        kv_block_tokens=1,
        exchange="local",
    )
    store = EtcdStore(
        EtcdOptions(
            etcd=flags.etcd,
            etcd_ca=flags.etcd_ca,
            etcd_cert=flags.etcd_cert,
            etcd_key=flags.etcd_key,
        )
    )
    key = Keys(flags.instance).rank(record.rank, record.incarnation)
    await store.put(key, pack_record(record), lease_id=record.lease_id)
    await store.close()


if __name__ == "__main__":
    main()
