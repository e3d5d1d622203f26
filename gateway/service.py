"""Wires the parts of one gateway, runs it until it is told to stop, then drains it. `__main__`
gives it the real store, clock and socket."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import NamedTuple

import structlog
from aiohttp import web

from gateway.admission import Admission, AdmissionLimits
from gateway.api.authentication import Authenticator
from gateway.api.cross_origin import CrossOrigin
from gateway.api.grammar_reader import GrammarReader
from gateway.api.guided import GrammarLimits
from gateway.api.http_app import HttpApp
from gateway.api.http_listener import BACKLOG, client_listener, quiet_http_logger
from gateway.api.refusal_pace import RefusalPace
from gateway.api.request_admission import RequestAdmission
from gateway.api.request_log import RequestLog
from gateway.api.resumption import Resumption
from gateway.api.unread_bodies import UnreadBodies
from gateway.api_key_watch import ApiKeyWatch
from gateway.cache_salt import CacheSalts
from gateway.cluster_view import ClusterWatch
from gateway.config import GatewayConfig
from gateway.handover import hand_over
from gateway.health import Health
from gateway.metrics import GatewayMetrics
from gateway.model_loader import ModelLoader
from gateway.piece_pace import PiecePace
from gateway.preparation import GRAMMAR_RESTS, GRAMMARS_RUNNING_MAX, Preparation
from gateway.request_pacer import RequestPacer
from gateway.routing_policy import routing_policy
from gateway.served_model import ParserNames
from gateway.session_driver import SessionDriver
from gateway.session_state import SessionPolicy
from gateway.stream_names import StreamNames
from gateway.tokenizer_loader import TokenizerOptions
from gateway.vllm_metrics import VllmSources
from shared.clock import Clock
from shared.codec import pack
from shared.connection_table import ConnectionLimits
from shared.grammars.closed_schema import JSON_SPACE, NO_SPACE
from shared.grammars.messages import GrammarBudget
from shared.handshake import NAME_KEY_BYTES, Access, gateway_caller
from shared.http_listener import HttpListener
from shared.keys import Keys
from shared.leased_keys import LeasedKeys
from shared.records import GatewayRecord
from shared.release import own_release
from shared.request_body import READ_BYTES
from shared.server_certificate import ServerCertificate
from shared.store import Store
from shared.tracing import Tracer
from shared.version import starfish_version

log = structlog.get_logger()

CLOSE_TIMEOUT_S = 2.0


class Listeners(NamedTuple):
    """`shared` may be other gateways' too, `own` is of this one alone."""

    shared: socket.socket
    own: socket.socket | None = None

    def sockets(self) -> list[socket.socket]:
        return [self.shared] if self.own is None else [self.shared, self.own]


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayDependencies:
    """What a gateway gets from outside. `listeners` may take as long as it likes, and gives None if
    there will never be any. Set `stop` to make it drain and end."""

    store: Store
    clock: Clock
    listeners: Callable[[], Awaitable[Listeners | None]]
    stop: asyncio.Event
    access: Access
    api_keys: ApiKeyWatch
    tracer: Tracer | None = None


async def run_gateway(config: GatewayConfig, dependencies: GatewayDependencies) -> None:
    """Follows the instance from the beginning, and serves clients once it has its listeners. Raises
    CheckpointError if the tokenizer of the instance's model cannot be read, and what `listeners`
    raises."""
    name_key = secrets.token_bytes(NAME_KEY_BYTES)
    caller = gateway_caller(f"gateway-{socket.gethostname()}", name_key)
    name = caller.name
    keys = Keys(config.instance)
    metrics = GatewayMetrics()
    leased = LeasedKeys(dependencies.store, ttl_s=config.timings.lease_ttl_s)
    admission = Admission(
        AdmissionLimits(tokens_max=config.tokens_in_flight_max, sessions_max=config.sessions_max)
    )
    salts = CacheSalts(dependencies.access.secret, share=config.share_prefix_cache)
    preparation = Preparation()
    pacer = RequestPacer()
    async with asyncio.TaskGroup() as tasks:
        driver = SessionDriver(
            caller=caller,
            access=dependencies.access,
            clock=dependencies.clock,
            keys=keys,
            leased=leased,
            metrics=metrics,
            policy=SessionPolicy(no_rank_timeout_s=config.no_rank_timeout_s),
            routing=routing_policy(config.routing, random.Random()),
            tasks=tasks,
        )
        models = ModelLoader(
            folder=config.model,
            name=config.served_model_name,
            clock=dependencies.clock,
            tokenizer_options=TokenizerOptions(
                chat_template=config.chat_template,
                trust_special_tokens=config.trust_special_tokens,
            ),
            parsers=ParserNames(
                tool_calls=config.tool_call_parser, reasoning=config.reasoning_parser
            ),
        )
        health = Health(driver, models, dependencies.clock)
        grammars = GrammarReader(
            GrammarLimits(
                bytes_max=config.grammar_bytes_max, properties_max=config.grammar_properties_max
            ),
            GrammarBudget(
                compile_s=config.grammar_compile_s,
                step_s=0.0,  # it only compiles
                memory_mb=config.grammar_memory_mb,
            ),
            json_space=NO_SPACE if config.structured_outputs_disable_any_whitespace else JSON_SPACE,
        )
        app = HttpApp(
            driver=driver,
            admission=RequestAdmission(
                admission,
                preparation,
                Preparation(
                    GRAMMARS_RUNNING_MAX,
                    rests=GRAMMAR_RESTS,
                    rests_for=lambda key: driver.serves_others(key.name),
                ),
                salts,
                dependencies.clock,
            ),
            authenticator=Authenticator(
                lambda: dependencies.api_keys.keys,
                metrics,
                pacer,
                metrics_need_key=config.metrics_need_key,
            ),
            pace=PiecePace(pacer, lambda: driver.is_congested, driver.serves_others),
            refusals=RefusalPace(driver.serves_others),
            request_log=RequestLog(dependencies.clock, access_log=config.access_log),
            clock=dependencies.clock,
            metrics=metrics,
            health=health,
            models=models,
            grammars=grammars,
            resumption=Resumption(
                StreamNames(dependencies.access.secret),
                dependencies.clock,
                event_ids=config.event_ids,
            ),
            body_bytes_max=config.body_bytes_max,
            cross_origin=CrossOrigin(_origins(config.cors_origins)),
            logprobs_max=config.logprobs_max,
            tracer=dependencies.tracer,
        )
        http_listener = client_listener(
            ConnectionLimits(
                connections_max=config.connections_max,
                per_address_max=config.connections_per_address_max,
                header_timeout_s=config.header_timeout_s,
                idle_timeout_s=config.idle_timeout_s,
            ),
            clock=dependencies.clock,
            metrics=metrics,
        )
        watch = ClusterWatch(
            store=dependencies.store,
            keys=keys,
            listeners=(models.on_view, driver.on_view, admission.on_view),
        )
        _add_gauges(metrics, driver, admission, http_listener)
        metrics.vllm.sources = VllmSources(
            model_name=lambda: models.served.name if models.served else "",
            generated=lambda: driver.generated,
            ranks=driver.rank_gauges,
            unplaced=lambda: driver.num_waiting,
        )
        metrics.add_info(
            "What this gateway is",
            lambda: {
                "gateway": name,
                "starfish_instance": config.instance,
                "model_name": models.served.name if models.served else "",
                "version": starfish_version(),
            },
        )
        metrics.add_counter(
            "event_loop_cpu_seconds",
            "CPU time of the thread that serves requests: near one a second, this gateway limits",
            time.thread_time,  # metrics are rendered on that thread
            gateway=name,
        )
        metrics.add_gauge(
            "preparations_waiting",
            "Requests that wait to be tokenised",
            lambda: preparation.num_waiting,
        )
        background = [
            tasks.create_task(watch.run()),
            tasks.create_task(leased.run()),
            tasks.create_task(driver.run_probes()),
            tasks.create_task(models.run()),
            tasks.create_task(http_listener.run()),
            tasks.create_task(dependencies.api_keys.run()),
        ]
        runner = web.AppRunner(
            app.build(http_listener.track_request, UnreadBodies().take),
            handler_cancellation=True,  # a client that leaves ends its sessions
            access_log=None,
            logger=quiet_http_logger(),
            auto_decompress=False,  # `request_body` does it, within limits
            shutdown_timeout=CLOSE_TIMEOUT_S,
            lingering_time=0.0,  # `UnreadBodies` does it
            read_bufsize=READ_BYTES,
        )
        await runner.setup()
        certificate = _certificate(config)
        if certificate is not None:
            background.append(tasks.create_task(certificate.follow_files()))
        listeners = await _until_needed(dependencies)
        if listeners is not None:
            tls = certificate.context if certificate else None
            await http_listener.start(runner, listeners.sockets(), tls, backlog=BACKLOG)
            leased.put(keys.gateway(name), pack(_record(name, listeners, config)))
            host, port = listeners.shared.getsockname()[:2]
            log.info("gateway_listening", host=host, port=port, instance=config.instance)
            await dependencies.stop.wait()
            shares = hand_over(config, listeners.shared)
            await _drain(config, http_listener, health, driver, shares=shares)
        await runner.cleanup()
        await leased.release()
        driver.close()
        grammars.close()
        for task in background:
            task.cancel()


async def _until_needed(dependencies: GatewayDependencies) -> Listeners | None:
    """None if it is told to end before."""
    async with asyncio.TaskGroup() as tasks:
        needed = tasks.create_task(_listeners_of(dependencies))
        stopped = tasks.create_task(dependencies.stop.wait())
        await asyncio.wait({needed, stopped}, return_when=asyncio.FIRST_COMPLETED)
        found = needed.result() if needed.done() else None
        for task in (needed, stopped):
            task.cancel()
    return found


async def _listeners_of(dependencies: GatewayDependencies) -> Listeners | None:
    return await dependencies.listeners()


async def _drain(
    config: GatewayConfig,
    http_listener: HttpListener,
    health: Health,
    driver: SessionDriver,
    *,
    shares: bool,
) -> None:
    """If it `shares` its port with a gateway that goes on, it accepts no more, and still answers
    one request of each connection that it has, which is then closed. Else new requests get 503."""
    health.draining, health.refuses = True, not shares
    if shares:
        http_listener.stop_sharing()
    log.info(
        "gateway_draining", sessions=driver.num_sessions, drain_s=config.drain_s, accepts=not shares
    )
    try:
        async with asyncio.timeout(config.drain_s):
            if shares:
                await http_listener.wait_until_answered()
            await driver.wait_until_idle()
    except TimeoutError:
        log.warning("drain_incomplete", sessions=driver.num_sessions)
        driver.shut_down()
    http_listener.stop()


def _certificate(config: GatewayConfig) -> ServerCertificate | None:
    """Raises ConfigError."""
    if config.tls_cert is None or config.tls_key is None:
        return None
    return ServerCertificate(config.tls_cert, config.tls_key)


def _origins(text: str) -> list[str]:
    return [part.strip().rstrip("/") for part in text.split(",") if part.strip()]


def _kv_usage(driver: SessionDriver) -> float:
    loads = driver.loads()
    num_blocks = sum(load.kv_blocks for load in loads)
    num_free = sum(load.kv_blocks_free for load in loads)
    return 1.0 - num_free / num_blocks if num_blocks else 0.0


def _record(name: str, listeners: Listeners, config: GatewayConfig) -> GatewayRecord:
    host, port = listeners.shared.getsockname()[:2]
    own = listeners.own
    return GatewayRecord(
        gateway=name,
        pid=os.getpid(),
        host=str(host),
        port=int(port),
        scheme="https" if config.tls_cert is not None else "http",
        own_port=0 if own is None else int(own.getsockname()[1]),
        release=own_release(),
    )


def _add_gauges(
    metrics: GatewayMetrics,
    driver: SessionDriver,
    admission: Admission,
    http_listener: HttpListener,
) -> None:
    metrics.add_gauge(
        "connections", "Open connections of clients", lambda: http_listener.num_connections
    )
    metrics.add_gauge("live_ranks", "Ranks that take sessions", lambda: len(driver.live_ranks()))
    metrics.add_gauge(
        "kv_replicas_rejected",
        "KV replicas that the live ranks did not believe: somebody writes to their memory",
        lambda: driver.kv_replicas_rejected,
    )
    metrics.add_gauge(
        "stragglers",
        "Ranks for which the others wait in two fifths of each step or more",
        lambda: len(driver.stragglers()),
    )
    metrics.add_gauge("epoch", "Epoch of the newest map", lambda: driver.view.epoch)
    metrics.add_gauge("sessions_in_flight", "Sessions not ended", lambda: driver.num_sessions)
    metrics.add_gauge(
        "sessions_waiting", "Sessions that wait for a rank", lambda: driver.num_waiting
    )
    metrics.add_gauge(
        "rank_requests_running",
        "Requests in the ranks' batches, of all gateways",
        lambda: sum(load.running for load in driver.loads()),
    )
    metrics.add_gauge(
        "rank_requests_waiting",
        "Requests in the ranks' queues, of all gateways",
        lambda: sum(load.waiting for load in driver.loads()),
    )
    metrics.add_gauge(
        "kv_cache_usage", "Share of the ranks' KV blocks in use, 0 to 1", lambda: _kv_usage(driver)
    )
    metrics.add_counter(
        "generated_tokens",
        "Tokens that ranks have generated",
        lambda: sum(driver.generated.values()),
    )
    metrics.add_gauge(
        "tokens_in_flight", "prompt + max_tokens of admitted requests", lambda: admission.tokens
    )
