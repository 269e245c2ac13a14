# The learner, with the arith example. Build from the repository root:
#   docker build -f deploy/images/learner.Dockerfile -t ibtpo-learner:0.1.0 .
# and for the CPU, a fifth of the size:
#   docker build -f deploy/images/learner.Dockerfile -t ibtpo-learner-cpu:0.1.0 \
#     --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu .
ARG PYTHON_IMAGE=python:3.11-slim
FROM ${PYTHON_IMAGE}

# PyPI's torch brings its CUDA libraries along: the node needs the driver only.
ARG TORCH_INDEX_URL=https://pypi.org/simple
RUN python -m pip install --no-cache-dir --index-url "${TORCH_INDEX_URL}" torch==2.13.0

WORKDIR /opt/ibtpo/src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY ibtpo_torchvision.py ./
COPY ibtpo_settings ibtpo_settings
COPY ibtree ibtree
COPY server_ext server_ext
COPY learner learner
RUN python -m pip install --no-cache-dir -c constraints.txt ".[learner]"
COPY examples/arith /opt/ibtpo/examples/arith

# A named user: libraries look up the name of whoever runs them.
RUN groupadd --gid 10001 ibtpo \
    && useradd --uid 10001 --gid 10001 --create-home --home-dir /home/ibtpo ibtpo \
    && install -d -o 10001 -g 10001 /data
ENV HOME=/home/ibtpo \
    HF_HUB_OFFLINE=1
USER 10001:10001
WORKDIR /data
# Checkpoints and metrics (--out-dir below /data).
VOLUME ["/data"]
ENTRYPOINT ["ibtpo-learner"]
