"""Flags of `vllm serve` 0.32, so that one which is missing here is answered as such and not as a typing error."""

from __future__ import annotations

_NAMES = """
--allowed-local-media-path --allowed-media-domains --api-server-count --attention-backend
--attention-config --chat-template-content-format --collect-detailed-traces --config-format
--cpu-offload-gb --custom-histogram-buckets --data-parallel-address
--data-parallel-backend --data-parallel-external-lb --data-parallel-hybrid-lb --data-parallel-rank
--data-parallel-rpc-port --data-parallel-size-local --data-parallel-start-rank --decode-context-parallel-size
--distributed-executor-backend --enable-expert-parallel
--enable-lora --enable-prompt-embeds --enable-sleep-mode
--exclude-tools-when-tool-choice-none --hf-token
--kv-cache-dtype --kv-cache-metrics --kv-events-config --kv-offloading-backend --kv-offloading-size
--kv-transfer-config --limit-mm-per-prompt --log-error-stack --logits-processors --lora-dtype --lora-modules
--max-cpu-loras --max-lora-rank --max-loras --middleware --mm-processor-kwargs --model-impl
--nnodes --node-rank --prefill-context-parallel-size
--prefix-caching-hash-algo --reasoning-parser-plugin
--show-hidden-metrics-for-version --stream-interval --structured-outputs-config --tokenizer-revision
--tool-parser-plugin --tool-strict-level --trust-request-mm-kwargs --uvicorn-log-level -ac -asc -dcp -dpa
-dpb -dpe -dph -dpl -dpn -dpp -dpr -ep -n -pcp -r
"""
VLLM_FLAGS = frozenset(_NAMES.split())
