#!/bin/sh
# All GPU tests. From anywhere:
#   tests/gpu/run.sh [python]
# On a machine without a GPU every test is skipped with its reason.
set -e
cd "$(dirname "$0")/../.."
PY=${1:-python3}
# NVLink multicast can take a shared host's GPUs out of service; nothing here needs it
export NCCL_NVLS_ENABLE="${NCCL_NVLS_ENABLE:-0}" TORCH_SYMM_MEM_DISABLE_MULTICAST="${TORCH_SYMM_MEM_DISABLE_MULTICAST:-1}"
export NVSHMEM_DISABLE_NVLS="${NVSHMEM_DISABLE_NVLS:-1}"
exec "$PY" -m pytest -q tests/gpu
