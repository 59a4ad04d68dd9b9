#!/bin/sh
# it's "a" $HOME `model` \ 100% {{x}} #é as leanplan fitted it: plan 8ce9489bef
# transformers: unchanged
# artefact sha256 dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd
# vLLM was not measured; its speed and memory are its own
# threads of the plan: vLLM chooses itself
cd "$(dirname "$0")" || exit 1
exec "${VLLM:-vllm}" serve ./checkpoint \
  --served-model-name 'it'"'"'s "a" $HOME `model` \ 100% {{x}} #é' \
  --host :: \
  --port 8000 \
  --max-model-len 2048 \
  --max-num-seqs 4
