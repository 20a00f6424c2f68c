"""`--config` and `--print-config`, and the settings that flags and environment come to."""

from __future__ import annotations

import pytest
import yaml

from omni_engine.engine.config import EngineArgs
from omni_engine.server.arguments import engine_args
from omni_engine.server.cli import main
from omni_engine.server.config_file import config_text, parse_with_config
from omni_engine.server.serve_arguments import (
    header_limits,
    serve_parser,
    server_settings,
    step_timeout,
    take_model_argument,
    tls_files,
)


@pytest.fixture
def resolve(tmp_path):
    """Parses flags over a configuration text; returns (arguments, EngineArgs)."""

    def run(text, *words):
        file = tmp_path / "config.yaml"
        file.write_text(text)
        parser = serve_parser()
        arguments = parse_with_config(parser, ["--config", str(file), *words])
        take_model_argument(parser, arguments)
        return arguments, engine_args(arguments)

    return run


def test_a_file_gives_flags_of_every_kind(resolve):
    text = """
        model: m
        port: 9000
        served_model_name: [a, b]
        max-model-len: 4k
        kv-cache-memory-bytes: 1000000
        enable-prefix-caching: false
        enable-request-id-headers: true
        hf-overrides: {rope_theta: 5}
        allowed-origins: ["*"]
        api-key: k
        gpu-memory-utilization: 0.5
        host: null
    """
    arguments, args = resolve(text)
    assert args == EngineArgs(
        model="m", max_model_len=4000, kv_cache_memory_bytes=1_000_000, enable_prefix_caching=False,
        hf_overrides={"rope_theta": 5}, gpu_memory_utilization=0.5,
    )  # fmt: skip
    assert (arguments.port, arguments.host) == (9000, None)
    assert arguments.served_model_name == ["a", "b"]
    assert arguments.enable_request_id_headers is True
    assert (arguments.allowed_origins, arguments.api_key) == (["*"], ["k"])


def test_the_command_line_goes_before_the_file(resolve):
    text = "model: m\nport: 9000\nseed: 7\nenable-request-id-headers: true\nserved-model-name: [a, b]\n"
    words = ["n", "--port", "1", "--no-enable-request-id-headers", "--served-model-name", "c"]
    arguments, args = resolve(text, *words)
    assert (args.model, args.seed, arguments.port) == ("n", 7, 1)
    assert arguments.enable_request_id_headers is False
    assert arguments.served_model_name == ["c"]
    assert resolve(text, "--model", "o")[1].model == "o"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1", "unknown flag, did you mean --port?: --prot"),
        ("max-lora-rank: 8", "not supported yet: --max-lora-rank"),
        ("port: many", "--port has a wrong value"),
        ("dtype: int3", "--dtype must be one of"),
        ("port: true", "--port takes a value, not: true"),
        ("enable-prefix-caching: 3", "--enable-prefix-caching must be true or false: 3"),
        ("hf-overrides: [1]", "not a JSON object"),
        ("- port", "must hold flags with their values"),
        ("port: [", "is not YAML"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_in_one_line(resolve, capsys, text, message):
    with pytest.raises(SystemExit) as raised:
        resolve(text, "m")
    assert raised.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_file_that_is_missing_is_said_with_its_name(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "m", "--config", "no/such.yaml"])
    assert capsys.readouterr().err.endswith("(No such file or directory): no/such.yaml\n")


def test_print_config_prints_what_config_reads_and_no_secret(resolve, capsys):
    words = ["m", "--port", "5", "--max-num-seqs", "9", "--allowed-origins", '["a"]', "--api-key", "hidden-secret",
             "--disable-access-log-for-endpoints", "/health,/ping", "--seed", "3", "--print-config"]  # fmt: skip
    assert main(["serve", *words]) == 0
    text = capsys.readouterr().out
    values = yaml.safe_load(text)
    assert (values["port"], values["max-num-seqs"], values["seed"], values["model"]) == (5, 9, 3, "m")
    assert values["block-size"] is None
    assert "secret" not in text
    arguments, args = resolve(text)
    assert config_text(arguments, args) == text


def settings_of(*words):
    parser = serve_parser()
    arguments = parser.parse(["m", *words])
    take_model_argument(parser, arguments)
    return server_settings(arguments, engine_args(arguments))


def test_api_keys_come_from_flags_before_the_environment(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "env")
    assert settings_of().api_keys == ("env",)
    assert settings_of("--api-key", "a", "b").api_keys == ("a", "b")


@pytest.mark.parametrize(("text", "path"), [("/api/", "/api"), ("api/v", "/api/v"), ("/", ""), ("", "")])
def test_the_root_path_has_a_slash_before_and_none_behind(text, path):
    assert settings_of("--root-path", text).root_path == path


def test_fingerprints_follow_the_engines_settings():
    full = settings_of().fingerprint
    assert full == settings_of("--port", "1").fingerprint
    assert full != settings_of("--seed", "1").fingerprint
    assert full.startswith("omni-engine-")
    assert full.endswith(settings_of("--fingerprint-mode", "hash").fingerprint)
    assert settings_of("--fingerprint-mode", "none").fingerprint is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ssl-keyfile", "k"], "HTTPS needs --ssl-certfile too, beside: --ssl-keyfile"),
        (["--ssl-cert-reqs", "2"], "HTTPS needs --ssl-certfile too, beside: --ssl-cert-reqs"),
        (["--enable-ssl-refresh"], "HTTPS needs --ssl-certfile too, beside: --enable-ssl-refresh"),
        (["--fingerprint-mode", "custom"], "--fingerprint-mode: not supported yet: custom"),
        (["--fingerprint-mode", "short"], "invalid choice: 'short'"),
        (["--sse-keep-alive-interval", "-1"], "not a number of seconds, 0 or more: -1"),
        (["--engine-hang-timeout", "nan"], "not a number of seconds, 0 or more: nan"),
        (["--h11-max-header-count", "0"], "--h11-max-header-count must be at least 1: 0"),
        (["--allowed-origins", "x"], "not JSON"),
        (["--allowed-origins", '{"a": 1}'], "not a JSON list of strings"),
    ],
)
def test_wrong_values_are_usage_errors(capsys, words, message):
    with pytest.raises(SystemExit):
        parser = serve_parser()
        arguments = parser.parse(["m", *words])
        tls_files(parser, arguments)
        header_limits(parser, arguments)
    assert message in capsys.readouterr().err


def test_the_limit_of_a_step_comes_from_its_flag_before_the_environment(monkeypatch):
    def limit(*words):
        return step_timeout(serve_parser().parse(["m", *words]))

    monkeypatch.delenv("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", raising=False)
    assert limit() == 300
    monkeypatch.setenv("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "12.5")
    assert (limit(), limit("--engine-hang-timeout", "0")) == (12.5, 0)
    monkeypatch.setenv("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "soon")
    with pytest.raises(ValueError, match="VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS must be a number, not negative: soon"):
        limit()


def test_streaming_and_metrics_flags_reach_the_settings():
    settings = settings_of("--sse-keep-alive-interval", "2.5", "--enable-per-request-metrics")
    assert (settings.keep_alive_seconds, settings.enable_per_request_metrics) == (2.5, True)
    assert (settings_of().keep_alive_seconds, settings_of().enable_per_request_metrics) == (0, False)
