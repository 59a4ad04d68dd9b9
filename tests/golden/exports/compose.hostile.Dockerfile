# Made by leanplan export.
# it's "a" $HOME `model` \ 100% {{x}} #é as leanplan fitted it: plan 8ce9489bef
# transformers: unchanged
# Build it where the plan was measured or on the same kind of processor; a GPU needs a base image with its libraries.
# LEANPLAN is what to install leanplan from: a released version, a wheel's address or git+https://...;
# the engine's libraries are installed in the versions the artefact was made with.
FROM python:3.11-slim
ARG LEANPLAN='leanplan[serve]'
RUN pip install --no-cache-dir "$LEANPLAN" torch==2.13.0 transformers==5.23.0
ENV LEANPLAN_STORE=/tmp/leanplan
ENTRYPOINT ["leanplan"]
