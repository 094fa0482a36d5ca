#!/bin/bash
# Fine-tune with Open MPI's mpirun, which starts the ranks and tells them their numbers. They meet
# at the first host. All arguments are options of launch/train.py:
#
#   HOSTS=gpu01:8,gpu02:8 launch/cluster/mpirun.sh --config launch/recipes/lora_zero2.yaml \
#       --model.path /models/Qwen-7B-Chat --data.train train.jsonl --output_dir runs/NAME
#
# mpirun logs in to every machine with ssh, without a password. Variables of this shell that change
# how the ranks run are passed on (see the list below). Each rank finds the network interface that
# leads to the first host; your own NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME win.
set -euo pipefail

# Each rank's share of the cores: an offloaded optimizer computes on them.
slots="${HOSTS%%,*}:1" slots="${slots#*:}" slots="${slots%%:*}" cores="$(nproc)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > slots ? cores / slots : 1))}"
export MASTER_ADDR="${MASTER_ADDR:-${HOSTS%%[:,]*}}"
export MASTER_PORT="${MASTER_PORT:-$((20000 + RANDOM % 12000))}" # Linux hands none of these out

passed=()
for name in $(compgen -e); do
    case $name in
        PATH | PYTHON* | VIRTUAL_ENV | CONDA_* | LD_LIBRARY_PATH | LD_PRELOAD | LANG | LC_* | TZ) ;;
        MASTER_* | NCCL_* | GLOO_* | UCX_* | FI_* | OMP_* | MKL_* | KMP_* | MALLOC_*) ;;
        CUDA_* | NVIDIA_* | TORCH* | PYTORCH_* | TRITON_* | DS_* | XDG_CACHE_HOME) ;;
        HF_* | TRANSFORMERS_* | TOKENIZERS_* | WANDB_* | SWANLAB_* | MLFLOW_* | TRACKIO_*) ;;
        *_proxy | *_PROXY | SSL_CERT_* | REQUESTS_CA_BUNDLE) ;;
        *) continue ;;
    esac
    passed+=(-x "$name")
done

exec mpirun --host "$HOSTS" --map-by slot --bind-to none "${passed[@]}" \
    python launch/train.py --data.cache_dir "/tmp/qwen_ds_$UID" "$@"
