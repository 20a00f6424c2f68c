"""How the processes of an engine write their logs: level and format, text for people or JSON for machines."""

from __future__ import annotations

import json
import logging
import os
from datetime import datetime, timezone

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
FORMATS = ("text", "json")
LEVEL_VARIABLE = "OMNI_ENGINE_LOG_LEVEL"
FORMAT_VARIABLE = "OMNI_ENGINE_LOG_FORMAT"


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (RFC 3339, UTC), level, logger, process, message and, of an error, traceback.

    The dictionary `data` of a record, if it was logged with `extra={"data": …}`, adds its own keys.
    """

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
        }
        fields.update(getattr(record, "data", {}))
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def set_up_logging() -> None:
    """Log to the standard error as the environment says, which the core process inherits; may be called again.

    OMNI_ENGINE_LOG_LEVEL goes before VLLM_LOGGING_LEVEL; a name that is no level means INFO.
    """
    level = (os.environ.get(LEVEL_VARIABLE) or os.environ.get("VLLM_LOGGING_LEVEL") or "").upper()
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if logs_json() else logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level if level in LEVELS else "INFO", handlers=[handler], force=True)


def logs_json() -> bool:
    return os.environ.get(FORMAT_VARIABLE) == "json"
