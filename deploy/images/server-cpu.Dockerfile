# The server on a CPU, with the arith example. Build from the repository root:
#   docker build -f deploy/images/server-cpu.Dockerfile -t ibtpo-server-cpu:0.1.0 .
ARG PYTHON_IMAGE=python:3.11-slim
FROM ${PYTHON_IMAGE}

# Where torch's CPU build is; PyPI's build brings gigabytes of CUDA packages.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
# torch first: nothing after it may pull another build. sglang and torchvision go in without what
# they ask for, for the same reason; `cpu` lists the modules that sglang imports.
RUN python -m pip install --no-cache-dir --index-url "${TORCH_INDEX_URL}" torch==2.13.0 \
    && python -m pip install --no-cache-dir --no-deps sglang==0.5.21 torchvision==0.26.0

WORKDIR /opt/ibtpo/src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY ibtpo_torchvision.py ./
COPY ibtpo_settings ibtpo_settings
COPY ibtree ibtree
COPY server_ext server_ext
COPY learner learner
RUN python -m pip install --no-cache-dir -c constraints.txt ".[cpu]"
COPY examples/arith /opt/ibtpo/examples/arith

# A named user: libraries look up the name of whoever runs them.
RUN groupadd --gid 10001 ibtpo \
    && useradd --uid 10001 --gid 10001 --create-home --home-dir /home/ibtpo ibtpo \
    && install -d -o 10001 -g 10001 /data
ENV HOME=/home/ibtpo \
    HF_HUB_OFFLINE=1
USER 10001:10001
WORKDIR /data
# The journal and the weight store (--data-dir /data).
VOLUME ["/data"]
EXPOSE 7300 7301 7302
ENTRYPOINT ["ibtpo-server"]
