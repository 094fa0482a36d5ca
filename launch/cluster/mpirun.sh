#!/bin/bash
# Fine-tune with Open MPI's mpirun: it starts the ranks, and mpi4py tells them their numbers and
# where they meet. All arguments are options of launch/train.py:
#
#   HOSTS=gpu01:8,gpu02:8 launch/cluster/mpirun.sh --config launch/recipes/lora_zero2.yaml \
#       --model.path /models/Qwen-7B-Chat --data.train train.jsonl --output_dir runs/NAME
#
# mpirun logs in to every machine with ssh, without a password.
set -euo pipefail
exec mpirun --host "$HOSTS" --map-by slot --bind-to none \
    -x PATH -x PYTHONPATH -x OMP_NUM_THREADS=1 \
    python launch/train.py --data.cache_dir "/tmp/qwen_ds_$UID" "$@"
