"""The header endpoint-load-metrics: how busy the engine is, told to balancers that ask (ORCA, xDS v3)."""

from __future__ import annotations

import json

from aiohttp import web

from .context import CONTEXT

REQUEST_HEADER = "endpoint-load-metrics-format"
RESPONSE_HEADER = "endpoint-load-metrics"


async def add_load_report(request: web.Request, response: web.StreamResponse) -> None:
    """Put the header on the answer to a POST that asks for it, as TEXT or JSON; other formats are left unanswered."""
    wanted = request.headers.get(REQUEST_HEADER, "").upper()
    engine = request.app[CONTEXT].engine
    if request.method != "POST" or wanted not in ("TEXT", "JSON") or not engine.is_ready:
        return
    stats = await engine.stats()
    metrics = {
        "kv_cache_usage_perc": float(stats.get("kv_cache_usage", 0.0)),
        "num_requests_waiting": float(stats.get("num_waiting", 0)),
    }
    if wanted == "JSON":
        report = json.dumps({"named_metrics": metrics})
    else:
        report = ", ".join(f"named_metrics.{name}={value}" for name, value in metrics.items())
    response.headers[RESPONSE_HEADER] = f"{wanted} {report}"
