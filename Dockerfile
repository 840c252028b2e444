# An image with the kit: docker build -t diffusion-kit .
# The torch that pip finds has CUDA. For a smaller image without it: --build-arg TORCH_INDEX= and torch's own index for CPUs,
# which its installation page names.
FROM python:3.11-slim-bookworm

ARG TORCH_INDEX=""
ARG EXTRAS=data
# For DeepSpeed: --build-arg EXTRAS=data,deepspeed --build-arg PACKAGES="g++ ninja-build libaio-dev"
ARG PACKAGES=""

RUN apt-get update \
    && apt-get install -y --no-install-recommends libtcmalloc-minimal4 libgl1 libglib2.0-0 $PACKAGES \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/diffusion_kit
RUN pip install --no-cache-dir torch torchvision ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY diffusion_kit diffusion_kit
RUN DS_BUILD_OPS=0 pip install --no-cache-dir ".[$EXTRAS]"

# On Kubernetes the claim belongs to this user's group: launch.kubernetes.group is 1000.
RUN useradd --create-home --uid 1000 kit && install -d -o kit -g kit /workspace /cache
ENV HF_HOME=/cache/huggingface \
    DIFFUSION_KIT_CACHE=/cache/diffusion_kit \
    TORCH_EXTENSIONS_DIR=/cache/torch_extensions \
    PYTHONUNBUFFERED=1
USER kit
WORKDIR /workspace

# launch.kubernetes.preload: [/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4]
CMD ["diffusion-kit", "doctor"]
