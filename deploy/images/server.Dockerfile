# The server on a GPU. Build from the repository root:
#   docker build -f deploy/images/server.Dockerfile -t ibtpo-server:0.1.0 .
# The tag must be the SGLang version that the project is written against.
ARG SGLANG_IMAGE=lmsysorg/sglang:v0.5.21
FROM ${SGLANG_IMAGE}

WORKDIR /opt/ibtpo/src
COPY pyproject.toml README.md LICENSE ./
COPY ibtpo_torchvision.py ./
COPY ibtpo_settings ibtpo_settings
COPY ibtree ibtree
COPY server_ext server_ext
COPY learner learner
# sglang and its CUDA packages are in the image already. Its Python may be the distribution's own,
# which pip leaves alone unless told otherwise.
RUN PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --no-cache-dir ".[server]"

# A named user: libraries look up the name of whoever runs them.
RUN groupadd --gid 10001 ibtpo \
    && useradd --uid 10001 --gid 10001 --create-home --home-dir /home/ibtpo ibtpo \
    && install -d -o 10001 -g 10001 /data
# Compiled kernels go below HOME; without it they would go to root's home.
ENV HOME=/home/ibtpo \
    HF_HUB_OFFLINE=1
USER 10001:10001
WORKDIR /data
# The journal and the weight store (--data-dir /data).
VOLUME ["/data"]
EXPOSE 7300 7301 7302
ENTRYPOINT ["ibtpo-server"]
