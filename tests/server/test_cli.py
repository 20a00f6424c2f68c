"""The command line: flags from `EngineArgs`, messages for wrong ones, and what it imports."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys

import pytest

from omni_engine import __version__
from omni_engine.engine.config import DEMO_MODEL, EngineArgs
from omni_engine.server import terminal
from omni_engine.server.arguments import engine_args, parse_size, parse_size_or_word, sampling_fields
from omni_engine.server.cli import main
from omni_engine.server.serve_arguments import read_chat_template, serve_parser, server_settings, take_model_argument


def parse_serve(*words):
    parser = serve_parser()
    arguments = parser.parse(words)
    take_model_argument(parser, arguments)
    return arguments


def usage_error(capsys, *words):
    with pytest.raises(SystemExit) as raised:
        main(words)
    assert raised.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_every_engine_argument_has_a_flag_with_help():
    text = serve_parser().format_help()
    for field in dataclasses.fields(EngineArgs):
        assert f"--{field.name.replace('_', '-')}" in text
        assert field.metadata["help"]


def test_flags_that_are_not_given_leave_the_defaults():
    assert engine_args(parse_serve("m")) == EngineArgs(model="m")


def test_without_a_model_the_demo_is_served_under_a_short_name():
    parser = serve_parser()
    for words, model, names in (([], str(DEMO_MODEL), ("demo",)), (["m"], "m", ())):
        arguments = parser.parse(words)
        take_model_argument(parser, arguments)
        args = engine_args(arguments)
        assert args.model == model
        assert server_settings(arguments, args).served_model_names == names


def test_flags_become_engine_arguments_of_their_types():
    args = engine_args(
        parse_serve(
            "--model", "m", "--max_model_len", "4k", "--kv-cache-memory-bytes=1.5g", "--dtype", "float32", "--seed",
            "3", "--no-enable-prefix-caching", "--trust_remote_code", "--hf-overrides", '{"a": {"b": 1}}',
            "--device-memory-utilization", "0.5",
        )
    )  # fmt: skip
    assert args == EngineArgs(
        model="m", max_model_len=4000, kv_cache_memory_bytes=1_500_000_000, dtype="float32", seed=3,
        enable_prefix_caching=False, trust_remote_code=True, hf_overrides={"a": {"b": 1}}, gpu_memory_utilization=0.5,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value"), [("7", 7), ("1k", 1000), ("1K", 1024), ("2M", 2 * 2**20), ("1.5g", 1_500_000_000), ("-1", -1)]
)
def test_sizes(text, value):
    assert parse_size(text) == value


@pytest.mark.parametrize("text", ["", "k", "1.5K", "1.0005k", "1x", "1e3", "0x10"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"number|whole"):
        parse_size(text)


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("-1", -1), ("2k", 2000)])
def test_max_model_len_takes_words_and_minus_one(text, value):
    assert parse_size_or_word(text) == value
    assert engine_args(parse_serve("m", "--max-model-len", text)).max_model_len == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serve", "m", "--model", "n"], "two models are given"),
        (["serve", "m", "--max-modl-len", "3"], "unknown flag, did you mean --max-model-len?: --max-modl-len"),
        (["serve", "--max_modl_len=3", "m"], "unknown flag, did you mean --max-model-len?: --max-modl-len"),
        (["serve", "m", "--zzzz"], "unknown flag: --zzzz"),
        (["serve", "m", "--max-lora-rank", "2"], "not supported yet: --max-lora-rank"),
        (["serve", "--max_lora_rank", "2", "m"], "not supported yet: --max-lora-rank"),
        (["serve", "m", "-dcp", "2"], "not supported yet: -dcp"),
        (["serve", "m", "--kv-transfer-config.kv_role=both"], "not supported yet: --kv-transfer-config"),
        (["serve", "m", "-sc", "mtp"], "not JSON"),
        (["serve", "m", "--spec-tokens", "x"], "--spec-tokens"),
        (["serve", "m", "--no-enable-lora"], "not supported yet: --no-enable-lora"),
        (["serve", "m", "--port", "x"], "--port"),
        (["serve", "m", "--dtype", "int3"], "--dtype: invalid choice: 'int3'"),
        (["serve", "m", "--hf-overrides", "[1]"], "not a JSON object: [1]"),
        (["serve", "m", "--hf-overrides", "{"], "not JSON"),
        (["serve", "m", "--shutdown-timeout", "-1"], "--shutdown-timeout must not be negative"),
        (["serve", "m", "--max-num-seq", "3"], "did you mean --max-num-seqs?"),
        (["generate", "m", "--max-tokens", "5", "a", "b"], "one prompt at a time"),
        (["chat", "m", "more"], "quote text that holds spaces: more"),
    ],
)
def test_usage_errors_are_one_line_with_the_remedy(capsys, words, message):
    assert message in usage_error(capsys, *words)


def test_version_and_overview(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"
    assert main(["--help"]) == 0
    assert "serve" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["sreve"]) == 2


def test_a_failure_is_one_line_and_status_1(capsys):
    assert main(["serve", "no/such/folder/here", "--host", "127.0.0.1", "--port", "0"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("omni-engine serve: error: ")
    assert last.endswith("no/such/folder/here")


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["-O3"], {"mode": 3}),
        (["-O", '{"cudagraph_mode": "FULL"}'], {"cudagraph_mode": "FULL"}),
        (["--compilation-config.mode=0"], {"mode": 0}),
        (["--compilation_config.cudagraph_mode=NONE"], {"cudagraph_mode": "NONE"}),
        (["-cc.mode", "0", "-cc.cudagraph_mode", "NONE"], {"mode": 0, "cudagraph_mode": "NONE"}),
    ],
)
def test_compilation_config_is_spelt_as_in_vllm(words, value):
    assert engine_args(parse_serve("m", *words)).compilation_config == value


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--speculative-config", '{"method": "mtp", "num_speculative_tokens": 2}'], {"num_speculative_tokens": 2}),
        (["-sc", '{"method": "mtp"}'], {}),
        (["-sc.method=mtp", "--speculative_config.num_speculative_tokens", "2"], {"num_speculative_tokens": 2}),
        (["--spec-method", "mtp", "--spec-tokens", "3"], {"num_speculative_tokens": 3}),
        (["--spec-tokens=3", "-sc", '{"method": "mtp", "adaptive_depth": false}'],
         {"num_speculative_tokens": 3, "adaptive_depth": False}),
    ],
)  # fmt: skip
def test_speculative_config_is_spelt_as_in_vllm(words, value):
    assert engine_args(parse_serve("m", *words)).speculative_config == {"method": "mtp", **value}


def test_a_draft_model_is_named_by_a_flag_of_its_own():
    args = engine_args(parse_serve("m", "--spec-model", "draft", "--spec-tokens", "2"))
    assert args.speculative_config == {"model": "draft", "num_speculative_tokens": 2}


def test_two_flags_that_differ_are_refused():
    arguments = parse_serve("m", "--spec-tokens", "2", "-sc", '{"method": "mtp", "num_speculative_tokens": 3}')
    with pytest.raises(ValueError, match=r"spec_tokens and speculative_config\.num_speculative_tokens.*: 2 and 3"):
        engine_args(arguments)


def test_a_failure_is_a_traceback_at_debug_level():
    script = "from omni_engine.server.cli import main; main(['serve', 'm', '--chat-template', 'missing.jinja'])"
    quiet, loud = (
        subprocess.run(
            [sys.executable, "-c", script],
            env={"OMNI_ENGINE_LOG_LEVEL": level, "PATH": ""},
            capture_output=True,
            text=True,
        ).stderr
        for level in ("INFO", "DEBUG")
    )
    assert "Traceback" not in quiet and "missing.jinja" in quiet
    assert "Traceback" in loud


def test_a_chat_template_is_a_file_or_a_text(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text("{{ messages }}")
    assert read_chat_template(str(path)) == "{{ messages }}"
    assert read_chat_template("{{ x }}") == "{{ x }}"
    assert read_chat_template(None) is None
    with pytest.raises(ValueError, match=r"missing\.jinja"):
        read_chat_template("missing.jinja")


def test_sampling_flags_become_sampling_parameters():
    words = ["m", "p", "--max-tokens", "1k", "--temperature", "0", "--stop", "a", "--stop", "b", "--ignore-eos"]
    arguments = terminal.generate_parser().parse(words)
    assert sampling_fields(arguments) == {
        "max_tokens": 1000, "temperature": 0.0, "stop": ["a", "b"], "ignore_eos": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    "module", ["server.app", "server.cli", "server.serve", "server.terminal", "server.completions", "server.chat"]
)
def test_the_server_imports_no_torch(module):
    script = f"import sys, omni_engine.{module}; print(sorted(set(sys.modules) & {{'torch', 'transformers'}}))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_the_application_does_not_wait_for_tokenizers_or_templates():
    script = (
        "import sys, omni_engine.server.app\n"
        "print(sorted(set(sys.modules) & {'tokenizers', 'jinja2', 'huggingface_hub', 'numpy', 'sentencepiece'}))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_with_log_format_json_every_line_is_an_object(tmp_path):
    words = [str(tmp_path), "--host", "127.0.0.1", "--port", "0", "--log-format", "json"]
    script = "import sys; from omni_engine.server.cli import main; sys.exit(main(['serve', *sys.argv[1:]]))"
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert done.returncode == 1
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert "listens on http://127.0.0.1:" in lines[0]["message"]
    assert lines[-1]["level"] == "ERROR"
    assert "config.json" in lines[-1]["message"]
