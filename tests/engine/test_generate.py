"""`Engine.generate`: what each sampling parameter and prompt form does, end to end on a tiny checkpoint."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from omni_engine import LLM, Engine, RequestOutputKind, SamplingParams, ValidationError
from omni_engine.engine.errors import RequestRejectedError


@pytest.fixture(scope="module")
def path(make_checkpoint):
    return make_checkpoint("LlamaForCausalLM")


@pytest.fixture(scope="module")
def shared_engine(path):
    return Engine(str(path), dtype="float32", max_model_len=128, max_num_batched_tokens=64, max_num_seqs=8)


@pytest.fixture
def engine(shared_engine):
    yield shared_engine
    assert not shared_engine.has_unfinished_requests()
    shared_engine.check_integrity()


def greedy(**fields):
    return SamplingParams(**{"temperature": 0, "max_tokens": 12, "ignore_eos": True, **fields})


def one(engine, params, prompt="The harbour"):
    return engine.generate(prompt, params)[0].outputs[0]


def test_prompts_as_text_ids_and_dicts_are_the_same(engine):
    ids = engine.tokenizer.encode("The harbour")
    forms = ["The harbour", ids, {"prompt": "The harbour"}, {"prompt_token_ids": ids}]
    outputs = engine.generate(forms, greedy())
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    assert all(output.prompt_token_ids == ids and output.finished for output in outputs)
    assert outputs[0].prompt == "The harbour"


def test_a_single_prompt_needs_no_list(engine):
    assert len(engine.generate("The harbour", greedy())) == 1
    assert len(engine.generate([5, 6, 7], greedy())) == 1
    assert engine.generate(np.array([5, 6, 7]), greedy())[0].prompt_token_ids == [5, 6, 7]


def test_outputs_are_in_the_order_of_the_prompts(engine):
    prompts = [[5 + i] * (20 - i) for i in range(15)]
    outputs = engine.generate(prompts, [greedy(max_tokens=1 + i) for i in range(15)])
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == list(range(1, 16))


def test_text_is_the_decoded_tokens(engine):
    output = one(engine, greedy(max_tokens=30))
    assert output.text == engine.tokenizer.decode(output.token_ids)
    assert output.finish_reason == "length"
    assert output.stop_reason is None


def test_eos_ends_with_reason_stop_and_ignore_eos_goes_on(engine):
    best = one(engine, greedy()).token_ids[0]
    assert best != engine.tokenizer.eos_token_id
    params = greedy(ignore_eos=False, logit_bias={engine.tokenizer.eos_token_id: 100.0})
    ended = one(engine, params)
    assert (ended.finish_reason, ended.stop_reason) == ("stop", None)
    assert ended.token_ids == [engine.tokenizer.eos_token_id]
    assert ended.text == ""
    assert len(one(engine, params.clone(ignore_eos=True)).token_ids) == 12


def test_further_eos_ids_of_the_generation_config_end_too(engine):
    ended = one(engine, greedy(ignore_eos=False, logit_bias={1: 100.0}))
    assert (ended.finish_reason, ended.token_ids) == ("stop", [1])


def test_stop_token_ids_end_and_are_named(engine):
    free = one(engine, greedy())
    stop = free.token_ids[4]
    stopped = one(engine, greedy(stop_token_ids=[stop]))
    cut = free.token_ids.index(stop) + 1
    assert stopped.token_ids == free.token_ids[:cut]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    assert stopped.text == engine.tokenizer.decode(free.token_ids[: cut - 1])
    included = one(engine, greedy(stop_token_ids=[stop], include_stop_str_in_output=True))
    assert included.text == engine.tokenizer.decode(free.token_ids[:cut])


def test_stop_strings_cut_the_text(engine):
    free = one(engine, greedy(max_tokens=30))
    stop = free.text[8:11]
    cut = free.text.index(stop)
    stopped = one(engine, greedy(max_tokens=30, stop=[stop]))
    assert stopped.text == free.text[:cut]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    assert len(stopped.token_ids) < 30
    assert one(engine, greedy(max_tokens=30, stop=stop, include_stop_str_in_output=True)).text == free.text[:cut] + stop


def test_min_tokens_delays_stop_strings(engine):
    free = one(engine, greedy(max_tokens=30))
    stopped = one(engine, greedy(max_tokens=30, stop=[free.text[0]], min_tokens=6))
    assert len(stopped.token_ids) >= 6


def test_n_gives_different_seeded_samples(engine):
    params = SamplingParams(n=4, seed=21, max_tokens=10, ignore_eos=True)
    completions = engine.generate("The harbour", params)[0].outputs
    assert [completion.index for completion in completions] == [0, 1, 2, 3]
    assert len({tuple(completion.token_ids) for completion in completions}) == 4
    for index, completion in enumerate(completions):
        single = one(engine, params.clone(n=1, seed=21 + index))
        assert single.token_ids == completion.token_ids


def test_seeds_reproduce_and_their_absence_does_not(engine):
    seeded = [one(engine, SamplingParams(seed=3, max_tokens=8)).token_ids for _ in range(2)]
    free = [one(engine, SamplingParams(max_tokens=8)).token_ids for _ in range(2)]
    assert seeded[0] == seeded[1]
    assert free[0] != free[1]


def test_logprobs_equal_transformers(engine, path, reference_model):
    output = one(engine, greedy(logprobs=3))
    prompt = engine.tokenizer.encode("The harbour")
    with torch.no_grad():
        logits = reference_model(path)(torch.tensor([prompt + output.token_ids])).logits[0]
    expected = logits[len(prompt) - 1 : -1].log_softmax(-1)
    assert len(output.logprobs) == 12
    for position, entry in enumerate(output.logprobs):
        top = expected[position].topk(3)
        assert next(iter(entry)) == output.token_ids[position]
        assert set(entry) == {output.token_ids[position], *top.indices.tolist()}
        for token, value in entry.items():
            assert value.logprob == pytest.approx(float(expected[position, token]), abs=1e-4)
            assert value.decoded_token == engine.tokenizer.token_string(token)
            assert value.rank == int((expected[position] > expected[position, token]).sum()) + 1
    chosen = [entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True)]
    assert output.cumulative_logprob == pytest.approx(sum(chosen))


def test_prompt_logprobs_equal_transformers_over_chunks(engine, path, reference_model):
    prompt = [(7 * i) % 500 + 4 for i in range(100)]  # two chunks of 64
    engine.generate(prompt, greedy(max_tokens=1))  # the prefix is cached now, and must not be used
    result = engine.generate(prompt, greedy(max_tokens=2, prompt_logprobs=2))[0]
    with torch.no_grad():
        expected = reference_model(path)(torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert len(result.prompt_logprobs) == len(prompt)
    assert result.prompt_logprobs[0] is None
    for position in range(1, len(prompt)):
        entry = result.prompt_logprobs[position]
        top = expected[position - 1].topk(2).indices.tolist()
        assert set(entry) == {prompt[position], *top}
        assert entry[prompt[position]].logprob == pytest.approx(
            float(expected[position - 1, prompt[position]]), abs=1e-4
        )


def test_prompts_are_fed_forward_to_the_end_only_where_somebody_reads(path):
    engine = Engine(str(path), dtype="float32", max_model_len=128, max_num_batched_tokens=64, enforce_eager=True)
    fed = []
    last = engine._core.runner.model.layers[-1].get_submodule("mlp")
    last.register_forward_pre_hook(lambda _, arguments: fed.append(len(arguments[0])))
    first, second = list(range(5, 105)), list(range(205, 235))
    engine.generate([first, second], greedy(max_tokens=1))
    assert fed == [1, 1, 1]  # of 64 tokens, of 36 that end the first prompt and 28 of the second, and of its last 2
    fed.clear()
    engine.generate([[7, *first]], greedy(max_tokens=1, prompt_logprobs=1))
    assert sum(fed) == 101


def test_prompt_logprobs_are_told_once_for_n_sequences(engine):
    params = SamplingParams(n=3, seed=2, max_tokens=4, ignore_eos=True, prompt_logprobs=1)
    result = engine.generate([4, 5, 6, 7, 8], params)[0]
    assert len(result.prompt_logprobs) == 5
    assert all(token in entry for token, entry in zip([5, 6, 7, 8], result.prompt_logprobs[1:], strict=True))
    assert result.prompt_logprobs == engine.generate([4, 5, 6, 7, 8], params.clone(n=1))[0].prompt_logprobs


def test_bad_words_never_appear(engine):
    tokenizer = engine.tokenizer
    free = one(engine, greedy(max_tokens=30))
    words = {token: tokenizer.token_string(token) for token in free.token_ids}
    token = next(t for t, word in words.items() if word and tokenizer.encode(word, add_special_tokens=False) == [t])
    changed = one(engine, greedy(max_tokens=30, bad_words=[words[token]]))
    assert token not in changed.token_ids


def test_allowed_token_ids_bound_the_output(engine):
    assert set(one(engine, greedy(allowed_token_ids=[10, 20, 30])).token_ids) <= {10, 20, 30}


def test_max_tokens_none_fills_the_context_and_more_is_clamped(engine):
    prompt = [9] * 100
    for max_tokens in (None, 5000):
        output = engine.generate(prompt, greedy(max_tokens=max_tokens))[0].outputs[0]
        assert len(output.token_ids) == 28
        assert output.finish_reason == "length"


def test_truncate_prompt_tokens_keeps_the_last_ones(engine):
    prompt = list(range(10, 60))
    assert engine.generate(prompt, greedy(truncate_prompt_tokens=7))[0].prompt_token_ids == prompt[-7:]
    assert len(engine.generate([9] * 300, greedy(truncate_prompt_tokens=-1))[0].prompt_token_ids) == 127


def test_detokenize_false_gives_ids_only(engine):
    output = one(engine, greedy(detokenize=False))
    assert output.text == ""
    assert len(output.token_ids) == 12


def test_skip_special_tokens_decides_what_the_text_shows(engine):
    eos = engine.tokenizer.eos_token_id
    params = greedy(max_tokens=2, logit_bias={eos: 100.0})
    assert one(engine, params).text == ""
    assert one(engine, params.clone(skip_special_tokens=False)).text == "<|im_end|>" * 2


@pytest.mark.parametrize("n", [1, 3])
def test_output_kinds_add_up(engine, n):
    params = SamplingParams(n=n, seed=1, max_tokens=9, ignore_eos=True, logprobs=1)
    final = engine.generate("The harbour", params)[0]
    cumulative = list(engine.stream("The harbour", params.clone(output_kind=RequestOutputKind.CUMULATIVE)))
    assert [c.token_ids for c in cumulative[-1].outputs] == [c.token_ids for c in final.outputs]
    text, tokens, logprobs = [""] * n, [[] for _ in range(n)], [[] for _ in range(n)]
    for output in engine.stream("The harbour", params.clone(output_kind=RequestOutputKind.DELTA)):
        for completion in output.outputs:
            text[completion.index] += completion.text
            tokens[completion.index] += completion.token_ids
            logprobs[completion.index] += completion.logprobs
    assert text == [completion.text for completion in final.outputs]
    assert tokens == [completion.token_ids for completion in final.outputs]
    assert logprobs == [completion.logprobs for completion in final.outputs]
    only = list(engine.stream("The harbour", params.clone(output_kind=RequestOutputKind.FINAL_ONLY)))
    assert len(only) == 1


def test_leaving_a_stream_aborts_the_request(engine):
    for _ in engine.stream("The harbour", greedy(max_tokens=100)):
        break
    assert not engine.has_unfinished_requests()
    assert engine._core.stats().num_running == 0


def test_add_step_and_abort(engine):
    engine.add_request("a", "The harbour", greedy(max_tokens=100))
    engine.add_request("b", "The boats", greedy(max_tokens=3))
    with pytest.raises(ValidationError, match="id is running"):
        engine.add_request("b", "again", greedy())
    outputs = engine.step()
    assert {output.request_id for output in outputs} == {"a", "b"}
    engine.abort_request("a")
    finished = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output.outputs[0].finish_reason
    assert finished == {"a": "abort", "b": "length"}


@pytest.mark.parametrize(
    ("prompt", "fields", "message"),
    [
        ("", {}, "cannot be empty"),
        ([], {}, "cannot be empty"),
        ([515], {}, "out of vocabulary"),
        ([-1], {}, "out of vocabulary"),
        ([1.5], {}, "integers"),
        (["a", 1], {}, None),
        ({"prompt_embeds": 1}, {}, "prompt_embeds"),
        ([5] * 128, {}, "leaves no room"),
        ([5] * 1000, {}, "maximum context length is 128"),
        ("x", {"logprobs": 21}, "greater than max allowed"),
        ("x", {"stop_token_ids": [515]}, "vocabulary"),
        ("x", {"allowed_token_ids": [-1]}, "vocabulary"),
        ("x", {"logit_bias": {515: 1.0}}, "vocabulary"),
        ("x", {"allowed_token_ids": [3], "min_tokens": 1}, "leave none of allowed_token_ids"),
        ("x", {"truncate_prompt_tokens": 500}, "truncate_prompt_tokens"),
        ("x" * 200_000, {}, "maximum context length"),
    ],
)
def test_bad_input_costs_only_its_own_request(engine, prompt, fields, message):
    with pytest.raises(ValidationError, match=message):
        engine.add_request("bad", prompt, greedy(**fields))
    assert not engine.has_unfinished_requests()
    assert len(one(engine, greedy()).token_ids) == 12


def test_a_bad_prompt_among_good_ones_leaves_nothing_behind(engine):
    with pytest.raises(ValidationError):
        engine.generate(["The harbour", "", "The boats"], greedy())
    assert engine.get_num_unfinished_requests() == 0
    assert not engine._core.has_unfinished


def test_lists_of_other_lengths_are_refused(engine):
    with pytest.raises(ValidationError, match="must be the same"):
        engine.generate(["a", "b"], [greedy()])


def test_llm_generates_and_chats(path):
    llm = LLM(model=str(path), dtype="float32", max_model_len=128)
    outputs = llm.generate(["The harbour", "The boats"], greedy(), use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [12, 12]
    messages = [{"role": "user", "content": "Where are the boats?"}]
    chat = llm.chat(messages, greedy(), use_tqdm=False)
    assert chat[0].prompt == "<|im_start|>user\nWhere are the boats?<|im_end|>\n<|im_start|>assistant\n"
    assert len(llm.chat([messages, messages], greedy(), use_tqdm=False)) == 2
    for method in (llm.encode, llm.embed, llm.classify, llm.reward, lambda texts: llm.score(texts, texts)):
        with pytest.raises(ValueError, match="--runner pooling"):
            method(["x"])
    with pytest.raises(TypeError, match="tensor_parallel_sizes"):
        LLM(model=str(path), tensor_parallel_sizes=2)


def test_dummy_weights_need_no_files_and_follow_the_seed(path, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((path / name).read_bytes())

    def tokens(seed):
        engine = Engine(str(tmp_path), load_format="dummy", dtype="float32", seed=seed)
        return one(engine, greedy()).token_ids

    assert tokens(1) == tokens(1) != tokens(2)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "DeepseekV3ForCausalLM"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dummy_weights_give_finite_logits_that_differ(make_checkpoint, architecture, dtype):
    engine = Engine(
        str(make_checkpoint(architecture)), load_format="dummy", dtype=dtype, max_logprobs=-1,
        logprobs_mode="raw_logits", max_model_len=64,
    )  # fmt: skip
    logits = []
    for prompt in ([5, 6, 7], [9, 8]):
        output = engine.generate({"prompt_token_ids": prompt}, greedy(max_tokens=2, logprobs=-1))[0].outputs[0]
        logits += [[step[token].logprob for token in sorted(step)] for step in output.logprobs]
    values = np.array(logits)
    assert np.isfinite(values).all()
    assert values.std(axis=1).min() > 0.3 and values.std(axis=1).max() < 3
    assert np.abs(np.corrcoef(values)[np.triu_indices(4, 1)]).max() < 0.9  # other tokens, other logits


def test_max_model_len_auto_takes_what_fits(path):
    engine = Engine(str(path), dtype="float32", max_model_len="auto", num_gpu_blocks_override=5)
    assert engine.max_model_len == 64


def test_what_does_not_fit_is_refused_with_the_arithmetic(path):
    with pytest.raises(ValueError, match=r"max seq len \(256\).*lower max_model_len"):
        Engine(str(path), dtype="float32", num_gpu_blocks_override=5)
    with pytest.raises(ValueError, match="positions this model was made for"):
        Engine(str(path), dtype="float32", max_model_len=1000)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs must be a positive integer: 0"),
        ({"block_size": -1}, "block_size"),
        ({"kv_cache_memory_bytes": 0}, "kv_cache_memory_bytes"),
        ({"gpu_memory_utilization": 5}, "gpu_memory_utilization"),
        ({"max_prefill_share": 0}, r"max_prefill_share must be in \(0, 1\]: 0"),
        ({"max_logprobs": -2}, "max_logprobs"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"scheduling_policy": "lifo"}, "scheduling_policy must be one of"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is not supported yet"),
        ({"quantization": "awq"}, "quantization is not supported yet"),
        ({"max_model_len": 0}, "max_model_len"),
        ({"max_num_batched_tokens": 4, "max_num_seqs": 8}, "max_num_batched_tokens"),
        ({"device": "tpu"}, "device"),
        ({"max_model_len": 1.5}, "max_model_len must be an integer or text"),
        ({"hf_overrides": "x"}, "hf_overrides must be a mapping"),
        ({"seed": "x"}, "seed must be an integer"),
        ({"enable_prefix_caching": "no"}, "enable_prefix_caching must be true or false"),
        ({"kv_cache_memory_bytes": 10**18}, "kv_cache_memory_bytes is more than"),
        ({"override_generation_config": {"temperature": 5}}, "temperature"),
        ({"override_generation_config": {"heat": 1}}, "heat"),
    ],
)
def test_wrong_engine_arguments_are_named(path, fields, message):
    with pytest.raises(ValueError, match=message):
        Engine(str(path), **{"dtype": "float32", **fields})


def test_chat_messages_are_a_prompt(engine):
    messages = [{"role": "user", "content": "Where are the boats?"}]
    forms = [messages, {"messages": messages}, {"messages": messages, "add_generation_prompt": True}]
    outputs = [engine.generate(form, greedy())[0] for form in forms]
    text = "<|im_start|>user\nWhere are the boats?<|im_end|>\n<|im_start|>assistant\n"
    assert {output.prompt for output in outputs} == {text}
    assert outputs[0].prompt_token_ids == engine.tokenizer.encode(text, add_special_tokens=False)
    assert len(engine.generate([messages, "The harbour", {"messages": messages}], greedy())) == 3
    with pytest.raises(ValidationError, match="colour"):
        engine.generate({"messages": messages, "colour": "red"}, greedy())
    with pytest.raises(ValidationError, match="must not be empty"):
        engine.generate({"messages": []}, greedy())


def test_streams_and_generate_may_be_nested(engine):
    prompts = ["The harbour", "The boats", "Three plus four"]
    alone = [one(engine, greedy(), prompt).token_ids for prompt in prompts]
    engine.add_request("7", prompts[2], greedy())
    seen = []
    for output in engine.stream(prompts[0], greedy()):
        inner = engine.generate([prompts[1]], greedy())
        assert [o.outputs[0].token_ids for o in inner] == [alone[1]]
        seen.append(output)
    assert seen[-1].outputs[0].token_ids == alone[0]
    stepped = []
    while engine.has_unfinished_requests():
        stepped += engine.step()
    assert {output.request_id for output in stepped} == {"7"}
    assert stepped[-1].outputs[0].token_ids == alone[2]


def test_streams_side_by_side_get_their_own_outputs(engine):
    params = greedy(output_kind=RequestOutputKind.DELTA)
    pairs = list(zip(engine.stream("The harbour", params), engine.stream([9, 9], params), strict=True))
    for index, prompt in ((0, "The harbour"), (1, [9, 9])):
        tokens = [token for pair in pairs for token in pair[index].outputs[0].token_ids]
        assert tokens == one(engine, greedy(), prompt).token_ids


def test_a_refused_request_costs_the_others_nothing(path):
    engine = Engine(str(path), dtype="float32", max_model_len=128, max_num_queued_reqs=1)
    engine.add_request("a", "The harbour", greedy(max_tokens=1))
    with pytest.raises(RequestRejectedError, match="too many requests"):
        engine.add_request("b", "The boats", SamplingParams(n=2, max_tokens=1))
    outputs = engine.step()
    assert [(o.request_id, o.finished) for o in outputs] == [("a", True)]
    assert not engine.has_unfinished_requests()
    engine.check_integrity()


def test_a_stop_string_may_begin_within_min_tokens(engine):
    free = one(engine, greedy(max_tokens=30))
    texts = [engine.tokenizer.token_string(token) for token in free.token_ids]
    cut = next(i for i in range(5, 25) if texts[i] and texts[i + 1] and "\ufffd" not in texts[i] + texts[i + 1])
    stop = texts[cut] + texts[cut + 1]
    stopped = one(engine, greedy(max_tokens=30, stop=[stop], min_tokens=cut + 1))
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    assert len(stopped.token_ids) == cut + 2
    assert one(engine, greedy(max_tokens=30, stop=[stop], min_tokens=cut + 2)).finish_reason == "length"


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1e39},
        {"repetition_penalty": 1e-46},
        {"top_k": 2**63},
        {"presence_penalty": 10**400},
        {"ignore_eos": None},
        {"skip_special_tokens": 1},
        {"output_kind": "DELTA"},
        {"stop": ["\ud800"]},
        {"stop": ["x" * 5000, "y" * 5000]},
        {"bad_words": ["x" * 20_000]},
        {"logit_bias": {1.7: 2}},
    ],
)
def test_parameters_that_no_step_could_survive_are_refused(fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
        SamplingParams(**fields)


def test_extreme_parameters_do_not_fail_a_step(engine):
    extremes = [
        {"repetition_penalty": 1e6}, {"repetition_penalty": 1e-6}, {"top_k": 2**62}, {"top_p": 1e-300},
        {"min_p": 1.0}, {"logit_bias": {3: 1e30}}, {"presence_penalty": -2, "frequency_penalty": 2}, {"seed": -(2**63)},
        {"seed": 2**63 - 1, "n": 3},
    ]  # fmt: skip
    for fields in extremes:
        output = engine.generate("The harbour", SamplingParams(max_tokens=4, ignore_eos=True, logprobs=1, **fields))[0]
        assert all(len(completion.token_ids) == 4 for completion in output.outputs), fields


@pytest.mark.parametrize("prompts", [None, 5, b"abc", {1, 2}])
def test_what_is_no_prompt_is_refused(engine, prompts):
    with pytest.raises(ValidationError, match="prompts"):
        engine.generate(prompts, greedy())


@pytest.mark.parametrize("params", [{"n": 1}, "x", [None]])
def test_what_are_no_sampling_params_is_refused(engine, params):
    with pytest.raises(ValidationError, match="sampling_params"):
        engine.generate(["a"], params)


@pytest.mark.parametrize("priority", [None, "x", 2**80])
def test_priority_must_be_an_integer(engine, priority):
    with pytest.raises(ValidationError, match="priority"):
        engine.add_request("p", "The harbour", greedy(), priority=priority)


def test_end_ids_outside_the_vocabulary_are_ignored(path, tmp_path):
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 99999]}')
    engine = Engine(str(tmp_path), dtype="float32", max_model_len=64)
    params = SamplingParams(temperature=0, max_tokens=5, min_tokens=3)
    assert len(one(engine, params).token_ids) == 5


def test_neutral_arguments_of_vllm_are_taken_and_others_named(path):
    llm = LLM(model=str(path), dtype="float32", runner="generate", kv_cache_dtype="auto", enable_lora=False)
    llm.generate("The harbour", greedy(), use_tqdm=False, lora_request=None)
    for name, value in (("kv_cache_dtype", "fp8"), ("model_impl", "transformers"), ("no_such_argument", 1)):
        with pytest.raises(TypeError, match=name):
            LLM(model=str(path), **{name: value})


def test_without_a_tokenizer_ids_go_in_and_ids_come_out(path, tmp_path):
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (tmp_path / name).write_bytes((path / name).read_bytes())
    with pytest.raises(ValueError, match="tokenizer"):
        Engine(str(tmp_path), dtype="float32")
    engine = Engine(str(tmp_path), dtype="float32", skip_tokenizer_init=True, max_model_len=64)
    output = engine.generate([5, 6, 7], greedy(logprobs=1))[0].outputs[0]
    assert (output.text, len(output.token_ids)) == ("", 12)
    assert all(
        entry[token].decoded_token is None for entry, token in zip(output.logprobs, output.token_ids, strict=True)
    )
    assert engine.generate([5, 6, 7], greedy(ignore_eos=False, logit_bias={3: 100.0}))[0].outputs[0].token_ids == [3]
    for prompt, fields in (("text", {}), ([5], {"stop": ["a"]}), ([5], {"bad_words": ["a"]}), ([{"role": "user"}], {})):
        with pytest.raises(ValidationError, match="tokenizer"):
            engine.generate(prompt, greedy(**fields))


def test_a_model_without_chat_template_says_so(path, tmp_path):
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    engine = Engine(str(tmp_path), dtype="float32", max_model_len=64)
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(ValueError, match="chat template"):
        engine.generate(messages, greedy())
    given = {"messages": messages, "chat_template": "{{ messages[0]['content'] }}!"}
    assert engine.generate(given, greedy())[0].prompt == "Hi!"
