# For machines with NVIDIA GPUs. The base is plain Python, not a CUDA image: torch's wheels bring
# the CUDA libraries that they were built for, and a second copy could only disagree with them. The
# driver comes from the host.
#
#   docker build -t qwen-ds .
#   docker run --rm --gpus all --ipc host -v /models:/models -v "$PWD/runs:/qwen-ds/runs" qwen-ds \
#       deepspeed --num_gpus 8 launch/train.py --config launch/recipes/lora_zero2.yaml \
#       --model.path /models/Qwen-7B-Chat --data.train /models/train.json --output_dir runs/adgen
FROM python:3.11-slim

# A compiler: torch.compile on GPUs, and DeepSpeed's CPU Adam at the first use of offloading.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 qwen
WORKDIR /qwen-ds
COPY --chown=qwen . .
# DeepSpeed compiles nothing during its installation. The project is installed editable, because
# launch/ is not a package and uses qwen_ds from here.
RUN DS_BUILD_OPS=0 pip install --no-cache-dir -c constraints.txt -e '.[serve,demo,gpu]' && \
    mkdir -p runs && chown qwen . runs

USER qwen
CMD ["python", "launch/train.py", "--help"]
