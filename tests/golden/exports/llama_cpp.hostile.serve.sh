#!/bin/sh
# it's "a" $HOME `model` \ 100% {{x}} #é as leanplan fitted it: plan d2858ee5d5
# llama_cpp: unchanged
# artefact sha256 dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd
# llama.cpp as measured: the build in xllamacpp 2026.10.11549
cd "$(dirname "$0")" || exit 1
exec "${LLAMA_SERVER:-llama-server}" \
  --model model.gguf \
  --alias 'it'"'"'s "a" $HOME `model` \ 100% {{x}} #é' \
  --host :: \
  --port 8000 \
  --ctx-size 4096 \
  --parallel 4 \
  --threads 2 \
  --threads-batch 2 \
  --cache-type-k f32 \
  --cache-type-v f32 \
  --flash-attn off \
  --no-cache-prompt \
  --cache-ram 0 \
  --no-mmap --metrics
