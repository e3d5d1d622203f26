"""Trains the small mixture-of-experts model or its dense baseline, then teaches it to chat.

    python train.py --data DATA --out OUT             # the model: base, then chat
    python train.py --data DATA --out OUT --dense --dropout 0 --chat-steps 0   # the baseline

`DATA` is what prepare.py wrote. Out come the weights (bf16 safetensors) and `log.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from export import read_weights, write_weights
from model import Model, ModelConfig, Routing, balance_loss
from torch import Tensor

END_ID = 2  # <|im_end|>
BALANCE_WEIGHT = 0.01
TEXT_SHARE = 0.5  # of the fine-tuning loss
Forward = Callable[[Tensor], tuple[Tensor, list[Routing]]]
LossOfStep = Callable[[], tuple[Tensor, Tensor]]


class Corpus:
    """The tokens on the device, and random windows of them: a source by weight, a place in it."""

    def __init__(self, folder: Path, device: str, seed: int) -> None:
        self.meta = json.loads((folder / "meta.json").read_text())
        self.train = self.load(folder / "train.bin", device)
        self.held_out = self.load(folder / "held_out.bin", device)
        self.chat = self.load(folder / "chat.bin", device).view(
            -1, self.meta["chat"][0]["row_tokens"]
        )
        self.random = np.random.default_rng(seed)
        self.device = device

    @staticmethod
    def load(path: Path, device: str) -> Tensor:
        return torch.from_numpy(np.fromfile(path, dtype=np.uint16).astype(np.int32)).to(device)

    def windows(self, num_rows: int, length: int) -> Tensor:
        sources = self.meta["train"]
        share = np.array([s["weight"] * (s["end"] - s["start"]) for s in sources])
        chosen = self.random.choice(len(sources), size=num_rows, p=share / share.sum())
        starts = [
            self.random.integers(sources[i]["start"], sources[i]["end"] - length) for i in chosen
        ]
        at = torch.tensor(starts).pin_memory() if self.device == "cuda" else torch.tensor(starts)
        rows = at.to(self.device, non_blocking=True)[:, None] + torch.arange(
            length, device=self.device
        )
        return self.train[rows].long()

    def conversations(self, num_rows: int) -> Tensor:
        rows = torch.from_numpy(self.random.integers(0, len(self.chat), num_rows)).to(self.device)
        return self.chat[rows].long()


def answer_mask(ids_BT: Tensor, mark: list[int]) -> Tensor:
    """True where a token belongs to an answer, its end mark included."""
    opened = torch.ones_like(ids_BT, dtype=torch.bool)
    for offset, token in enumerate(reversed(mark)):
        opened &= ids_BT.roll(offset, dims=1) == token
    starts = opened.roll(1, dims=1).long()
    starts[:, 0] = 0
    ends = (ids_BT == END_ID).roll(1, dims=1).long()
    ends[:, 0] = 0
    # Inside an answer: the last mark seen was an opening one.
    position = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
    last_start = torch.where(starts.bool(), position, -1).cummax(dim=1).values
    last_end = torch.where(ends.bool(), position, -1).cummax(dim=1).values
    return (last_start > last_end) & (last_start >= 0)


def loss_of(model: Forward, ids: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(loss of the next token, in the mean or by the weights of each; load-balancing loss)"""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        logits, routings = model(ids[:, :-1])
    labels = ids[:, 1:].flatten()
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels, reduction="none")
    balance = balance_loss(routings) if routings else losses.new_ones(())
    return (losses.mean() if weights is None else (losses * weights.flatten()).sum()), balance


@torch.no_grad()
def evaluate(model: Model, corpus: Corpus, length: int, num_rows: int = 16) -> dict[str, object]:
    """Held-out bits per byte, in all and by source; the share of tokens of every expert."""
    model.eval()
    tokens = corpus.held_out.long()
    padded = F.pad(tokens, (0, -(len(tokens) - 1) % length))
    inputs, targets = padded[:-1].view(-1, length), padded[1:].view(-1, length)
    nats, usage = [], []
    for ids, labels in zip(inputs.split(num_rows), targets.split(num_rows), strict=True):
        with torch.autocast(ids.device.type, dtype=torch.bfloat16):
            logits, routings = model(ids)
        nats.append(
            F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
        )
        if routings:
            num_experts = model.config.num_experts
            usage.append(
                torch.stack([r.ids_NK.flatten().bincount(minlength=num_experts) for r in routings])
            )
    model.train()
    bits = torch.cat(nats)[: len(tokens) - 1].double().cpu() / math.log(2)
    sources = corpus.meta["held_out"]
    # Token t is predicted at place t - 1; the very first has no context and is not counted.
    by_source = {
        s["name"]: bits[max(s["start"] - 1, 0) : s["end"] - 1].sum().item() / s["num_bytes"]
        for s in sources
    }
    counts = torch.stack(usage).sum(dim=0).double() if usage else torch.zeros(0, 1)
    return {
        "bits_per_byte": bits.sum().item() / sum(s["num_bytes"] for s in sources),
        "by_source": by_source,
        "expert_shares": (counts / counts.sum(dim=1, keepdim=True)).tolist(),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A linear warm-up, then a straight line to zero."""

    steps: int
    warmup: int
    peak: float

    def at(self, step: int) -> float:
        return self.peak * min(
            (step + 1) / self.warmup, (self.steps - step) / max(1, self.steps - self.warmup)
        )


def optimiser(model: Model, weight_decay: float) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


class Run:
    """One training run: what its stages share."""

    def __init__(self, args: argparse.Namespace, model: Model, corpus: Corpus) -> None:
        self.args = args
        self.model = model
        self.corpus = corpus
        self.forward: Forward = torch.compile(model, dynamic=False) if args.compile else model
        self.log: list[dict[str, object]] = []

    def base_loss(self) -> tuple[Tensor, Tensor]:
        return loss_of(self.forward, self.corpus.windows(self.args.rows, self.args.length + 1))

    def chat_loss(self) -> tuple[Tensor, Tensor]:
        """Conversations, of which only the answers count, beside plain text against forgetting."""
        num_chat = self.args.rows * 5 // 8
        chat = F.pad(self.corpus.conversations(num_chat), (0, 1))[:, : self.args.length + 1]
        text = self.corpus.windows(self.args.rows - num_chat, chat.shape[1])
        answers = answer_mask(chat, self.corpus.meta["chat"][0]["answer_mark"])[:, 1:].float()
        plain = torch.ones_like(text[:, 1:], dtype=torch.float32)
        weights = [
            (1 - TEXT_SHARE) * answers / answers.sum().clamp(min=1),
            TEXT_SHARE * plain / plain.numel(),
        ]
        return loss_of(self.forward, torch.cat([chat, text]), torch.cat(weights))

    def stage(self, name: str, schedule: Schedule, loss_of_step: LossOfStep) -> None:
        adam = optimiser(self.model, self.args.weight_decay)
        began = time.monotonic()
        for step in range(schedule.steps):
            for group in adam.param_groups:
                group["lr"] = schedule.at(step)
            loss, balance = loss_of_step()
            (loss + BALANCE_WEIGHT * balance).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            adam.step()
            adam.zero_grad(set_to_none=True)
            last = step + 1 == schedule.steps
            if step % self.args.log_every == 0 or last:
                row = {"stage": name, "step": step, "seconds": time.monotonic() - began}
                self.report(row, loss, balance, in_full=step % self.args.eval_every == 0 or last)
            if (step and step % self.args.save_every == 0) or last:
                write_weights(self.model, self.args.out, prefix=name)

    def report(
        self, row: dict[str, object], loss: Tensor, balance: Tensor, *, in_full: bool
    ) -> None:
        row |= {"train_loss": loss.item(), "balance": balance.item()}
        if in_full:
            row |= evaluate(self.model, self.corpus, self.args.length)
        self.log.append(row)
        print(
            json.dumps({k: v for k, v in row.items() if not isinstance(v, dict | list)}), flush=True
        )
        (self.args.out / "log.json").write_text(json.dumps(self.log))


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    config = ModelConfig(dropout=args.dropout, **json.loads(args.config))
    if args.dense:  # one "expert" as wide as all that a token of the sparse model uses
        width = config.moe_intermediate_size * config.num_experts_per_tok
        one = {"num_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": width}
        config = dataclasses.replace(config, **one)
    model = Model(config).to(args.device)
    run = Run(args, model, Corpus(args.data, args.device, args.seed))
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    run.log.append(
        {
            "config": dataclasses.asdict(config),
            "parameters": sum(p.numel() for p in model.parameters()),
            "active": model.num_active_parameters(),
            "batch_tokens": args.rows * args.length,
            "settings": settings,
        }
    )
    if args.base:
        read_weights(model, args.base, prefix="base")
    else:
        run.stage("base", Schedule(steps=args.steps, warmup=200, peak=args.lr), run.base_loss)
    if args.chat_steps:
        run.stage(
            "chat", Schedule(steps=args.chat_steps, warmup=50, peak=args.chat_lr), run.chat_loss
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--config", default="{}", help="JSON over the fields of ModelConfig")
    parser.add_argument("--base", type=Path, help="weights of an earlier run: only the chat stage")
    parser.add_argument("--dense", action="store_true")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available()
    )
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--chat-steps", type=int, default=700)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--chat-lr", type=float, default=6e-4)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--eval-every", type=int, default=400)
    parser.add_argument("--save-every", type=int, default=2000)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
